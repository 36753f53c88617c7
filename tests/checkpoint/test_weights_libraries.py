"""Quantised weights as libraries write them: compressed-tensors, modelopt, FBGEMM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quantised_folders import folder_of, planes, recognised, refused

from paramdelta.checkpoint import recognise
from paramdelta.formats import (
    COMPRESSED_BF16,
    COMPRESSED_F32,
    FBGEMM,
    FP8_TENSOR,
    INT4,
    INT4_F32,
    MXFP4_COMPRESSED,
    NVFP4_COMPRESSED,
    NVFP4_MODELOPT,
)

Q = "model.layers.0.self_attn.q_proj"


def compressed(layout: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
        "quantization_status": "compressed",
    }


TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("shape", [(4096, 1), (4096,)], ids=["grid", "row"])
@pytest.mark.parametrize(("dtype", "recipe"), [("BF16", COMPRESSED_BF16), ("F32", COMPRESSED_F32)])
def test_fp8_per_channel(tmp_path: Path, dtype: str, recipe: Any, shape: tuple[int, ...]) -> None:
    config = compressed("float-quantized", TOKENS, num_bits=8, type="float", strategy="channel", symmetric=True)
    tensors = {f"{Q}.weight": ("F8_E4M3", (4096, 5120)), f"{Q}.weight_scale": (dtype, shape)}
    found = recognised(tmp_path, tensors, config)
    made = found.weights[f"{Q}.weight"].format
    assert (made.name, made.method, made.recipe) == ("fp8-channel", "compressed-tensors", recipe)
    assert (made.rows, made.cols, made.scale_dtype.safetensors) == (1, 0, dtype)
    assert made.scale_shape == ("grid" if len(shape) == 2 else "row")
    assert found.dynamic
    assert found.ignored == ("lm_head", "re:.*gate$")


@pytest.mark.parametrize(("shape", "how"), [((), "scalar"), ((1,), "one"), ((1, 1), "grid")])
def test_fp8_per_tensor_with_measured_activations(tmp_path: Path, shape: tuple[int, ...], how: str) -> None:
    config = compressed("float-quantized", STATIC, num_bits=8, type="float", strategy="tensor")
    tensors = {
        f"{Q}.weight": ("F8_E4M3", (4096, 5120)),
        f"{Q}.weight_scale": ("BF16", shape),
        f"{Q}.input_scale": ("BF16", (1,)),
    }
    found = recognised(tmp_path, tensors, config)
    made = found.weights[f"{Q}.weight"].format
    assert (made.name, made.recipe, made.scale_shape) == ("fp8-tensor", COMPRESSED_BF16, how)
    assert not found.dynamic
    assert len(found.statistics) == 1


def test_fp8_blocks_under_another_name(tmp_path: Path) -> None:
    config = compressed(
        "float-quantized", TOKENS, num_bits=8, type="float", strategy="block", block_structure=[128, 128]
    )
    tensors = {f"{Q}.weight": ("F8_E4M3", (576, 5120)), f"{Q}.weight_scale": ("BF16", (5, 40))}
    made = recognised(tmp_path, tensors, config).weights[f"{Q}.weight"].format
    assert (made.name, made.rows, made.cols, made.recipe) == ("fp8-block", 128, 128, COMPRESSED_BF16)
    assert made.spelling.of(f"{Q}.weight", "scale") == f"{Q}.weight_scale"


def test_mxfp8(tmp_path: Path) -> None:
    config = compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32)
    tensors = {f"{Q}.weight": ("F8_E4M3", (64, 128)), f"{Q}.weight_scale": ("U8", (64, 4))}
    made = recognised(tmp_path, tensors, config).weights[f"{Q}.weight"].format
    assert (made.name, made.method, made.scale.name) == ("mxfp8", "compressed-tensors", "f8_e8m0")


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_mxfp4_packed(tmp_path: Path, dtype: str) -> None:
    config = compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    tensors = {f"{Q}.weight_packed": ("U8", (512, 1024)), f"{Q}.weight_scale": (dtype, (512, 64))}
    checkpoint = folder_of(tmp_path, tensors, config)
    found, complaints = recognise(checkpoint)
    assert complaints == []
    weight = found.weights[f"{Q}.weight"]
    assert weight.shape == (512, 2048)
    assert planes(checkpoint, found, weight.name) == {"codes": f"{Q}.weight_packed", "scale": f"{Q}.weight_scale"}
    assert (weight.format.name, weight.format.recipe, weight.format.cols) == ("mxfp4", MXFP4_COMPRESSED, 32)
    assert weight.format.scale.name == "f8_e8m0"


NVFP4_CONFIG = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)


@pytest.mark.parametrize("second", [(), (1,)], ids=["scalar", "one"])
def test_nvfp4_packed(tmp_path: Path, second: tuple[int, ...]) -> None:
    tensors = {
        f"{Q}.weight_packed": ("U8", (512, 1024)),
        f"{Q}.weight_scale": ("F8_E4M3", (512, 128)),
        f"{Q}.weight_global_scale": ("F32", second),
        f"{Q}.input_global_scale": ("F32", (1,)),
    }
    checkpoint = folder_of(tmp_path, tensors, NVFP4_CONFIG)
    found, complaints = recognise(checkpoint)
    assert complaints == []
    weight = found.weights[f"{Q}.weight"]
    assert weight.shape == (512, 2048)
    assert planes(checkpoint, found, weight.name)["second"] == f"{Q}.weight_global_scale"
    assert (weight.format.name, weight.format.recipe, weight.format.second) == ("nvfp4", NVFP4_COMPRESSED, "divide")
    assert (weight.format.rows, weight.format.cols, weight.format.scale.name) == (1, 16, "f8_e4m3")
    assert [checkpoint.tensors.names[r] for r in found.statistics] == [f"{Q}.input_global_scale"]


def int4_config(**weights: Any) -> dict[str, Any]:
    return compressed(
        "pack-quantized", **{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    )


@pytest.mark.parametrize(("dtype", "recipe"), [("BF16", INT4), ("F32", INT4_F32)])
def test_int4_of_kimi(tmp_path: Path, dtype: str, recipe: Any) -> None:
    config = {"model_type": "kimi_k25", "text_config": {"quantization_config": int4_config(symmetric=True)}}
    tensors = {
        f"{Q}.weight_packed": ("I32", (2048, 896)),
        f"{Q}.weight_scale": (dtype, (2048, 224)),
        f"{Q}.weight_shape": ("I64", (2,)),
    }
    checkpoint = folder_of(tmp_path, tensors, config)
    found, complaints = recognise(checkpoint)
    assert complaints == []
    weight = found.weights[f"{Q}.weight"]
    assert weight.shape == (2048, 7168)
    assert planes(checkpoint, found, weight.name)["shape_row"] == f"{Q}.weight_shape"
    assert (weight.format.name, weight.format.recipe) == ("int4", recipe)
    assert (weight.format.rows, weight.format.cols, weight.format.bits) == (1, 32, 4)
    assert not weight.format.zero_points
    assert weight.format.spelling.of(weight.name, "zero_point") is None
    assert found.config_place == "config.json:text_config"


@pytest.mark.parametrize(
    ("weights", "columns", "grid"), [({}, 64, (1, 32)), ({"strategy": "channel", "group_size": None}, 1, (1, 0))]
)
def test_int4_with_zero_points(tmp_path: Path, weights: dict[str, Any], columns: int, grid: tuple[int, int]) -> None:
    tensors = {
        f"{Q}.weight_packed": ("I32", (500, 256)),
        f"{Q}.weight_scale": ("BF16", (500, columns)),
        f"{Q}.weight_shape": ("I64", (2,)),
        f"{Q}.weight_zero_point": ("I32", (63, columns)),
    }
    checkpoint = folder_of(tmp_path, tensors, int4_config(symmetric=False, **weights))
    found, complaints = recognise(checkpoint)
    assert complaints == []
    weight = found.weights[f"{Q}.weight"]
    assert weight.format.zero_points
    assert (weight.format.rows, weight.format.cols) == grid
    assert planes(checkpoint, found, weight.name)["zero_point"] == f"{Q}.weight_zero_point"


def test_zero_points_of_the_wrong_shape(tmp_path: Path) -> None:
    tensors = {
        f"{Q}.weight_packed": ("I32", (512, 256)),
        f"{Q}.weight_scale": ("BF16", (512, 64)),
        f"{Q}.weight_zero_point": ("I32", (512, 64)),
    }
    (complaint,) = refused(tmp_path, tensors, int4_config(symmetric=False))
    assert "I32 [512, 64], but zero points are packed into I32 [64, 64]" in complaint.problem


def test_groups_of_several_formats(tmp_path: Path) -> None:
    config = compressed("mixed-precision", TOKENS, num_bits=8, type="float", strategy="channel")
    nvfp4 = NVFP4_CONFIG["config_groups"]["group_0"] | {"format": "nvfp4-pack-quantized"}
    config["config_groups"]["group_1"] = nvfp4
    tensors = {
        "a.weight": ("F8_E4M3", (64, 128)),
        "a.weight_scale": ("BF16", (64, 1)),
        "b.weight_packed": ("U8", (64, 64)),
        "b.weight_scale": ("F8_E4M3", (64, 8)),
        "b.weight_global_scale": ("F32", (1,)),
    }
    found = recognised(tmp_path, tensors, config)
    assert [w.format.name for w in found.weights.values()] == ["fp8-channel", "nvfp4"]


def test_schemes_by_name(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    tensors = {"a.weight": ("F8_E4M3", (64, 128)), "a.weight_scale": ("BF16", (64, 1))}
    assert recognised(tmp_path, tensors, config).weights["a.weight"].format.name == "fp8-channel"


MODELOPT_FP8 = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}
MODELOPT_NVFP4 = {
    "producer": {"name": "modelopt"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
}


def test_modelopt_fp8(tmp_path: Path) -> None:
    attention = Q.removesuffix(".q_proj")
    tensors = {
        f"{Q}.weight": ("F8_E4M3", (8192, 8192)),
        f"{Q}.input_scale": ("F32", ()),
        f"{Q}.weight_scale": ("F32", ()),
        f"{attention}.k_proj.k_scale": ("F32", ()),
        f"{attention}.v_proj.v_scale": ("F32", ()),
        "model.norm.weight": ("BF16", (8192,)),
    }
    checkpoint = folder_of(tmp_path, tensors, {"model_type": "llama"}, MODELOPT_FP8)
    found, complaints = recognise(checkpoint)
    assert complaints == []
    made = found.weights[f"{Q}.weight"].format
    assert (made.name, made.method, made.recipe, made.scale_shape) == ("fp8-tensor", "modelopt", FP8_TENSOR, "scalar")
    assert len(found.statistics) == 3
    assert (found.method, found.config_place, found.dynamic) == ("modelopt", "hf_quant_config.json", False)
    assert found.config == MODELOPT_FP8
    assert found.ignored == ("lm_head",)


@pytest.mark.parametrize("scale", [(4,), (4, 1), (4, 1, 1)], ids=str)
def test_modelopt_stacks_have_a_scale_for_each_expert(tmp_path: Path, scale: tuple[int, ...]) -> None:
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    tensors = {
        name: ("F8_E4M3", (4, 512, 256)),
        f"{name}_weight_scale": ("F32", scale),
        f"{name}_input_scale": ("F32", (4,)),
    }
    found = recognised(tmp_path, tensors, None, MODELOPT_FP8)
    made = found.weights[name].format
    assert made.name == "fp8-tensor"
    assert made.scale_shape == {1: "scalar", 2: "one", 3: "grid"}[len(scale)]
    assert made.spelling.of(name, "scale") == f"{name}_weight_scale"
    assert len(found.statistics) == 1


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{Q}.weight": ("U8", (512, 1024)),
        f"{Q}.weight_scale": ("F8_E4M3", (512, 128)),
        f"{Q}.weight_scale_2": ("F32", ()),
        f"{Q}.input_scale": ("F32", ()),
        name: ("U8", (4, 512, 64)),
        f"{name}_weight_scale": ("F8_E4M3", (4, 512, 8)),
        f"{name}_weight_scale_2": ("F32", (4,)),
    }
    checkpoint = folder_of(tmp_path, tensors, {"model_type": "llama"}, MODELOPT_NVFP4)
    found, complaints = recognise(checkpoint)
    assert complaints == []
    assert {n: w.shape for n, w in found.weights.items()} == {f"{Q}.weight": (512, 2048), name: (4, 512, 128)}
    for weight in found.weights.values():
        made = weight.format
        assert (made.name, made.method, made.recipe, made.second) == ("nvfp4", "modelopt", NVFP4_MODELOPT, "multiply")
        assert (made.rows, made.cols, made.codes_dtype.name) == (1, 16, "u8")
    assert planes(checkpoint, found, name)["second"] == f"{name}_weight_scale_2"
    assert not found.dynamic


@pytest.mark.parametrize(
    ("algorithm", "names"), [("FP8_PB_WO", "fp8-block"), ("FP8_PER_CHANNEL_PER_TOKEN", "fp8-channel")]
)
def test_modelopts_other_fp8(tmp_path: Path, algorithm: str, names: str) -> None:
    scale = (2, 4) if names == "fp8-block" else (256,)
    tensors = {"a.weight": ("F8_E4M3", (256, 512)), "a.weight_scale": ("F32", scale)}
    found = recognised(tmp_path, tensors, None, {"quantization": {"quant_algo": algorithm}})
    assert found.weights["a.weight"].format.name == names
    assert found.dynamic


def test_modelopts_blocks_have_scales_of_four_dimensions(tmp_path: Path) -> None:
    tensors = {"a.weight": ("F8_E4M3", (256, 512)), "a.weight_scale": ("F32", (2, 1, 4, 1))}
    made = recognised(tmp_path, tensors, None, {"quantization": {"quant_algo": "FP8_PB_WO"}}).weights["a.weight"].format
    assert (made.name, made.rows, made.cols, made.scale_shape) == ("fp8-block", 128, 128, "spread")
    assert made.recipe == FP8_TENSOR


def test_modelopt_mixed(tmp_path: Path) -> None:
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
    tensors = {
        "a.weight": ("F8_E4M3", (64, 128)),
        "a.weight_scale": ("F32", ()),
        "b.weight": ("U8", (64, 64)),
        "b.weight_scale": ("F8_E4M3", (64, 8)),
        "b.weight_scale_2": ("F32", ()),
    }
    config = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    found = recognised(tmp_path, tensors, None, config)
    assert [w.format.name for w in found.weights.values()] == ["fp8-tensor", "nvfp4"]


def test_a_quantised_cache_leaves_weights_alone(tmp_path: Path) -> None:
    tensors = {"k_proj.weight": ("BF16", (64, 64)), "k_proj.k_scale": ("F32", ())}
    config = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    found = recognised(tmp_path, tensors, None, config)
    assert found.weights == {}
    assert found.method is None
    assert len(found.statistics) == 1


FBGEMM_CONFIG = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def test_llama_405b_of_fbgemm(tmp_path: Path) -> None:
    up = "model.layers.1.mlp.up_proj"
    tensors = {
        f"{up}.input_scale_ub": ("F32", (1,)),
        f"{up}.weight": ("F8_E4M3", (53248, 16384)),
        f"{up}.weight_scale": ("F32", (53248, 1)),
    }
    found = recognised(tmp_path, tensors, FBGEMM_CONFIG)
    made = found.weights[f"{up}.weight"].format
    assert (made.name, made.method, made.recipe) == ("fp8-channel", "fbgemm_fp8", FBGEMM)
    assert (made.rows, made.cols) == (1, 0)
    assert len(found.statistics) == 1
    assert found.dynamic


def test_llama_4_stacks_are_transposed(tmp_path: Path) -> None:
    experts = "language_model.model.layers.0.feed_forward.experts"
    tensors = {
        f"{experts}.gate_up_proj": ("F8_E4M3", (16, 5120, 16384)),
        f"{experts}.gate_up_proj_scale": ("F32", (16, 1, 16384)),
        f"{experts}.down_proj": ("F8_E4M3", (16, 8192, 5120)),
        f"{experts}.down_proj_scale": ("F32", (16, 1, 5120)),
    }
    found = recognised(tmp_path, tensors, FBGEMM_CONFIG)
    assert {n: (w.shape, w.format.rows, w.format.cols) for n, w in found.weights.items()} == {
        f"{experts}.gate_up_proj": ((16, 5120, 16384), 0, 1),
        f"{experts}.down_proj": ((16, 8192, 5120), 0, 1),
    }
    assert {w.format.recipe for w in found.weights.values()} == {FBGEMM}
