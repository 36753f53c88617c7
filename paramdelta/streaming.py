"""Merged tensors without an output folder: the same plan and engine as a merge, writing into the tensors' own memory.
While the caller uses one batch of tensors, the engine fills the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paramdelta import devices, engine
from paramdelta.errors import NonFiniteError, OperandError, StorageError, shown
from paramdelta.memory import DeviceMemory
from paramdelta.merging import prepare
from paramdelta.plan.work import Work
from paramdelta.stages import Kernel, KernelStage

if TYPE_CHECKING:
    from paramdelta.plan import Plan
    from paramdelta.plan.deltas import Folders

BATCH_BYTES = 128 << 20
Column = np.ndarray[Any, Any]


def stream(
    post: Folders,
    base: Folders,
    new_base: str | Path,
    *,
    framework: Literal["np", "pt"] = "np",
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "cpu",
    batch_bytes: int = BATCH_BYTES,
    kernel: Kernel | None = None,
    **policies: Any,
) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, new_base + alpha · (post − base))`` for every tensor, in the order of the output's files.

    The values are those :func:`paramdelta.merge` would write. Each tensor owns its memory and may be kept or dropped;
    at most two batches of ``batch_bytes`` (or one tensor larger than that) are held besides.

    Parameters
    ----------
    post, base, new_base : checkpoint folders; lists of post and base for several deltas
    framework : ``"np"`` for NumPy arrays (bf16 and fp8 as ml_dtypes types), ``"pt"`` for torch tensors
    device : ``"cpu"``, or ``"cuda"``, ``"cuda:1"`` …: tensors of that GPU, merged there (``framework="pt"``)
    threads, memory, isa, io : see :class:`paramdelta.engine.EngineOptions`
    kernel : other arithmetic than a merge's, called for every piece of a tensor whose parts lie in a slot
        (:mod:`paramdelta.stages`); copies, and quantised weights, come as ever
    **policies : as in :func:`paramdelta.merge`, except ``overwrite``

    Raises
    ------
    InputError, StorageError : as :func:`paramdelta.merge`, the first at once, before a tensor is yielded
    NonFiniteError : as soon as a batch has NaN, Inf or overflow, unless ``allow_nonfinite``
    """
    from paramdelta.plan import make_request

    if framework not in ("np", "pt"):
        raise OperandError(f"framework: expected 'np' or 'pt', got {framework!r}")
    if device != "cpu" and (framework != "pt" or not device.startswith("cuda") or kernel is not None):
        raise OperandError(f"device: {device!r} needs framework='pt', and is 'cuda' or 'cuda:N', without a kernel")
    request = make_request(post=post, base=base, new_base=new_base, out=None, **policies)
    stage = None if kernel is None else KernelStage(kernel)
    options = engine.EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device, stage=stage)
    plan = prepare(request)
    options = devices.resolved(options, plan.work)
    return _batches(plan, framework, options, batch_bytes)


def _batches(plan: Plan, framework: str, options: engine.EngineOptions, batch_bytes: int) -> Iterator[tuple[str, Any]]:
    work, _ = engine.settle(plan.work, tensors=len(plan.names), options=options)
    plan.check_inputs()
    ahead: Batch | None = None
    groups = _grouped(plan, batch_bytes)
    try:
        first = next(groups, None)
        ahead = None if first is None else Batch(plan, work, first, framework, options)
        while ahead is not None:
            ready, following = ahead, next(groups, None)
            tensors = ready.finish()
            ahead = None if following is None else Batch(plan, work, following, framework, options)
            yield from tensors
    except (StorageError, ValueError):
        plan.check_inputs()  # a cause that says more than what it led to
        raise
    finally:
        if ahead is not None:
            ahead.abandon()


def _grouped(plan: Plan, batch_bytes: int) -> Iterator[range]:
    """Cut the tensors, in output order, into runs of about ``batch_bytes``."""
    start, size = 0, 0
    for tensor in range(len(plan.names)):
        nbytes = plan.nbytes_of(tensor)
        if tensor > start and size + nbytes > batch_bytes:
            yield range(start, tensor)
            start, size = tensor, 0
        size += nbytes
    if start < len(plan.names):
        yield range(start, len(plan.names))


class Batch:
    """Tensors that the engine is filling; their numbers in the plan ascend. ``work`` is the plan's, settled."""

    def __init__(
        self, plan: Plan, work: Work, tensors: Sequence[int], framework: str, options: engine.EngineOptions
    ) -> None:
        self._plan, self._tensors = plan, tensors
        device = options.device if options.stage is not None else "cpu"
        pairs = [_allocate_numpy(plan, t) if framework == "np" else _allocate_torch(plan, t, device) for t in tensors]
        if device.startswith("cuda"):
            _wait_for_earlier_work(device)
        self._values = [value for value, _ in pairs]
        plan.check_inputs()
        part = into_memory(work, tensors, [memory.nbytes for _, memory in pairs])
        self._run = engine.start(part, [memory for _, memory in pairs], tensors=len(plan.names), options=options)

    def finish(self) -> list[tuple[str, Any]]:
        """Wait for the engine; return names and values. Raises NonFiniteError, StorageError."""
        try:
            while not self._run.wait_for(engine.WAKE_SECONDS):
                pass
        except BaseException:
            self._run.abandon()
            raise
        counts = self._run.finish().counts
        self._plan.check_inputs()  # no tensor is handed out that other files than the planned ones went into
        if counts and not self._plan.request.allow_nonfinite:
            rows = ", ".join(
                f"{shown(self._plan.names[c.tensor])} ({c.nan} NaN, {c.inf} Inf, {c.overflow} overflow)" for c in counts
            )
            raise NonFiniteError(f"results that are not finite: {rows} (allow_nonfinite=True lets them pass)")
        return list(zip((self._plan.names[t] for t in self._tensors), self._values, strict=True))

    def abandon(self) -> None:
        """Stop the engine; the values are lost."""
        self._run.abandon()


