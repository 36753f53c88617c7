"""The one pass over the data: workers take loads, read them, and add them to the sums of their tensors.

The sums of a tensor do not depend on who took which load: leaves are cut from the start of each load, loads are cut
alike whatever the number of workers, and what is added up is added without rounding (csrc/cpu/gram.hpp).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paramdelta.analysis.comparison import Comparison, Key
from paramdelta.analysis.loads import Load, Survey
from paramdelta.analysis.reading import Files, Reader
from paramdelta.backends.threads import default_threads
from paramdelta.engine import WAKE_SECONDS, EngineOptions
from paramdelta.storage import WAITING_THREADS


@dataclass
class Facts:
    """Of a delta in one tensor: elements compared, those that are bit-equal, those whose difference is not finite, the
    largest finite |post − base| and where it is first."""

    elements: int = 0
    unchanged: int = 0
    nonfinite: int = 0
    largest: float = 0.0
    at: int | None = None

    def add(self, elements: int, largest: float, at: int | None, nonfinite: int, unchanged: int) -> None:
        """Add those of another part."""
        self.elements += elements
        self.unchanged += unchanged
        self.nonfinite += nonfinite
        if at is None or largest < self.largest:
            return
        if largest > self.largest or self.at is None or at < self.at:
            self.largest, self.at = largest, at


@dataclass
class TensorSums:
    """What the pass finds of a tensor: inner products by what they are, and facts of each delta."""

    sums: dict[Comparison, Any] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)

    def products(self) -> dict[Key, float]:
        """Return the inner products. Where parts of a tensor have different deltas, theirs are rounded before they are
        added."""
        parts: dict[Key, list[float]] = {}
        for comparison in sorted(self.sums, key=lambda c: c.deltas):
            for key, value in comparison.named(self.sums[comparison].products()).items():
                parts.setdefault(key, []).append(value)
        return {key: added(values) for key, values in parts.items()}


def added(values: list[float]) -> float:
    """Return the correctly rounded sum: NaN where an operand is, or infinities cancel."""
    if all(map(math.isfinite, values)):
        return math.fsum(values)
    return float(np.sum(values))


class Pass:
    """The pass, as it runs: what is left, what was found, what went wrong."""

    def __init__(self, survey: Survey, options: EngineOptions) -> None:
        self._survey, self._options = survey, options
        self._loads = survey.loads()
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []
        self.found: dict[int, TensorSums] = {}
        self.bytes_read = 0
        self.threads = 0

    def run(self, on_progress: Callable[[int, int], None] | None = None) -> dict[int, TensorSums]:
        """Take every load; return what was found by the number of the tensor. Raises StorageError, and what
        ``on_progress`` raises."""
        files = Files(self._survey, self._options)
        with files.opened():
            waits = WAITING_THREADS if files.reached.wait else 1
            self.threads = self._options.threads or max(default_threads(), waits)
            workers = [
                threading.Thread(target=self._work, args=(files,), name=f"analysis-{n}") for n in range(self.threads)
            ]
            started = []
            try:
                for worker in workers:
                    worker.start()
                    started.append(worker)
                while (alive := next((w for w in started if w.is_alive()), None)) is not None:
                    alive.join(WAKE_SECONDS)
                    if on_progress is not None:
                        on_progress(self.bytes_read, 0)
            except BaseException as error:
                self._failures.append(error)
                raise
            finally:
                for worker in started:
                    worker.join()
        if self._failures:
            raise self._failures[0]
        return self.found

    def _next(self) -> Load | None:
        with self._lock:
            return None if self._failures else next(self._loads, None)

    def _work(self, files: Files) -> None:
        reader = Reader(self._survey, files, replace(self._options, threads=1))
        try:
            while (load := self._next()) is not None:
                self._take(load, reader)
        except BaseException as error:
            with self._lock:
                self._failures.append(error)

    def _take(self, load: Load, reader: Reader) -> None:
        operands = [(data.__array_interface__["data"][0], code) for data, code in reader.operands(load)]
        # SAFETY: the addresses are those of the reader's buffers, which are this thread's until the next load.
        sums, elements = load.comparison.sums(), self._survey.elements_of(load)
        sums.add(operands, count=elements, first=0, isa=self._options.isa)
        facts = sums.facts()
        with self._lock:
            self.bytes_read += reader.nbytes(load)
            tensor = self.found.setdefault(load.tensor, TensorSums())
            if load.comparison in tensor.sums:
                tensor.sums[load.comparison].merge(sums)
            else:
                tensor.sums[load.comparison] = sums
            for k, (largest, at, nonfinite, unchanged) in zip(load.comparison.deltas, facts, strict=False):
                place = None if at is None else self._survey.place(load, at)
                tensor.facts.setdefault(k, Facts()).add(elements, largest, place, nonfinite, unchanged)
