"""Bytes taken for decisions: a fuzzer's input, read as numbers and picks, so that most inputs make a folder or a column
of work that is nearly right. When the bytes run out, every decision is the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decisions read from ``data``, in order."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def number(self, low: int, high: int) -> int:
        """Return a number of low … high, both included."""
        width = max(1, ((high - low).bit_length() + 7) // 8)
        return low + int.from_bytes(self.take(width), "little") % (high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of ``options``."""
        return options[self.number(0, len(options) - 1)]

    def odds(self, one_in: int) -> bool:
        """Whether something rare happens; never, once the bytes have run out."""
        byte = self.take(1)
        return bool(byte) and byte[0] % one_in == one_in - 1

    def rest(self) -> bytes:
        """Return what is left."""
        return self.take(len(self._data))
