"""The state of a recycling: ``recycle.json`` in its folder, a document for people and programs, replaced in one step
after everything that was done; and the locks that keep a second recycling, and a command left behind, apart from it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paramdelta
from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.documents import read_json
from paramdelta.errors import Complaint, InputError, StorageError, shown, storage_errors
from paramdelta.publish import locked

NAME = "recycle.json"
FOLDERS = ("starts", "outs", "deltas", "logs")
_VERSION = 1
_LOCK = "lock"
_RUNNING = "running"
_PART = f".{NAME}.part"
_MIB = 1 << 20


def now() -> str:
    """Return the time in UTC: ``2026-01-31T10:00:00Z``."""
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


class State:
    """What is done in ``folder``. ``versions`` has a mapping for every version that was begun, in their order:
    ``settings`` and ``inputs`` (fingerprints) it was begun with, then ``start``, ``command`` and ``delta`` as they are
    done. Of the first ``accepted`` versions the settings are not compared any more (``restart_from``)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions: list[dict[str, Any]] = []
        self.accepted = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / NAME

    def of(self, index: int) -> dict[str, Any]:
        """Return what is known of a version that was begun."""
        return self.versions[index - 1]

    def begun(self, index: int) -> bool:
        """Whether a version was begun."""
        return len(self.versions) >= index

    def done(self, index: int) -> bool:
        """Whether the delta of a version is there."""
        return self.begun(index) and "delta" in self.of(index)

    def read(self) -> None:
        """Take over what the file says. Raises InputError where the folder holds other things, or another document."""
        if not self.path.exists():
            other = sorted(set(os.listdir(self.folder)) - {_LOCK, _RUNNING, _PART}) if self.folder.is_dir() else []
            if other:
                problem = f"holds {shown(other[0])} and no {NAME}: it is no folder of a recycling"
                raise InputError(Complaint(str(self.folder), problem, "name another folder: --out DIR"))
            return
        wrong: list[Complaint] = []
        document = read_json(self.folder, NAME, wrong)
        versions, accepted = document.get("versions"), document.get("accepted", 0)
        if not wrong and (document.get("kind") != "recycle" or document.get("version") != _VERSION):
            wrong.append(Complaint(str(self.path), f"expected a recycle document of version {_VERSION}"))
        if not wrong and not (isinstance(versions, list) and all(map(_is_version, versions)) and type(accepted) is int):
            wrong.append(Complaint(str(self.path), "is not what paramdelta recycle writes", "--restart begins anew"))
        if wrong:
            raise InputError(wrong)
        self.versions, self.accepted = document["versions"], accepted

    def write(self) -> None:
        """Replace the file in one step, and see that it is on disk."""
        document = {
            "version": _VERSION,
            "kind": "recycle",
            "paramdelta": paramdelta.__version__,
            "written": now(),
            "accepted": self.accepted,
            "versions": self.versions,
        }
        text = json.dumps(document, indent=2)
        beside = self.folder / _PART
        with storage_errors(self.path, "cannot be written"):
            with open(beside, "w", encoding="ascii") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            sync(self.folder)

    def accept_before(self, first: int | None) -> list[dict[str, Any]]:
        """Keep the versions before ``first`` as they are, whatever they were made with, and return the others, which
        are forgotten. Nothing is written. Raises InputError where one to keep is not done."""
        if first is None:
            return []
        if first > 1 and not self.done(first - 1):
            problem = f"version {first - 1} is not done, so that none can begin with version {first}"
            raise InputError(Complaint("--restart-from", problem))
        gone, self.versions = self.versions[first - 1 :], self.versions[: first - 1]
        self.accepted = first - 1
        return gone

    def restart_from(self, first: int | None) -> None:
        """Do as :meth:`accept_before`, and remove what was made of the forgotten versions once that is written."""
        gone = self.accept_before(first)
        if first is None:
            return
        self.write()
        for entry in gone:
            for kind in FOLDERS:
                remove(self.folder / kind / f"{entry['label']}{'.log' if kind == 'logs' else ''}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second recycling away from the folder, which is made where it is not there. Raises StorageError."""
        try:
            fd = locked(self.folder)
        except BlockingIOError as error:
            text = f"{self.folder}: another recycling works there (its file {_LOCK} is locked)"
            raise StorageError(
                error.errno, text, remedy="wait for it or end it, or name another folder: --out"
            ) from None
        except OSError as error:
            raise StorageError(error.errno, f"{self.folder}: cannot be created: {error.strerror}") from error
        try:
            yield
        finally:
            os.close(fd)

    def forget_command(self) -> None:
        """Let go of the processes of a command that has ended well: whatever it left running is its own affair."""
        with storage_errors(self.folder / _RUNNING, "cannot be removed"):
            (self.folder / _RUNNING).unlink(missing_ok=True)

    @contextlib.contextmanager
    def command_lock(self, what: str) -> Iterator[int]:
        """Yield a descriptor for the command to inherit: as long as any process of it lives, the file stays locked.
        Where it ends well, the file goes away, and what it leaves running is its own affair. Raises StorageError where
        a command of an earlier run is still alive."""
        path = self.folder / _RUNNING
        with storage_errors(path, "cannot be opened"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(error.errno, f"{path}: cannot be locked: {error.strerror}") from error
            alive = _holders(path)
            named = f"process{'es' if len(alive) != 1 else ''} {', '.join(map(str, alive))}" if alive else "a process"
            end = f"wait for it to end, or end it (kill {' '.join(map(str, alive))})" if alive else "wait for it to end"
            text = f"{self.folder}: the command of an earlier run of {what} still lives ({named}) and may write there"
            raise StorageError(error.errno, text, remedy=f"{end}, then repeat the command") from None
        try:
            yield fd
        finally:
            os.close(fd)


def _is_version(entry: Any) -> bool:
    kinds = {"label": str, "settings": dict, "inputs": dict}
    made = {"start": dict, "command": dict, "delta": dict}
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(entry[key], kind) for key, kind in made.items() if key in entry)
        and "/" not in entry["label"]
        and entry["label"] not in ("", ".", "..")
    )


def _holders(path: Path) -> list[int]:
    """Return the processes of this user, except this one, that have a file open."""
    status = path.stat()
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            other = link.stat()
            if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
                found.add(int(link.parts[2]))
    return sorted(found - {os.getpid()})


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return of each file of a checkpoint its size and the SHA-256 of its first and its last MiB, of shards also that
    of the header. Raises StorageError."""
    headers = {file.name: file.digest for file in checkpoint.files}
    found = {}
    for name in sorted({*headers, *checkpoint.side_files}):
        path = checkpoint.path / name
        with storage_errors(path, "cannot be read"), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read(_MIB))
        found[name] = {"bytes": size, "ends_sha256": digest.hexdigest()}
        if name in headers:
            found[name]["header_sha256"] = headers[name]
    return found


def remove(path: Path) -> None:
    """Remove a file, a link or a folder where it is there, and what an unfinished merge has left beside it."""
    with storage_errors(path, "cannot be removed"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    remove_partial(path)


def remove_partial(path: Path) -> None:
    """Remove what a merge into a folder has left beside it; also one that was killed once the folder was there."""
    partial = path.parent / f".{path.name}.partial"
    if partial.is_dir():
        with storage_errors(partial, "cannot be removed"):
            shutil.rmtree(partial)


def sync(folder: Path) -> None:
    """See that the names in a folder are on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
