"""A merge from memory-backed files through a device and back: against its bound, the processor, and PyTorch.

In one process, after a first merge that does not count: what the engine takes. As processes of their own: what a user
waits for, the start of a device included. A trace of one merge shows what went on at the same time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import data, process
from benchmarks.gpu import ROOT, bounds, model, overlap
from benchmarks.gpu.bounds import GROUP
from benchmarks.gpu.device import Clock, Device, command_line, environment
from benchmarks.gpu.sizes import Sizes
from benchmarks.machine import file_system_of
from benchmarks.results import Metric, Record
from paramdelta import merge
from paramdelta.errors import ParamDeltaError

DEVICES = ("cuda", "cpu", "auto")
TRACE = "trace.json.gz"
TRACED = "trace of one merge"
SAME = "bytes of cuda's output against the processor's"
SCRIPT = "torch script on the GPU, process"


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield the bounds, merges in one process, the trace, and merges as processes."""
    place, nbytes = model.choose(sizes.model)
    with data.workspace(place, need=0) as scratch:
        folders = model.write(scratch / "in", nbytes)
        case = f"3 × {folders.nbytes / 1e9:.3g} GB bf16, {file_system_of(place)}"
        out = scratch / "out"
        limits = []
        for record in bounds.run(device, sizes, Clock(clock.left() / 3), case, folders, out):
            limits.append(record)
            yield record
        bound_seconds = bounds.seconds_of(limits)
        yield from in_one_process(device, sizes, clock, case, folders, out, bound_seconds)
        yield traced(device, case, folders, out)
        yield from as_processes(device, sizes, clock, case, folders, out, bound_seconds)


def merge_once(folders: data.Folders, out: Path, device: str) -> Any:
    """Merge to a folder that was not there, and return the report."""
    shutil.rmtree(out, ignore_errors=True)
    return merge(post=folders.post, base=folders.base, new_base=folders.new_base, out=out, device=device)


def why_not(device: Device, name: str) -> str | None:
    return device.why_not("cuda") if name == "cuda" else None


def in_one_process(
    device: Device, sizes: Sizes, clock: Clock, case: str, folders: data.Folders, out: Path, bound_seconds: float | None
) -> Iterator[Record]:
    """Yield a record of each device: seconds of the engine and of the whole call, and its share of the bound."""
    sums = {}
    for name in DEVICES:
        contender = f"paramdelta --device {name}, one process"
        if why_not(device, name):
            yield Record(GROUP, case, contender, {}, skipped=why_not(device, name))
            continue
        reports = []
        try:
            for k in range(1 + sizes.model_rounds):
                if clock.over() and k > 1:
                    break
                reports.append(merge_once(folders, out, name))
        except ParamDeltaError as error:
            yield Record(GROUP, case, contender, {}, skipped=f"{type(error).__name__}: {error}")
            continue
        sums[name] = json.loads((out / "paramdelta.json").read_text())["checksums"]["tensors"]
        shutil.rmtree(out)
        counted, last = reports[1:], reports[-1]
        moved = last.bytes_read + last.bytes_written
        engine = Metric("s", tuple(max(r.engine_seconds, 1e-9) for r in counted))
        metrics = {
            "engine": engine,
            "bandwidth": Metric("B/s", tuple(moved / s for s in engine.samples)),
            "call": Metric("s", tuple(r.seconds for r in counted)),
            "first_engine": Metric("s", (reports[0].engine_seconds,)),
        }
        told = {
            "bytes": moved,
            "device": last.device,
            "device_why": last.device_why,
            "threads": last.threads,
            "slot_bytes": last.slot_bytes,
        }
        ratios = {} if bound_seconds is None else {"of_bound": bound_seconds / engine.median}
        yield Record(GROUP, case, contender, told, metrics, ratios)
    if {"cuda", "cpu"} <= sums.keys():
        wrong = sum(sums["cuda"].get(name) != crc for name, crc in sums["cpu"].items())
        metrics = {"tensors": Metric("1", (len(sums["cpu"]),)), "differing": Metric("1", (wrong,))}
        yield Record(GROUP, case, SAME, {"compared": "CRC-32 of each tensor"}, metrics)


def traced(device: Device, case: str, folders: data.Folders, out: Path) -> Record:
    """Merge once under PyTorch's profiler, keep the trace, and return what went on at the same time in it."""
    if why_not(device, "cuda"):
        return Record(GROUP, case, TRACED, {}, skipped=why_not(device, "cuda"))
    profiler = device.torch.profiler
    activity = profiler.ProfilerActivity.CUDA if device.on == "cuda" else profiler.ProfilerActivity.CPU
    path = Path(os.environ.get("PARAMDELTA_BENCHMARK_OUT", ".")) / TRACE
    try:
        with profiler.profile(activities=[activity]) as profile:
            merge_once(folders, out, "cuda")
            device.finish()
        profile.export_chrome_trace(str(path))
    except (RuntimeError, OSError, ParamDeltaError) as error:  # where the profiler may not look, merges go on
        return Record(GROUP, case, TRACED, {}, skipped=f"{type(error).__name__}: {error}")
    shutil.rmtree(out)
    seconds = overlap.overlaps(overlap.read(path))
    metrics = {name: Metric("s", (value,)) for name, value in seconds.items()}
    return Record(GROUP, case, TRACED, {"file": path.name}, metrics)


def as_processes(
    device: Device, sizes: Sizes, clock: Clock, case: str, folders: data.Folders, out: Path, bound_seconds: float | None
) -> Iterator[Record]:
    """Yield a record of each command: wall time, processor time, peak memory."""
    commands: dict[str, list[str]] = {}
    inputs = ["--post", str(folders.post), "--base", str(folders.base), "--new-base", str(folders.new_base)]
    for name in DEVICES:
        contender = f"paramdelta --device {name}, process"
        if why_not(device, name):
            yield Record(GROUP, case, contender, {}, skipped=why_not(device, name))
        else:
            merging = ["merge", *inputs, "--out", str(out), "--device", name, "--quiet"]
            commands[contender] = [*command_line(device.on), *merging]
    if importlib.util.find_spec("torch"):
        script = [sys.executable, str(bounds.peer_script()), *map(str, folders), str(out)]
        commands[SCRIPT] = [*script, "cuda:0" if device.on == "cuda" else "cpu"]
    usages: dict[str, list[process.Usage]] = {name: [] for name in commands}
    failed: dict[str, str] = {}
    for k in range(sizes.model_rounds):
        for name, command in commands.items():
            if name in failed or (clock.over() and k):
                continue
            shutil.rmtree(out, ignore_errors=True)
            try:
                usages[name].append(process.measure(command, env=environment(device.on), cwd=out.parent))
            except process.CommandError as error:
                failed[name] = str(error).replace(str(out.parent), "SCRATCH").replace(str(ROOT), ".")
    for name, used in usages.items():
        if name in failed:
            yield Record(GROUP, case, name, {}, skipped=failed[name])
            continue
        wall = Metric("s", tuple(u.wall for u in used))
        metrics = {
            "wall": wall,
            "bandwidth": Metric("B/s", tuple(4 * folders.nbytes / s for s in wall.samples)),
            "user": Metric("s", tuple(u.user for u in used)),
            "sys": Metric("s", tuple(u.sys for u in used)),
            "peak_rss": Metric("B", tuple(u.peak_rss for u in used)),
        }
        ratios = {} if bound_seconds is None else {"of_bound": bound_seconds / wall.median}
        yield Record(GROUP, case, name, {"bytes": 4 * folders.nbytes}, metrics, ratios)
