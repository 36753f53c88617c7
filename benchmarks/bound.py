"""The roofline that kernels are held against: how many bytes a second three read streams and one write stream move.

Compiles ``bound.cpp`` on first use (a C++ compiler, no flags for the machine: every loop carries its own target) and
calls it by ctypes. One call is one pass, so passes can alternate with passes of the kernel under test.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).with_name("bound.cpp")
CACHE = SOURCE.parents[1] / "build" / "benchmarks"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")

# Every stream begins this much further into its page than the one before, in bytes: at equal page offsets a load
# waits for an earlier store whose lowest 12 address bits match (4K aliasing). A multiple of the cache line.
STAGGER = 1088
PAGE = 4096
KEEP = 3  # loops that are measured beside a kernel, of those that bound.cpp has

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Buffers:
    """Memory of one measurement: three or more inputs, one output, and the slab that owns them."""

    inputs: tuple[Bytes, ...]
    out: Bytes
    slab: Bytes = field(repr=False)


def allocate(sizes: Sequence[int], *, stagger: int = STAGGER, shift: int = 0) -> Buffers:
    """Return streams of ``sizes`` bytes (the inputs, then the output) in one slab with every page touched.

    Stream i begins ``(i * stagger + shift) % 4096`` bytes into a page.
    """
    offsets = [(i * stagger + shift) % PAGE for i in range(len(sizes))]
    rooms = [-(-(size + offset) // PAGE) * PAGE for size, offset in zip(sizes, offsets, strict=True)]
    slab = np.empty(sum(rooms) + PAGE, dtype=np.uint8)
    slab.fill(1)  # touches every page
    at = -slab.ctypes.data % PAGE
    streams = []
    for size, room, offset in zip(sizes, rooms, offsets, strict=True):
        streams.append(slab[at + offset : at + offset + size])
        at += room
    return Buffers(tuple(streams[:-1]), streams[-1], slab)


def piece(buffers: Buffers, sizes: Sequence[int], i: int) -> Buffers:
    """Return the ``i``-th part of all streams, ``sizes`` bytes of each."""
    parts = [s[i * size : (i + 1) * size] for s, size in zip((*buffers.inputs, buffers.out), sizes, strict=True)]
    return Buffers(tuple(parts[:-1]), parts[-1], buffers.slab)


def compiler() -> str | None:
    """Return the C++ compiler: what CXX names, or g++, c++ or clang++, whichever is found first."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def why_not() -> str | None:
    """Return None where the bound can be measured, else the reason and the way out."""
    if compiler() is None:
        return "the bound needs a C++ compiler; install g++ or name one in CXX"
    return None


@cache
def _library() -> ctypes.CDLL:
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = CACHE / f"bound-{key}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "bound.so"
            subprocess.run([str(compiler()), *FLAGS, str(SOURCE), "-o", str(made)], check=True)
            made.replace(target)
    library = ctypes.CDLL(str(target))
    library.bound_name.restype = ctypes.c_char_p
    library.bound_run.restype = ctypes.c_double
    library.bound_run.argtypes = [ctypes.c_int, ctypes.c_int, *([ctypes.c_void_p] * 4), ctypes.c_size_t]
    return library


def variants() -> dict[str, int]:
    """Return the loops that this machine runs: name and number."""
    library = _library()
    every = range(library.bound_variants())
    return {library.bound_name(i).decode(): i for i in every if library.bound_runs_here(i)}


def run(variant: int, buffers: Buffers, threads: int) -> float:
    """Make one pass over the first three inputs and the output; return its bytes per second.

    The output is written from its first cache line on (non-temporal stores need whole lines), all streams as far
    as the shortest reaches. Four times that length over the time is the result.
    """
    skip = -buffers.out.ctypes.data % 64
    lengths = [stream.nbytes for stream in buffers.inputs[:3]] + [buffers.out.nbytes - skip]
    nbytes = min(lengths) // 4096 * 4096
    if nbytes == 0:
        raise ValueError("the bound needs 4096 bytes of whole cache lines in each stream")
    addresses = [stream.ctypes.data for stream in buffers.inputs[:3]] + [buffers.out.ctypes.data + skip]
    return 4 * nbytes / float(_library().bound_run(variant, threads, *addresses, nbytes))


@dataclass
class Bound:
    """The best few loops for these buffers and this number of threads, taken in turn, one pass at a time."""

    buffers: Buffers
    threads: int
    names: tuple[str, ...] = ()
    passes: int = 0

    def choose(self, *, keep: int = KEEP, rounds: int = 3) -> None:
        """Keep the ``keep`` loops whose best of ``rounds`` passes is highest."""
        numbers = variants()
        best = dict.fromkeys(numbers, 0.0)
        for _ in range(rounds):
            for name, number in numbers.items():
                best[name] = max(best[name], run(number, self.buffers, self.threads))
        self.names = tuple(sorted(best, key=best.__getitem__, reverse=True)[:keep])

    def next_pass(self) -> float:
        """Make a pass of the next of the chosen loops and return its bytes per second."""
        if not self.names:
            self.choose()
        name = self.names[self.passes % len(self.names)]
        self.passes += 1
        return run(variants()[name], self.buffers, self.threads)
