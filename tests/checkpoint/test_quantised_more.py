"""Quantised folders in less common shapes, and plain ones whose names look like codes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from paramdelta.checkpoint import open_checkpoint, quantisation_complaint
from paramdelta.dtypes import BY_SAFETENSORS

PLAIN = {"x.weight": ("BF16", [2, 2])}


def complaints(path: Path, tensors: dict[str, tuple[str, list[int]]], **configs: Any) -> list[Any]:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BY_SAFETENSORS[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    for name, value in configs.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return quantisation_complaint(open_checkpoint(path, role="post"))


QUANTISED = {
    "stacked experts in blocks": {"e.gate_up": ("F8_E4M3", [2, 2, 2]), "e.gate_up_scale_inv": ("F32", [2, 1, 1])},
    "stacked experts, one scale each": {"e.down": ("F8_E4M3", [2, 2, 2]), "e.down_scale": ("F32", [2, 1, 1])},
    "scale_weight": {"x.weight": ("F8_E4M3", [2, 2]), "x.scale_weight": ("F32", [])},
    "bitsandbytes 4 bits": {"x.weight": ("U8", [4, 1]), "x.weight.absmax": ("F32", [1])},
    "bitsandbytes 8 bits": {"x.weight": ("I8", [2, 2]), "x.SCB": ("F32", [2])},
}


@pytest.mark.parametrize("tensors", QUANTISED.values(), ids=QUANTISED.keys())
def test_codes_with_scales(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    assert len(complaints(tmp_path, tensors)) == 1


@pytest.mark.parametrize(
    "path", [("llm_config",), ("language_config",), ("thinker_config", "text_config")], ids="/".join
)
def test_nested_configs(tmp_path: Path, path: tuple[str, ...]) -> None:
    config: dict[str, Any] = {"quantization_config": {"quant_method": "fp8"}}
    for key in reversed(path):
        config = {key: config}
    assert len(complaints(tmp_path, PLAIN, config=config)) == 1


NAMES_ALONE = {
    "x_blocks": {"x_blocks": ("BF16", [2]), "x_scales": ("BF16", [2])},
    "x.qweight": {"x.qweight": ("BF16", [2])},
    "x.weight_packed": {"x.weight_packed": ("BF16", [2])},
    "x.absmax": {"x.absmax": ("F32", [2])},
    "x_scale of bf16": {"x": ("BF16", [2]), "x_scale": ("F32", [2])},
}


@pytest.mark.parametrize("tensors", NAMES_ALONE.values(), ids=NAMES_ALONE.keys())
def test_names_of_codes_alone_do_not_matter(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    assert complaints(tmp_path, tensors) == []


@pytest.mark.parametrize(("algorithm", "count"), [(None, 0), ("FP8", 1)], ids=["cache only", "weights"])
def test_modelopts_own_file(tmp_path: Path, algorithm: str | None, count: int) -> None:
    config = {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}}
    assert len(complaints(tmp_path, PLAIN, hf_quant_config=config)) == count
