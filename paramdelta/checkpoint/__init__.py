"""Checkpoints on disk: strict headers, folders with an index, and what they hold. No tensor data is read here."""

from __future__ import annotations

from typing import Any

from paramdelta import JSON_VERSION
from paramdelta.checkpoint.folder import INDEX, SINGLE, Checkpoint, ShardFile, open_checkpoint
from paramdelta.checkpoint.table import TensorSpec, TensorTable
from paramdelta.checkpoint.weights import (
    Quantisation,
    QuantisedWeight,
    quantisation_complaint,
    quantised_as,
    recognise,
)

__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "Quantisation",
    "QuantisedWeight",
    "ShardFile",
    "TensorSpec",
    "TensorTable",
    "describe",
    "open_checkpoint",
    "quantisation_complaint",
    "quantised_as",
    "recognise",
]


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint holds as JSON-ready values, for ``paramdelta inspect``."""
    import math

    table = checkpoint.tensors
    architectures = checkpoint.config.get("architectures")
    dtypes: dict[str, dict[str, int]] = {}
    for row, shape in enumerate(table.shapes):
        entry = dtypes.setdefault(table.dtype_of(row).safetensors, {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += math.prod(shape)
        entry["bytes"] += int(table.nbytes[row])
    return {
        "version": JSON_VERSION,
        "kind": "checkpoint",
        "name": checkpoint.label,
        "architecture": ", ".join(map(str, architectures if isinstance(architectures, list) else [])) or None,
        "model_type": checkpoint.config.get("model_type"),
        "parameters": _parameters(checkpoint),
        "tensors": len(table),
        "bytes": int(table.nbytes.sum()),
        "files": len(checkpoint.files),
        "sharded": checkpoint.sharded,
        "tied_embeddings": checkpoint.tied,
        "quantised": quantised_as(checkpoint),
        "dtypes": dtypes,
        "shards": [{"name": f.name, "bytes": f.size} for f in checkpoint.files],
        "side_files": list(checkpoint.side_files),
        "notes": list(checkpoint.notes),
    }


def _parameters(checkpoint: Checkpoint) -> int:
    """Return the number of elements of all weights, not counting scales, packing and calibration."""
    import math

    found, _ = recognise(checkpoint)
    others = found.parts | set(found.statistics)
    shapes = [weight.shape for weight in found.weights.values()]
    shapes += [shape for row, shape in enumerate(checkpoint.tensors.shapes) if row not in others]
    return sum(map(math.prod, shapes))
