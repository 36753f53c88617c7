"""The conformance suite on the device: pytest's count of what passed, failed and was skipped, by backend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import ROOT
from benchmarks.gpu.device import Clock, Device, environment
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record

GROUP = "gpu-conformance"
MOST_PROCESSES = 8  # each has a context on the device
SHOWN = 4000


class Selection(NamedTuple):
    """Test files, and pytest's expression for those of their tests that are of the device."""

    files: tuple[str, ...]
    expression: str


SELECTIONS = {
    "cuda": {
        "cuda": Selection(("tests/conformance", "tests/test_cuda_build.py"), "cuda and not cuda-host"),
        "triton": Selection(("tests/conformance",), "triton"),
    },
    "host": {
        "cuda": Selection(("tests/conformance/test_fast_lanes.py",), "cuda-host and f16 and weights"),
        "triton": Selection(("tests/conformance/test_fast_lanes.py",), "triton and f16 and weights"),
    },
}


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield one record for each backend; a run that is cut counts as what it was: not finished."""
    selections = SELECTIONS["cuda" if device.on == "cuda" else "host"]
    reason = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    for i, (kernels, selection) in enumerate(selections.items()):
        parameters = {"files": list(selection.files), "expression": selection.expression}
        if reason or device.why_not(kernels):
            yield Record(GROUP, "tests", kernels, parameters, skipped=reason or device.why_not(kernels))
        else:
            yield tests(kernels, selection, device.on, Clock(clock.left() / (len(selections) - i)))


def tests(kernels: str, selection: Selection, on: str, clock: Clock) -> Record:
    """Run pytest in a process of its own."""
    parameters: dict[str, object] = {"files": list(selection.files), "expression": selection.expression}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection.expression]
        command += [f"--junitxml={report}", *(str(ROOT / file) for file in selection.files)]
        processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        if processes > 2 and importlib.util.find_spec("xdist"):
            command += ["-n", str(processes)]
        # The tests are to import what is installed, not what lies beside them.
        env = environment(on) | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PARAMDELTA_EMULATE": ""}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=max(1, clock.left()),
            )
        except subprocess.TimeoutExpired as cut:
            said = (cut.stdout or b"").decode(errors="replace")[-SHOWN:]
            return Record(GROUP, "tests", kernels, parameters, skipped=f"cut by the clock, so far: {said}")
        said = done.stdout.decode(errors="replace")
        if not report.exists():
            return Record(
                GROUP, "tests", kernels, parameters, skipped=f"pytest ended with {done.returncode}: {said}"[:SHOWN]
            )
        counts = counted(report)
    parameters["exit_code"] = done.returncode
    if done.returncode:
        parameters["said"] = said[-SHOWN:]
        print(said[-SHOWN:])
    if not counts["passed"] and not counts["failed"]:
        return Record(GROUP, "tests", kernels, parameters, skipped=f"no test ran: {said[-SHOWN:]}")
    return Record(GROUP, "tests", kernels, parameters, {name: Metric("1", (n,)) for name, n in counts.items()})


def counted(report: Path) -> dict[str, int]:
    """Return what pytest's XML report counts."""
    found = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        found["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return found
