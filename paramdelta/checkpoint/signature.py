"""What tells that a file is still the one whose header was read: inputs must stay as they are while a merge runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from paramdelta.errors import StorageError

_REMEDY = "inputs must stay as they are while a merge runs: see that nothing writes to them, then repeat the command"


@dataclass(frozen=True)
class Signature:
    """Device, inode, bytes and time of last modification (nanoseconds since 1970) of a file, as stat(2) has them."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @staticmethod
    def of(status: os.stat_result) -> Signature:
        """Return the signature that a file with this status has."""
        return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def modified(self) -> str:
        """The time of the last modification in UTC, with nanoseconds: ``2026-01-31T10:00:00.123456789Z``."""
        seconds, rest = divmod(self.modified_ns, 10**9)
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def check_unchanged(files: Iterable[tuple[Path, Signature]]) -> None:
    """Raise StorageError for the first file that is not what it was when its signature was taken."""
    for path, then in files:
        try:
            now = Signature.of(path.stat())
        except OSError as error:
            text = f"{path}: went away while the merge ran: {error.strerror}"
            raise StorageError(error.errno, text, remedy=_REMEDY) from error
        if now != then:
            raise StorageError(f"{path}: changed while the merge ran: {_difference(then, now)}", remedy=_REMEDY)


def _difference(then: Signature, now: Signature) -> str:
    if (then.device, then.inode) != (now.device, now.inode):
        return "another file has taken its place"
    if then.size != now.size:
        return f"it had {then.size:,} bytes and has {now.size:,}"
    return f"it was last written {then.modified} and again {now.modified}"
