"""How a run reaches its files: through the page cache or past it, decided file by file from what the kernel says.

``cached``: ordinary reads and writes; for files in the page cache, and file systems that are memory. ``passing``: the
same, but the page cache is left as it was found (RWF_DONTCACHE, or told to forget). ``direct``: past the page cache
(O_DIRECT). None of it changes a byte of the output.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paramdelta.errors import OperandError

CACHED, PASSING, DIRECT = "cached", "passing", "direct"
MODES = ("auto", "buffered", "direct")
# Below this, what a file's own transfers cost is lost in what opening it costs.
SMALLEST_DIRECT = 16 << 20
# Workers that wait for storage: 16 requests of 2 MiB keep more in flight than a disk or a RAID of eight asks for.
WAITING_THREADS = 16
WAITING_SLOT = 8 << 20
_MEMORY_SHARE = 8  # buffers take an eighth of the available memory at most, unless a caller says how much


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The access of each input and output file, by number; None for what is not a file.

    ``cold`` are the inputs that the page cache does not have and that either way would reach.
    """

    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    cold: tuple[int, ...] = ()

    @property
    def wait(self) -> bool:
        """Whether some transfers wait for storage."""
        return any(access in (PASSING, DIRECT) for access in (*self.inputs, *self.outputs))

    def with_cold(self, access: str) -> Paths:
        """Return the same, with another access to what is cold."""
        cold = set(self.cold)
        return replace(self, inputs=tuple(access if i in cold else a for i, a in enumerate(self.inputs)))

    def summary(self) -> dict[str, dict[str, int]]:
        """Return how many files are read and written which way."""
        return {
            "read": dict(Counter(a for a in self.inputs if a is not None)),
            "written": dict(Counter(a for a in self.outputs if a is not None)),
        }


def choose_paths(inputs: Sequence[Any], outputs: Sequence[Any], sizes: Sequence[int], mode: str = "auto") -> Paths:
    """Choose the access of every one of ``inputs`` and ``outputs`` (paths, or memory), the outputs of ``sizes`` bytes.

    ``buffered``: through the page cache. ``direct``: past it, wherever the file system can. ``auto``: what the page
    cache has is read from there; what is cold is read past it (in large merges, :class:`Trial` compares that with
    ``passing``), and outputs are written past it.
    """
    from paramdelta import _cpu

    read: list[str | None] = []
    cold: list[int] = []
    for number, path in enumerate(inputs):
        if not isinstance(path, Path):
            read.append(None)
            continue
        name = os.fsencode(path)
        size = path.stat().st_size if path.exists() else 0  # opening it will say what is wrong
        if _cpu.in_memory(name):
            read.append(CACHED)
        elif mode == "direct" and _goes_direct(name, size):
            read.append(DIRECT)
        elif 2 * _cpu.cached_bytes(name) >= size:
            read.append(CACHED)
        elif mode == "auto" and _goes_direct(name, size):
            read.append(DIRECT)
            cold.append(number)
        else:
            read.append(PASSING)
    written: list[str | None] = []
    for out, size in zip(outputs, sizes, strict=True):
        if not isinstance(out, Path):
            written.append(None)
            continue
        name = os.fsencode(out)
        if _cpu.in_memory(name) or size < SMALLEST_DIRECT:
            written.append(CACHED)
        elif mode != "buffered" and _goes_direct(name, size):
            written.append(DIRECT)
        else:
            written.append(PASSING)
    return Paths(inputs=tuple(read), outputs=tuple(written), cold=tuple(cold))


def _goes_direct(name: bytes, size: int) -> bool:
    from paramdelta import _cpu

    return size >= SMALLEST_DIRECT and bool(_cpu.direct_alignment(name))


def check_mode(mode: str) -> str:
    """Return ``mode``, or raise OperandError where it is none."""
    if mode not in MODES:
        raise OperandError(f"io: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


@dataclass
class Trial:
    """Reads the first segments of a large cold merge one way each, and the rest the way that was faster.

    Which way is faster depends on the storage: read-ahead gives depth to a disk that wants long queues, while O_DIRECT
    saves a fast RAID the copy out of the page cache. Nothing is read twice to find out.
    """

    paths: Paths
    segments: int
    _speeds: dict[str, float] = field(default_factory=dict)

    FEWEST = 6  # segments; with fewer there is little to win

    def next(self) -> Paths:
        """Return the paths for the next segment."""
        if not self.paths.cold or self.segments < self.FEWEST:
            return self.paths
        untried = [access for access in (DIRECT, PASSING) if access not in self._speeds]
        return self.paths.with_cold(untried[0] if untried else self.best())

    def tell(self, paths: Paths, nbytes: int, seconds: float) -> None:
        """Note how fast a segment was read with ``paths``."""
        if self.paths.cold and nbytes:
            self._speeds.setdefault(str(paths.inputs[self.paths.cold[0]]), nbytes / max(seconds, 1e-9))

    def best(self) -> str:
        """Return the fastest access so far."""
        return max(self._speeds, key=self._speeds.__getitem__, default=DIRECT)


def memory_limit() -> int:
    """Return the bytes that buffers may take unless a caller says otherwise: an eighth of what the machine, or the
    process's cgroup, has left, shared among the processes of this node."""
    from paramdelta.backends.threads import local_world_size

    free = [_number(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    group = "".join(line[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::"))
    for folder in (Path(group), *Path(group).parents) if group else ():
        here = Path("/sys/fs/cgroup") / str(folder).lstrip("/")
        most, used = (_number("".join(_lines(str(here / name)))) for name in ("memory.max", "memory.current"))
        if most:
            free.append(max(most - used, 0))
    return min(free, default=1 << 30) // _MEMORY_SHARE // local_world_size()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0
