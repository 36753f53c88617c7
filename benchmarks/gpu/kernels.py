"""Bandwidth of the kernels on a device, as a share of a device-to-device copy in the same run, and against PyTorch.

A copy's rate counts what it reads and what it writes, as a merge's does. It is the best median of several kinds and
sizes, those between the rounds of the case included. All contenders of a case take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.device import KERNELS, Clock, Device
from benchmarks.gpu.operands import TORCH_NAMES, Blocks, Plain, Source
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record
from paramdelta import dtypes

GROUP = "gpu-kernels"
COPY = "device-to-device copy"
THREE_WAY = "bf16 three-way"
FOUR_DELTAS = "bf16, 4 deltas"
BLOCKS = "fp8 blocks to fp8 blocks"
EAGER, COMPILED = "torch eager", "torch.compile"
ALPHAS = (0.5, 0.25, -0.125, 0.3)
MOST_COPIED = 1 << 30

Functions = dict[str, Callable[[], Any]]


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield the copies, then every case."""
    copy_rate = 0.0
    for record in copies(device, sizes, clock):
        copy_rate = max(copy_rate, record.metrics["bandwidth"].median)
        yield record
    for name, make, with_torch in (
        (THREE_WAY, lambda: plain(device, sizes, dtypes.BF16, (1.0,)), True),
        (BLOCKS, lambda: blocks(device, sizes), True),
        (FOUR_DELTAS, lambda: plain(device, sizes, dtypes.BF16, ALPHAS), True),
        ("bf16, alpha 0.7", lambda: plain(device, sizes, dtypes.BF16, (0.7,)), False),
        ("f16 three-way", lambda: plain(device, sizes, dtypes.F16, (1.0,)), False),
        ("f32 three-way", lambda: plain(device, sizes, dtypes.F32, (1.0,)), False),
    ):
        device.free()
        yield from case(device, sizes, clock, name, make(), copy_rate, with_torch=with_torch)


def copies(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Measure copies of several sizes: the driver's, PyTorch's, and a kernel that reads once and writes once."""
    torch = device.torch
    for size in sizes.copies:
        source, to = (torch.ones(size // 4, dtype=torch.int32, device=device.place) for _ in range(2))
        functions: Functions = {
            "cuMemcpyDtoDAsync": device.copier(to, source),
            "Tensor.copy_": lambda to=to, source=source: to.copy_(source),  # type: ignore[misc]
            "bitwise_not": lambda to=to, source=source: torch.bitwise_not(source, out=to),  # type: ignore[misc]
        }
        for name, seconds in device.take_turns(
            functions, rounds=max(3, sizes.rounds // 2), repeat=sizes.calls, clock=clock
        ).items():
            yield timed(f"{COPY}, {size} bytes", name, seconds, 2 * size, {"bytes": size})
        del source, to, functions
        device.free()


def plain(device: Device, sizes: Sizes, dtype: dtypes.DType, alphas: tuple[float, ...]) -> Plain:
    """Make operands of weights."""
    count = sizes.elements // (2 if len(alphas) > 1 else 1) // (dtype.itemsize // 2)
    kind = getattr(device.torch, TORCH_NAMES[dtype])
    return Plain(device, dtype, Source(device, 1).operands("weights", kind, count, len(alphas)), alphas)


def blocks(device: Device, sizes: Sizes) -> Blocks:
    """Make matrices of fp8 codes in blocks."""
    return Blocks.of(Source(device, 2), "weights", sizes.side, sizes.side)


def case(
    device: Device, sizes: Sizes, clock: Clock, name: str, job: Plain | Blocks, copy_rate: float, *, with_torch: bool
) -> Iterator[Record]:
    """Measure one merge by every contender, beside a copy of as many bytes."""
    torch = device.torch
    functions: Functions = {}
    skipped: dict[str, str] = {}
    for kernels in KERNELS:
        reason = device.why_not(kernels)
        if reason:
            skipped[ours(kernels)] = reason
        else:
            room = job.room()
            functions[ours(kernels)] = lambda kernels=kernels, room=room: job.enqueue(kernels, *room)
    if with_torch:
        expression = job.in_torch()
        flat = flat_operands(job)
        functions[EAGER] = lambda: expression(*flat)
        compiled = torch.compile(expression, backend="inductor" if device.on == "cuda" else "eager", dynamic=False)
        functions[COMPILED] = lambda: compiled(*flat)
    copied = min(job.nbytes // 2, MOST_COPIED)
    source, to = (torch.empty(copied, dtype=torch.uint8, device=device.place) for _ in range(2))
    functions[COPY] = device.copier(to, source)
    for contender in list(functions):
        try:
            functions[contender]()
            device.finish()
        except Exception as error:  # whatever a compiler or PyTorch meets on this machine
            if "CUDA error" in str(error):
                raise
            skipped[contender] = f"{type(error).__name__}: {error}"[:2000]
            del functions[contender]
    samples = device.take_turns(functions, rounds=sizes.rounds, repeat=sizes.calls, clock=clock)
    parameters = {"elements": count_of(job), "bytes": job.nbytes}
    rate = max(copy_rate, Metric("B/s", tuple(2 * copied / s for s in samples[COPY])).median)
    for contender, seconds in samples.items():
        nbytes = 2 * copied if contender == COPY else job.nbytes
        record = timed(name, contender, seconds, nbytes, parameters)
        record.ratios["of_copy"] = record.metrics["bandwidth"].median / rate
        for kernels in KERNELS:
            if contender not in (COPY, ours(kernels)) and ours(kernels) in samples:
                reference = Metric("s", tuple(samples[ours(kernels)]))
                record.ratios[f"times_{kernels}"] = record.metrics["time"].median / reference.median
        yield record
    for contender, reason in skipped.items():
        yield Record(GROUP, name, contender, parameters, skipped=reason)


def ours(kernels: str) -> str:
    """Return the contender's name of a backend of ours."""
    return f"paramdelta {kernels}"


def count_of(job: Plain | Blocks) -> int:
    """Return the elements of the output."""
    return job.count if isinstance(job, Plain) else job.shape[0] * job.shape[1]


def flat_operands(job: Plain | Blocks) -> list[Any]:
    """Return what the expression in PyTorch takes."""
    if isinstance(job, Plain):
        return list(job.operands)
    return [each for pair in zip(job.codes, job.scales, strict=True) for each in pair]


def timed(case: str, contender: str, seconds: list[float], nbytes: int, parameters: dict[str, Any]) -> Record:
    """Return the record of one contender, with the bandwidth that its times mean."""
    metrics = {"time": Metric("s", tuple(seconds)), "bandwidth": Metric("B/s", tuple(nbytes / s for s in seconds))}
    return Record(GROUP, case, contender, dict(parameters), metrics)
