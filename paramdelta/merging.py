"""The high-level merge: three folders in, the fourth out. Opens, plans, checks, runs the engine, publishes."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta import checksums as sums
from paramdelta import devices, engine, resuming
from paramdelta.errors import (
    Complaint,
    InputError,
    NonFiniteError,
    NotPublishedError,
    PrecisionError,
    StorageError,
    shown,
)
from paramdelta.publish import Staging, write_files
from paramdelta.report import MergeReport, NonFinite, Quantised

if TYPE_CHECKING:
    from paramdelta.plan import MergeRequest, Plan
    from paramdelta.plan.deltas import Folders

# A merge that fills the last byte of a file system leaves no room for its own metadata.
_SPARE_BYTES = 16 << 20
_MOST_LISTED = 20
PUT_BACK = "{}: a merge was cut short while it replaced this folder, which is there again as it was"


def merge(
    *,
    post: Folders,
    base: Folders,
    new_base: str | Path,
    out: str | Path,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "auto",
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **policies: Any,
) -> MergeReport:
    """Write ``new_base + Σ alpha_k · (post_k − base_k)`` as a checkpoint folder.

    Every tensor is computed as in :mod:`paramdelta.reference`: differences, products and sums in binary64, one
    rounding to the output type. The folder appears whole or not at all.

    Parameters
    ----------
    post, base, new_base : folders of safetensors checkpoints (one file, or shards with an index). Of several deltas
        ``post`` and ``base`` are lists of the same length; they are added in this order, and all but the weights
        (tokenizer, config, chat template) is as with the first alone
    out : the folder to write; must not exist unless ``overwrite``
    threads, memory, isa, io, device : see :class:`paramdelta.engine.EngineOptions`; no effect on the result
    restart : discard what an earlier run, cut short, has left of a merge to ``out``; by default the same merge is
        continued, and another refused
    checksums : record the CRC-32 of every tensor in ``paramdelta.json``, by which :func:`paramdelta.verify` checks the
        folder without its sources
    on_progress : called with (bytes read, bytes written) about ten times a second
    **policies : the fields of :class:`paramdelta.plan.MergeRequest`: ``alpha``, ``include``, ``exclude``,
        ``copy_from``, ``rename_post``, ``rename_base``, ``rename_new_base``, ``vocab``, ``tokenizer``, ``dtype``,
        ``format``, ``block_size``, ``scale_type``, ``no_quantise``, ``scale_policy``, ``activation_scales``,
        ``max_shard_size``, ``allow_unscaled``, ``allow_nonfinite``, ``max_quant_error``, ``overwrite``

    Returns
    -------
    MergeReport

    Raises
    ------
    InputError
        The inputs or the request do not fit together. Carries every complaint; nothing was written.
    NonFiniteError
        Results are NaN, infinite or overflowed and ``allow_nonfinite`` was not given. Nothing was published;
        ``report`` lists the tensors.
    PrecisionError
        Requantising lost more of a tensor than ``max_quant_error``, as ‖q − merged‖ / ‖merged‖. Nothing was published.
    StorageError
        Reading or writing failed. Nothing was published.

    Notes
    -----
    The sum is ParamΔ (arXiv 2504.21023) and fine-tuning transfer (arXiv 2503.20110).
    """
    from paramdelta.plan import make_request

    request = make_request(post=post, base=base, new_base=new_base, out=out, **policies)
    options = engine.EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device)
    return run_merge(prepare(request), options=options, restart=restart, checksums=checksums, on_progress=on_progress)


def prepare(request: MergeRequest) -> Plan:
    """Open the three folders, plan the merge, and look at a sample of the data; raise InputError with every complaint.

    The garbage collector rests meanwhile: headers are millions of small objects without cycles, and looking through
    them again and again took a quarter of the time for 100,000 tensors.
    """
    from paramdelta.plan import make_plan, open_all

    with without_collector():
        plan = make_plan(request, *open_all(request))
    return with_data_warnings(plan)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Let the garbage collector rest, where it worked."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def with_data_warnings(plan: Plan) -> Plan:
    """Return a plan with the warnings that a look at a sample of the data gives rise to."""
    from paramdelta.plan.order import data_warnings

    return replace(plan, warnings=(*plan.warnings, *data_warnings(plan)))


def run_merge(
    plan: Plan,
    *,
    options: engine.EngineOptions | None = None,
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Carry out a plan and publish its folder, continuing what an earlier run left unless ``restart``. Raises what
    :func:`merge` raises while running, and InputError where the unfinished merge was another."""
    started = time.perf_counter()
    request = plan.request
    if request.out is None:
        raise InputError(Complaint("out", "a merge needs a folder to write to", "--out DIR"))
    if not checksums:
        plan = plan.without_checksums()
    options = devices.resolved(options, plan.work)
    with Staging(request.out) as staging:
        if staging.put_back and not request.overwrite:
            raise StorageError(PUT_BACK.format(request.out), remedy="--overwrite replaces it, or name another --out")
        check_space(plan, staging.folder)
        with plan.watched_inputs():
            result, resumed = resuming.carry_out(
                plan, staging, options=options, restart=restart, on_progress=on_progress
            )
        return conclude(plan, staging, result, resumed=resumed, started=started)


