"""Measures the kernels in several processes, one after the other, and pools their samples.

Where the loader happens to put code and stack changes a kernel's speed by up to 40 % for the life of a process, while
samples of one process agree within a few percent. Only samples of several processes show how far two runs of the same
build may lie apart. ``python -m benchmarks.pooled`` is one such process; it prints its records as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import kernels, quantised, results
from benchmarks.machine import ROOT
from benchmarks.results import Metric, Record, bound_ratios

PROCESSES, ROUNDS = 5, 2  # samples of each case in each process
QUICK_PROCESSES, QUICK_ROUNDS = 11, 1


def run(*, quick: bool, processes: int | None = None) -> list[Record]:
    """Measure every kernel in each of several processes and return the pooled records."""
    command = [sys.executable, "-m", "benchmarks.pooled", *(["--quick"] if quick else [])]
    taken = []
    for _ in range(processes or (QUICK_PROCESSES if quick else PROCESSES)):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        taken.append([results.record_of(raw) for raw in json.loads(done.stdout)])
    return pool(taken)


def pool(taken: Sequence[Sequence[Record]]) -> list[Record]:
    """Join the samples of the same case, process after process."""
    return [_joined(same) for same in zip(*taken, strict=True)]


def _joined(records: Sequence[Record]) -> Record:
    first = records[0]
    metrics = {
        name: Metric(metric.unit, tuple(x for record in records for x in record.metrics[name].samples))
        for name, metric in first.metrics.items()
        if all(name in record.metrics for record in records)
    }
    loops = sorted({loop for record in records for loop in record.parameters["bound_loops"]})
    told: dict[str, Any] = {**first.parameters, "bound_loops": loops, "processes": len(records)}
    ratios = bound_ratios(metrics["bandwidth"], metrics["bound"])
    return Record(first.group, first.case, first.contender, told, metrics, ratios)


def main() -> int:
    quick = "--quick" in sys.argv[1:]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    records = [*kernels.run(quick=quick, rounds=rounds), *quantised.run(quick=quick, rounds=rounds)]
    json.dump([asdict(record) for record in records], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
