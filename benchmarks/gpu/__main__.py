"""Everything that a machine with a GPU has to show: build, conformance, laws, sanitizer, kernels, many small tensors,
the pipeline. Each part is a process of its own with a share of the time; results are saved after each.

    PARAMDELTA_BUILD_CUDA=1 pip install --no-build-isolation --no-deps . && python -m benchmarks.gpu --out FOLDER

Writes FOLDER/gpu.json (the benchmarks' schema), summary.json, summary.md, trace.json.gz. Exit code 0: everything that
is a question of right or wrong was right; 1: something was not, or did not run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.gpu import ROOT, summary
from benchmarks.gpu.child import PARTS
from benchmarks.gpu.device import PLACES, describe, environment
from benchmarks.results import Record

# Of the time that is left when a part begins, as a share of the weights of all parts to come; what one does not use the
# others have.
WEIGHTS = {
    "build": 5,
    "conformance": 130,
    "laws": 90,
    "sanitizer": 80,
    "kernels": 80,
    "foreach": 20,
    "pipeline": 115,
}
GRACE = 1.25  # a part sees the end of its time by itself, if not within a measurement; else it is ended
SPARE = 5.0  # seconds beyond that, for what takes its time to begin
TO_TIDY_UP = 10.0  # seconds for a part that is ended to remove its files
RESERVE = 8.0  # seconds, for the summary
PACKAGES = ("triton",)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="a folder for the results (default: a dated one in benchmarks/results)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all parts together (default: 520)")
    parser.add_argument("--on", choices=PLACES, default="cuda", help="host: every line with no GPU, tiny; ptx: laws")
    parser.add_argument("--commit", help="where this is no git checkout: the commit of the sources")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts: {', '.join(unknown)} is none of {','.join(PARTS)}")
    return options


def limit_of(part: str, parts: list[str], left: float) -> float:
    """Return the seconds that a part may take of those that are left for it and the parts behind it."""
    coming = parts[parts.index(part) :]
    return left * WEIGHTS[part] / sum(WEIGHTS[name] for name in coming)


def run_part(part: str, limit: float, most: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part; end it, and all that it started, where it does not end by itself."""
    command = [sys.executable, "-m", "benchmarks.gpu.child", part, "--on", options.on]
    command += ["--limit", str(limit), "--out", str(options.out)]
    env = environment(options.on) | {"PARAMDELTA_BENCHMARK_OUT": str(options.out.resolve())}
    start = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        ended: int | None = child.wait(timeout=most)
    except subprocess.TimeoutExpired:
        ended = None
        child.terminate()  # it removes its files
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=TO_TIDY_UP)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return {"part": part, "limit": limit, "seconds": time.monotonic() - start, "exit_code": ended, "cut": ended is None}


def read_part(folder: Path, part: str) -> list[Record]:
    """Return what a part has written; a last line that was cut short is left out."""
    path = folder / f"{part}.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(results.record_of(json.loads(line)))
        except json.JSONDecodeError:
            break
    return found


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine with its devices, the versions with those of CUDA, and the commit."""
    versions = machine.describe_versions() | machine.versions_of(PACKAGES) | machine.cuda_versions()
    commit = machine.describe_commit()
    if options.commit:
        commit = {"commit": options.commit, "dirty": commit["dirty"]}
    return {
        "machine": machine.describe_machine() | {"gpu": describe(options.on)},
        "versions": versions,
        "commit": commit,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    begun = time.monotonic()
    now = datetime.datetime.now(datetime.timezone.utc)
    options.out = options.out or ROOT / "benchmarks" / "results" / f"{now:%Y-%m-%d-%H%M}-gpu"
    options.out.mkdir(parents=True, exist_ok=True)
    told = about(options)
    records: list[Record] = []
    runs: list[dict[str, Any]] = []

    def save() -> dict[str, Any]:
        asked = {"parts": options.parts, "budget": options.budget, "on": options.on, "runs": runs}
        content = results.document(records, **told, options=asked)
        results.write(options.out / "gpu.json", content)
        return content

    for part in options.parts:
        (options.out / f"{part}.jsonl").unlink(missing_ok=True)
    for part in options.parts:
        left = options.budget - RESERVE - (time.monotonic() - begun)
        if left <= 1:
            runs.append({"part": part, "limit": 0.0, "seconds": 0.0, "exit_code": None, "cut": True})
            continue
        limit = limit_of(part, options.parts, left)
        print(f"== {part}: {limit:.0f} of {left:.0f} s", flush=True)
        runs.append(run_part(part, limit, min(left, limit * GRACE + SPARE), options))
        records += read_part(options.out, part)
        save()
    content = save()
    made = summary.of(content)
    summary.write(options.out, made, content)
    for part in options.parts:
        (options.out / f"{part}.jsonl").unlink(missing_ok=True)
    print(summary.markdown(made, content))
    print(f"written: {options.out}, in {time.monotonic() - begun:.0f} s")
    return 0 if made["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
