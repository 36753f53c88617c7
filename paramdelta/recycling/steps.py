"""Takes one version through its steps: its start, the command, its delta. Each is noted when it is done, and each may
be cut short anywhere: folders that paramdelta writes are absent or complete, a command counts once its end is noted."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta.checkpoint import Checkpoint, open_checkpoint
from paramdelta.deltas import apply_request, extract_request
from paramdelta.engine import EngineOptions
from paramdelta.errors import CheckpointError, Complaint, InputError, ParamDeltaError, storage_errors
from paramdelta.journal import Journal, differences, identity, listed, read_lines
from paramdelta.merging import prepare, run_merge
from paramdelta.publish import sync_files
from paramdelta.recycling import training
from paramdelta.recycling.plan import RecyclePlan, Version
from paramdelta.recycling.state import FOLDERS, State, fingerprint, now, remove, remove_partial, sync
from paramdelta.recycling.survey import Surveyed, commit_of, family, first_delta

if TYPE_CHECKING:
    from paramdelta.plan import MergeRequest, Plan

_MOST_LISTED = 5


class CommandError(ParamDeltaError, RuntimeError):
    """The command that fine-tunes did not end well. ``command_exit_code`` is its exit code, of a signal minus its
    number; ``log`` is where its output is."""

    def __init__(self, text: str, *, command_exit_code: int, log: Path, remedy: str) -> None:
        super().__init__(text)
        self.command_exit_code, self.log, self.remedy = command_exit_code, log, remedy


class Watcher:
    """What is told of a recycling while it runs; this one listens to nothing. Derive from it what does."""

    show_output = False  # whether `output` is to be called

    def step(self, text: str) -> None:
        """A step begins, or is found done."""

    def warn(self, warnings: Iterable[str]) -> None:
        """Lines that a person should read."""

    def output(self, data: bytes) -> None:
        """Output of the command, as it comes."""

    @contextlib.contextmanager
    def moving(self, total: int, doing: str) -> Iterator[Callable[[int, int], None] | None]:
        """Data is about to be read and written, ``total`` bytes; yield what is to be called with both, or None."""
        yield None


class Steps:
    """The steps of the versions of one plan."""

    def __init__(self, plan: RecyclePlan, state: State, options: EngineOptions, watcher: Watcher) -> None:
        self.plan, self.state, self.options, self.watcher = plan, state, options, watcher

    def folder(self, kind: str, version: Version) -> Path:
        """Return where something of a version is."""
        return self.plan.out / kind / version.label

    def delta_for(self, version: Version) -> Path | None:
        """Return the delta that a version starts with."""
        if version.index == 1:
            return first_delta(self.plan)
        return self.folder("deltas", self.plan.versions[version.index - 2])

    def carry_out(self, surveyed: Surveyed) -> None:
        """Take a version through all that is still to do."""
        version, model = surveyed.version, surveyed.checkpoint
        if not self.state.begun(version.index):
            self._begin(version, model)
        entry = self.state.of(version.index)
        if "delta" not in entry:
            for kind in FOLDERS:
                with storage_errors(self.plan.out / kind, "cannot be created"):
                    (self.plan.out / kind).mkdir(exist_ok=True)
            start = self._start(version, model, entry)
            out = self.folder("outs", version)
            if not (entry.get("command", {}).get("finished") and os.path.lexists(out)):
                self._train(version, entry, start, out)
            self._extract(version, model, entry, out)
        self.tidy(version)

    def _begin(self, version: Version, model: Checkpoint) -> None:
        """Note what the version is made of."""
        self.state.versions.append(
            {
                "label": version.label,
                "begun": now(),
                "folder": str(model.path.absolute()),
                "commit": commit_of(model),
                "settings": self.plan.settings(version),
                "inputs": self.inputs(version, model),
            }
        )
        self.state.write()

    def inputs(self, version: Version, model: Checkpoint) -> dict[str, Any]:
        """Return the fingerprints of what a version is made of. Raises InputError where the delta is not the one that
        was extracted."""
        delta = self.delta_for(version)
        found = None if delta is None else fingerprint(open_checkpoint(delta, role="delta"))
        if version.index > 1:
            changed = differences(self.state.of(version.index - 1)["delta"]["files"], found)
            if changed:
                problem = f"is not as it was extracted:{listed(changed)}"
                remedy = f"--restart-from {version.index - 1} makes it again"
                raise InputError(Complaint(str(delta), problem, remedy))
        return {"model": fingerprint(model), "delta": found}

    def _start(self, version: Version, model: Checkpoint, entry: dict[str, Any]) -> Path:
        """Return the folder that the command starts from, made where it is not there."""
        delta = self.delta_for(version)
        if delta is None:
            start = model.path.absolute()
        else:
            start = self.folder("starts", version)
            if not start.is_dir():
                self.watcher.step(f"{self.named(version)}: starts from {version.name} and the delta {delta.name}")
                given = {"alpha": self.plan.alpha, **self.plan.apply}
                self._merge(apply_request(new_base=model.path, deltas=delta, out=start, **given), "applying")
            remove_partial(start)
        if "start" not in entry:
            entry["start"] = {"folder": str(start), "delta": None if delta is None else str(delta), "written": now()}
            self.state.write()
        return start

    def _train(self, version: Version, entry: dict[str, Any], start: Path, out: Path) -> None:
        """Run the command, and note how it ended."""
        log = self.plan.out / "logs" / f"{version.label}.log"
        places = {"start": str(start), "out": str(out), "version": version.name, "index": str(version.index)}
        variables = {f"PARAMDELTA_{name.upper()}": value for name, value in places.items()}
        arguments = self.plan.command.filled(places)
        with self.state.command_lock(self.named(version)) as lock:
            if self.plan.unfinished == "remove":
                remove(out)
            attempt: dict[str, Any] = {"begun": now()}
            attempts = [*entry.get("command", {}).get("attempts", []), attempt]
            entry["command"] = {"arguments": arguments, "log": str(log), "finished": False, "attempts": attempts}
            self.state.write()
            self.watcher.step(f"{self.named(version)}: {shlex.join(arguments)}")
            with storage_errors(log, "cannot be written"), open(log, "a", encoding="utf-8") as file:
                file.write(f"# attempt {len(attempts)}, {attempt['begun']}: {shlex.join(arguments)}\n")

            def note_process(number: int) -> None:
                attempt["process"] = number
                self.state.write()

            ended = training.run(
                arguments,
                workdir=self.plan.command.workdir,
                env={**os.environ, **self.plan.command.env, **variables},
                log=log,
                lock=lock,
                on_output=self.watcher.output if self.watcher.show_output else None,
                on_start=note_process,
            )
            attempt |= {"ended": now(), "seconds": round(ended.seconds, 3), "exit_code": ended.exit_code}
            if ended.interrupted:
                attempt["interrupted"] = True
            elif ended.exit_code == 0 and os.path.lexists(out):
                sync_files(out)
                sync(out.parent)
                entry["command"]["finished"] = True
            self.state.write()
            if entry["command"]["finished"]:
                self.state.forget_command()
        if ended.interrupted:
            raise KeyboardInterrupt
        if not entry["command"]["finished"]:
            raise self._failed(version, ended, out, log)

    def _failed(self, version: Version, ended: training.Ended, out: Path, log: Path) -> CommandError:
        nothing = f", but left nothing in {out}" if ended.exit_code == 0 else ""
        lines = "".join(f"\n    {line}" for line in ended.tail) or "\n    (none)"
        kept = "removed" if self.plan.unfinished == "remove" else "there for it"
        return CommandError(
            f"the command of {self.named(version)} ended with {ended.spelled}{nothing}; the last lines of its output, "
            f"which is in {log}:{lines}",
            command_exit_code=ended.exit_code,
            log=log,
            remedy=f"paramdelta recycle, repeated, runs this command again; what it left in {out} is then {kept}. With "
            f"another command: --restart-from {version.index}",
        )

    def _extract(self, version: Version, model: Checkpoint, entry: dict[str, Any], out: Path) -> None:
        """Check what the command left, and take the delta out of it."""
        target = self.folder("deltas", version)
        if not target.is_dir():
            changed = differences(entry["inputs"]["model"], fingerprint(open_checkpoint(model.path, role=version.name)))
            if changed:
                problem = f"changed while {self.named(version)} was made of it:{listed(changed)}"
                raise InputError(Complaint(str(model.path), problem, f"--restart-from {version.index} begins it anew"))
            self._check_tuned(version, model, out)
            self.watcher.step(f"{self.named(version)}: extracts its delta, {out.name} - {version.name}")
            self._merge(extract_request(post=out, base=model.path, out=target, **self.plan.extract), "extracting")
        remove_partial(target)
        files = fingerprint(open_checkpoint(target, role="delta"))
        entry["delta"] = {"folder": str(target), "written": now(), "files": files}
        self.state.write()

    def _check_tuned(self, version: Version, model: Checkpoint, out: Path) -> None:
        """Raise InputError where the command left no checkpoint, or one of another family."""
        left = f"the command of {self.named(version)} has to leave the tuned checkpoint there"
        again = "repair it, or remove it to have the command run again; then repeat"
        try:
            tuned = open_checkpoint(out, role="what was left")
        except CheckpointError as error:
            wrong = [Complaint(c.subject, c.problem, c.remedy) for c in error.complaints]
            inner = sorted(path.parent.name for path in out.glob("*/config.json"))[:_MOST_LISTED]
            found = f"; there are checkpoints in {', '.join(inner)}" if inner else ""
            raise InputError([*wrong, Complaint(str(out), f"{left}, not deeper{found}", again)]) from None
        if family(tuned) != family(model):
            problem = (
                f"expected a model of one family with {version.name}, {family(model)}, got {family(tuned)}; {left}"
            )
            raise InputError(Complaint(str(out), problem, again))

    def tidy(self, version: Version) -> None:
        """Remove what need not stay of a version that is done."""
        entry = self.state.of(version.index)
        if "removed" in entry:
            return
        gone = [kind for kind in ("starts", "outs") if kind not in self.plan.keep]
        for kind in gone:
            remove(self.folder(kind, version))
        entry["removed"] = gone
        self.state.write()

    def _merge(self, request: MergeRequest, doing: str) -> None:
        """Carry a request out. What an earlier run left of it is continued where it is of the same inputs, byte for
        byte and time for time, and begun anew where it is not: whether the inputs will do was decided before."""
        plan = prepare(request)
        self.watcher.warn(plan.warnings)
        with self.watcher.moving(plan.bytes_read + plan.bytes_written, doing) as on_progress:
            run_merge(plan, options=self.options, restart=_is_another(plan), on_progress=on_progress)

    def named(self, version: Version) -> str:
        """Return a version in words: ``version 2 of 3 (v2)``."""
        return f"version {version.index} of {len(self.plan.versions)} ({version.name})"


def _is_another(plan: Plan) -> bool:
    """Whether there is an unfinished merge into the same folder, of another request or other inputs."""
    out = plan.request.out
    assert out is not None
    lines, _ = read_lines(out.parent / f".{out.name}.partial" / Journal.NAME)
    return bool(lines and differences(lines[0], identity(plan)))
