"""Bandwidth of the CPU kernels per dtype, lane, instruction set and number of threads, as a share of the roofline.

Passes of the kernel alternate with passes of the best few roofline loops over the same memory, so that both see the
same machine. A sample is the best of as many passes as there are such loops, for the roofline (one of each) and for
the kernel alike, so that neither has more chances. Buffers lie beyond the last-level cache unless a size is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import bound
from benchmarks.machine import threads_allowed
from benchmarks.results import OURS, Metric, Record, bound_ratios
from paramdelta import dtypes
from paramdelta.backends import Operand, Term, cpu
from paramdelta.dtypes import DType

STREAM_BYTES = 256 << 20  # of the output: 1 GiB in all for one dtype, many times any last-level cache
QUICK_STREAM_BYTES = 64 << 20
POOL_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Case:
    """One merge to measure: dtypes of post, base, new_base and out, alpha, and how many deltas are added.

    ``stagger`` and ``shift`` place the streams within their pages (see ``bound.allocate``).
    """

    name: str
    post: DType
    base: DType
    new_base: DType
    out: DType
    alpha: float = 1.0
    deltas: int = 1
    stagger: int = bound.STAGGER
    shift: int = 0

    @property
    def streams(self) -> tuple[DType, ...]:
        """Dtypes of all streams: each delta's post and base, new_base, out."""
        return (*((self.post, self.base) * self.deltas), self.new_base, self.out)

    @property
    def bytes_per_element(self) -> int:
        return sum(d.itemsize for d in self.streams)


def _same(name: str, dtype: DType, **others: Any) -> Case:
    return Case(f"{dtype} {name}", dtype, dtype, dtype, dtype, **others)


FUSED = tuple(_same("alpha 1", d) for d in (dtypes.BF16, dtypes.F16, dtypes.F32))
GENERAL = tuple(_same("alpha 0.7", d, alpha=0.7) for d in (dtypes.BF16, dtypes.F16, dtypes.F32))
OTHERS = (
    *(_same("alpha 1", d) for d in (dtypes.F64, dtypes.F8_E4M3, dtypes.F8_E5M2)),
    _same("two deltas", dtypes.BF16, deltas=2),
    Case("bf16 deltas on f32", dtypes.BF16, dtypes.BF16, dtypes.F32, dtypes.F32),
    Case("f32 to bf16", dtypes.F32, dtypes.F32, dtypes.F32, dtypes.BF16),
    _same("alpha 1, unaligned", dtypes.BF16, shift=1),
    _same("alpha 1, equal page offsets", dtypes.BF16, stagger=0),
)


def plan(*, quick: bool = False) -> Iterator[tuple[Case, str, int]]:
    """Yield what to measure: case, instruction set, threads.

    bf16 in both lanes with every instruction set on one thread and on all; every other case with the vector sets on
    all threads. ``quick`` keeps the best instruction set and all threads.
    """
    isas = cpu.capabilities().variants
    everywhere = threads_allowed()
    for case in (*FUSED, *GENERAL, *OTHERS):
        full = case in (FUSED[0], GENERAL[0])
        for isa in reversed(isas):
            if (quick and isa != isas[-1]) or (isa == "scalar" and not full and len(isas) > 1):
                continue
            for threads in sorted({1, everywhere}) if full and not quick else (everywhere,):
                yield case, isa, threads


