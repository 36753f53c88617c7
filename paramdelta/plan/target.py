"""Checks where the output is to go, before anything is written: inputs are never touched, outputs never replaced
unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from paramdelta.checkpoint import Checkpoint
from paramdelta.errors import Complaint
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.sidefiles import RECORD


def check_target(request: MergeRequest) -> list[Complaint]:
    """Return what is wrong with the output folder."""
    if request.out is None:
        return []
    try:
        return _check(request, request.out)
    except OSError as error:  # a name too long, links in a circle, a folder that may not be entered
        return [Complaint(str(request.out), f"cannot be written to: {error.strerror}", "name another --out")]


def _check(request: MergeRequest, out: Path) -> list[Complaint]:
    wrong = [c for role, folder in request.folders.items() if (c := _overlap(out, folder, role)) is not None]
    parent = out.absolute().parent
    if not parent.is_dir():
        wrong.append(Complaint(str(out), f"its parent folder {parent} does not exist", f"mkdir -p {parent}"))
    elif not os.access(parent, os.W_OK | os.X_OK):
        read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        why = "it lies on a file system that is mounted read-only" if read_only else "its permissions forbid it"
        wrong.append(
            Complaint(str(out), f"its parent folder {parent} cannot be written to: {why}", "name another --out")
        )
    if out.is_symlink():
        wrong.append(
            Complaint(
                str(out), f"is a symbolic link, to {os.readlink(out)}", "name the folder itself, or name another --out"
            )
        )
    elif out.exists() and not out.is_dir():
        wrong.append(Complaint(str(out), "exists and is not a folder", "name another --out"))
    elif out.is_dir() and not request.overwrite:
        wrong.append(Complaint(str(out), "exists already", "--overwrite replaces it, or name another --out"))
    elif out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        wrong.append(
            Complaint(
                str(out),
                f"--overwrite replaces only folders that a merge wrote, and this one has no {RECORD}",
                "remove it yourself, or name another --out",
            )
        )
    return wrong


def check_links(request: MergeRequest, checkpoints: Iterable[Checkpoint]) -> list[Complaint]:
    """Return the files of the inputs that are links into the output folder: replacing it would take them away."""
    if request.out is None:
        return []
    target = Path(os.path.realpath(request.out))
    return [
        Complaint(
            str(checkpoint.path / name),
            f"really lies in the output folder {request.out}, which would be replaced",
            "name another --out",
        )
        for checkpoint in checkpoints
        for name in (*(f.name for f in checkpoint.files), *checkpoint.side_files)
        if target in Path(os.path.realpath(checkpoint.path / name)).parents
        and target not in Path(os.path.realpath(checkpoint.path)).parents
    ]


def _overlap(out: Path, folder: Path, role: str) -> Complaint | None:
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(folder))
    if target == source:
        return Complaint(str(out), f"is {role} itself: inputs are never written to", "name another --out")
    if source in target.parents:
        return Complaint(str(out), f"lies inside {role}: inputs are never written to", "name another --out")
    if target in source.parents:
        return Complaint(str(out), f"contains {role}: it would be replaced with it", "name another --out")
    return None
