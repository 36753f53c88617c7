"""Merges that differ in their alphas alone, from inputs that are read once: sweeps over alpha, and the straight line
between two checkpoints. Each folder is that of the plain merge with its alphas, to the byte."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta import devices, engine, resuming
from paramdelta.engine import EngineOptions, RunResult
from paramdelta.errors import Complaint, InputError, NonFiniteError, NotPublishedError, PlanError, StorageError
from paramdelta.journal import Journal, identity, read_lines, replay
from paramdelta.merging import PUT_BACK, check_room, judged, with_data_warnings, without_collector, write_side_files
from paramdelta.publish import SweepStaging, mark_of, sync_files
from paramdelta.report import MergeReport, SweepReport

if TYPE_CHECKING:
    from paramdelta.plan import MergeRequest, Plan
    from paramdelta.plan.deltas import Folders

Rules = Mapping[str, float] | str | Sequence[str]


def sweep(
    *,
    post: Folders,
    base: Folders,
    new_base: str | Path,
    out: str | Path,
    alphas: Any,
    alpha: Rules = (),
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "auto",
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **policies: Any,
) -> SweepReport:
    """Write ``new_base + alpha · (post − base)`` as a checkpoint folder for every alpha, reading the inputs once.

    Each folder is the one that :func:`paramdelta.merge` writes with that alpha, byte for byte, and is published by
    itself when all are done.

    Parameters
    ----------
    post, base, new_base, threads, memory, isa, io, restart, checksums, on_progress : as in :func:`paramdelta.merge`
    out : the folder of the folders, which are called ``alpha-0.5`` and so on; or a pattern for them: ``runs/m-{alpha}``
    alphas : numbers, for all deltas; of several deltas also lists, with a number for each delta. As strings they are
        spelled as on the command line: ``"0,0.5,1"``, or ``"2:0,0.5,1"`` for the second delta
    alpha : what does not vary: rules for the tensors of a glob (``{"lm_head*": 0}``, ``"lm_head*=0"``), or for a delta
        that ``alphas`` leaves out (``"1:0.8"``)
    **policies : the other policies of :func:`paramdelta.merge`

    Returns
    -------
    SweepReport

    Raises
    ------
    InputError, StorageError
        As :func:`paramdelta.merge`. Where publishing is cut short, folders that are there are complete, and the same
        call continues with the rest.
    NonFiniteError, PrecisionError
        Folders were not published, because of their own results; the others were. ``report`` is the SweepReport.

    Notes
    -----
    What is quantised in new_base is merged with an alpha of 0 in a pass of its own, which reads new_base.
    """
    requests = make_requests(alphas, out=out, alphas=_rules(alpha), post=post, base=base, new_base=new_base, **policies)
    options = EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device)
    plans = prepare(requests, restart=restart)
    return run_sweep(plans, options=options, restart=restart, checksums=checksums, on_progress=on_progress)


def interpolate(
    a: str | Path,
    b: str | Path,
    *,
    at: Any,
    out: str | Path,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "auto",
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **policies: Any,
) -> SweepReport:
    """Write ``A + t · (B − A)`` as a checkpoint folder for every t: the straight line between two checkpoints.

    The sweep with post = B and base = new_base = A. At t = 0 all weights are A's, byte for byte. At t = 1 they are B's
    up to the sign of zero where both binary64 operations are exact: always for f16, for bf16 where the exponents of a
    and b lie within 44 of each other, for f32 within 28. Elsewhere they are within the merge's one rounding, and what
    is quantised is quantised again. Tokenizer and chat template are B's, config and names of tensors A's.

    Parameters
    ----------
    a, b : checkpoint folders
    at : numbers t, which may lie outside of 0 … 1; or a string, ``"0,0.25,1"``
    out : the folder of the folders, which are called ``at-0.25`` and so on; or a pattern for them: ``line/{at}``

    The others, what is returned and what is raised are as in :func:`sweep`.
    """
    requests = make_requests(at, out=out, word="at", option="--at", post=b, base=a, new_base=a, **policies)
    options = EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device)
    plans = prepare(requests, restart=restart)
    return run_sweep(plans, options=options, restart=restart, checksums=checksums, on_progress=on_progress)


def _rules(alpha: Any) -> tuple[str, ...]:
    """Return rules as the command line spells them."""
    if isinstance(alpha, Mapping):
        return tuple(f"{glob}={value}" for glob, value in alpha.items())
    return (str(alpha),) if isinstance(alpha, (str, int, float)) else tuple(str(rule) for rule in alpha)


def make_requests(values: Any, *wrong: Complaint, **options: Any) -> list[MergeRequest]:
    """Return a request for each variant, as :func:`paramdelta.plan.variants.make_requests`. Where they are wrong, or
    ``wrong`` names what the caller found, the folders are looked at too, so that one run shows everything. Raises
    PlanError."""
    from paramdelta.plan import make_request, variants

    found = list(wrong)
    try:
        requests = variants.make_requests(values, **options)
    except PlanError as error:
        found += error.complaints
    else:
        if not found:
            return requests
    make_request(*found, **{role: options[role] for role in ("post", "base", "new_base")})
    raise PlanError(found)


def prepare(requests: Sequence[MergeRequest], *, restart: bool = False) -> list[Plan]:
    """Open the folders once and plan every merge; raise PlanError with every complaint. Folders that a run, cut short,
    has published already may be there, unless ``restart``."""
    from paramdelta.plan import make_plan, open_all

    bare = [dataclasses.replace(request, out=None) for request in requests]
    wrong = _check_targets(requests, restart=restart)
    try:
        with without_collector():
            opened = open_all(bare[0])
            wrong += _check_links(requests, opened)
            plans = [make_plan(request, *opened) for request in bare]
    except PlanError as error:
        raise PlanError([*wrong, *error.complaints]) from None
    if wrong:
        raise PlanError(wrong)
    plans = [dataclasses.replace(p, request=r) for p, r in zip(plans, requests, strict=True)]
    return [with_data_warnings(plan) for plan in plans]


def _check_targets(requests: Sequence[MergeRequest], *, restart: bool) -> list[Complaint]:
    from paramdelta.plan.target import check_target

    parent = _out(requests[0]).parent
    if not parent.is_dir():  # it will be made
        return check_target(dataclasses.replace(requests[0], out=parent))
    control = parent / SweepStaging.NAME
    marks = {} if restart else replay(read_lines(control / Journal.NAME)[0][1:]).publishing or {}
    wanted = [r for r in requests if mark_of(_out(r), _record()) != marks.get(_out(r).name, [])]
    return [complaint for request in wanted for complaint in check_target(request)]


def _check_links(requests: Sequence[MergeRequest], opened: Any) -> list[Complaint]:
    from paramdelta.plan.target import check_links

    return [complaint for request in requests for complaint in check_links(request, opened)]


def _out(request: MergeRequest) -> Path:
    if request.out is None:
        raise InputError(Complaint("out", "a sweep needs a folder to write to", "--out DIR"))
    return request.out


def _record() -> str:
    from paramdelta.plan.sidefiles import RECORD

    return RECORD


def run_sweep(
    plans: Sequence[Plan],
    *,
    options: EngineOptions | None = None,
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Carry out the plans of a sweep and publish their folders, continuing what an earlier run left unless ``restart``.
    Raises what :func:`sweep` raises while running."""
    started = time.perf_counter()
    outs = [_out(plan.request) for plan in plans]
    if not checksums:
        plans = [plan.without_checksums() for plan in plans]
    with SweepStaging(outs[0].parent, [out.name for out in outs]) as staging:
        if staging.put_back and not plans[0].request.overwrite:
            raise StorageError(PUT_BACK.format(staging.target), remedy="--overwrite replaces it, or name another --out")
        if restart:
            staging.clear()
        with ExitStack() as stack:
            report, errors = _Run(plans, staging, stack, options, on_progress).run()
    report = dataclasses.replace(report, seconds=time.perf_counter() - started)
    if errors:
        nonfinite = any(isinstance(error, NonFiniteError) for error in errors)
        kind = NonFiniteError if nonfinite else type(errors[0])
        there = len(plans) - len(errors)
        told = f"{there} of {len(plans)} folders of the sweep {'is' if there == 1 else 'are'} published, complete"
        raise kind("\n".join([*map(str, errors), told]), report)
    return report


