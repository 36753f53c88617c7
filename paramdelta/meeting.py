"""Where the ranks of a merge meet: the temporary folder beside the output. They never need to talk.

All ranks hold the folder's lock together, so that a merge of another job, which wants it alone, is refused. Each rank
holds its own journal locked, so that no rank runs twice. What only one may do at a time, looking at what the others say
they merge and creating the output files, happens behind a *door*: a lock that is held for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta import engine, publish
from paramdelta.errors import Complaint, InputError, StorageError
from paramdelta.journal import Journal, check_same, identity, rank_journals, rank_name
from paramdelta.publish import DOOR, locked
from paramdelta.resuming import all_there

if TYPE_CHECKING:
    from paramdelta.plan import Plan
    from paramdelta.ranks import Rank

_DOOR_SECONDS = 600.0  # opening it takes a moment; who waits so long waits for a dead machine's lock
_LEAVING_SECONDS = 1.0  # whoever leaves an empty folder locks it alone to remove it
_WAKE_SECONDS = 0.05


def control_folder(target: Path) -> Path:
    """Return the temporary folder of a merge into ``target``."""
    return target.parent / f".{target.name}.partial"


class Meeting:
    """One rank's place in the temporary folder of ``target``. ``patience``: seconds to wait for a rank's predecessor
    that was killed a moment ago, and for its machine to let go of its locks."""

    def __init__(self, target: Path, rank: Rank, *, patience: float = 0.0) -> None:
        self.target, self.rank, self.patience = target, rank, patience
        self.control = control_folder(target)
        self.folder = self.control / "output"
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Meeting:
        with self._open:
            lock = self._patiently(
                lambda: locked(self.control, shared=True),
                f"{self.target}: another merge is writing it (its folder {self.control} is locked)",
            )
            self._open.callback(self._leave, lock)
            self._open = self._open.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._open.close()
        if kind is not None and not issubclass(kind, InputError) and self._noted():
            publish.kept.append(self.control)

    def _leave(self, lock: int) -> None:
        """Let the folder go; where nobody else is in it and nothing is noted in it, remove it."""
        try:
            if not self._noted() and _try_lock(lock) and not self._noted():
                shutil.rmtree(self.control, ignore_errors=True)
        finally:
            os.close(lock)

    def _noted(self) -> bool:
        return bool(self._others(""))

    def join(self, plan: Plan, check: Callable[[Path], None]) -> tuple[Journal, list[Path]]:
        """Take this rank's journal, make sure that the others merge the same, and create the output files if nobody
        has; ``check`` is called with their folder first. Return the journal and the output files.

        Raises InputError where the folder holds another merge, StorageError where this rank runs already.
        """
        who = identity(plan, ranks=self.rank.world)
        name = rank_name(self.rank.number, self.rank.world)
        with self._door():
            for path in self._others(name):
                check_same(
                    path,
                    who,
                    f"give every rank the command that was begun; to discard what is there: rm -r {self.control}",
                )
            self._take(self.control / name)
            self.folder.mkdir(exist_ok=True)
            if not all_there(plan.work, self.folder):
                self._forget(name)
                check(self.folder)
                outputs = engine.create_outputs(plan.work, self.folder)
            else:  # headers are written once: a page of theirs may hold another rank's bytes
                outputs = [self.folder / file for file, _ in plan.work.outputs]
            journal = Journal(self.control, who, restart=False, name=name)
        self._open.callback(journal.close)
        return journal, outputs

    def _others(self, name: str) -> list[Path]:
        alone = self.control / Journal.NAME
        found = [path for path in rank_journals(self.control) if path.name != name]
        return [*([alone] if alone.exists() and alone.stat().st_size else []), *found]

    def _take(self, path: Path) -> None:
        """Lock this rank's journal for as long as the meeting lasts."""

        def take() -> int:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise
            return fd

        fd = self._patiently(take, f"{self.target}: {self.rank} of this merge is running already ({path} is locked)")
        self._open.callback(os.close, fd)

    def _forget(self, name: str) -> None:
        """Output files are missing: what the journals call finished is gone. None of a running rank's may be."""
        for path in rank_journals(self.control):
            if path.name != name and _is_locked(path):
                raise StorageError(
                    f"{self.folder}: output files are gone while the rank of {path.name} is writing them"
                )
        for path in rank_journals(self.control):
            os.truncate(path, 0)

    @contextlib.contextmanager
    def _door(self) -> Iterator[None]:
        try:
            fd = os.open(self.control / DOOR, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                deadline = time.monotonic() + _DOOR_SECONDS
                while not _try_lock(fd):
                    if time.monotonic() > deadline:
                        raise StorageError(errno.ETIMEDOUT, f"{self.control / DOOR}: locked by another rank too long")
                    time.sleep(_WAKE_SECONDS)
                yield
            finally:
                os.close(fd)
        except (StorageError, InputError):
            raise
        except OSError as error:
            raise StorageError(error.errno, f"{self.control}: ranks cannot meet there: {error.strerror}") from error

    def _patiently(self, take: Callable[[], int], refusal: str) -> int:
        deadline = time.monotonic() + max(self.patience, _LEAVING_SECONDS)
        while True:
            try:
                return take()
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise StorageError(error.errno, refusal) from error
                time.sleep(_WAKE_SECONDS)
            except OSError as error:
                text = f"{self.control}: cannot create the temporary folder: {error.strerror}"
                raise StorageError(error.errno, text) from error


def discard(target: Path) -> None:
    """Remove what an earlier merge into ``target`` left, if nobody is working on it."""
    control = control_folder(target)
    if not control.exists():
        return
    try:
        fd = locked(control)
        try:
            shutil.rmtree(control)
        finally:
            os.close(fd)
    except OSError as error:
        reason = "another merge is writing it" if isinstance(error, BlockingIOError) else error.strerror
        raise StorageError(error.errno, f"{control}: cannot be discarded: {reason}") from error


def refuse_restart(target: Path) -> InputError:
    """Return why ranks that nobody coordinates cannot begin anew."""
    return InputError(
        Complaint(
            "--restart",
            "a rank on its own cannot tell what the others have written since they began anew from what is to go",
            f"before any rank starts: rm -r {control_folder(target)}",
        )
    )


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _try_lock(fd)
    finally:
        os.close(fd)


def sources_of(plan: Plan) -> dict[str, Any]:
    """Return what whoever publishes needs to know beside the request: where the inputs lie, and what is allowed."""
    request = plan.request
    return {
        "folders": {role: os.path.abspath(folder) for role, folder in request.folders.items()},
        "allow_nonfinite": request.allow_nonfinite,
        "max_quant_error": request.max_quant_error,
        "overwrite": request.overwrite,
        "checksums": plan.has_checksums,
    }
