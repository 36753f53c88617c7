"""Memory of the caller's, where a file would be else: what the engine reads operands from and writes outputs to, on the
host or on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class DeviceMemory(NamedTuple):
    """Memory of the device that a run's stage computes on."""

    address: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The bytes of a tensor that is loaded already.

    ``place`` is an array of its bytes, or where they lie on a device: the engine takes it as input and as output.
    ``read(offset, count)`` returns some of them, for those who look at a sample. SAFETY: whoever makes this keeps the
    tensor alive for as long as it is used.
    """

    place: Any
    nbytes: int
    read: Callable[[int, int], bytes]
