"""Checkpoints on disk: strict headers, folders with an index, and what they hold. No tensor data is read here."""

from __future__ import annotations

from typing import Any

from paramdelta import JSON_VERSION
from paramdelta.checkpoint.folder import INDEX, SINGLE, Checkpoint, ShardFile, open_checkpoint
from paramdelta.checkpoint.held import HeldTensor, held_checkpoint
from paramdelta.checkpoint.table import TensorSpec, TensorTable
from paramdelta.checkpoint.weights import (
    Quantisation,
    QuantisedWeight,
    quantised_as,
    recognise,
)

__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "HeldTensor",
    "Quantisation",
    "QuantisedWeight",
    "ShardFile",
    "TensorSpec",
    "TensorTable",
    "describe",
    "held_checkpoint",
    "open_checkpoint",
    "quantised_as",
    "recognise",
]


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint holds as JSON-ready values, for ``paramdelta inspect``."""
    import math

    table = checkpoint.tensors
    quantisation, complaints = recognise(checkpoint, allow_unscaled=True)
    logical = {weight.codes: weight for weight in quantisation.weights.values()}
    beside = quantisation.parts.union(quantisation.statistics).difference(logical)
    formats: dict[str, dict[str, int]] = {}
    parameters = 0
    model_type = checkpoint.config.get("model_type")
    architectures = checkpoint.config.get("architectures")
    dtypes: dict[str, dict[str, int]] = {}
    for row, shape in enumerate(table.shapes):
        entry = dtypes.setdefault(table.dtype_of(row).safetensors, {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += math.prod(shape)
        entry["bytes"] += int(table.nbytes[row])
        if row in beside:
            continue
        weight = logical.get(row)
        elements = math.prod(shape if weight is None else weight.shape)
        parameters += elements
        if weight is not None:
            stored = formats.setdefault(weight.format.name, {"weights": 0, "parameters": 0})
            stored["weights"] += 1
            stored["parameters"] += elements
    return {
        "version": JSON_VERSION,
        "kind": "checkpoint",
        "name": checkpoint.label,
        "architecture": ", ".join(map(str, architectures if isinstance(architectures, list) else [])) or None,
        "model_type": model_type if isinstance(model_type, str) else None,
        "parameters": parameters,
        "tensors": len(table),
        "bytes": int(table.nbytes.sum()),
        "files": len(checkpoint.files),
        "sharded": checkpoint.sharded,
        "tied_embeddings": checkpoint.tied,
        "quantised": quantisation.description or None,
        "formats": formats,
        "calibration_tensors": len(quantisation.statistics),
        "dtypes": dtypes,
        "shards": [{"name": f.name, "bytes": f.size} for f in checkpoint.files],
        "side_files": list(checkpoint.side_files),
        "notes": list(checkpoint.notes),
        "problems": [str(complaint) for complaint in complaints],
    }
