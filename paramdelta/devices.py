"""Which device computes a merge: the processor, or a GPU that slots are sent to and come back from.

A GPU computes faster than a processor, but every byte crosses the link to it, and it is the same host memory and the
same storage that the bytes come from and go to. So ``auto`` measures, for a fraction of a second, and takes the device
whose estimate is the lesser:

    processor   R / read + R / merge                                  files in memory: a worker reads, then merges
                max(R / read, R / merge)                              storage is waited for: others merge meanwhile
    GPU         max(R / read, R / up, W / down, R / merge) + set-up   copies, kernels and reads overlap

with R bytes of operands, W bytes of output; writing is the same for both. The bytes of the output are the same, too.
"""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paramdelta import backends, engine, ops
from paramdelta.dtypes import DTYPES, MERGE_DTYPES
from paramdelta.errors import BackendError

if TYPE_CHECKING:
    from paramdelta.plan.work import Work

# Less than this is read in a fraction of the time that a GPU takes to be ready.
_SMALL_BYTES = 1 << 30
_SAMPLE_BYTES = 64 << 20
_SAMPLE_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes per second: ``read`` of the inputs, the way they will be read, ``waits`` whether it is storage that bounds
    it; ``merge`` of operands. ``up`` and ``down``: of the link to a GPU, both ways at once."""

    read: float
    waits: bool
    merge: float
    up: float = 0.0
    down: float = 0.0
    device_merge: float = 0.0
    setup_seconds: float = 0.0


class Estimate(NamedTuple):
    """Seconds for reading and merging, and what bounds them."""

    seconds: float
    bound: str


def on_processor(rates: Rates, operands: int) -> Estimate:
    """Return what the processor takes for ``operands`` bytes."""
    read, merge = operands / rates.read, operands / rates.merge
    if rates.waits:
        return Estimate(max(read, merge), "storage" if read >= merge else "merging")
    return Estimate(read + merge, "memory" if read >= merge else "merging")


def on_device(rates: Rates, operands: int, out: int) -> Estimate:
    """Return what a GPU takes for ``operands`` bytes that become ``out``."""
    bounds = {
        "storage" if rates.waits else "memory": operands / rates.read,
        "the link to it": operands / rates.up,
        "the link back": out / rates.down,
        "merging": operands / rates.device_merge,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return Estimate(bounds[bound] + rates.setup_seconds, bound)


class Choice(NamedTuple):
    """A device and the reason, in words for the report."""

    device: str
    why: str


def decide(rates: Rates, operands: int, out: int, gpu: str) -> Choice:
    """Return the device with the lesser estimate; the processor where they are within a tenth of each other."""
    cpu, device = on_processor(rates, operands), on_device(rates, operands, out)
    takes_gpu = device.seconds < 0.9 * cpu.seconds
    words = (
        f"estimated {cpu.seconds:.2f} s on the processor (bound by {cpu.bound}), {device.seconds:.2f} s on {gpu} "
        f"(bound by {device.bound})"
    )
    return Choice(gpu if takes_gpu else "cpu", words)


def resolved(options: engine.EngineOptions | None, work: Work) -> engine.EngineOptions:
    """Return the options with the device that they ask for, or that is the better one for ``work``, and its stage.

    Raises BackendError where the device cannot be used.
    """
    options = options or engine.EngineOptions()
    if options.stage is not None or options.device == "cpu":
        return options
    if options.device != "auto":
        return _with_stage(options, options.device)
    choice = _measured(options, work)
    options = replace(options, device=choice.device, device_why=choice.why)
    return options if choice.device == "cpu" else _with_stage(options, choice.device)


def on(device: str, options: engine.EngineOptions) -> engine.EngineOptions:
    """Return the options for work on a device, with a stage that may serve many runs, one after the other. Raises
    BackendError."""
    return replace(options, device=device) if device == "cpu" else _with_stage(options, device)


def most_deltas() -> int:
    """Return how many deltas a GPU's kernels add up, in plain and in quantised merges."""
    return int(_cuda().most_deltas())


def _cuda() -> ModuleType:
    return importlib.import_module("paramdelta.backends.cuda")


def _with_stage(options: engine.EngineOptions, device: str) -> engine.EngineOptions:
    reason = backends.why_not("cuda")
    if reason is not None:
        raise BackendError(f"--device {device}: {reason}; --device cpu gives the same bytes")
    number = int(device.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    return replace(options, device=f"cuda:{number}", stage=_cuda().stage(number))


def _measured(options: engine.EngineOptions, work: Work) -> Choice:
    operands = work.bytes_read()
    if operands < _SMALL_BYTES:
        return Choice("cpu", f"a merge that reads {operands / 1e9:.2f} GB is done before a GPU is ready")
    reason = backends.why_not("cuda")
    if reason is not None:
        return Choice("cpu", f"no GPU can be used: {reason}")
    return decide(measure(options, work), operands, sum(size for _, size in work.outputs), "cuda:0")


def measure(options: engine.EngineOptions, work: Work) -> Rates:
    """Measure this machine on the inputs of ``work``: reading, merging, the link to the first GPU and back."""
    paths = engine.paths_for(work, [size for _, size in work.outputs], options)
    started = time.perf_counter()
    gpu = _cuda().rates(0)
    setup_seconds = time.perf_counter() - started
    return Rates(
        read=read_rate(options, work),
        waits=bool(paths.wait),
        merge=merge_rate(options, work),
        up=gpu.up,
        down=gpu.down,
        device_merge=gpu.merge,
        setup_seconds=setup_seconds,
    )


def read_rate(options: engine.EngineOptions, work: Work) -> float:
    """Read a part of the largest input, the way a merge would, into nothing; return bytes per second.

    The part is from the middle of the file: its beginning is what planning has read already.
    """
    size, largest = max((file.stat().st_size, i) for i, file in enumerate(work.inputs) if isinstance(file, Path))
    count = min(size, _SAMPLE_BYTES)
    reading = work.reading(largest, (size - count) // 2, count)
    result = engine.carry_out(reading, [count], tensors=1, options=replace(options, stage=None))
    return result.bytes_read / max(result.seconds, 1e-9)


def merge_rate(options: engine.EngineOptions, work: Work) -> float:
    """Merge some million elements of the type that most of the output has; return bytes of operands per second."""
    counts = np.bincount(work.spans["out_dtype"], work.spans["count"], minlength=len(DTYPES))[: len(MERGE_DTYPES)]
    dtype = MERGE_DTYPES[int(np.argmax(counts))]
    rng = np.random.default_rng(0)
    operands = [rng.normal(0, 0.02, _SAMPLE_ELEMENTS).astype(dtype.to_numpy()) for _ in range(3)]
    out = np.empty_like(operands[0])
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        ops.merge(*operands, out=out, threads=options.threads)
        best = min(best, time.perf_counter() - started)
    return 3 * out.nbytes / best
