"""Bandwidth of the CPU kernels per dtype, lane, instruction set and number of threads, as a share of the roofline.

Passes of the kernel alternate with passes of the best few roofline loops over the same memory, so that both see the
same machine. A sample is the best of as many passes for the roofline (some of each loop) as for the kernel, so
that neither has more chances. Buffers lie beyond the last-level cache unless a size is given.

``quick`` measures one thread in passes of a fraction of a millisecond, the best of several: they slip through between
what others run. Instructions, where the machine counts them, are those of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks import bound, counters
from benchmarks.machine import threads_allowed
from benchmarks.results import OURS, Metric, Record, bound_ratios
from paramdelta import dtypes
from paramdelta.backends import Operand, Term, cpu
from paramdelta.dtypes import DType

STREAM_BYTES = 256 << 20  # of the output: 1 GiB in all for one dtype, many times any last-level cache
QUICK_STREAM_BYTES = 16 << 20
QUICK_PIECES = 4  # a pass takes one of them: short enough to slip through between what others run
PASSES, QUICK_PASSES = 1, 3  # of each loop of the roofline in a sample, and as many of the kernel
CHOSEN = "chosen"  # stands for the instruction set that the library takes by itself
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

    bf16 in both lanes with every instruction set, and the chosen one, on one thread and on all; every other case with
    the vector sets on all threads. ``quick`` keeps the chosen instruction set and one thread.
    """
    isas = cpu.capabilities().variants
    everywhere = threads_allowed()
    for case in (*FUSED, *GENERAL, *OTHERS):
        full = case in (FUSED[0], GENERAL[0])
        named = [isa for isa in reversed(isas) if full or isa != "scalar" or len(isas) == 1]
        for isa in (CHOSEN,) if quick else (CHOSEN, *named) if full else named:
            for threads in (1,) if quick else sorted({1, everywhere}) if full else (everywhere,):
                yield case, isa, threads


