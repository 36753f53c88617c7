"""Carries a merge out in segments, so that it can be continued: a segment that is on disk is noted in the journal while
the next one is being computed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paramdelta import checksums, engine
from paramdelta.engine import NOTHING, EngineOptions, RunResult, TensorCounts, TensorLoss
from paramdelta.errors import storage_errors
from paramdelta.journal import Journal, check_same, identity, rank_journals
from paramdelta.segments import SEGMENT_BYTES, Segment, cut
from paramdelta.storage import Trial

if TYPE_CHECKING:
    from concurrent.futures import Future

    from paramdelta.plan import Plan, Work
    from paramdelta.publish import Staging

_SEGMENT_VARIABLE = "PARAMDELTA_SEGMENT_BYTES"  # smaller segments, for tests of what is otherwise large


def segment_bytes() -> int:
    """Return the bytes of output after which a merge can be continued: 1 GiB."""
    return int(os.environ.get(_SEGMENT_VARIABLE) or SEGMENT_BYTES)


def carry_out(
    plan: Plan,
    staging: Staging,
    *,
    options: EngineOptions | None,
    restart: bool,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[RunResult, int]:
    """Write the output files of a plan into the staging folder; return what was done, and how many bytes of output an
    earlier run had done already.

    A merge of one segment keeps no journal. Raises InputError where the folder holds an unfinished merge that is not
    this one (unless ``restart``), else as :func:`paramdelta.engine.run`.
    """
    plan.check_inputs()
    limit = segment_bytes()
    for path in rank_journals(staging.control):
        if not restart:
            check_same(path, identity(plan))
        path.unlink()
    if plan.bytes_written <= limit and not (staging.control / Journal.NAME).exists():
        staging.clear()
        outputs = engine.create_outputs(plan.work, staging.folder)
        return engine.run(plan.work, outputs, tensors=len(plan.names), options=options, on_progress=on_progress), 0
    with closing(Journal(staging.control, identity(plan), restart=restart)) as journal:
        return carry_on(plan, plan.work, journal, staging, [staging.folder], options=options, on_progress=on_progress)


def carry_on(
    plan: Plan,
    work: Work,
    journal: Journal,
    staging: Staging,
    folders: Sequence[Path],
    *,
    options: EngineOptions | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[RunResult, int]:
    """Carry out what a journal does not call finished, into one folder for each variant of the work: that of ``plan``,
    or of several that share its tensors. Return what was done, and how many bytes of output were there already."""
    if journal.finished.segments and not all(all_there(work, folder) for folder in folders):
        journal.forget()
    done = journal.finished
    if not done.segments:
        staging.forget_output(folders)
    outputs = [path for folder in folders for path in engine.create_outputs(work, folder)]
    before, measuring = NOTHING, work.unsettled
    if measuring and done.measured is not None:
        work = work.settled(done.measured)
    elif measuring:
        work, before = engine.settle(work, tensors=len(plan.names), options=options, on_progress=on_progress)
        plan.check_inputs()
        journal.add_measured(before.measured)
    if measuring:  # a pass over all inputs is worth keeping
        staging.keep()
    noting = Noting(plan.check_inputs, journal, outputs, staging.keep)
    return in_segments(work, noting, before, len(plan.names), options, on_progress)


def in_segments(
    work: Work,
    noting: Noting,
    before: RunResult,
    tensors: int,
    options: EngineOptions | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[RunResult, int]:
    """Carry settled work out in segments, without those that the journal calls finished; return what was done, and how
    many bytes of output were there already."""
    segments = cut(work, segment_bytes())
    resumed = sum(segments[number].nbytes for number in noting.journal.finished.segments)
    if resumed:
        noting.keep()
    return noting.run(segments, before, tensors, options, on_progress), resumed


def all_there(work: Work, folder: Path) -> bool:
    """Whether the output files that a journal speaks of are there, at their size."""
    files = [(folder / name, size) for name, size in work.outputs]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


class Noting:
    """Runs segments, and syncs and notes each while the next one runs. ``keep`` is called once there is something to
    continue."""

    def __init__(
        self, check: Callable[[], None], journal: Journal, outputs: Sequence[Path], keep: Callable[[], None]
    ) -> None:
        self.check, self.journal, self.outputs, self.keep = check, journal, outputs, keep

    def run(
        self,
        segments: list[Segment],
        before: RunResult,
        tensors: int,
        options: EngineOptions | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> RunResult:
        done = self.journal.finished
        results = [done.result()]
        total, noted = before, None
        missing = [number for number in range(len(segments)) if number not in done.segments]
        if not missing:
            return joined(before, [done.result()])
        trial = Trial(engine.paths_for(segments[0].work, self.outputs, options), len(missing))
        from concurrent.futures import ThreadPoolExecutor  # most merges have one segment and start sooner without

        with ThreadPoolExecutor(max_workers=1) as background:
            for number in missing:
                self.check()  # a file that became a pipe would block its opening for ever
                segment, paths, earlier = segments[number], trial.next(), total
                total = engine.carry_out(
                    segment.work,
                    self.outputs,
                    tensors=tensors,
                    options=options,
                    paths=paths,
                    before=earlier,
                    on_progress=on_progress,
                )
                trial.tell(paths, total.bytes_read - earlier.bytes_read, total.seconds - earlier.seconds)
                results.append(total)
                _wait(noted)
                noted = background.submit(self.note, number, segment, total)
            _wait(noted)
        return joined(total, results)

    def note(self, number: int, segment: Segment, result: RunResult) -> None:
        """Sync the files of a segment, then say in the journal that it is finished. What was made from inputs that
        changed meanwhile never is."""
        for file in segment.files:
            path = self.outputs[file]
            with storage_errors(path, "cannot be synced"):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what is on disk need not stay in memory
                finally:
                    os.close(fd)
        self.check()
        self.journal.add_segment(number, result)
        self.keep()


def _wait(noted: Future[None] | None) -> None:
    if noted is not None:
        noted.result()


def joined(total: RunResult, results: Sequence[RunResult]) -> RunResult:
    """Return ``total`` with what all results together say of the tensors: those of segments, or of ranks."""
    return replace(
        total,
        counts=tuple(_counts(results)),
        losses=tuple(_losses(results)),
        checksums=checksums.combined(result.checksums for result in results),
    )


def _counts(results: Sequence[RunResult]) -> list[TensorCounts]:
    """Return the counts of all segments, one for each tensor."""
    totals: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for result in results:
        for row in result.counts:
            totals[row.tensor] = [
                a + b for a, b in zip(totals[row.tensor], (row.nan, row.inf, row.overflow), strict=True)
            ]
    return [TensorCounts(tensor, *totals[tensor]) for tensor in sorted(totals)]


def _losses(results: Sequence[RunResult]) -> list[TensorLoss]:
    totals: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for result in results:
        for row in result.losses:
            totals[row.tensor][0] += row.error_squared
            totals[row.tensor][1] += row.value_squared
    return [TensorLoss(tensor, *totals[tensor]) for tensor in sorted(totals)]