class Bench:
    """One case with its memory: weight-like values in every input, ready to be merged again and again."""

    def __init__(self, case: Case, stream_bytes: int) -> None:
        self.case = case
        self.elements = stream_bytes // case.out.itemsize
        sizes = [self.elements * d.itemsize for d in case.streams]
        self.buffers = bound.allocate(sizes, stagger=case.stagger, shift=case.shift)
        for i, (stream, dtype) in enumerate(zip(self.buffers.inputs, case.streams[:-1], strict=True)):
            _fill(stream, dtype, moved=i % 2 == 0, seed=i)

    @property
    def nbytes(self) -> int:
        """Bytes read and written by one merge."""
        return self.elements * self.case.bytes_per_element

    def merge(self, isa: str, threads: int) -> float:
        """Merge once and return bytes read and written per second."""
        case, inputs = self.case, self.buffers.inputs
        # SAFETY: the slab of self.buffers outlives the call.
        at = [Operand(s.ctypes.data, d) for s, d in zip(inputs, case.streams[:-1], strict=True)]
        terms = [Term(at[2 * k], at[2 * k + 1], case.alpha) for k in range(case.deltas)]
        out = Operand(self.buffers.out.ctypes.data, case.out)
        start = time.perf_counter()
        cpu.merge(at[-1], terms, out, self.elements, threads=threads, isa=isa)
        return self.nbytes / (time.perf_counter() - start)


def _fill(stream: bound.Bytes, dtype: DType, *, moved: bool, seed: int) -> None:
    """Fill a stream with N(0, 0.02²), the same for all inputs; ``moved`` adds N(0, 0.001²) from a seed of its own."""
    values = np.random.default_rng(0).standard_normal(POOL_ELEMENTS, dtype=np.float32) * np.float32(0.02)
    if moved:
        move = np.random.default_rng(seed + 1).standard_normal(POOL_ELEMENTS, dtype=np.float32)
        values = values + move * np.float32(1e-3)
    pool = values.astype(dtype.to_numpy()).view(np.uint8)
    for start in range(0, stream.size, pool.size):
        piece = stream[start : start + pool.size]
        piece[:] = pool[: piece.size]


def measure(bench: Bench, isa: str, threads: int, rounds: int) -> Record:
    """Take ``rounds`` samples of roofline and kernel in alternating passes, and return the record."""
    roofline = bound.Bound(bench.buffers, threads)
    roofline.choose()
    bench.merge(isa, threads)
    limits, rates = [], []
    for _ in range(rounds * len(roofline.names)):
        limits.append(roofline.next_pass())
        rates.append(bench.merge(isa, threads))
    return make_record(bench, isa, threads, rates, limits, roofline.names)


def best_of_each(passes: list[float], count: int) -> tuple[float, ...]:
    """Return the largest of each run of ``count`` passes."""
    return tuple(max(passes[i : i + count]) for i in range(0, len(passes), count))


def make_record(
    bench: Bench, isa: str, threads: int, rates: list[float], limits: list[float], loops: tuple[str, ...]
) -> Record:
    """Return the record of one measurement from passes of the kernel and of the roofline in bytes per second."""
    bandwidth = Metric("B/s", best_of_each(rates, len(loops)))
    bound_rate = Metric("B/s", best_of_each(limits, len(loops)))
    case = bench.case
    return Record(
        group="kernels",
        case=f"{case.name}, {isa}, {threads} thread{'s' if threads > 1 else ''}",
        contender=OURS,
        parameters={
            "merge": case.name,
            "dtypes": [d.name for d in case.streams],
            "alpha": case.alpha,
            "isa": isa,
            "threads": threads,
            "elements": bench.elements,
            "bound_loops": list(loops),
        },
        metrics={"bandwidth": bandwidth, "bound": bound_rate},
        ratios=bound_ratios(bandwidth, bound_rate),
    )


def run(*, quick: bool, rounds: int | None = None, stream_bytes: int | None = None) -> Iterator[Record]:
    """Measure all of ``plan`` and yield records as they are made. One case's memory is held at a time."""
    size = stream_bytes or (QUICK_STREAM_BYTES if quick else STREAM_BYTES)
    bench: Bench | None = None
    for case, isa, threads in plan(quick=quick):
        if bench is None or bench.case is not case:
            bench = None  # frees the slab before the next is made
            bench = Bench(case, size)
        yield measure(bench, isa, threads, rounds or (5 if quick else 11))