class Bench:
    """One case with its memory: weight-like values in every input, ready to be merged again and again."""

    def __init__(self, case: Case, stream_bytes: int, pieces: int = 1) -> None:
        self.case = case
        self.elements = stream_bytes // case.out.itemsize // pieces
        sizes = [self.elements * d.itemsize for d in case.streams]
        whole = bound.allocate([size * pieces for size in sizes], stagger=case.stagger, shift=case.shift)
        for i, (stream, dtype) in enumerate(zip(whole.inputs, case.streams[:-1], strict=True)):
            _fill(stream, dtype, moved=i % 2 == 0, seed=i)
        self.pieces = [bound.piece(whole, sizes, i) for i in range(pieces)]
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes read and written by one merge."""
        return self.elements * self.case.bytes_per_element

    @property
    def buffers(self) -> bound.Buffers:
        """The memory of the next pass of the roofline: half a round ahead of the merges."""
        return self.pieces[(self._next + len(self.pieces) // 2) % len(self.pieces)]

    def merge(self, isa: str, threads: int) -> float:
        """Merge the next piece and return the seconds that it took."""
        case, piece = self.case, self.pieces[self._next]
        self._next = (self._next + 1) % len(self.pieces)
        # SAFETY: the slab that the piece refers to outlives the call.
        at = [Operand(s.ctypes.data, d) for s, d in zip(piece.inputs, case.streams[:-1], strict=True)]
        terms = [Term(at[2 * k], at[2 * k + 1], case.alpha) for k in range(case.deltas)]
        out = Operand(piece.out.ctypes.data, case.out)
        start = time.perf_counter()
        cpu.merge(at[-1], terms, out, self.elements, threads=threads, isa=None if isa == CHOSEN else isa)
        return time.perf_counter() - start


def _fill(stream: bound.Bytes, dtype: DType, *, moved: bool, seed: int) -> None:
    """Fill a stream with N(0, 0.02²), the same for all inputs; ``moved`` adds N(0, 0.001²) from a seed of its own."""
    values = _normal(0) * np.float32(0.02)
    if moved:
        values = values + _normal(seed + 1) * np.float32(1e-3)
    pool = values.astype(dtype.to_numpy()).view(np.uint8)
    for start in range(0, stream.size, pool.size):
        piece = stream[start : start + pool.size]
        piece[:] = pool[: piece.size]


@cache
def _normal(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, dtype=np.float32)


class Memory(Protocol):
    """What a measurement needs of a bench: kernels here, those of quantised.py there."""

    elements: int

    @property
    def buffers(self) -> bound.Buffers: ...

    @property
    def nbytes(self) -> int: ...

    def merge(self, isa: str, threads: int) -> float: ...


class Measurement:
    """The samples of one kernel and of the roofline beside it, taken round by round."""

    def __init__(self, isa: str, threads: int) -> None:
        self.isa, self.threads = isa, threads
        self.loops: tuple[str, ...] = ()
        self.limits: list[float] = []
        self.rates: list[float] = []
        self.instructions: list[float] = []
        self.elements = 0

    def take(self, bench: Memory, rounds: int, passes: int = PASSES) -> None:
        """Take ``rounds`` samples in alternating passes, after one pass that does not count."""
        self.elements = bench.elements
        roofline = bound.Bound(bench.buffers, self.threads, self.loops)
        if not self.loops:
            roofline.choose()
            self.loops = roofline.names
        bench.merge(self.isa, self.threads)
        for _ in range(rounds):
            limits, rates = [], []
            for _ in range(passes * len(self.loops)):
                roofline.buffers = bench.buffers
                limits.append(roofline.next_pass())
                rates.append(bench.nbytes / bench.merge(self.isa, self.threads))
            self.limits.append(max(limits))
            self.rates.append(max(rates))
        if counters.why_not() is None:
            self._count(bench)

    def _count(self, bench: Memory) -> None:
        counter = counters.Counter()
        counter.start()
        bench.merge(self.isa, 1)
        count = counter.stop()
        counter.close()
        self.instructions += [] if count is None else [count / bench.elements]

    def record(self, name: str, **parameters: Any) -> Record:
        """Return the record of the case ``name``."""
        bandwidth, limit = Metric("B/s", tuple(self.rates)), Metric("B/s", tuple(self.limits))
        metrics = {"bandwidth": bandwidth, "bound": limit}
        if self.instructions:
            metrics["instructions"] = Metric("1/element", tuple(self.instructions))
        return Record(
            group="kernels",
            case=f"{name}, {self.isa}, {self.threads} thread{'s' if self.threads > 1 else ''}",
            contender=OURS,
            parameters={
                "merge": name,
                "isa": self.isa,
                "threads": self.threads,
                "elements": self.elements,
                "bound_loops": list(self.loops),
                **parameters,
            },
            metrics=metrics,
            ratios=bound_ratios(bandwidth, limit),
        )


def measure(bench: Bench, isa: str, threads: int, rounds: int, passes: int = PASSES) -> Record:
    """Take ``rounds`` samples of one case and return the record."""
    made = Measurement(isa, threads)
    made.take(bench, rounds, passes)
    return record_of(bench.case, made)


def record_of(case: Case, made: Measurement) -> Record:
    """Return the record of one case."""
    return made.record(case.name, dtypes=[d.name for d in case.streams], alpha=case.alpha)


def run(*, quick: bool, rounds: int, size: int | None = None) -> Iterator[Record]:
    """Measure all of ``plan`` and yield records as they are made. One case's memory is held at a time."""
    nbytes = size or (QUICK_STREAM_BYTES if quick else STREAM_BYTES)
    bench: Bench | None = None
    for case, isa, threads in plan(quick=quick):
        if bench is None or bench.case is not case:
            bench = None  # frees the slab before the next is made
            bench = Bench(case, nbytes, QUICK_PIECES if quick else 1)
        yield measure(bench, isa, threads, rounds, QUICK_PASSES if quick else PASSES)
