"""One part in a process of its own: ``python -m benchmarks.gpu.child PART --on cuda --limit 60 --out FOLDER``.

Each record is written to FOLDER/PART.jsonl as soon as there is one, so that a part that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.device import PLACES, Clock, Device
from benchmarks.gpu.sizes import BY_PLACE
from benchmarks.results import Record

PARTS = ("build", "conformance", "laws", "sanitizer", "kernels", "foreach", "pipeline")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("parts", metavar="PART[,PART...]", help=f"of {','.join(PARTS)}")
    parser.add_argument("--on", choices=PLACES, default="cuda")
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    clock = Clock(options.limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: what was made is removed on the way
    device = Device(options.on)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.parts.split(","):
        part = importlib.import_module(f"benchmarks.gpu.{name}")
        with (options.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for record in part.run(device, BY_PLACE[options.on], clock):
                file.write(json.dumps(asdict(record)) + "\n")
                file.flush()
                print(line(record), flush=True)
    return 0


def line(record: Record) -> str:
    """Return what to print of a record."""
    if record.skipped:
        return f"{record.case}, {record.contender}: skipped: {record.skipped}"
    told = [f"{name} {metric.median:.6g} {metric.unit}" for name, metric in record.metrics.items()]
    told += [f"{name} {ratio:.3f}" for name, ratio in record.ratios.items()]
    return f"{record.case}, {record.contender}: {', '.join(told)}"


if __name__ == "__main__":
    sys.exit(main())
