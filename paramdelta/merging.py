"""The high-level merge: three folders in, the fourth out. Opens, plans, checks, runs the engine, publishes."""

from __future__ import annotations

import dataclasses
import errno
import gc
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta import checksums as sums
from paramdelta import devices, engine, resuming
from paramdelta.errors import Complaint, InputError, NonFiniteError, PrecisionError, StorageError, shown
from paramdelta.publish import Staging, write_files
from paramdelta.report import MergeReport, NonFinite, Quantised

if TYPE_CHECKING:
    from paramdelta.plan import MergeRequest, Plan
    from paramdelta.plan.deltas import Folders

# A merge that fills the last byte of a file system leaves no room for its own metadata.
_SPARE_BYTES = 16 << 20
_MOST_LISTED = 20
_PUT_BACK = "{}: a merge was cut short while it replaced this folder, which is there again as it was"


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
        ``copy_from``, ``rename_post``, ``rename_base``, ``rename_new_base``, ``vocab``, ``dtype``, ``format``,
        ``block_size``, ``scale_type``, ``no_quantise``, ``scale_policy``, ``activation_scales``, ``max_shard_size``,
        ``allow_unscaled``, ``allow_nonfinite``, ``max_quant_error``, ``overwrite``

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
    from paramdelta.plan.order import data_warnings

    collecting = gc.isenabled()
    gc.disable()
    try:
        plan = make_plan(request, *open_all(request))
    finally:
        if collecting:
            gc.enable()
    return dataclasses.replace(plan, warnings=(*plan.warnings, *data_warnings(plan)))


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
    options, choice = devices.resolved(options, plan.work)
    with Staging(request.out) as staging:
        if staging.put_back and not request.overwrite:
            raise StorageError(_PUT_BACK.format(request.out), remedy="--overwrite replaces it, or name another --out")
        check_space(plan, staging.folder)
        with plan.watched_inputs():
            result, resumed = resuming.carry_out(
                plan, staging, options=options, restart=restart, on_progress=on_progress
            )
        return conclude(plan, staging, result, resumed=resumed, started=started, choice=choice)


def conclude(
    plan: Plan,
    staging: Staging,
    result: engine.RunResult,
    *,
    resumed: int,
    started: float,
    choice: devices.Choice = devices.PROCESSOR,
) -> MergeReport:
    """Write the small files of a folder whose weights are done, and publish it where the result allows it."""
    request = plan.request
    assert request.out is not None
    with plan.watched_inputs():
        _write_side_files(plan, staging.folder, result)
    nonfinite, quantised = _nonfinite(plan, result), losses(plan, result)
    lossy = _too_lossy(quantised, request.max_quant_error)
    publishable = (not nonfinite or request.allow_nonfinite) and not lossy
    if publishable:
        staging.publish(overwrite=request.overwrite)
    report = MergeReport(
        out=request.out if publishable else None,
        parameters=plan.parameters,
        tensors=len(plan.names),
        files=len(plan.work.outputs),
        bytes_read=result.bytes_read,
        bytes_written=result.bytes_written,
        seconds=time.perf_counter() - started,
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
        device=choice.device,
        device_why=choice.why,
    )
    if nonfinite and not request.allow_nonfinite:
        raise NonFiniteError(_nonfinite_text(nonfinite), report)
    if lossy:
        raise PrecisionError(lossy, report)
    return report


def _write_side_files(plan: Plan, folder: Path, result: engine.RunResult) -> None:
    """Write what the folder holds besides weights, the record last: it has the checksums of all else."""
    from paramdelta.plan.sidefiles import RECORD, with_checksums

    files = dict(plan.written_files())
    record = files.pop(RECORD)
    assert isinstance(record, bytes)
    write_files(folder, files.items())
    if plan.has_checksums:
        found = result.checksums
        if found is None:  # a part was written by a run that was not to keep them
            found = sums.read([folder / name for name, _ in plan.work.outputs], plan.work.extents)
        record = with_checksums(record, sums.document(plan, folder, files, found))
    write_files(folder, [(RECORD, record)])


def check_space(plan: Plan, folder: Path) -> None:
    """Raise StorageError where the output does not fit, counting what an earlier run has written to ``folder``."""
    there = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    needed = sum(size for _, size in plan.work.outputs) + _SPARE_BYTES - there
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


def _too_lossy(quantised: tuple[Quantised, ...], limit: float | None) -> str:
    """Return what is wrong where a tensor lost more than ``limit``, an empty string where none did."""
    rows = [(name, error) for q in quantised for name, error in q.worst if limit is not None and error > limit]
    if not rows:
        return ""
    lines = [f"  {shown(name)}: {error:.3%}" for name, error in rows]
    return "\n".join(
        [
            f"requantising lost more than {limit:.3%} of a tensor's norm; nothing was published. The worst:",
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


def _nonfinite_text(rows: tuple[NonFinite, ...]) -> str:
    lines = [
        f"  {shown(r.tensor)} ({r.dtype}, {r.elements:,} elements): "
        + ", ".join(f"{n:,} {what}" for n, what in ((r.nan, "NaN"), (r.inf, "Inf"), (r.overflow, "overflow")) if n)
        for r in rows
    ]
    return "\n".join(
        [
            f"{len(rows)} tensor{'s have' if len(rows) != 1 else ' has'} results that are not finite; "
            "nothing was published:",
            *lines,
            "    → look at these tensors in the inputs; --allow-nonfinite publishes the folder as it is",
        ]
    )
