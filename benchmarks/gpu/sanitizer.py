"""compute-sanitizer on a script that reaches every kernel: memcheck and racecheck."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import ROOT
from benchmarks.gpu.device import Clock, Device, environment
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record

GROUP = "gpu-sanitizer"
TOOLS = ("memcheck", "racecheck")
PROGRAM = "compute-sanitizer"
SHOWN = 4000


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield the script on its own, then under each tool."""
    yield watched("none", [], device.on, Clock(clock.left() / 4))
    program = find()
    for i, tool in enumerate(TOOLS):
        if device.on != "cuda" or program is None:
            reason = "there is no device" if device.on != "cuda" else f"there is no {PROGRAM} on PATH nor with nvcc"
            yield Record(GROUP, "script", tool, {}, skipped=reason)
        else:
            command = [program, "--tool", tool, "--error-exitcode", "99"]
            yield watched(tool, command, device.on, Clock(clock.left() / (len(TOOLS) - i)))


def find() -> str | None:
    """Return the program's path."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    places = [*beside, "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return shutil.which(PROGRAM) or next((found for p in places if (found := shutil.which(PROGRAM, path=p))), None)


def watched(tool: str, prefix: list[str], on: str, clock: Clock) -> Record:
    """Run the script under a tool; ``errors`` are those in the tool's summary."""
    command = [*prefix, sys.executable, "-m", "benchmarks.gpu.touch", "--on", on]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(on),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1, clock.left()),
        )
    except subprocess.TimeoutExpired as cut:
        said = (cut.stdout or b"").decode(errors="replace")[-SHOWN:]
        return Record(GROUP, "script", tool, {}, skipped=f"cut by the clock, so far: {said}")
    said = done.stdout.decode(errors="replace")
    parameters = {"exit_code": done.returncode, "said": said[-SHOWN:]}
    errors = errors_in(said) if prefix else int(done.returncode != 0)
    if errors is None:
        return Record(GROUP, "script", tool, parameters, skipped=f"no summary; it ended with {done.returncode}")
    metrics = {"errors": Metric("1", (errors,)), "failed": Metric("1", (int(done.returncode != 0),))}
    if done.returncode:
        print(said[-SHOWN:])
    return Record(GROUP, "script", tool, parameters, metrics)


def errors_in(said: str) -> int | None:
    """Return the number in the last summary of memcheck or racecheck, or None where there is none.

    ``ERROR SUMMARY: 2 errors``, ``RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)``.
    """
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", said)
    return int(next(n for n in found[-1] if n)) if found else None
