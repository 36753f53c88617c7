"""Three checkpoints to merge, of one file each: shapes of a Llama, weights that repeat, written at memory's speed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.data import Folders
from paramdelta.demo import BASE_SPREAD, DELTA_SPREAD, DRIFT_SPREAD, shape_for

POOL = (1 << 22) - 64  # elements; no divisor of a tensor's, so that not all tensors begin alike
SPREADS = {"post": DELTA_SPREAD, "base": 0.0, "new_base": DRIFT_SPREAD}
COPIES_AT_ONCE = 5.3  # three inputs, the output of one merge, its record, another for comparison, and some air
SMALLEST = 50_000


def choose(size: str) -> tuple[Path, int]:
    """Return where the checkpoints go, and the bytes of each: halved until they fit. Memory-backed where that is."""
    nbytes = shape_for(size).nbytes
    places = [p for p in (Path("/dev/shm"), Path(tempfile.gettempdir())) if p.is_dir() and os.access(p, os.W_OK)]
    free = {place: min(shutil.disk_usage(place).free, available_memory()) for place in places}
    while nbytes > SMALLEST:
        for place in places:
            if free[place] > nbytes * COPIES_AT_ONCE:
                return place, nbytes
        nbytes //= 2
    raise RuntimeError(f"no room for checkpoints in {', '.join(map(str, places))}")


def available_memory() -> int:
    """Return the bytes that can be used without another's loss."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def write(folder: Path, nbytes: int) -> Folders:
    """Write post, base and new_base of about ``nbytes`` each in bf16."""
    tensors = shape_for(f"{nbytes}B").tensors()
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(BASE_SPREAD)

    def one(item: tuple[int, tuple[str, float]]) -> Path:
        i, (role, spread) = item
        moves = np.random.default_rng(i + 1).standard_normal(POOL, np.float32) * np.float32(spread)
        return write_one(folder / role, tensors, (pool + moves).astype(ml_dtypes.bfloat16).view(np.uint8))

    with ThreadPoolExecutor(len(SPREADS)) as threads:
        return Folders(*threads.map(one, enumerate(SPREADS.items())))


def write_one(folder: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray) -> Path:
    """Write a folder of one file, whose tensors take their bytes from the pool, over and over."""
    header: dict[str, object] = {}
    at = 0
    for name, shape in tensors.items():
        end = at + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, pool.size):
            piece = memoryview(pool)[: at - start]
            while piece:
                piece = piece[file.write(piece) :]
    (folder / "config.json").write_text(json.dumps({"model_type": "synthetic"}) + "\n")
    return folder
