"""What can be known before the first command runs: every version opened, of one family, what the plan does to one after
another; and the room that all of it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paramdelta.checkpoint import Checkpoint, describe, hub, open_checkpoint
from paramdelta.deltas import apply_request, extract_request
from paramdelta.errors import CheckpointError, Complaint, InputError, PlanError
from paramdelta.plan import MergeRequest, make_plan, open_all
from paramdelta.recycling.plan import RecyclePlan, Version
from paramdelta.recycling.state import State

_ROLE = "a version"  # as complaints call a checkpoint
_UNPREDICTABLE = ("rename_post", "stacks")  # they are about what the command will have written


@dataclass(frozen=True)
class Surveyed:
    """A version that was opened: its checkpoint, and the bytes that its start (0 where that is the model itself), the
    output of the command (weights alone) and its delta take at least."""

    version: Version
    checkpoint: Checkpoint
    start_bytes: int
    out_bytes: int
    delta_bytes: int


def survey(plan: RecyclePlan, state: State, until: int) -> dict[int, Surveyed]:
    """Open the versions up to ``until`` and check them; those whose deltas are there already may be gone. A version on
    the Hub that is still to do is fetched. Raises InputError with every complaint."""
    wrong = list(_misplaced(plan))
    opened: dict[int, Checkpoint] = {}
    for version in plan.versions[:until]:
        if state.done(version.index) and _on_hub(plan, version):
            continue
        try:
            opened[version.index] = open_version(plan, state, version)
        except CheckpointError as error:
            if not state.done(version.index):
                here = plan.document.complaint(("versions", version.index - 1), "").subject
                wrong += [Complaint(f"{here}: {c.subject}", c.problem, c.remedy) for c in error.complaints]
    found: dict[int, Surveyed] = {}
    for index in opened:
        try:
            found[index] = _surveyed(plan, plan.versions[index - 1], opened)
        except InputError as error:
            if not state.done(index):
                wrong += error.complaints
    wrong += _strangers(plan, opened)
    if wrong:
        raise InputError(wrong)
    return found


def open_version(plan: RecyclePlan, state: State, version: Version) -> Checkpoint:
    """Open the model of a version: a folder, or the snapshot that its identifier names, the very one that it was begun
    with. Raises CheckpointError."""
    folder = plan.path(version.model)
    if _on_hub(plan, version):
        begun = state.of(version.index) if state.begun(version.index) else {}
        text = version.model
        if begun.get("commit") and begun["settings"].get("model") == text:
            text = f"{text.partition('@')[0]}@{begun['commit']}"
        folder = hub.located(text, _ROLE)
    return open_checkpoint(folder, role=_ROLE)


def _on_hub(plan: RecyclePlan, version: Version) -> bool:
    return not os.path.lexists(plan.path(version.model)) and hub.is_identifier(version.model)


def commit_of(checkpoint: Checkpoint) -> str | None:
    """Return the commit of a checkpoint in the Hub's cache."""
    folder = checkpoint.path.resolve()
    return folder.name if folder.parent.name == "snapshots" else None


def family(checkpoint: Checkpoint) -> str:
    """Return what kind of model a checkpoint is, as its config has it: ``llama``."""
    return str(checkpoint.config.get("model_type", "without a model_type"))


def first_delta(plan: RecyclePlan) -> Path | None:
    """Return the folder of the delta that is added to the first version."""
    return None if plan.first_delta is None else plan.path(plan.first_delta)


def _misplaced(plan: RecyclePlan) -> Iterator[Complaint]:
    """Yield complaints about a folder to work in that is, holds or lies in a version; and one without a parent."""
    out = Path(os.path.realpath(plan.out))
    for number, version in enumerate(plan.versions):
        model = Path(os.path.realpath(plan.path(version.model)))
        if model.exists() and (out == model or out in model.parents or model in out.parents):
            problem = f"and the folder to work in, {plan.out}, are one, or one lies in the other"
            yield plan.document.complaint(("versions", number), problem, "name another folder: --out DIR")
    if not out.parent.is_dir():
        problem = f"its parent folder {out.parent} does not exist"
        yield plan.document.complaint(("out",), problem, f"mkdir -p {out.parent}")
    elif out.exists() and not out.is_dir():
        yield plan.document.complaint(("out",), f"{out} exists and is not a folder", "name another: --out DIR")
    if not plan.command.workdir.is_dir():
        yield plan.document.complaint(("workdir",), f"there is no such folder: {plan.command.workdir}")


def _strangers(plan: RecyclePlan, opened: Mapping[int, Checkpoint]) -> Iterator[Complaint]:
    """Yield complaints about versions of another family than the first."""
    of_first = next(((index, family(c)) for index, c in opened.items()), None)
    for index, checkpoint in opened.items():
        if of_first is not None and family(checkpoint) != of_first[1]:
            first = plan.versions[of_first[0] - 1].name
            problem = f"expected a model of one family with {first}, {of_first[1]}, got {family(checkpoint)}"
            yield plan.document.complaint(("versions", index - 1), problem)


def _surveyed(plan: RecyclePlan, version: Version, opened: Mapping[int, Checkpoint]) -> Surveyed:
    checkpoint = opened[version.index]
    size = describe(checkpoint)["bytes"]
    start = 0
    if version.index > 1 or plan.first_delta is not None:
        planned = _applied(plan, version, opened)
        start = size if planned is None else planned
    delta = _extracted(plan, version, checkpoint)
    return Surveyed(version, checkpoint, start, start or size, delta)


def _extracted(plan: RecyclePlan, version: Version, checkpoint: Checkpoint) -> int:
    """Plan the delta of a version, the version itself standing for what the command will leave; return the bytes of it.
    A lossless one takes more, how much is known once there is something to look at."""
    given = {name: value for name, value in plan.extract.items() if name not in ("lossless", *_UNPREDICTABLE)}
    try:
        request = extract_request(post=checkpoint.path, base=checkpoint.path, **given)
        return make_plan(request, *open_all(request)).bytes_written
    except PlanError as error:
        here = plan.document.complaint(("versions", version.index - 1), "").subject
        raise InputError(Complaint(f"{here}: {c.subject}", c.problem, c.remedy) for c in error.complaints) from None


def _applied(plan: RecyclePlan, version: Version, opened: Mapping[int, Checkpoint]) -> int | None:
    """Plan the start of a version, the one before standing for its delta, which is still to come; return the bytes of
    it, None where nothing can be said."""
    given: dict[str, Any] = {"activation_scales": "new-base", **plan.apply, "alpha": plan.alpha}
    new_base = replace(opened[version.index], role="new_base")
    try:
        if version.index == 1:
            delta = first_delta(plan)
            assert delta is not None
            request = apply_request(new_base=new_base.path, deltas=delta, **given)
            return make_plan(request, *open_all(request)).bytes_written
        before = opened.get(version.index - 1)
        if before is None or any(given.get(name) for name in _UNPREDICTABLE):
            return None
        given["new_base"] = new_base.path
        request = MergeRequest.build(post=before.path, base=before.path, **given)
        post, base = (replace(before, role=role) for role in ("post", "base"))
        return make_plan(request, post, base, new_base).bytes_written
    except PlanError as error:
        here = plan.document.complaint(("versions", version.index - 1), "").subject
        what = f"{here}, which the delta of {plan.versions[version.index - 2].name} is for"
        if version.index == 1:
            what = plan.document.complaint(("first_delta",), "").subject
        raise InputError(
            Complaint(f"{what}: {c.subject}", c.problem, f"{c.remedy} (in the plan, under `apply`)" if c.remedy else "")
            for c in error.complaints
        ) from None
