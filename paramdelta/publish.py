"""Makes a folder appear whole or not at all: everything is written beside the target, synced, and renamed once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from paramdelta.errors import StorageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LOCK = "lock"

# Folders that this process left for a later run to continue.
kept: list[Path] = []


class Staging:
    """A folder beside ``target`` in which the output is built: it either becomes the target (:meth:`publish`) or goes
    away without a trace, unless it is told to stay (:meth:`keep`) for a later run to continue.

    ``control`` is .TARGET.partial, locked against another merge into the same target; ``folder`` within it is what will
    be the target. What an earlier run left there is found, not removed: see :meth:`clear`.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.control = target.parent / f".{target.name}.partial"
        self.folder = self.control / "output"
        self._lock: int | None = None
        self._stays = False

    def __enter__(self) -> Staging:
        try:
            self._lock = _locked(self.control)
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
            raise StorageError(
                error.errno, f"{self.control}: cannot create the temporary folder: {error.strerror}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._stays:
            kept.append(self.control)
        else:
            shutil.rmtree(self.control, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def keep(self) -> None:
        """Leave the folder where it is when this run ends without publishing it."""
        self._stays = True

    def clear(self) -> None:
        """Remove what an earlier run left, except the lock."""
        self.forget_output()
        with _storage_errors(self.control, "cannot be cleared"):
            self._clear_notes()

    def _notes(self) -> Iterator[Path]:
        return (entry for entry in self.control.iterdir() if entry not in (self.folder, self.control / _LOCK))

    def _clear_notes(self) -> None:
        for entry in list(self._notes()):
            entry.unlink()

    def forget_output(self) -> None:
        """Remove the output of an earlier run, and nothing else."""
        self._stays = False
        with _storage_errors(self.folder, "cannot be cleared"):
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def publish(self, *, overwrite: bool) -> None:
        """Sync every file and the folder, then rename it to the target. With ``overwrite`` an existing target is
        exchanged in one step and removed afterwards; without, an existing target is an error."""
        with _storage_errors(self.folder, "cannot be synced"):
            for path in sorted(self.folder.rglob("*")):
                if path.is_file():
                    _sync(path)
            _sync(self.folder)
            # From here on, what lies in the folder may be what was there before: no journal may speak of it.
            self._clear_notes()
            _sync(self.control)
        with _storage_errors(self.target, "cannot be published"):
            if overwrite and self.target.is_dir():
                self._replace()
            else:
                _rename_new(self.folder, self.target)
            self._stays = False
            _sync(self.target.parent)

    def _replace(self) -> None:
        if _exchange(self.folder, self.target):
            return  # the old folder goes with the temporary one
        old = self.target.parent / f".{self.target.name}.old-{secrets.token_hex(4)}"
        os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            os.rename(old, self.target)
            raise
        shutil.rmtree(old)


def _locked(control: Path) -> int:
    """Create a folder where there is none and lock it; return the descriptor that holds the lock."""
    while True:
        control.mkdir(exist_ok=True)
        fd = os.open(control / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        with _storage_errors(path, "cannot be written"), open(path, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with open(content, "rb") as source:  # in pieces: whoever made it chose its size
                    shutil.copyfileobj(source, file, 1 << 20)


@contextlib.contextmanager
def _storage_errors(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno, f"{path}: {what}: {error.strerror}") from error


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
