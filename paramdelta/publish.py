"""Makes a folder appear whole or not at all: everything is written beside the target, synced, and renamed once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from paramdelta.errors import StorageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """A temporary folder beside ``target`` that either becomes it (:meth:`publish`) or goes away without a trace."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        self._published = False

    def __enter__(self) -> Staging:
        try:
            self.folder.mkdir()
        except OSError as error:
            raise StorageError(
                error.errno, f"{self.folder}: cannot create the temporary folder: {error.strerror}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, *, overwrite: bool) -> None:
        """Sync every file and the folder, then rename it to the target. With ``overwrite`` an existing target is
        exchanged in one step and removed afterwards; without, an existing target is an error."""
        with _storage_errors(self.folder, "cannot be synced"):
            for path in sorted(self.folder.rglob("*")):
                if path.is_file():
                    _sync(path)
            _sync(self.folder)
        with _storage_errors(self.target, "cannot be published"):
            if overwrite and self.target.is_dir():
                self._replace()
            else:
                _rename_new(self.folder, self.target)
            self._published = True
            _sync(self.target.parent)

    def _replace(self) -> None:
        if _exchange(self.folder, self.target):
            shutil.rmtree(self.folder)
            return
        old = self.target.parent / f".{self.target.name}.old-{secrets.token_hex(4)}"
        os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            os.rename(old, self.target)
            raise
        shutil.rmtree(old)


def write_files(folder: Path, files: Iterable[tuple[str, bytes | Path]]) -> None:
    """Write or copy small files into ``folder``; names must be new."""
    for name, content in files:
        path = folder / name
        with _storage_errors(path, "cannot be written"):
            data = content if isinstance(content, bytes) else content.read_bytes()
            with open(path, "xb") as file:
                file.write(data)


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
