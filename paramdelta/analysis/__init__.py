"""Understanding deltas: one pass over post, base and perhaps new_base says how large each delta is and where, what it
leaves alone, and how it lies to the drift between the bases and to other deltas."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paramdelta.analysis.comparison import Key
from paramdelta.analysis.findings import Finding, findings_of, in_order
from paramdelta.analysis.loads import Survey
from paramdelta.analysis.measures import DeltaMeasures, Group, Spectrum, Tensor, place_of
from paramdelta.analysis.passing import Pass, TensorSums
from paramdelta.analysis.result import Analysis, Sources
from paramdelta.analysis.spectra import spectra
from paramdelta.analysis.tokens import token_findings
from paramdelta.engine import EngineOptions
from paramdelta.errors import Complaint, InputError
from paramdelta.plan import Plan, make_plan, make_request, open_all
from paramdelta.plan.values import matcher

if TYPE_CHECKING:
    from paramdelta.plan.deltas import Folders

__all__ = [
    "Analysis",
    "DeltaMeasures",
    "Finding",
    "Group",
    "Sources",
    "Spectrum",
    "Tensor",
    "analyze",
    "plan_of",
    "run_analysis",
]

SINGULAR_VALUES = 16


def analyze(
    post: Folders,
    base: Folders,
    new_base: str | Path | None = None,
    *,
    spectrum: str | Sequence[str] = (),
    singular_values: int = SINGULAR_VALUES,
    threads: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
    **pairing: Any,
) -> Analysis:
    """Measure ``post − base``, and against the drift ``new_base − base``, tensor by tensor.

    Values are decoded and rounded to binary32 (exact for every type but f64, and for quantised weights up to half a
    unit in the last of 24 bits); differences are binary32, sums as :func:`paramdelta.ops.norms` defines them, the same
    bits whatever the number of threads and the instruction set. Memory is a few MiB a thread; spectra take besides one
    delta matrix at a time, in binary32.

    Parameters
    ----------
    post, base : checkpoint folders; lists of the same length for several deltas
    new_base : the base that a merge would add the deltas to, None where only the deltas are of interest
    spectrum : globs of names of matrices (``"*"`` for all) whose largest ``singular_values`` are computed
    threads, isa, io : see :class:`paramdelta.engine.EngineOptions`
    on_progress : called with (bytes read, 0) about ten times a second
    **pairing : of :class:`paramdelta.plan.MergeRequest`: ``include``, ``exclude``, ``rename_post``, ``rename_base``,
        ``rename_new_base``, ``stacks``, ``allow_unscaled``. Tensors that cannot be paired are listed, not compared; of
        vocabularies of different size the rows that all have are compared

    Returns
    -------
    Analysis

    Raises
    ------
    InputError, StorageError : as :func:`paramdelta.merge`
    """
    plan = plan_of(post=post, base=base, new_base=new_base, **pairing)
    options = EngineOptions(threads=threads, isa=isa, io=io)
    return run_analysis(
        plan,
        drift=new_base is not None,
        spectrum=spectrum,
        singular_values=singular_values,
        options=options,
        on_progress=on_progress,
    )


def plan_of(*, post: Folders, base: Folders, new_base: str | Path | None, **pairing: Any) -> Plan:
    """Pair the tensors of an analysis, as a merge would whose output is plain. Raises InputError."""
    first = base[0] if isinstance(base, (list, tuple)) and base else base
    stand_in: Any = first if new_base is None else new_base
    options: dict[str, Any] = {"copy_from": "new-base", "vocab": "extend", "format": "f32", **pairing}
    request = make_request(post=post, base=base, new_base=stand_in, out=None, **options)
    plan = make_plan(request, *open_all(request))
    if not plan.work.terms.size and not plan.work.region_terms.size:
        wrong = f"none of its {len(plan.names):,} tensors can be compared with one of post and base"
        remedy = "give checkpoints of one architecture, or --rename-post, --rename-base where their names differ"
        raise InputError(Complaint(str(stand_in), wrong, remedy))
    return plan


def run_analysis(
    plan: Plan,
    *,
    drift: bool,
    spectrum: str | Sequence[str] = (),
    singular_values: int = SINGULAR_VALUES,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Carry out an analysis of what ``plan`` pairs; without ``drift``, its new_base is a stand-in. Raises StorageError,
    and InputError where ``spectrum`` matches no matrix."""
    started = time.perf_counter()
    options = options or EngineOptions()
    globs = (spectrum,) if isinstance(spectrum, str) else tuple(spectrum)
    survey = Survey(plan, drift)
    chosen = _matrices(plan, globs)
    if singular_values < 1:
        raise InputError(Complaint("--singular-values", f"expected at least 1, got {singular_values}"))
    with plan.watched_inputs():
        run = Pass(survey, options)
        sums = run.run(on_progress)
        found: dict[int, list[Spectrum]] = {}
        for tensor, values in spectra(survey, {t: plan.shape_of(t) for t in chosen}, singular_values, options):
            found.setdefault(tensor, []).append(values)
    tensors = tuple(_tensor(survey, t, sums[t], tuple(found.get(t, ()))) for t in sorted(sums))
    analysis = Analysis(
        sources=tuple(Sources(post=str(s.post), base=str(s.base)) for s in plan.request.sources),
        new_base=str(plan.request.new_base) if drift else None,
        tensors=tensors,
        findings=(),
        unpaired=tuple(dict.fromkeys([*plan.pairing.unpaired, *plan.pairing.dropped])),
        warnings=plan.warnings,
        seconds=time.perf_counter() - started,
        bytes_read=run.bytes_read,
        threads=run.threads,
    )
    suggested = [
        *token_findings(plan.checkpoints, survey.deltas, drift=drift),
        *findings_of(analysis.total, analysis.layers, analysis.modules, tensors),
    ]
    return dataclasses.replace(analysis, findings=in_order(suggested))


def _matrices(plan: Plan, globs: tuple[str, ...]) -> list[int]:
    """Return the numbers of the matrices whose names match."""
    if not globs:
        return []
    matches = matcher(globs)
    chosen = [t for t, name in enumerate(plan.names) if len(plan.shape_of(t)) == 2 and matches(name)]
    if not chosen:
        raise InputError(Complaint("--spectrum", f"no matrix matches {', '.join(globs)}", "GLOB='*' is for all"))
    return chosen


def _tensor(survey: Survey, number: int, sums: TensorSums, spectra: tuple[Spectrum, ...]) -> Tensor:
    plan, products = survey.plan, sums.products()
    shape, name = plan.shape_of(number), plan.names[number]
    deltas = tuple(DeltaMeasures.of(sums, k) if k in sums.facts else None for k in range(survey.deltas))
    places = [sums.facts[k].at if k in sums.facts else None for k in range(survey.deltas)]
    return Tensor(
        name=name,
        tensors=1,
        deltas=deltas,
        inner=_inner(products),
        shape=shape,
        dtype=_stored_type(plan, name),
        place=place_of(name),
        where=tuple(None if at is None else tuple(int(i) for i in np.unravel_index(at, shape)) for at in places),
        spectra=spectra,
    )


def _inner(products: dict[Key, float]) -> dict[tuple[int, int], float]:
    return {(i, j): value for (what, i, j), value in products.items() if what == "delta" and i != j}


def _stored_type(plan: Plan, name: str) -> str:
    """Return how new_base stores a tensor: its format where it is quantised, else its dtype."""
    names = plan.names_by_role["new_base"]
    row = names.rows.get(name)
    if row is None:
        return ""
    weight = names.weights.get(row)
    return names.dtype(row).name if weight is None else weight.format.name
