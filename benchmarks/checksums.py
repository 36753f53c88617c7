"""What checksums cost: ``python -m benchmarks.checksums``.

First the CRC-32 of memory by each instruction set, against a plain read of the same memory (numpy's exclusive or of
64-bit words), one thread, in turns, the best of each. Then a merge in memory with and without checksums, in turns,
and the reading of what it wrote to verify it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import paramdelta
from benchmarks import data
from paramdelta import _cpu

CACHED_BYTES, STREAMED_BYTES = 256 << 10, 256 << 20
PASS_BYTES = 64 << 20  # of a pass over what is cached
ROUNDS = 9


def speeds(nbytes: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Return GB/s (10⁹ bytes) of a plain read, and of CRC-32 by each instruction set, over ``nbytes`` of memory."""
    memory = np.random.default_rng(0).integers(0, 1 << 62, nbytes // 8, np.int64)
    raw = memory.view(np.uint8)
    ways: dict[str, Callable[[], object]] = {"plain read": lambda: np.bitwise_xor.reduce(memory)}
    for isa in _cpu.available_isas():
        ways[isa] = lambda isa=isa: _cpu.crc32_raw(raw, isa=isa)
    times = max(1, PASS_BYTES // nbytes)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            way()
            started = time.perf_counter()
            for _ in range(times):
                way()
            best[name] = min(best[name], (time.perf_counter() - started) / times)
    return {name: nbytes / seconds / 1e9 for name, seconds in best.items()}


def merges(folder: Path, size: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the engine's seconds of merges with and without checksums, in turns, and those of verifying the former."""
    inputs = data.write_inputs(folder, size)
    sources = {"post": inputs.post, "base": inputs.base, "new_base": inputs.new_base}
    found: dict[str, list[float]] = {"with": [], "without": [], "verify": []}
    for number in range(rounds):
        for checksums in (True, False) if number % 2 else (False, True):
            out = folder / "out"
            report = paramdelta.merge(**sources, out=out, checksums=checksums)
            found["with" if checksums else "without"].append(report.engine_seconds)
            if checksums:
                started = time.perf_counter()
                assert not paramdelta.verify(out).problems
                found["verify"].append(time.perf_counter() - started)
            shutil.rmtree(out)
    return found


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--size", default="1.24GB")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    print("| memory | " + " | ".join(speeds(1 << 16, 1)) + " |")
    for nbytes in (CACHED_BYTES, STREAMED_BYTES):
        row = speeds(nbytes, options.rounds)
        print(f"| {nbytes >> 10} KiB | " + " | ".join(f"{speed:.1f}" for speed in row.values()) + " |")
    with data.workspace(options.folder, need=data.bytes_needed(options.size)) as folder:
        found = merges(folder, options.size, options.rounds)
    for name, seconds in found.items():
        print(f"{name}: best {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s of {len(seconds)}")
    print(f"with / without: best {min(found['with']) / min(found['without']):.3f}")


if __name__ == "__main__":
    main()
