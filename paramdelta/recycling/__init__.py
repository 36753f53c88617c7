"""Recycling: version after version of a base model, each fine-tuned from the one before: its start is the version and
the delta of the last, a command of the user's fine-tunes it, and what that changed is the next delta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paramdelta import JSON_VERSION
from paramdelta.engine import EngineOptions
from paramdelta.errors import CheckpointError, Complaint, InputError
from paramdelta.journal import differences, listed
from paramdelta.recycling.plan import RecyclePlan, Version, load
from paramdelta.recycling.preview import Preview, Step, preview_of
from paramdelta.recycling.state import State, fingerprint
from paramdelta.recycling.steps import CommandError, Steps, Watcher
from paramdelta.recycling.survey import Surveyed, survey

__all__ = ["CommandError", "Preview", "RecycleReport", "Step", "VersionReport", "Watcher", "preview", "recycle"]


class RecycleInterrupt(KeyboardInterrupt):
    """A recycling was told to stop. The text says how far it is, and what the same command continues with."""


@dataclass(frozen=True, kw_only=True)
class VersionReport:
    """One version: its place, its name and the folder of its model; where its start, the tuned checkpoint and the delta
    are (None where not kept, or not there yet); how often the command ran, and the seconds of the run that ended
    well."""

    index: int
    name: str
    model: str
    start: str | None
    out: str | None
    delta: str | None
    attempts: int
    command_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RecycleReport:
    """What a recycling has come to. ``complete``: every version of the plan has its delta."""

    out: Path
    complete: bool
    versions: tuple[VersionReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"version": JSON_VERSION, "kind": "recycle", **asdict(self), "out": str(self.out)}


def recycle(
    plan: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    until: int | None = None,
    restart: bool = False,
    restart_from: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "auto",
    watcher: Watcher | None = None,
) -> RecycleReport:
    """For each version m_i: fine-tune ``m_i + alpha · Δ_{i−1}`` with a command, and extract ``Δ_i = tuned_i − m_i``.

    The first version is fine-tuned as it is, or with a delta that the plan names. Cut short, even by SIGKILL or a power
    cut, the same call continues: what is done is noted in ``recycle.json``, in the folder that is worked in.

    Parameters
    ----------
    plan : a file in YAML (extra ``yaml``) or JSON, or what one holds (docs/recycling.md)
    out : the folder to work in, in place of the plan's
    until : the last version to do, from 1; by default all
    restart : remove what is there and begin anew
    restart_from : keep the versions before this one as they are, with whatever plan they were made, and begin anew with
        this one
    threads, memory, isa, io, device : of applying and extracting, as in :func:`paramdelta.merge`
    watcher : is told of steps, of warnings, of bytes moved and of the command's output

    Returns
    -------
    RecycleReport

    Raises
    ------
    InputError
        The plan, a version, or what a command left does not do; or a continued plan or its inputs are not what they
        were. Carries every complaint.
    CommandError
        The command did not end well. The same call runs it again.
    NonFiniteError, PrecisionError, StorageError : as :func:`paramdelta.merge`
    KeyboardInterrupt : a signal came; the command got it too, and has ended

    Notes
    -----
    Iterative recycling-then-finetuning, algorithm 1 of fine-tuning transfer (arXiv 2503.20110).
    """
    read = load(plan, out=out)
    last = _last(read, until)
    first = _first(read, restart, restart_from)
    options = EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device)
    watcher = watcher or Watcher()
    surveyed = survey(read, _known(read, first), last)
    state = State(read.out)
    with state.locked():
        state.read()
        with state.command_lock("this recycling"):
            state.forget_command()
            state.restart_from(first)
        steps = Steps(read, state, options, watcher)
        _check_same(steps, surveyed)
        try:
            for version in read.versions[:last]:
                _carry_out(steps, version, surveyed)
        except KeyboardInterrupt:
            at = next((s for s in preview_of(read, state, surveyed, last).steps if not s.done), None)
            where = "" if at is None else f": {at.text}"
            raise RecycleInterrupt(f"the same command continues in {read.out}{where}") from None
        return _report(read, state)


def preview(
    plan: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    until: int | None = None,
    restart: bool = False,
    restart_from: int | None = None,
) -> Preview:
    """Return what :func:`recycle` would do, and the room it takes at least; nothing is written, but versions on the Hub
    are fetched. Raises InputError."""
    read = load(plan, out=out)
    last = _last(read, until)
    state = _known(read, _first(read, restart, restart_from))
    surveyed = survey(read, state, last)
    _check_same(Steps(read, state, EngineOptions(), Watcher()), surveyed)
    return preview_of(read, state, surveyed, last)


def _carry_out(steps: Steps, version: Version, surveyed: Mapping[int, Surveyed]) -> None:
    if steps.state.done(version.index):
        steps.watcher.step(f"{steps.named(version)}: is done")
        steps.tidy(version)
    else:
        steps.carry_out(surveyed[version.index])


def _last(plan: RecyclePlan, until: int | None) -> int:
    if until is not None and not 1 <= until <= len(plan.versions):
        problem = f"expected a number from 1 to {len(plan.versions)}, the versions of the plan, got {until}"
        raise InputError(Complaint("--until", problem))
    return until or len(plan.versions)


def _first(plan: RecyclePlan, restart: bool, restart_from: int | None) -> int | None:
    """Return the version to begin anew with, None for none."""
    if restart_from is not None and (restart or not 1 <= restart_from <= len(plan.versions)):
        problem = f"expected a number from 1 to {len(plan.versions)}, the versions of the plan, got {restart_from}"
        raise InputError(Complaint("--restart-from", "and --restart exclude each other" if restart else problem))
    return 1 if restart else restart_from


def _known(plan: RecyclePlan, first: int | None) -> State:
    """Return the state that there is, as a restart with version ``first`` would leave it; nothing is written."""
    state = State(plan.out)
    state.read()
    state.accept_before(first)
    return state


def _check_same(steps: Steps, surveyed: Mapping[int, Surveyed]) -> None:
    """Raise InputError where a version was begun with other settings or inputs than there are."""
    wrong = []
    first = 0
    plan, state = steps.plan, steps.state
    for index, entry in enumerate(state.versions, 1):
        if index <= state.accepted:
            continue
        now = plan.settings(plan.versions[index - 1]) if index <= len(plan.versions) else {}
        found = differences(_by_argument(entry["settings"]), _by_argument(now))
        if index in surveyed and not found:
            found = _changed_inputs(steps, surveyed[index], entry)
        if found:
            first = first or index
            name = f"{state.path}: version {index} ({entry['settings'].get('name')})"
            wrong.append(Complaint(name, f"was begun with another plan or other inputs:{listed(found)}"))
    if wrong:
        done = sum("delta" in entry for entry in state.versions)
        ways = ["put it back to continue", "--restart removes all of it and begins anew"]
        ways += [f"--restart-from {first} keeps the versions before {first}"] if first > 1 else []
        if first <= done < len(plan.versions):
            ways.append(f"--restart-from {done + 1} keeps all {done} that are done, and the rest is by this plan")
        raise InputError([*wrong[:-1], Complaint(wrong[-1].subject, wrong[-1].problem, "; ".join(ways))])


def _by_argument(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which two commands differ by argument."""
    command = settings.get("command")
    if not isinstance(command, list):
        return settings
    return {**settings, "command": {f"argument {number}": value for number, value in enumerate(command)}}


