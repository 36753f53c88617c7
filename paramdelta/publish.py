"""Makes a folder appear whole or not at all: everything is written beside the target, synced, and renamed once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paramdelta.errors import StorageError, storage_errors

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LOCK = "lock"
DOOR = "door"  # of ranks: only one at a time looks around and creates files
_OLD = "replaced"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Folders that this process left for a later run to continue, those that it could not remove, and those it published.
kept: list[Path] = []
stuck: list[Path] = []
published: list[Path] = []


class Staging:
    """A folder beside ``target`` in which the output is built: it either becomes the target (:meth:`publish`) or goes
    away without a trace, unless it is told to stay (:meth:`keep`) for a later run to continue.

    ``control`` is .TARGET.partial, locked against another merge into the same target; ``folder`` within it is what will
    be the target. What an earlier run left there is found, not removed: see :meth:`clear`. Where it left the folder
    that it was about to replace, that folder is put back, and ``put_back`` is true.
    """

    def __init__(self, target: Path, *, control: Path | None = None) -> None:
        self.target = target
        self.control = control or target.parent / f".{target.name}.partial"
        self.folder = self.control / "output"
        self._lock: int | None = None
        self._stays = False
        self.put_back = False

    def __enter__(self) -> Staging:
        try:
            self._lock = locked(self.control)
            self._put_all_back()
            if not self.folder.is_dir():  # then what else is there speaks of another one
                self.folder.mkdir()
                self._clear_notes()
            # An earlier run's notes are not this run's to lose, whatever becomes of it.
            self._stays = any(self._notes())
        except BlockingIOError as error:
            raise StorageError(
                error.errno, f"{self.target}: another merge is writing it (its folder {self.control} is locked)"
            ) from error
        except OSError as error:
            self._remove_bare()
            text = f"{self.control}: cannot create the temporary folder: {error.strerror}"
            raise StorageError(error.errno, text + _owner(self.control)) from error
        return self

    def _put_all_back(self) -> None:
        self._put_back(self.target, self._old(self.target))

    def _old(self, target: Path) -> Path:
        """Where a folder lies while another takes its place."""
        return self.control / _OLD

    def _put_back(self, target: Path, old: Path) -> None:
        """Undo a replacement that was cut short between its two renames."""
        if not old.is_dir():
            return
        if os.path.lexists(target):  # the new folder was already there
            shutil.rmtree(old)
        else:
            os.rename(old, target)
            _sync(target.parent)
            self.put_back = True

    def _remove_bare(self) -> None:
        """Remove the temporary folder where it is ours and holds no more than the lock; release the lock."""
        with contextlib.suppress(OSError):
            if self.control.stat().st_uid == os.geteuid() and set(os.listdir(self.control)) <= {_LOCK}:
                (self.control / _LOCK).unlink(missing_ok=True)
                self.control.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def __exit__(self, *_: object) -> None:
        try:
            with _undisturbed():
                if self._stays:
                    kept.append(self.control)
                    return
                shutil.rmtree(self.control, ignore_errors=True)
                if self.control.exists():
                    stuck.append(self.control)
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def keep(self) -> None:
        """Leave the folder where it is when this run ends without publishing it."""
        self._stays = True

    def clear(self) -> None:
        """Remove what an earlier run left, except the lock."""
        self.forget_output()
        with storage_errors(self.control, "cannot be cleared"):
            self._clear_notes()

    def _notes(self) -> Iterator[Path]:
        others = (self.folder.name, _LOCK, DOOR)
        return (e for e in self.control.iterdir() if e.name not in others and not e.name.startswith(_OLD))

    def _clear_notes(self) -> None:
        for entry in list(self._notes()):
            entry.unlink()

    def forget_output(self, folders: Sequence[Path] = ()) -> None:
        """Remove the output of an earlier run, in ``folders`` or all, and nothing else."""
        self._stays = False
        for folder in folders or [self.folder]:
            with storage_errors(folder, "cannot be cleared"):
                shutil.rmtree(folder)
                folder.mkdir()

    def publish(self, *, overwrite: bool) -> None:
        """Sync every file and the folder, then rename it to the target. With ``overwrite`` an existing target is
        exchanged in one step and removed afterwards; without, an existing target is an error."""
        sync_files(self.folder)
        self._publish(self.folder, self.target, overwrite=overwrite)

    def _publish(self, folder: Path, target: Path, *, overwrite: bool, stays: bool = False) -> None:
        with _undisturbed():
            with storage_errors(target, "cannot be published"):
                if overwrite and target.is_dir():
                    self._replace(folder, target)
                else:
                    _rename_new(folder, target)
            self._stays = stays
            published.append(target)
            parent = target.parent
            unsure = f"is complete, but may be gone after a power cut: syncing {parent} failed"
            with storage_errors(target, unsure, remedy=f"look at the system's log (dmesg), then: sync -f {parent}"):
                _sync(parent)

    def _replace(self, folder: Path, target: Path) -> None:
        """Exchange the folder with the target. An exchange leaves the old folder where the new one was, so no journal
        may speak of it then; if it fails, the journal is worth keeping."""
        notes = [(path, path.read_bytes()) for path in self._notes()]
        self._clear_notes()
        _sync(self.control)
        try:
            self._swap(folder, target)
        except OSError:
            for path, data in notes:
                path.write_bytes(data)
            raise

    def _swap(self, folder: Path, target: Path) -> None:
        """Put the folder in the target's place, in two renames where the file system cannot exchange. Killed between
        them, the old folder lies in the temporary one, from where the next run takes it back."""
        if _exchange(folder, target):
            return
        old = self._old(target)
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)
            raise


class SweepStaging(Staging):
    """A folder in ``parent`` in which several outputs are built, under one lock, to be renamed into ``parent`` one by
    one. ``parent`` is made where it is not there, and goes away again where nothing was published.

    What is published is known by its inode and its record (:func:`mark_of`): the journal, which says so beforehand,
    need not go away before an exchange, and a run that was cut short between two of them continues with the rest.
    """

    NAME = ".sweep.partial"

    def __init__(self, parent: Path, names: Sequence[str]) -> None:
        super().__init__(parent, control=parent / self.NAME)
        self.names = names
        self._made = False

    def __enter__(self) -> SweepStaging:
        self._made = not self.target.exists()
        with storage_errors(self.target, "cannot be created"):
            self.target.mkdir(exist_ok=True)
        try:
            super().__enter__()
        except BaseException:
            self._remove_parent()
            raise
        self._make_folders()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._remove_parent()

    def _remove_parent(self) -> None:
        if self._made:
            with contextlib.suppress(OSError):  # it is not empty
                self.target.rmdir()

    def _put_all_back(self) -> None:
        for name in self.names:
            self._put_back(self.target / name, self._old(self.target / name))

    def _old(self, target: Path) -> Path:
        return self.control / f"{_OLD}-{target.name}"

    def forget_output(self, folders: Sequence[Path] = ()) -> None:
        """As that of a single output; what else is there stays worth keeping."""
        stays = self._stays
        super().forget_output(folders)
        self._stays = stays
        if not folders:
            self._make_folders()

    def _make_folders(self) -> None:
        for name in self.names:
            with storage_errors(self.folder / name, "cannot be created"):
                (self.folder / name).mkdir(exist_ok=True)

    def publish_one(self, name: str, *, overwrite: bool) -> None:
        """Rename one output, whose files are synced, to its place."""
        self._publish(self.folder / name, self.target / name, overwrite=overwrite, stays=True)

    def finished(self) -> None:
        """Everything is published: nothing is left to continue."""
        self._stays = False

    def _replace(self, folder: Path, target: Path) -> None:
        self._swap(folder, target)


def mark_of(folder: Path, record: str) -> list[Any] | None:
    """Return what a folder is known by wherever it is renamed to: its inode, and the digest of a file in it; None where
    there is none."""
    try:
        return [folder.stat().st_ino, hashlib.sha256((folder / record).read_bytes()).hexdigest()]
    except OSError:
        return None


def sync_files(folder: Path) -> None:
    """Sync every file in a folder, and the folder. Raises StorageError."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with storage_errors(path, "cannot be synced"):
                _sync(path)
    with storage_errors(folder, "cannot be synced"):
        _sync(folder)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put signals that would interrupt the block off to its end: what is half published, or half removed, cannot be
    told in a word."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for which in ours:
        signal.signal(which, note)
    try:
        yield
    finally:
        for which, handler in ours.items():
            signal.signal(which, handler)
        for number in came:
            signal.raise_signal(number)