def into_memory(work: Work, tensors: Sequence[int], sizes: list[int]) -> Work:
    """Return the part of ``work`` that makes ``tensors``, each an output of its own that starts at byte 0, and only
    the input files it needs. Of a region whose codes or scales belong elsewhere, only the wanted plane is kept."""

    columns = (work.spans["tensor"], work.regions["tensor"], work.scale_tensors, np.asarray(tensors))
    place = np.full(2 + max(int(column.max(initial=-1)) for column in columns), -1)  # the last is for the number −1
    place[list(tensors)] = np.arange(len(tensors))

    def wanted(numbers: Column) -> Column:
        return place[numbers] >= 0

    codes, scales = wanted(work.regions["tensor"]), wanted(work.scale_tensors)
    spans = work.spans[wanted(work.spans["tensor"])].copy()
    regions = work.regions[codes | scales].copy()
    in_codes, in_scales = codes[codes | scales], scales[codes | scales]
    scale_tensors = work.scale_tensors[codes | scales]
    first = np.full(len(tensors), np.iinfo(np.int64).max, np.int64)
    parts = (
        (spans, "out_file", "out_offset", spans["tensor"], np.ones(len(spans), bool)),
        (regions, "out_file", "out_offset", regions["tensor"], in_codes),
        (regions, "scale_out_file", "scale_out_offset", scale_tensors, in_scales),
    )
    for rows, _, offset, numbers, chosen in parts:
        np.minimum.at(first, place[numbers[chosen]], rows[offset][chosen])
    for rows, file, offset, numbers, chosen in parts:
        local = np.where(chosen, place[numbers], 0)
        rows[file] = np.where(chosen, local, -1)
        rows[offset] = np.where(chosen, rows[offset] - first[local], 0)
    terms, views = work.terms.copy(), work.views.copy()
    used = np.zeros(len(work.inputs) + 1, bool)
    term_rows = referred(spans)
    region_terms = work.region_terms[referred(regions)]
    view_rows = np.concatenate([regions["new_view"], region_terms["post_view"], region_terms["base_view"]])
    of_views = [views[column] for column in ("file", "scale_file", "zero_file", "second_file")]
    of_regions = [regions[column] for column in ("given_file", "second_file")]
    for column in (spans["new_file"], terms["post_file"][term_rows], terms["base_file"][term_rows], *of_regions):
        used[column] = True
    for column in of_views:
        used[column[view_rows]] = True
    used[-1] = False  # what refers to no file
    number = np.where(used, np.cumsum(used) - 1, -1)
    for column in (spans["new_file"], terms["post_file"], terms["base_file"], *of_views, *of_regions):
        column[:] = np.where(column >= 0, number[column], -1)
    return replace(
        work,
        inputs=tuple(path for path, keep in zip(work.inputs, used[:-1], strict=True) if keep),
        outputs=tuple(("", size) for size in sizes),
        headers=(),
        extents=work.extents[:0],
        spans=spans,
        terms=terms,
        regions=regions,
        views=views,
        scale_tensors=scale_tensors,
    )


def referred(rows: Column) -> Column:
    """Return the numbers of the terms that spans or regions refer to."""
    pairs = zip(rows["first_term"].tolist(), rows["n_terms"].tolist(), strict=True)
    return np.concatenate([np.arange(0), *(np.arange(first, first + count) for first, count in pairs if count)])


def _allocate_numpy(plan: Plan, tensor: int) -> tuple[Any, np.ndarray[Any, Any]]:
    dtype, shape = plan.dtype_of(tensor), plan.shape_of(tensor)
    if dtype.numpy is None:  # types narrower than a byte: their packed bytes
        raw = np.empty(plan.nbytes_of(tensor), np.uint8)
        return raw, raw
    value = np.empty(shape, dtype.to_numpy())
    return value, value.reshape(-1).view(np.uint8)


def _allocate_torch(plan: Plan, tensor: int, device: str) -> tuple[Any, np.ndarray[Any, Any] | DeviceMemory]:
    import torch

    dtype, shape = plan.dtype_of(tensor), plan.shape_of(tensor)
    torch_dtype = getattr(torch, dtype.torch, None) if dtype.torch else None
    if torch_dtype is None:
        raise OperandError(
            f"{shown(plan.names[tensor])}: this torch has no {dtype.name} tensors; framework='np' yields it"
        )
    value = torch.empty(shape, dtype=torch_dtype, device=device)
    if device != "cpu":
        return value, DeviceMemory(value.data_ptr(), value.nbytes)
    return value, value.reshape(-1).view(torch.uint8).numpy()


def _wait_for_earlier_work(device: str) -> None:
    """torch hands out memory that kernels queued earlier may still be using; other streams must wait for those."""
    import torch

    torch.cuda.current_stream(device).synchronize()