def _changed_inputs(steps: Steps, surveyed: Surveyed, entry: dict[str, Any]) -> list[str]:
    """Return in what the inputs of a version differ from those it was begun with; what is done may miss its delta."""
    now = {"model": fingerprint(surveyed.checkpoint), "delta": entry["inputs"]["delta"]}
    try:
        now = steps.inputs(surveyed.version, surveyed.checkpoint)
    except CheckpointError:
        if "delta" not in entry:
            raise
    return differences(entry["inputs"], now)


def _report(plan: RecyclePlan, state: State) -> RecycleReport:
    versions = []
    for version in plan.versions[: len(state.versions)]:
        entry = state.of(version.index)
        command = entry.get("command", {})
        ended = [a for a in command.get("attempts", []) if command.get("finished")]
        gone = entry.get("removed", [])
        start = entry.get("start", {}).get("folder")
        of_its_own = entry.get("start", {}).get("delta") is not None
        tuned = command.get("finished") and "outs" not in gone
        versions.append(
            VersionReport(
                index=version.index,
                name=version.name,
                model=entry["folder"],
                start=None if of_its_own and "starts" in gone else start,
                out=str(plan.out / "outs" / version.label) if tuned else None,
                delta=entry.get("delta", {}).get("folder"),
                attempts=len(command.get("attempts", [])),
                command_seconds=ended[-1].get("seconds") if ended else None,
            )
        )
    complete = len(versions) == len(plan.versions) and all(v.delta is not None for v in versions)
    return RecycleReport(out=plan.out, complete=complete, versions=tuple(versions))
