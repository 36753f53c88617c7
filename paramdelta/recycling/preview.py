"""What a recycling would do, step by step, and the room that it takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paramdelta import JSON_VERSION
from paramdelta.recycling.plan import RecyclePlan, Version
from paramdelta.recycling.state import State
from paramdelta.recycling.survey import Surveyed


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a version: ``start`` (m + alpha · delta), ``command``, ``delta`` or ``remove``; what it is in words;
    whether it is done, and the bytes it adds at least (negative: that it gives back)."""

    index: int
    name: str
    kind: str
    text: str
    done: bool
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The steps up to the last version asked for. ``bytes_at_most`` is the most that is needed beside what is there
    already, at any time, and ``bytes_in_the_end`` what stays of it. Both count weights alone, the output of a command
    as large as its start: what else it writes (optimiser states, checkpoints under way) is not known. ``free`` is what
    the file system has."""

    out: Path
    steps: tuple[Step, ...]
    bytes_at_most: int
    bytes_in_the_end: int
    free: int

    def to_dict(self) -> dict[str, Any]:
        """Return the preview as JSON-ready values."""
        return {"version": JSON_VERSION, "kind": "recycle_plan", **asdict(self), "out": str(self.out)}


def preview_of(plan: RecyclePlan, state: State, surveyed: Mapping[int, Surveyed], last: int) -> Preview:
    """Return the steps up to version ``last``."""
    steps = [step for version in plan.versions[:last] for step in _steps(plan, state, version, surveyed)]
    used = most = 0
    for step in steps:
        if not step.done:
            used += step.bytes
            most = max(most, used)
    there = next(p for p in (plan.out, *plan.out.parents) if p.is_dir())
    return Preview(
        out=plan.out,
        steps=tuple(steps),
        bytes_at_most=most,
        bytes_in_the_end=used,
        free=shutil.disk_usage(there).free,
    )


def _steps(plan: RecyclePlan, state: State, version: Version, surveyed: Mapping[int, Surveyed]) -> Iterator[Step]:
    entry = state.of(version.index) if state.begun(version.index) else {}
    sizes = surveyed.get(version.index)
    start, out, delta = (sizes.start_bytes, sizes.out_bytes, sizes.delta_bytes) if sizes else (0, 0, 0)

    def step(kind: str, text: str, done: bool, size: int) -> Step:
        return Step(index=version.index, name=version.name, kind=kind, text=text, done=done, bytes=size)

    before = plan.versions[version.index - 2].name if version.index > 1 else plan.first_delta
    done = "delta" in entry
    made = before is not None
    if made:
        alpha = plan.alpha if isinstance(plan.alpha, int | float | str) else "alpha"
        yield step("start", f"{version.name} + {alpha} * delta of {before}", done or "start" in entry, start)
    trained = done or bool(entry.get("command", {}).get("finished"))
    yield step("command", f"fine-tune {'this' if made else version.name} with the command", trained, out)
    yield step("delta", f"extract the delta: tuned - {version.name}", done, delta)
    gone = [kind for kind in ("starts", "outs") if kind not in plan.keep and (made or kind != "starts")]
    if gone:
        freed = sum(size for kind, size in (("starts", start), ("outs", out)) if kind in gone)
        yield step("remove", f"remove {' and '.join('the ' + kind[:-1] for kind in gone)}", "removed" in entry, -freed)
