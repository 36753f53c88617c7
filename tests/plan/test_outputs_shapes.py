"""Scales come out in the shape that the followed checkpoint gives them, also where new_base has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_folders import plan
from quantised_folders import folder_of
from quantised_toys import Shape, Tensors, skeleton

from paramdelta.checkpoint import recognise

E, N, K = 3, 256, 384
STACK = "model.layers.0.mlp.experts.up_proj"
MATRIX = "model.layers.0.mlp.up_proj"
MODELOPT = {"producer": {"name": "modelopt"}}

SHAPES: dict[str, tuple[str, Shape, str, Shape, dict[str, Any]]] = {
    "spread blocks": (f"{MATRIX}.weight", (N, K), f"{MATRIX}.weight_scale", (2, 1, 3, 1), {"quant_algo": "FP8_PB_WO"}),
    "blocks": (f"{MATRIX}.weight", (N, K), f"{MATRIX}.weight_scale", (2, 3), {"quant_algo": "FP8_PB_WO"}),
    "rows": (f"{MATRIX}.weight", (N, K), f"{MATRIX}.weight_scale", (N,), {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "columns of rows": (
        f"{MATRIX}.weight",
        (N, K),
        f"{MATRIX}.weight_scale",
        (N, 1),
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    ),
    "a scalar": (f"{MATRIX}.weight", (N, K), f"{MATRIX}.weight_scale", (), {"quant_algo": "FP8"}),
    "one": (f"{MATRIX}.weight", (N, K), f"{MATRIX}.weight_scale", (1,), {"quant_algo": "FP8"}),
    "one by one": (f"{MATRIX}.weight", (N, K), f"{MATRIX}.weight_scale", (1, 1), {"quant_algo": "FP8"}),
    "an expert each": (STACK, (E, N, K), f"{STACK}_weight_scale", (E,), {"quant_algo": "FP8"}),
    "an expert each, [E, 1]": (STACK, (E, N, K), f"{STACK}_weight_scale", (E, 1), {"quant_algo": "FP8"}),
    "an expert each, [E, 1, 1]": (STACK, (E, N, K), f"{STACK}_weight_scale", (E, 1, 1), {"quant_algo": "FP8"}),
    "rows of experts": (
        STACK,
        (E, N, K),
        f"{STACK}_weight_scale",
        (E, N, 1),
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    ),
}


@pytest.mark.parametrize(("codes", "shape", "scale", "scales", "algorithm"), SHAPES.values(), ids=SHAPES.keys())
def test_like_post(
    codes: str, shape: Shape, scale: str, scales: Shape, algorithm: dict[str, Any], tmp_path: Path
) -> None:
    plain: Tensors = {codes: ("BF16", shape), "model.norm.weight": ("BF16", (K,))}
    quantised: Tensors = {**plain, codes: ("F8_E4M3", shape), scale: ("F32", scales)}
    for role, tensors in (("post", quantised), ("base", plain), ("new_base", plain)):
        (tmp_path / role).mkdir()
        modelopt = {**MODELOPT, "quantization": algorithm} if role == "post" else None
        if algorithm["quant_algo"] == "FP8" and role == "post":
            tensors = {**tensors, f"{codes.removesuffix('.weight')}.input_scale": ("F32", ())}
        folder_of(tmp_path / role, tensors, {"model_type": "toy"}, modelopt)
    sources = {role: tmp_path / role for role in ("post", "base", "new_base")}
    made = plan(sources, format="like-post")
    held = {name: (made.dtype_of(i).safetensors, made.shape_of(i)) for i, name in enumerate(made.names)}
    assert {name: held[name] for name in (codes, scale)} == {codes: ("F8_E4M3", shape), scale: ("F32", scales)}
    found, complaints = recognise(skeleton(made, tmp_path / "out"))
    assert complaints == []
    assert [w.format for w in found.weights.values()] == [f for f in made.stored.formats if f is not None]