def conclude(plan: Plan, staging: Staging, result: engine.RunResult, *, resumed: int, started: float) -> MergeReport:
    """Write the small files of a folder whose weights are done, and publish it where the result allows it."""
    with plan.watched_inputs():
        check_sums(plan, staging.folder, result)
        write_side_files(plan, staging.folder, result)
    report, error = judged(plan, result, resumed=resumed)
    if error is None:
        staging.publish(overwrite=plan.request.overwrite)
    report = replace(report, seconds=time.perf_counter() - started)
    if error is not None:
        error.report = report
        raise error
    return report


def judged(
    plan: Plan,
    result: engine.RunResult,
    *,
    resumed: int,
    outcome: str = "nothing was published",
    remedy: str = "--allow-nonfinite publishes the folder as it is",
) -> tuple[MergeReport, NotPublishedError | None]:
    """Return the report of a merge whose weights are done, and the error that keeps it from being published, if any;
    ``outcome`` says so in words, and ``remedy`` what lets results pass that are not finite."""
    request = plan.request
    nonfinite, quantised = _nonfinite(plan, result), losses(plan, result)
    lossy = _too_lossy(quantised, request.max_quant_error, outcome)
    error: NotPublishedError | None = None
    if nonfinite and not request.allow_nonfinite:
        error = NonFiniteError(_nonfinite_text(nonfinite, outcome, remedy))
    elif lossy:
        error = PrecisionError(lossy)
    report = MergeReport(
        out=request.out if error is None else None,
        parameters=plan.parameters,
        tensors=len(plan.names),
        files=len(plan.work.outputs),
        bytes_read=result.bytes_read,
        bytes_written=result.bytes_written,
        seconds=result.seconds,
        engine_seconds=result.seconds,
        threads=result.threads,
        slot_bytes=result.slot_bytes,
        isa=result.isa,
        policies=plan.policies,
        warnings=plan.warnings,
        nonfinite=nonfinite,
        quantised=quantised,
        resumed_bytes=resumed,
        io=result.paths.summary() if result.paths is not None else {},
        device=result.device,
        device_why=result.device_why,
    )
    return report, error


def check_sums(plan: Plan, folder: Path, result: engine.RunResult) -> None:
    """Raise StorageError where a tensor has not come out as it is known to be."""
    if not plan.sums:
        return
    found = result.checksums
    if found is None:
        found = sums.read([folder / name for name, _ in plan.work.outputs], plan.work.extents)
    made = zip(plan.names, sums.spelled(found, plan.layout.nbytes.tolist()), strict=True)
    wrong = [name for name, crc32 in made if plan.sums.get(name, crc32) != crc32]
    if wrong:
        more = f" and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        raise StorageError(
            f"{shown(wrong[0])}{more}: base and delta do not give back what the delta was taken from",
            remedy="new_base is another one, or either folder is damaged: paramdelta verify checks the delta",
        )


