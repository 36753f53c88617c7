"""Runs a plan's work on the streaming engine: creates the output files, starts the workers, waits, reports progress.

No Python runs per slot; this module wakes ten times a second to call ``on_progress`` and to let Ctrl-C through.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta.errors import OperandError, StorageError

if TYPE_CHECKING:
    import numpy as np

    from paramdelta.plan.work import Work

# A MiB a worker stays in the second-level cache from read to write. Smaller slots cost system calls; larger ones, up to
# 8 MiB, made no difference beyond the noise (docs/performance.md).
SLOT_BYTES = 1 << 20
SMALLEST_SLOT = 1 << 17
WAKE_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a run uses the machine; none of it changes a byte of the output.

    ``threads``: workers, None for as many as the process may use. ``memory``: bytes for all slots together, None for
    1 MiB a worker. ``isa``: ``scalar``, ``avx2`` or ``avx512``; None for the best this machine has.
    """

    threads: int | None = None
    memory: int | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise OperandError(f"threads: expected at least 1, got {self.threads}")
        if self.memory is not None and self.memory < SMALLEST_SLOT:
            raise OperandError(f"memory: expected at least {SMALLEST_SLOT} bytes (128 KiB), got {self.memory}")

    def resolve(self) -> tuple[int, int]:
        """Return (threads, bytes of a slot): fewer threads where the memory allows no more slots."""
        from paramdelta.backends.threads import default_threads

        threads = self.threads or default_threads()
        if self.memory is None:
            return threads, SLOT_BYTES
        threads = max(1, min(threads, self.memory // SMALLEST_SLOT))
        return threads, min(self.memory // threads, 1 << 30) // 4096 * 4096


@dataclass(frozen=True)
class TensorCounts:
    """Outputs of one tensor that are NaN, infinite, or finite but beyond the output type's range."""

    tensor: int
    nan: int
    inf: int
    overflow: int


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run did: seconds of wall time, bytes moved, and the tensors with non-finite or overflowed results."""

    seconds: float
    bytes_read: int
    bytes_written: int
    threads: int
    slot_bytes: int
    isa: str
    counts: tuple[TensorCounts, ...]


def create_outputs(work: Work, folder: Path) -> list[Path]:
    """Create each output file in ``folder`` with its header, at its full size (sparse). Existing files are errors."""
    paths = []
    for (name, size), header in zip(work.outputs, work.headers, strict=True):
        path = folder / name
        try:
            with open(path, "xb") as file:
                file.write(header)
                file.truncate(size)
        except OSError as error:
            raise StorageError(error.errno, f"{path}: cannot be created: {error.strerror}") from error
        paths.append(path)
    return paths


def run(
    work: Work,
    outputs: Sequence[Path] | Sequence[np.ndarray[Any, Any]],
    *,
    tensors: int,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Carry out ``work`` into existing files, or into writable byte arrays of the outputs' sizes.

    ``tensors`` is the number of output tensors the spans refer to. ``on_progress(bytes_read, bytes_written)`` is
    called about ten times a second. KeyboardInterrupt, and whatever ``on_progress`` raises, stops the workers after
    the load they carry and is raised again. Raises StorageError where a read or write fails.
    """
    run_ = start(work, outputs, tensors=tensors, options=options)
    try:
        while not run_.wait_for(WAKE_SECONDS):
            if on_progress is not None:
                on_progress(*run_.progress())
        result = run_.finish()
        if on_progress is not None:
            on_progress(result.bytes_read, result.bytes_written)
        return result
    except BaseException:
        run_.abandon()
        raise


class RunningWork:
    """Work that is being carried out by the engine's threads."""

    def __init__(self, engine: Any, threads: int, slot_bytes: int, isa: str) -> None:
        self._engine = engine
        self._threads, self._slot_bytes, self._isa = threads, slot_bytes, isa
        self._started = time.perf_counter()
        engine.start()

    def wait_for(self, seconds: float) -> bool:
        """Wait at most ``seconds``; True when every worker is done."""
        return bool(self._engine.wait_for(seconds))

    def progress(self) -> tuple[int, int]:
        """Return (bytes read, bytes written) so far."""
        read, written = self._engine.progress()
        return read, written

    def abandon(self) -> None:
        """Stop the workers and wait for them; what was written so far is of no use."""
        self._engine.stop()
        while not self._engine.wait_for(WAKE_SECONDS):
            pass

    def finish(self) -> RunResult:
        """Wait for the workers and return what was done. Raises StorageError."""
        counts = self._engine.finish()
        read, written = self._engine.progress()
        return RunResult(
            seconds=time.perf_counter() - self._started,
            bytes_read=read,
            bytes_written=written,
            threads=self._threads,
            slot_bytes=self._slot_bytes,
            isa=self._isa,
            counts=tuple(TensorCounts(*row) for row in counts),
        )


def start(
    work: Work,
    outputs: Sequence[Path] | Sequence[np.ndarray[Any, Any]],
    *,
    tensors: int,
    options: EngineOptions | None = None,
) -> RunningWork:
    """Open the files, start the workers and return at once. The arguments are those of :func:`run`."""
    from paramdelta import _cpu

    options = options or EngineOptions()
    threads, slot_bytes = options.resolve()
    _allow_open_files(len(work.inputs) + len(outputs))
    engine = _cpu.Engine(
        spans=work.spans,
        terms=work.terms,
        tensors=tensors,
        inputs=[os.fsencode(path) for path in work.inputs],
        outputs=[os.fsencode(out) if isinstance(out, Path) else out for out in outputs],
        threads=threads,
        slot_bytes=slot_bytes,
        isa=options.isa,
    )
    return RunningWork(engine, threads, slot_bytes, options.isa or _cpu.best_isa())


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit on open files to what the run needs, where the hard limit allows it."""
    needed = count + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StorageError(
            f"the merge opens {count} files, but this process may open only {hard}: raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
