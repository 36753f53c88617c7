"""Runs a plan's work on the streaming engine: creates the output files, starts the workers, waits, reports progress.

No Python runs per slot; this module wakes ten times a second to call ``on_progress`` and to let Ctrl-C through.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta.errors import OperandError, ResourceError, StorageError, storage_errors
from paramdelta.memory import DeviceMemory, Memory
from paramdelta.storage import (
    CACHED,
    WAITING_SLOT,
    WAITING_THREADS,
    Paths,
    check_mode,
    choose_paths,
    memory_limit,
)

if TYPE_CHECKING:
    import numpy as np

    from paramdelta.plan.work import Work

# A MiB a worker stays in the second-level cache from read to write. Smaller slots cost system calls; larger ones, up to
# 8 MiB, made no difference beyond the noise (docs/performance.md).
SLOT_BYTES = 1 << 20
SMALLEST_SLOT = 1 << 17
# Whole rows of units are read in long runs; beyond this, pieces of them will do.
LARGEST_SLOT = 1 << 23
WAKE_SECONDS = 0.1
COLUMNS = ("spans", "terms", "regions", "region_terms", "views", "recipes", "extents")


# Files, memory, a device's memory, or only sizes: what is written is not kept.
Outputs = Sequence["Path | np.ndarray[Any, Any] | DeviceMemory | int"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a run uses the machine; none of it changes a byte of the output.

    ``threads``: workers, None for as many as the process may use, or more where they wait for storage. ``memory``:
    bytes for all slots together, None for what the files ask for: 1 MiB a worker, 8 MiB where it waits for storage, and
    no more than an eighth of what is free. ``isa``: ``scalar``, ``avx2`` or ``avx512``; None for the best this machine
    has. ``io``: ``auto``, ``buffered`` or ``direct``, see :mod:`paramdelta.storage`. ``device``: ``cpu``, ``cuda``,
    ``cuda:N``, or ``auto`` (:mod:`paramdelta.devices`), and ``device_why`` it is that. ``stage``: what computes, None
    for that of ``device``: an object with ``merge(worker, jobs)`` (:mod:`paramdelta.stages`), or the capsule of an
    extension.
    """

    threads: int | None = None
    memory: int | None = None
    isa: str | None = None
    io: str = "auto"
    device: str = "cpu"
    device_why: str = ""
    stage: Any = None

    def __post_init__(self) -> None:
        check_mode(self.io)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise OperandError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.threads is not None and self.threads < 1:
            raise OperandError(f"threads: expected at least 1, got {self.threads}")
        if self.memory is not None and self.memory < SMALLEST_SLOT:
            raise OperandError(f"memory: expected at least {SMALLEST_SLOT} bytes (128 KiB), got {self.memory}")

    def resolve(self, work: Work, paths: Paths) -> tuple[int, int]:
        """Return (threads, bytes of a slot): fewer threads where the memory allows no more slots, larger slots where
        rows of a quantised matrix's units take more."""
        from paramdelta.backends.threads import default_threads

        waits = paths.wait or (self.stage is not None and self.device != "cpu")  # for storage, or for a device
        threads = self.threads or max(default_threads(), WAITING_THREADS if waits else 1)
        if self.memory is None:
            slot = max(WAITING_SLOT if waits else SLOT_BYTES, min(_unit_bytes(work), LARGEST_SLOT))
            slot = max(min(slot, memory_limit() // threads), SMALLEST_SLOT)
            return threads, slot // 4096 * 4096
        threads = max(1, min(threads, self.memory // SMALLEST_SLOT))
        return threads, min(self.memory // threads, 1 << 30) // 4096 * 4096


@dataclass(frozen=True)
class TensorCounts:
    """Outputs of one tensor that are NaN, infinite, or finite but beyond the output type's range."""

    tensor: int
    nan: int
    inf: int
    overflow: int


@dataclass(frozen=True)
class TensorLoss:
    """What quantising lost of one tensor: sums of (code · scale − merged)² and of merged²."""

    tensor: int
    error_squared: float
    value_squared: float


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run did: seconds of wall time, bytes moved, the tensors with non-finite or overflowed results, and what
    quantising lost. ``measured`` is (amax, touched) of each unit, in a pass that measures; ``paths`` how files were
    reached. ``checksums`` are contributions to the checksums of tensors (:mod:`paramdelta.checksums`), None where they
    were not asked for. ``device`` computed, chosen by ``auto`` for the reason ``device_why``."""

    seconds: float
    bytes_read: int
    bytes_written: int
    threads: int
    slot_bytes: int
    isa: str
    counts: tuple[TensorCounts, ...]
    losses: tuple[TensorLoss, ...] = ()
    measured: tuple[tuple[float, bool], ...] = ()
    paths: Paths | None = None
    checksums: Mapping[int, int] | None = None
    device: str = "cpu"
    device_why: str = ""

    def of_variant(self, variant: int, variants: int, tensors: int) -> RunResult:
        """Return what a run of ``variants``, of ``tensors`` each, did for one of them. Bytes read, and seconds, are
        those of all."""
        first = variant * tensors
        mine = range(first, first + tensors)
        paths = self.paths
        if paths is not None:
            files = len(paths.outputs) // variants
            paths = replace(paths, outputs=paths.outputs[variant * files : (variant + 1) * files])
        return replace(
            self,
            bytes_written=self.bytes_written // variants,
            paths=paths,
            counts=tuple(replace(c, tensor=c.tensor - first) for c in self.counts if c.tensor in mine),
            losses=tuple(replace(x, tensor=x.tensor - first) for x in self.losses if x.tensor in mine),
            checksums=None
            if self.checksums is None
            else {tensor - first: value for tensor, value in self.checksums.items() if tensor in mine},
        )


NOTHING = RunResult(seconds=0.0, bytes_read=0, bytes_written=0, threads=0, slot_bytes=0, isa="", counts=())


def create_outputs(work: Work, folder: Path) -> list[Path]:
    """Create each output file in ``folder`` with its header, at its full size: allocated where the file system can do
    so without writing, else sparse. What an earlier run wrote to it is kept."""
    from paramdelta import _cpu

    paths = []
    for (name, size), header in zip(work.outputs, work.headers, strict=True):
        path = folder / name
        with storage_errors(path, "cannot be created"):
            with open(path, "r+b" if path.exists() else "xb") as file:
                file.write(header)
                file.truncate(size)
            _cpu.reserve(os.fsencode(path), size)
        paths.append(path)
    return paths


def run(
    work: Work,
    outputs: Outputs,
    *,
    tensors: int,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Carry out ``work`` into existing files, into writable byte arrays of the outputs' sizes, or, where an output is
    only its size, into nothing.

    ``tensors`` is the number of output tensors the spans refer to. Of several variants, ``outputs`` are those of the
    first, then of the second, and so on. ``on_progress(bytes_read, bytes_written)`` is
    called about ten times a second. KeyboardInterrupt, and whatever ``on_progress`` raises, stops the workers after
    the load they carry and is raised again. Raises StorageError where a read or write fails.
    """
    work, before = settle(work, tensors=tensors, options=options, on_progress=on_progress)
    return carry_out(work, outputs, tensors=tensors, options=options, before=before, on_progress=on_progress)


def settle(
    work: Work,
    *,
    tensors: int,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Work, RunResult]:
    """Find the scales of whole tensors, where ``work`` has any, by a pass that reads and writes nothing. Return the
    work that is left and what the pass did. Raises as :func:`run`."""
    if not work.unsettled:
        return work, NOTHING
    measures = work.measuring()
    result = carry_out(measures, [], tensors=tensors, options=options, on_progress=on_progress)
    return work.settled(result.measured), result


def carry_out(
    work: Work,
    outputs: Outputs,
    *,
    tensors: int,
    options: EngineOptions | None = None,
    paths: Paths | None = None,
    before: RunResult | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Carry out settled work, as :func:`run`, by ``paths`` if they are given. The result adds to ``before``, that of
    what was done already."""
    running = start(work, outputs, tensors=tensors, options=options, paths=paths)
    return completed(running, before=before, on_progress=on_progress)


def completed(
    running: RunningWork,
    *,
    before: RunResult | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Wait for work that was started, and return what it did; the arguments, and what is raised, as in
    :func:`carry_out`."""
    before = before or NOTHING

    def report(read: int, written: int) -> None:
        if on_progress is not None:
            on_progress(before.bytes_read + read, before.bytes_written + written)

    try:
        while not running.wait_for(WAKE_SECONDS):
            report(*running.progress())
        result = running.finish()
        report(result.bytes_read, result.bytes_written)
    except BaseException:
        running.abandon()
        raise
    return replace(
        result,
        seconds=result.seconds + before.seconds,
        bytes_read=result.bytes_read + before.bytes_read,
        bytes_written=result.bytes_written + before.bytes_written,
    )


class RunningWork:
    """Work that is being carried out by the engine's threads."""

    def __init__(self, engine: Any, known: RunResult, *, summing: bool = False) -> None:
        """``known``: what is known of the result before it starts."""
        self._engine, self._known, self._summing = engine, known, summing
        self._started = time.perf_counter()
        try:
            engine.start()
        except RuntimeError as error:
            self.abandon()
            raise ResourceError(f"{known.threads} threads could not be started: {error}") from error

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
        counts, losses, measured, checksums = self._engine.finish()
        read, written = self._engine.progress()
        return replace(
            self._known,
            seconds=time.perf_counter() - self._started,
            bytes_read=read,
            bytes_written=written,
            counts=tuple(TensorCounts(*row) for row in counts),
            losses=tuple(TensorLoss(*row) for row in losses),
            measured=tuple(measured),
            checksums=dict(checksums) if self._summing else None,
        )


def start(
    work: Work,
    outputs: Outputs,
    *,
    tensors: int,
    options: EngineOptions | None = None,
    paths: Paths | None = None,
) -> RunningWork:
    """Open the files, start the workers and return at once. The arguments are those of :func:`carry_out`."""
    from paramdelta import _cpu

    options = options or EngineOptions()
    paths = paths or paths_for(work, outputs, options)
    threads, slot_bytes = options.resolve(work, paths)
    allow_open_files(2 * (len(work.inputs) + len(outputs)))  # direct files are open for the page cache, too
    try:
        engine = _cpu.Engine(
            columns={name: getattr(work, name) for name in COLUMNS},
            tensors=tensors,
            units=len(work.units),
            variants=work.variants,
            own_input=work.own_input,
            inputs=[_opened(file, access) for file, access in zip(work.inputs, paths.inputs, strict=True)],
            outputs=[_opened(file, access) for file, access in zip(outputs, paths.outputs, strict=True)],
            threads=threads,
            slot_bytes=slot_bytes,
            isa=options.isa,
            stage=options.stage,
        )
    except MemoryError:
        slots = f"{threads} slots of {slot_bytes:,} bytes"
        raise ResourceError(f"{slots} could not be allocated: this process may have no more memory") from None
    except ValueError as error:
        if "are too small" not in str(error):
            raise
        raise OperandError(f"memory: {error}: give more memory, or fewer threads") from None
    isa = options.isa or _cpu.best_isa()
    known = replace(
        NOTHING,
        threads=threads,
        slot_bytes=slot_bytes,
        isa=isa,
        paths=paths,
        device=options.device,
        device_why=options.device_why,
    )
    return RunningWork(engine, known, summing=len(work.extents) > 0)


def paths_for(work: Work, outputs: Outputs, options: EngineOptions | None = None) -> Paths:
    """Return how the files of ``work`` and ``outputs`` are to be reached under ``options``."""
    mode = (options or EngineOptions()).io
    return choose_paths(work.inputs, outputs, [size for _, size in work.outputs] * work.variants, mode)


def _opened(file: Any, access: str | None) -> Any:
    """Return a file as the extension takes it: (path, access), or memory as it is."""
    if isinstance(file, Memory):
        file = file.place
    if isinstance(file, DeviceMemory):
        return list(file)
    return (os.fsencode(file), access or CACHED) if isinstance(file, Path) else file


def allow_open_files(count: int) -> None:
    """Raise this process's soft limit on open files to what the run needs, where the hard limit allows it."""
    needed = count + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StorageError(
            errno.EMFILE, f"the merge opens {count} files at once, but this process may open only {hard}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _unit_bytes(work: Work) -> int:
    """Return about how many bytes a row of units takes of a slot, in the region where it takes most."""
    if not len(work.regions):
        return 0
    import numpy as np

    from paramdelta.formats import CODEC_BITS, CODECS

    bits = np.array([CODEC_BITS[codec] for codec in CODECS])
    regions = work.regions
    per_element = np.full(len(regions), 16) + bits[work.views["codec"][regions["new_view"]]]
    terms = work.region_terms
    of_terms = np.zeros(len(terms) + 1, np.int64)
    of_terms[1:] = np.cumsum(
        bits[work.views["codec"][terms["post_view"]]] + bits[work.views["codec"][terms["base_view"]]]
    )
    per_element += of_terms[regions["first_term"] + regions["n_terms"]] - of_terms[regions["first_term"]]
    whole = np.where((regions["recipe"] >= 0) & (regions["given_file"] < 0), regions["rows"], 1)
    rows = np.where(regions["grid_rows"] > 0, np.minimum(regions["grid_rows"], regions["rows"]), whole)
    return int((rows * regions["cols"] * per_element // 8 * 9 // 8).max()) + (1 << 16)
