"""Stages: what computes the loads of the streaming engine. The processor is one, a GPU another, a caller's own kernel
a third: the engine reads, hands over, and writes what comes back.

The engine's slots, with their reads past the page cache, their bounded memory and their threads, are so of use to other
arithmetic than ours:

    def halfway(job):                                    # called for every piece of a tensor
        ((post, base, alpha),) = job.terms
        values = [x.array.view(x.dtype.to_numpy()).astype("f4") for x in (post, job.new_base)]
        job.out.array.view(job.out.dtype.to_numpy())[:] = (values[0] + values[1]) / 2

    for name, tensor in paramdelta.stream(post, base, new_base, kernel=halfway): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.backends import Counts
from paramdelta.dtypes import DTYPES, DType

__all__ = ["Job", "Kernel", "KernelStage", "Piece"]


class Piece(NamedTuple):
    """Elements of one operand as their stored codes (unsigned integers of that size), and their dtype. They lie in
    a slot: valid until the kernel returns. An operand of zeros has an array of zeros."""

    array: NDArray[Any]
    dtype: DType


class Job(NamedTuple):
    """``elements`` consecutive elements of an output tensor: ``out`` is to be made of ``new_base`` and the ``terms``,
    each (post, base, alpha). ``tensor`` is the tensor's number in the plan."""

    tensor: int
    elements: int
    out: Piece
    new_base: Piece
    terms: tuple[tuple[Piece, Piece, float], ...]


# Called for every job, by one worker at a time; returns what it counted, or nothing.
Kernel = Callable[[Job], "Counts | None"]


class KernelStage:
    """A kernel as the engine takes it. Quantised matrices are computed by the processor, as ever."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def merge(self, worker: int, jobs: Sequence[tuple[Any, ...]]) -> list[Counts]:
        """Compute one load; called by the extension."""
        return [self._kernel(_job_of(job)) or Counts() for job in jobs]


def _job_of(job: tuple[Any, ...]) -> Job:
    tensor, count, out, new_base, terms = job

    def piece(operand: tuple[int, memoryview | None]) -> Piece:
        number, memory = operand
        dtype = DTYPES[number]
        kind = np.dtype(f"u{dtype.itemsize}")
        return Piece(np.zeros(count, kind) if memory is None else np.frombuffer(memory, kind), dtype)

    pairs = tuple((piece(post), piece(base), alpha) for post, base, alpha in terms)
    return Job(tensor, count, piece(out), piece(new_base), pairs)
