"""The one schema of results: what a record holds, how ratios are made, and how a file of results is checked.

A result file is a JSON object: ``schema``, ``machine``, ``versions``, ``commit``, ``options``, ``records``. A record
is one contender in one case: its metrics with unit and raw samples, and ratios, always between samples of one run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "paramdelta-benchmarks/2"
READABLE = ("paramdelta-benchmarks/1", SCHEMA)  # 2 added counters and processor time, and took nothing away
GROUPS = ("kernels", "merges", "storage", "sweeps", "quantised", "start", "many")
GPU_GROUPS = tuple(
    f"gpu-{part}" for part in ("build", "conformance", "laws", "sanitizer", "kernels", "foreach", "pipeline")
)
UNITS = ("B/s", "1/s", "s", "B", "1", "1/element")
OURS = "paramdelta"


@dataclass(frozen=True)
class Metric:
    """Raw samples of one quantity in the order in which they were taken, in base units."""

    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """The largest sample of a rate, the smallest of anything else."""
        return max(self.samples) if self.unit.endswith("/s") else min(self.samples)


@dataclass(frozen=True)
class Record:
    """One contender in one case; ``skipped`` holds the reason where it was not measured."""

    group: str
    case: str
    contender: str
    parameters: dict[str, Any]
    metrics: dict[str, Metric] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None


def bound_ratios(bandwidth: Metric, bound: Metric) -> dict[str, float]:
    """Return the share of the bound that was reached: by medians, and by the best sample of each."""
    return {
        "of_bound": bandwidth.median / bound.median,
        "of_bound_best": bandwidth.best / bound.best,
    }


def peer_ratios(theirs: Metric, ours: Metric) -> dict[str, float]:
    """Return how many times longer the peer took: by medians, by the best of each, and within each round.

    ``times_ours_paired`` is the median of theirs over ours round by round: it cancels drift of the machine.
    """
    pairs = [t / o for t, o in zip(theirs.samples, ours.samples, strict=False)]
    return {
        "times_ours": theirs.median / ours.median,
        "times_ours_best": theirs.best / ours.best,
        "times_ours_paired": statistics.median(pairs),
    }


def compare_within_cases(records: Sequence[Record], metric: str = "wall") -> list[Record]:
    """Return the records with ``peer_ratios`` added to every contender that met ours in the same case."""
    ours = {(r.group, r.case): r.metrics[metric] for r in records if r.contender == OURS and metric in r.metrics}
    done = []
    for record in records:
        reference = ours.get((record.group, record.case))
        if reference is not None and record.contender != OURS and metric in record.metrics:
            ratios = record.ratios | peer_ratios(record.metrics[metric], reference)
            record = Record(**{**vars(record), "ratios": ratios})
        done.append(record)
    return done


def document(
    records: Sequence[Record],
    *,
    machine: dict[str, Any],
    versions: dict[str, Any],
    commit: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the JSON object of one run, checked."""
    made = {
        "schema": SCHEMA,
        "machine": machine,
        "versions": versions,
        "commit": commit,
        "options": options,
        "records": [asdict(record) for record in records],
    }
    made = json.loads(json.dumps(made))
    check(made)
    return made


def write(path: Path, content: dict[str, Any]) -> None:
    """Check a result and write it."""
    check(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a result file and check it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    check(content)
    return dict(content)


def records_of(content: dict[str, Any]) -> list[Record]:
    """Return the records of a checked result."""
    return [record_of(raw) for raw in content["records"]]


def record_of(raw: dict[str, Any]) -> Record:
    """Return one record from its JSON object."""
    metrics = {name: Metric(m["unit"], tuple(m["samples"])) for name, m in raw["metrics"].items()}
    return Record(**{**raw, "metrics": metrics})


def check(content: Any) -> None:
    """Raise ValueError, naming every fault, unless ``content`` follows the schema."""
    faults = []
    if not isinstance(content, dict) or content.get("schema") not in READABLE:
        raise ValueError(f"not a result file: expected an object with a schema of {READABLE}")
    for key in ("machine", "versions", "commit", "options"):
        if not isinstance(content.get(key), dict):
            faults.append(f"{key}: expected an object, got {content.get(key)!r}")
    if not isinstance(content.get("records"), list):
        faults.append("records: expected a list")
    else:
        for i, record in enumerate(content["records"]):
            faults += [f"records[{i}]: {fault}" for fault in _faults_of(record)]
    if faults:
        raise ValueError("\n".join(faults))


def _faults_of(record: Any) -> list[str]:
    keys = {"group", "case", "contender", "parameters", "metrics", "ratios", "skipped"}
    if not isinstance(record, dict) or record.keys() != keys:
        return [f"expected exactly {sorted(keys)}"]
    faults = []
    if record["group"] not in GROUPS + GPU_GROUPS:
        faults.append(f"group: expected one of {GROUPS + GPU_GROUPS}, got {record['group']!r}")
    if (record["skipped"] is None) != bool(record["metrics"]):
        faults.append("expected either metrics or the reason why it was skipped")
    for name, metric in record["metrics"].items():
        if metric.get("unit") not in UNITS:
            faults.append(f"{name}: expected a unit of {UNITS}, got {metric.get('unit')!r}")
        samples = metric.get("samples")
        if not samples or not all(isinstance(x, (int, float)) and math.isfinite(x) and x >= 0 for x in samples):
            faults.append(f"{name}: expected finite samples, at least one")
    for name, ratio in record["ratios"].items():
        if not isinstance(ratio, (int, float)) or not math.isfinite(ratio):
            faults.append(f"ratio {name}: expected a finite number, got {ratio!r}")
    return faults
