"""One merge by many processes: each rank writes its part (:func:`merge_part`), and one process, when all are done,
gathers what they noted and publishes the folder (:func:`finalize`)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta import devices, engine, resuming
from paramdelta.errors import Complaint, InputError, StorageError
from paramdelta.journal import Finished, check_same, identity, rank_journals, rank_name, read_lines, replay
from paramdelta.meeting import Meeting, control_folder, sources_of
from paramdelta.merging import check_space, conclude, prepare
from paramdelta.publish import Staging
from paramdelta.report import MergeReport, RankReport
from paramdelta.shares import Shares

if TYPE_CHECKING:
    from paramdelta.plan import Plan
    from paramdelta.ranks import Rank

Progress = Callable[[int, int], None]
_MOST_NAMED = 20


def merge_part(
    plan: Plan,
    rank: Rank,
    *,
    options: engine.EngineOptions | None = None,
    on_progress: Progress | None = None,
    patience: float = 0.0,
) -> RankReport:
    """Carry out a rank's part of a plan in the folder where the ranks meet, continuing what an earlier run of the rank
    left; publish nothing.

    ``patience``: seconds to wait for an earlier run of this rank that is just ending. Raises InputError where the
    folder holds another merge, or other ranks merge something else; StorageError as :func:`paramdelta.engine.run`,
    or where this rank is running already.
    """
    started = time.perf_counter()
    out = plan.request.out
    if out is None:
        raise InputError(Complaint("out", "a merge needs a folder to write to", "--out DIR"))
    shares, tensors = Shares(plan.work, rank.world), len(plan.names)
    with Meeting(out, rank, patience=patience) as meeting:
        journal, outputs = meeting.join(plan, lambda folder: check_space(plan, folder))
        done = journal.finished
        if done.sources != sources_of(plan):
            journal.add_sources(sources_of(plan))
        work, before = shares.part(rank.number), engine.NOTHING
        options = devices.resolved(options, work)
        if work.unsettled:
            measured = done.measured
            if measured is None:
                before = engine.carry_out(
                    shares.measured_by(rank.number), [], tensors=tensors, options=options, on_progress=on_progress
                )
                journal.add_measured(before.measured)
                measured = list(before.measured)
            work = work.settled(measured)
        noting = resuming.Noting(plan.check_inputs, journal, outputs, lambda: None)
        with plan.watched_inputs():
            result, resumed = resuming.in_segments(work, noting, before, tensors, options, on_progress)
        report = RankReport(
            out=out,
            rank=rank.number,
            ranks=rank.world,
            source=rank.source,
            bytes_read=result.bytes_read,
            bytes_written=result.bytes_written,
            resumed_bytes=resumed,
            seconds=time.perf_counter() - started,
            threads=result.threads,
            slot_bytes=result.slot_bytes,
            isa=result.isa,
        )
        if done.totals is None:
            journal.add_totals({**report.to_dict(), "engine_seconds": result.seconds})
    return report


def finalize(
    out: str | Path,
    *,
    options: engine.EngineOptions | None = None,
    on_progress: Progress | None = None,
    **allowed: Any,
) -> MergeReport:
    """Publish the merge into ``out`` that ranks have carried out.

    Rebuilds the plan from what the ranks noted and the headers of the inputs, checks that it is the same, writes the
    few rows at the borders between ranks (:mod:`paramdelta.shares`), and does the rest as :func:`paramdelta.merge`:
    the same files, the same errors. A refusal or a failure leaves everything for another try.

    Parameters
    ----------
    out : the folder that the ranks were given
    options, on_progress : for the rows at the borders
    **allowed : ``allow_nonfinite``, ``max_quant_error``, ``overwrite``, where another value is to hold than the ranks
        were given

    Raises
    ------
    InputError
        There is no merge of ranks, or inputs have changed since.
    StorageError
        Ranks are missing, unfinished or still running; or reading or writing failed.
    NonFiniteError, PrecisionError
        As :func:`paramdelta.merge`.
    """
    target = Path(out)
    started = time.perf_counter()
    world = _world(target)
    with Staging(target) as staging:
        staging.keep()
        ranks = _finished(staging.control, world)
        plan = _plan(target, staging.control, world, ranks, allowed)
        check_space(plan, staging.folder)
        with plan.watched_inputs():
            result = _written_seam(plan, staging.folder, ranks, options, on_progress)
        resumed = sum(int(rank.totals["resumed_bytes"]) for rank in ranks if rank.totals)
        return conclude(plan, staging, result, resumed=resumed, started=started)


def _world(target: Path) -> int:
    """Return how many ranks work on a folder."""
    control = control_folder(target)
    found = rank_journals(control) if control.is_dir() else []
    sizes = {int(match[1]) for path in found if (match := re.fullmatch(r".*-of-(\d+)", path.name))}
    if not sizes:
        done = target.is_dir() and not control.exists()
        problem = "is published already" if done else f"no merge of several ranks is unfinished ({control})"
        raise InputError(Complaint(str(target), problem, "" if done else "name the folder that the ranks were given"))
    return sizes.pop()


def _finished(control: Path, world: int) -> list[Finished]:
    """Return what each rank noted, or raise StorageError with the ranks that are not done."""
    ranks, missing, unfinished = [], [], []
    for number in range(world):
        lines, _ = read_lines(control / rank_name(number, world))
        finished = replay(lines[1:])
        if not lines:
            missing.append(number)
        elif finished.totals is None:
            unfinished.append(number)
        ranks.append(finished)
    if missing or unfinished:
        parts = [
            f"{text} {_named(numbers)}"
            for text, numbers in (("never began:", missing), ("not finished:", unfinished))
            if numbers
        ]
        raise StorageError(
            f"{control}: of {world} ranks, {'; '.join(parts)}. Nothing was published, nothing is lost: repeat the "
            "command for these ranks, then finalize"
        )
    return ranks


def _named(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MOST_NAMED]))
    return f"{shown} and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else shown


def _plan(target: Path, control: Path, world: int, ranks: list[Finished], allowed: dict[str, Any]) -> Plan:
    """Plan the merge again as the ranks did; raise InputError where anything differs from what they noted."""
    from paramdelta.plan import make_request
    from paramdelta.plan.deltas import folder_options

    lines, _ = read_lines(control / rank_name(0, world))
    sources = dict(ranks[0].sources or {})
    folders, checksums = sources.pop("folders"), sources.pop("checksums")
    given = {name: value for name, value in allowed.items() if value not in (None, False)}
    plan = prepare(make_request(**folder_options(folders), out=target, **lines[0]["request"], **{**sources, **given}))
    who = identity(plan, ranks=world)
    for number in range(world):
        check_same(
            control / rank_name(number, world),
            who,
            f"restore the inputs, or discard what the ranks have written: rm -r {control}",
        )
    if not resuming.all_there(plan.work, control / "output"):
        raise StorageError(
            f"{control / 'output'}: output files are gone or cut short: repeat the command for all ranks"
        )
    return plan if checksums else plan.without_checksums()


def _written_seam(
    plan: Plan, folder: Path, ranks: list[Finished], options: engine.EngineOptions | None, on_progress: Progress | None
) -> engine.RunResult:
    """Write the rows at the borders between ranks; return what all ranks and this process did."""
    seam = Shares(plan.work, len(ranks)).seam
    if seam.unsettled:
        # Each unit was measured by one rank; to the others it is (0, False).
        each = zip(*(rank.measured or [] for rank in ranks), strict=True)
        seam = seam.settled([next((found for found in unit if found != (0.0, False)), unit[0]) for unit in each])
    outputs = engine.create_outputs(plan.work, folder)
    own = engine.carry_out(seam, outputs, tensors=len(plan.names), options=options, on_progress=on_progress)
    totals = [rank.totals or {} for rank in ranks]
    total = replace(
        own,
        seconds=own.seconds + max(t["engine_seconds"] for t in totals),
        bytes_read=own.bytes_read + sum(t["bytes_read"] for t in totals),
        bytes_written=own.bytes_written + sum(t["bytes_written"] for t in totals),
        threads=sum(t["threads"] for t in totals),
        slot_bytes=max(t["slot_bytes"] for t in totals),
        isa=next((t["isa"] for t in totals if t["isa"]), own.isa),
    )
    return resuming.joined(total, [own, *(rank.result() for rank in ranks)])
