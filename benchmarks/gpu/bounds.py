"""What bounds a merge through a device: the host's copy, as the engine reads and writes,
and the link both ways at once.

Either is the time for one merge's bytes: three parts that are read and go up, one that comes down and is written.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import bound, storage
from benchmarks.data import Folders
from benchmarks.gpu.device import Clock, Device
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record
from paramdelta.backends.threads import default_threads

GROUP = "gpu-pipeline"
HOST = "host copy: three files read, one written"
LINK = "link: three parts up while one comes down"
REQUEST = 2 << 20  # a quarter of a slot that waits for a device


def run(device: Device, sizes: Sizes, clock: Clock, case: str, folders: Folders, out: Path) -> Iterator[Record]:
    """Yield both bounds for a merge of these folders."""
    yield host(device, sizes, clock, case, folders, out)
    rounds = max(3, sizes.model_rounds)
    part = folders.nbytes
    seconds = [link(device, sizes.link_bytes, part) for _ in range(rounds)]
    metrics = {"time": Metric("s", tuple(seconds)), "bandwidth": Metric("B/s", tuple(4 * part / s for s in seconds))}
    up, down, merged = device.extension.rates(0)
    metrics |= {"up": Metric("B/s", (up,)), "down": Metric("B/s", (down,)), "merge": Metric("B/s", (merged,))}
    yield Record(GROUP, case, LINK, {"bytes": 4 * part, "buffer": sizes.link_bytes}, metrics)


def host(device: Device, sizes: Sizes, clock: Clock, case: str, folders: Folders, out: Path) -> Record:
    """Measure the loop without arithmetic, with as many threads as are best."""
    reason = bound.why_not()
    if reason:
        return Record(GROUP, case, HOST, {}, skipped=reason)
    program = storage.plain_program()
    files = [str(folder / "model.safetensors") for folder in folders]
    found: dict[int, list[float]] = {}
    for threads in sorted({default_threads(), max(16, default_threads()), 2 * default_threads()}):
        found[threads] = []
        for k in range(1 + max(2, sizes.model_rounds)):
            if clock.over() and k > 1:
                break
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            command = [str(program), "buffered", str(threads), str(REQUEST), *files, str(out / "out")]
            start = time.perf_counter()
            subprocess.run(command, check=True)
            if k:  # memory that was never used is slow once
                found[threads].append(time.perf_counter() - start)
    shutil.rmtree(out, ignore_errors=True)
    medians = {threads: Metric("s", tuple(seconds)).median for threads, seconds in found.items()}
    best = min(medians, key=medians.__getitem__)
    nbytes = 4 * folders.nbytes
    metrics = {
        "time": Metric("s", tuple(found[best])),
        "bandwidth": Metric("B/s", tuple(nbytes / s for s in found[best])),
    }
    return Record(GROUP, case, HOST, {"bytes": nbytes, "threads": best, "all_medians": medians}, metrics)


def link(device: Device, buffer: int, part: int) -> float:
    """Return seconds for three parts up and one down at once, from a run that is long enough to tell."""
    torch = device.torch
    if device.on != "cuda":
        source, to = (torch.zeros(buffer, dtype=torch.uint8) for _ in range(2))
        start = time.perf_counter()
        for _ in range(4):
            ctypes.memmove(to.data_ptr(), source.data_ptr(), buffer)
        return (time.perf_counter() - start) * part / buffer
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    pinned = [torch.empty(buffer, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there: list[Any] = [torch.empty(buffer, dtype=torch.uint8, device=device.place) for _ in range(2)]
    times = 4

    def pump(count: int) -> None:
        for _ in range(count):
            with torch.cuda.stream(streams[0]):
                for _ in range(3):
                    there[0].copy_(pinned[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                pinned[1].copy_(there[1], non_blocking=True)

    pump(1)
    device.finish()
    start = time.perf_counter()
    pump(times)
    device.finish()
    return (time.perf_counter() - start) / times * part / buffer


def seconds_of(records: list[Record]) -> float | None:
    """Return the greater time of the two bounds, which is the lesser rate; None where one was not measured."""
    times = {r.contender: r.metrics["time"].median for r in records if r.contender in (HOST, LINK) and r.metrics}
    return max(times.values()) if len(times) == 2 else None


def peer_script() -> Path:
    """Return the script in PyTorch that does the same on a GPU."""
    peers = importlib.import_module("benchmarks.peers")
    return Path(peers.__path__[0]) / "torch_gpu_script.py"