class _Run:
    """One sweep on its way: which of its folders are done, and which published."""

    def __init__(
        self,
        plans: Sequence[Plan],
        staging: SweepStaging,
        stack: ExitStack,
        options: EngineOptions | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        from paramdelta.plan.variants import passes_of

        self.plans, self.staging, self.stack = plans, staging, stack
        self.on_progress = on_progress
        self.names = [_out(plan.request).name for plan in plans]
        self.passes = passes_of(plans)
        self.options = devices.resolved(options, self.passes[0].work)
        self.journals: list[Journal] = []
        self.published: dict[str, Any] = {}  # marks by name
        # What fits a segment is done again where it is cut short; only its publication is noted.
        self.large = (
            sum(plan.bytes_written for plan in plans) > resuming.segment_bytes()
            or (staging.control / Journal.NAME).exists()
        )

    def run(self) -> tuple[SweepReport, list[NotPublishedError]]:
        """Carry out and publish; return what was done, and why folders were not published."""
        for plan in self.plans[:1]:
            plan.check_inputs()
        if self.large:
            self.open_journals()
        resumed = [0] * len(self.plans)
        with self.plans[0].watched_inputs():
            if self.large and self.journals[0].finished.publishing is not None:
                self.look_around(self.journals[0].finished.publishing)
                results = [journal.finished.result() for journal in self.journals]
                resumed = [plan.bytes_written for plan in self.plans]
            else:
                results = self.carry_out(resumed)
            return self.conclude(results, resumed)

    def open_journals(self) -> None:
        """Open a journal for each pass. Raises InputError where they are of another sweep."""
        who = identity(self.plans[0], works=[p.work for p in self.passes])
        who["request"]["alphas"] = [plan.request.to_dict()["alphas"] for plan in self.plans]
        who["folders"] = self.names
        for number in range(len(self.passes)):
            name = f"{Journal.NAME}-{number + 1}" if number else Journal.NAME
            journal = Journal(self.staging.control, who, restart=False, name=name)
            self.journals.append(self.stack.enter_context(closing(journal)))

    def look_around(self, marks: dict[str, Any]) -> None:
        """Find out what a run that was cut short while it published has published."""
        lost = []
        for name, mark in marks.items():
            if mark_of(self.staging.target / name, _record()) == mark:
                self.published[name] = mark
            elif (mark_of(self.staging.folder / name, _record()) or [None])[0] != mark[0]:
                lost.append(name)
        if lost:
            problem = f"holds an unfinished sweep, of which folders went away: {', '.join(lost)}"
            raise InputError(Complaint(str(self.staging.control), problem, "--restart discards it and begins anew"))

    def carry_out(self, resumed: list[int]) -> list[RunResult]:
        """Make the weights of all folders; note in ``resumed`` how many bytes of each were there already."""
        check_room(sum(size for p in self.plans for _, size in p.work.outputs), self.staging.folder)
        if not self.large:
            self.staging.clear()
        results = []
        read = written = 0
        for number, one in enumerate(self.passes):
            plan = self.plans[one.members[0]]
            folders = [self.staging.folder / self.names[member] for member in one.members]
            shown = None if self.on_progress is None else _behind(self.on_progress, read, written)
            if self.large:
                result, there = resuming.carry_on(
                    plan,
                    one.work,
                    self.journals[number],
                    self.staging,
                    folders,
                    options=self.options,
                    on_progress=shown,
                )
                for member in one.members:
                    resumed[member] = there // len(one.members)
            else:
                outputs = [path for folder in folders for path in engine.create_outputs(one.work, folder)]
                result = engine.run(one.work, outputs, tensors=len(plan.names), options=self.options, on_progress=shown)
            read, written = read + result.bytes_read, written + result.bytes_written
            results.append(result)
        return results

    def conclude(self, results: Sequence[RunResult], resumed: list[int]) -> tuple[SweepReport, list[NotPublishedError]]:
        """Write the small files of every folder, and publish those whose results allow it."""
        reports: dict[int, MergeReport] = {}
        errors: list[NotPublishedError] = []
        ready = []
        for one, result in zip(self.passes, results, strict=True):
            for variant, member in enumerate(one.members):
                plan, name = self.plans[member], self.names[member]
                own = result.of_variant(variant, one.work.variants, len(plan.names))
                own = dataclasses.replace(
                    own, counts=tuple(c for c in own.counts if c.tensor not in one.copied[variant])
                )
                reports[member], error = judged(
                    plan, own, resumed=resumed[member], outcome=f"{plan.request.out} was not published"
                )
                if name in self.published:
                    reports[member] = dataclasses.replace(reports[member], out=plan.request.out)
                    continue
                if error is not None:
                    errors.append(error)
                write_side_files(plan, self.staging.folder / name, own)
                if error is None:
                    ready.append(member)
        self.plans[0].check_inputs()
        self.publish(sorted(ready), results)
        if not errors or not self.large:
            self.staging.finished()
        report = SweepReport(
            out=self.staging.target,
            folders=tuple(reports[member] for member in range(len(self.plans))),
            passes=len(self.passes),
            bytes_read=sum(result.bytes_read for result in results),
            bytes_written=sum(result.bytes_written for result in results),
            seconds=0.0,
            engine_seconds=sum(result.seconds for result in results),
            resumed_bytes=sum(resumed),
        )
        return report, errors

    def publish(self, members: Sequence[int], results: Sequence[RunResult]) -> None:
        """Rename what is ready, having noted it, so that the same command continues between two renames."""
        for member in members:
            sync_files(self.staging.folder / self.names[member])
        if len(members) > 1 and not self.journals:
            self.open_journals()
            for journal, result in zip(self.journals, results, strict=True):
                journal.add_segment(0, result)
        if self.journals:
            marks = {self.names[m]: mark_of(self.staging.folder / self.names[m], _record()) for m in members}
            self.journals[0].add_publishing({**self.published, **marks})
        for member in members:
            self.staging.publish_one(self.names[member], overwrite=self.plans[member].request.overwrite)


def _behind(on_progress: Callable[[int, int], None], read: int, written: int) -> Callable[[int, int], None]:
    """Return what tells progress behind bytes that earlier passes moved."""
    return lambda more_read, more_written: on_progress(read + more_read, written + more_written)


def bytes_moved(plans: Sequence[Plan]) -> int:
    """Return the bytes of tensor data that a sweep reads and writes."""
    from paramdelta.plan.variants import passes_of

    return sum(one.work.bytes_read() for one in passes_of(plans)) + sum(plan.bytes_written for plan in plans)
