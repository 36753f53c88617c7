"""Raw results: collected from the jobs' folders, written to one JSON file, read back and checked. No paths in it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paramdelta
from benchmarks import machine
from experiments.jobs import Place, all_jobs
from experiments.settings import PACKAGES

SCHEMA = "paramdelta-experiments/1"
FOLDER = Path(__file__).with_name("results")


def collect(configuration: str, places: Sequence[Place]) -> dict[str, Any]:
    """Gather what the jobs of every seed have found."""
    described = machine.describe_machine()
    return {
        "schema": SCHEMA,
        "configuration": configuration,
        "digest": places[0].folder.parent.name,
        "settings": dataclasses.asdict(places[0].settings),
        "machine": {part: described[part] for part in ("cpu", "architecture", "cores", "kernel")},
        "versions": {
            "python": platform.python_version(),
            "paramdelta": paramdelta.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": machine.describe_commit(),
        "seeds": [_seed(place) for place in places],
    }


def _seed(place: Place) -> dict[str, Any]:
    found = {job.name: place.result(job) for job in all_jobs()}
    return _rounded(
        {
            "seed": place.seed,
            "parameters": found["pretrain-m1"]["parameters"],
            "losses": {name: result["loss"] for name, result in found.items() if "loss" in result},
            "curves": {name: result["curve"] for name, result in found.items() if "curve" in result},
            "measured": found["measure"],
        }
    )


def _rounded(value: Any) -> Any:
    """Floats to six digits behind the point: more would only be noise of the sums' order."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document: a line for each entry, and for each seed."""
    head = {key: value for key, value in document.items() if key != "seeds"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    seeds = ",\n".join("  " + json.dumps(seed, separators=(",", ":")) for seed in document["seeds"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join([*lines, f' "seeds": [\n{seeds}\n ]']) + "\n}\n")


def read(path: Path) -> dict[str, Any]:
    """Read a result file; ValueError where it is none."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected a result file of schema {SCHEMA}")
    if not document.get("seeds"):
        raise ValueError(f"{path.name}: expected at least one seed")
    return document