def _owner(folder: Path) -> str:
    """Return words for the owner of a folder of another user's, an empty string where there is none."""
    with contextlib.suppress(OSError):
        owner = folder.stat().st_uid
        if owner != os.geteuid():
            return f" (it is there already and belongs to user {owner})"
    return ""


def locked(control: Path, *, shared: bool = False) -> int:
    """Create a folder where there is none and lock it, alone or with others that share it; return the descriptor that
    holds the lock. Raises BlockingIOError where somebody else has locked it."""
    while True:
        control.mkdir(exist_ok=True)
        fd = os.open(control / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == os.stat(control / _LOCK).st_ino:
                return fd
        except FileNotFoundError:
            pass  # whoever held the lock has just removed the folder
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def write_files(folder: Path, files: Iterable[tuple[str, bytes | Path]]) -> None:
    """Write or copy small files into ``folder``, over what an earlier run wrote."""
    for name, content in files:
        path = folder / name
        with storage_errors(path, "cannot be written"), open(path, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with open(content, "rb") as source:  # in pieces: whoever made it chose its size
                    shutil.copyfileobj(source, file, 1 << 20)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must be free: rename(2) alone would silently replace an empty folder."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(errno.EEXIST, "something of that name appeared while the merge ran")
    os.rename(source, target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))