def write_side_files(plan: Plan, folder: Path, result: engine.RunResult) -> None:
    """Write what the folder holds besides weights, the record last: it has the checksums of all else."""
    from paramdelta.plan.sidefiles import RECORD, with_checksums, with_losses

    files = dict(plan.written_files())
    record = files.pop(RECORD)
    assert isinstance(record, bytes)
    write_files(folder, files.items())
    if plan.request.kind == "extract":
        record = with_losses(record, [asdict(of_format) for of_format in _rounded(losses(plan, result))])
    if plan.has_checksums:
        found = result.checksums
        if found is None:  # a part was written by a run that was not to keep them
            found = sums.read([folder / name for name, _ in plan.work.outputs], plan.work.extents)
        record = with_checksums(record, sums.document(plan, folder, files, found))
    write_files(folder, [(RECORD, record)])


def _rounded(lost: tuple[Quantised, ...]) -> Iterator[Quantised]:
    """Yield losses to three digits: sums of many workers are not the same to the last."""
    for q in lost:
        worst = tuple((name, float(f"{error:.3g}")) for name, error in q.worst)
        yield replace(q, relative_error=float(f"{q.relative_error:.3g}"), worst=worst)


def check_space(plan: Plan, folder: Path) -> None:
    """Raise StorageError where the output does not fit, counting what an earlier run has written to ``folder``."""
    check_room(sum(size for _, size in plan.work.outputs), folder)


def check_room(needed: int, folder: Path) -> None:
    """Raise StorageError where as many bytes do not fit, counting what is in ``folder``, or in folders in it."""
    there = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    needed += _SPARE_BYTES - there
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{folder.absolute().parent.parent}: the output needs {needed:,} bytes, but only {free:,} are free"
        raise StorageError(errno.ENOSPC, text)


def losses(plan: Plan, result: engine.RunResult) -> tuple[Quantised, ...]:
    """Return what quantising lost, by format. A tensor of zeros that stayed zeros lost nothing."""
    found: dict[str, list[engine.TensorLoss]] = {}
    for loss in result.losses:
        format_ = plan.format_of(loss.tensor)
        if format_ is not None:
            found.setdefault(format_.name, []).append(loss)
    made = []
    for name, rows in found.items():
        errors = sorted(((_relative(r.error_squared, r.value_squared), r.tensor) for r in rows), reverse=True)
        total = _relative(sum(r.error_squared for r in rows), sum(r.value_squared for r in rows))
        worst = tuple((plan.names[tensor], error) for error, tensor in errors[:_MOST_LISTED])
        made.append(Quantised(format=name, tensors=len(rows), relative_error=total, worst=worst))
    return tuple(made)


def _relative(error_squared: float, value_squared: float) -> float:
    if error_squared == 0.0:
        return 0.0
    return math.sqrt(error_squared / value_squared) if value_squared > 0.0 else math.inf


def _too_lossy(quantised: tuple[Quantised, ...], limit: float | None, outcome: str) -> str:
    """Return what is wrong where a tensor lost more than ``limit``, an empty string where none did."""
    rows = [(name, error) for q in quantised for name, error in q.worst if limit is not None and error > limit]
    if not rows:
        return ""
    lines = [f"  {shown(name)}: {error:.3%}" for name, error in rows]
    return "\n".join(
        [
            f"requantising lost more than {limit:.3%} of a tensor's norm; {outcome}. The worst:",
            *lines,
            "    → --format bf16 loses less; a larger --max-quant-error publishes the folder as it is",
        ]
    )


def _nonfinite(plan: Plan, result: engine.RunResult) -> tuple[NonFinite, ...]:
    return tuple(
        NonFinite(
            tensor=plan.names[c.tensor],
            dtype=plan.dtype_of(c.tensor).name,
            elements=plan.elements_of(c.tensor),
            nan=c.nan,
            inf=c.inf,
            overflow=c.overflow,
        )
        for c in result.counts
    )


def _nonfinite_text(rows: tuple[NonFinite, ...], outcome: str, remedy: str) -> str:
    lines = [
        f"  {shown(r.tensor)} ({r.dtype}, {r.elements:,} elements): "
        + ", ".join(f"{n:,} {what}" for n, what in ((r.nan, "NaN"), (r.inf, "Inf"), (r.overflow, "overflow")) if n)
        for r in rows
    ]
    return "\n".join(
        [
            f"{len(rows)} tensor{'s have' if len(rows) != 1 else ' has'} results that are not finite; {outcome}:",
            *lines,
            f"    → look at these tensors in the inputs; {remedy}",
        ]
    )
