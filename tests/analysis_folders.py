"""Checkpoints for the tests of analyses: deltas whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16 = ml_dtypes.bfloat16
Tensors = dict[str, np.ndarray[Any, Any]]
SIDE = 128
LAYERS = 3


def base_tensors(seed: int = 0, dtype: Any = BF16) -> Tensors:
    """Return a small model in Llama's layout: three layers, embeddings, norms."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (64, SIDE), "model.norm.weight": (SIDE,), "lm_head.weight": (64, SIDE)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (SIDE, SIDE)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (3 * SIDE, SIDE)
        shapes[f"{prefix}.input_layernorm.weight"] = (SIDE,)
    return {name: (rng.standard_normal(shape) / 16).astype(dtype) for name, shape in shapes.items()}


def moved(tensors: Tensors, steps: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
    """Return tensors with steps added to some of them, rounded once."""
    return {
        name: (tensor.astype(np.float32) + steps[name]).astype(tensor.dtype) if name in steps else tensor
        for name, tensor in tensors.items()
    }


def noise(tensors: Tensors, size: float, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return normal steps for every tensor, ``size`` in standard deviation."""
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(t.shape) * size).astype(np.float32) for name, t in tensors.items()}


def write(folder: Path, tensors: Tensors, *, vocabulary: Mapping[str, int] | None = None) -> Path:
    """Write a folder, with a tokenizer.json where ``vocabulary`` is given."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "tie_word_embeddings": "lm_head.weight" not in tensors}
    (folder / "config.json").write_text(json.dumps(config))
    if vocabulary is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": dict(vocabulary)}}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
