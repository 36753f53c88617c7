"""Quantised weights as their makers release them: DeepSeek, Qwen, Kimi, MiniMax, Mistral, gpt-oss."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantised_folders import folder_of, planes, recognised

from paramdelta.checkpoint import recognise
from paramdelta.formats import DEEPGEMM, DEEPGEMM_UE8M0, FP8_TENSOR, MXFP4_DEEPSEEK, MXFP4_OPENAI
from paramdelta.formats import MXFP8 as MXFP8_RECIPE

BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
L = "model.layers.3"
DEEPSEEK_V3 = {
    "model.embed_tokens.weight": ("BF16", (512, 7168)),
    f"{L}.self_attn.kv_a_proj_with_mqa.weight": ("F8_E4M3", (576, 7168)),
    f"{L}.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (5, 56)),
    f"{L}.mlp.gate.weight": ("BF16", (256, 7168)),
    f"{L}.mlp.gate.e_score_correction_bias": ("F32", (256,)),
    f"{L}.mlp.experts.0.down_proj.weight": ("F8_E4M3", (7168, 2048)),
    f"{L}.mlp.experts.0.down_proj.weight_scale_inv": ("F32", (56, 16)),
    "model.layers.61.eh_proj.weight": ("BF16", (7168, 14336)),
    "model.layers.61.shared_head.norm.weight": ("BF16", (7168,)),
    "lm_head.weight": ("BF16", (512, 7168)),
}
DEEPSEEK_V3_WEIGHTS = [f"{L}.self_attn.kv_a_proj_with_mqa.weight", f"{L}.mlp.experts.0.down_proj.weight"]


@pytest.mark.parametrize("shards", [1, 2], ids=["one file", "scales in another shard"])
def test_deepseek_v3(tmp_path: Path, shards: int) -> None:
    checkpoint = folder_of(tmp_path, DEEPSEEK_V3, BLOCKS, shards=shards)
    found, complaints = recognise(checkpoint)
    assert complaints == []
    assert sorted(found.weights) == sorted(DEEPSEEK_V3_WEIGHTS)
    assert found.method == "fp8"
    assert (found.config, found.config_place) == (BLOCKS, "config.json")
    assert found.dynamic
    assert found.statistics == ()
    for name, weight in found.weights.items():
        assert weight.name == name
        assert weight.shape == DEEPSEEK_V3[name][1]
        assert planes(checkpoint, found, name) == {"codes": name, "scale": f"{name}_scale_inv"}
        made = weight.format
        assert (made.name, made.method, made.recipe) == ("fp8-block", "fp8", DEEPGEMM)
        assert (made.rows, made.cols, made.scale.name, made.scale_dtype.name) == (128, 128, "f32", "f32")
        assert made.spelling.of(name, "scale") == f"{name}_scale_inv"
        assert (made.codec, made.codes_dtype.name, made.scale_shape) == ("f8_e4m3", "f8_e4m3", "grid")
    rows = checkpoint.tensors.rows
    assert found.parts == {rows[n] for w in DEEPSEEK_V3_WEIGHTS for n in (w, f"{w}_scale_inv")}
    assert "fp8 in blocks of 128×128" in found.description
    assert "2 × fp8-block (blocks of 128×128, scales F32)" in found.description


def test_weights_are_in_the_order_of_the_table(tmp_path: Path) -> None:
    backwards = dict(reversed(DEEPSEEK_V3.items()))
    assert list(recognised(tmp_path, backwards, BLOCKS).weights) == DEEPSEEK_V3_WEIGHTS[::-1]


def test_without_a_config_the_headers_suffice(tmp_path: Path) -> None:
    found = recognised(tmp_path, DEEPSEEK_V3)
    assert {(w.format.name, w.format.rows, w.format.cols) for w in found.weights.values()} == {("fp8-block", 128, 128)}
    assert (found.method, found.config, found.config_place) == ("fp8", {}, "")
    assert DEEPSEEK_V3_WEIGHTS[0] in found.description


def test_deepseek_v32_has_scales_of_powers_of_two(tmp_path: Path) -> None:
    found = recognised(tmp_path, DEEPSEEK_V3, BLOCKS | {"scale_fmt": "ue8m0"})
    assert {w.format.recipe for w in found.weights.values()} == {DEEPGEMM_UE8M0}
    assert {w.format.scale_dtype.name for w in found.weights.values()} == {"f32"}


V4_CONFIG = {"model_type": "deepseek_v4", "quantization_config": BLOCKS | {"scale_fmt": "ue8m0"}}
V4_DENSE = {
    "embed.weight": ("BF16", (512, 4096)),
    "layers.0.hc_attn_scale": ("F32", (3,)),
    "layers.0.hc_attn_base": ("F32", (24,)),
    "layers.0.attn.q_l2_clip.scale": ("F32", (64,)),
    "layers.0.attn.wq_a.weight": ("F8_E4M3", (1024, 4096)),
    "layers.0.ffn.gate.weight": ("BF16", (256, 4096)),
    "layers.0.ffn.gate.tid2eid": ("I32", (512, 6)),
    "layers.0.ffn.experts.0.w1.weight": ("I8", (2048, 2048)),
    "layers.0.ffn.experts.0.w1.scale": ("F8_E8M0", (2048, 128)),
    "layers.0.attn.wq_a.scale": ("F8_E8M0", (8, 32)),
}


def test_deepseek_v4_has_fp4_experts_beside_fp8(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, V4_DENSE, V4_CONFIG | {"expert_dtype": "fp4"})
    found, complaints = recognise(checkpoint)
    assert complaints == []
    assert list(found.weights) == ["layers.0.attn.wq_a.weight", "layers.0.ffn.experts.0.w1.weight"]
    dense, expert = found.weights.values()
    assert (dense.format.name, dense.format.recipe) == ("fp8-block", DEEPGEMM_UE8M0)
    assert (dense.format.rows, dense.format.cols, dense.format.scale.name) == (128, 128, "f8_e8m0")
    assert planes(checkpoint, found, dense.name)["scale"] == "layers.0.attn.wq_a.scale"
    assert expert.shape == (2048, 4096)
    assert (expert.format.name, expert.format.recipe) == ("mxfp4", MXFP4_DEEPSEEK)
    assert (expert.format.rows, expert.format.cols, expert.format.codec) == (1, 32, "f4")
    assert (expert.format.codes_dtype.name, expert.format.scale_dtype.name) == ("i8", "f8_e8m0")
    assert expert.format.spelling.of(expert.name, "scale") == "layers.0.ffn.experts.0.w1.scale"
    assert found.statistics == ()


@pytest.mark.parametrize(("dtype", "columns"), [("U8", 1024), ("F4", 2048)])
def test_fp4_experts_under_other_dtypes(tmp_path: Path, dtype: str, columns: int) -> None:
    tensors = {"experts.0.w1.weight": (dtype, (64, columns)), "experts.0.w1.scale": ("F8_E8M0", (64, 64))}
    (expert,) = recognised(tmp_path, tensors, V4_CONFIG | {"expert_dtype": "fp4"}).weights.values()
    assert expert.shape == (64, 2048)
    assert (expert.format.name, expert.format.codec, expert.format.codes_dtype.safetensors) == ("mxfp4", "f4", dtype)


def test_deepseek_v4_base_has_fp8_experts_with_f32_scales(tmp_path: Path) -> None:
    expert = "layers.0.ffn.experts.0.w1"
    tensors = {
        f"{expert}.weight": ("F8_E4M3", (2048, 4096)),
        f"{expert}.scale": ("F32", (16, 32)),
        "layers.0.attn.wq_a.weight": ("F8_E4M3", (1024, 4096)),
        "layers.0.attn.wq_a.scale": ("F8_E8M0", (8, 32)),
    }
    found = recognised(tmp_path, tensors, V4_CONFIG | {"expert_dtype": "fp8"})
    assert [w.format.scale_dtype.name for w in found.weights.values()] == ["f32", "f8_e8m0"]
    assert {(w.format.name, w.format.rows) for w in found.weights.values()} == {("fp8-block", 128)}


def test_blocks_of_32_in_a_nested_config(tmp_path: Path) -> None:
    config = {"text_config": {"quantization_config": BLOCKS | {"weight_block_size": [32, 32]}}}
    tensors = {"a.weight": ("F8_E4M3", (64, 100)), "a.scale": ("F8_E8M0", (2, 4))}
    found = recognised(tmp_path, tensors, config)
    assert (found.weights["a.weight"].format.rows, found.weights["a.weight"].format.cols) == (32, 32)
    assert found.config_place == "config.json:text_config"


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_qwen3_with_scales_of_other_floats(tmp_path: Path, dtype: str) -> None:
    tensors = {
        f"{L}.mlp.up_proj.weight": ("F8_E4M3", (25600, 5120)),
        f"{L}.mlp.up_proj.weight_scale_inv": (dtype, (200, 40)),
        f"{L}.input_layernorm.weight": ("BF16", (5120,)),
    }
    config = BLOCKS | {"modules_to_not_convert": ["lm_head", f"{L}.input_layernorm"]}
    found = recognised(tmp_path, tensors, config)
    (weight,) = found.weights.values()
    assert (weight.format.recipe, weight.format.scale_dtype.safetensors) == (DEEPGEMM, dtype)
    assert found.ignored == ("lm_head", f"{L}.input_layernorm")


def test_stacked_experts_in_blocks(tmp_path: Path) -> None:
    name = f"{L}.mlp.experts.gate_up_proj"
    tensors = {name: ("F8_E4M3", (8, 1536, 2000)), f"{name}_scale_inv": ("BF16", (8, 12, 16))}
    weight = recognised(tmp_path, tensors, BLOCKS).weights[name]
    assert weight.shape == (8, 1536, 2000)
    assert (weight.format.rows, weight.format.cols) == (128, 128)
    assert weight.format.spelling.of(name, "scale") == f"{name}_scale_inv"


def test_a_block_larger_than_the_weight(tmp_path: Path) -> None:
    tensors = {"a.weight": ("F8_E4M3", (64, 64)), "a.weight_scale_inv": ("F32", (1, 1))}
    made = recognised(tmp_path, tensors, BLOCKS).weights["a.weight"].format
    assert (made.name, made.rows, made.cols) == ("fp8-block", 128, 128)


MISTRAL = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}


def test_mistral_per_tensor(tmp_path: Path) -> None:
    tensors = {
        f"{L}.self_attn.q_proj.weight": ("F8_E4M3", (4096, 5120)),
        f"{L}.self_attn.q_proj.weight_scale_inv": ("F32", ()),
        f"{L}.self_attn.q_proj.activation_scale": ("F32", ()),
    }
    checkpoint = folder_of(tmp_path, tensors, MISTRAL | {"modules_to_not_convert": None})
    found, complaints = recognise(checkpoint)
    assert complaints == []
    made = found.weights[f"{L}.self_attn.q_proj.weight"].format
    assert (made.name, made.recipe, made.rows, made.cols) == ("fp8-tensor", FP8_TENSOR, 0, 0)
    assert made.scale_shape == "scalar"
    assert made.whole
    assert [checkpoint.tensors.names[r] for r in found.statistics] == [f"{L}.self_attn.q_proj.activation_scale"]
    assert not found.dynamic
    assert found.ignored == ()


def test_mistral_stacks_have_a_scale_for_each_expert(tmp_path: Path) -> None:
    tensors = {"experts.down_proj": ("F8_E4M3", (4, 256, 512)), "experts.down_proj_scale_inv": ("F32", (4, 1, 1))}
    made = recognised(tmp_path, tensors, MISTRAL).weights["experts.down_proj"].format
    assert (made.name, made.scale_shape) == ("fp8-tensor", "grid")


def test_mistrals_own_names(tmp_path: Path) -> None:
    tensors = {
        "layers.0.wq.weight": ("F8_E4M3", (256, 512)),
        "layers.0.wq.qscale_weight": ("F32", ()),
        "layers.0.wq.qscale_act": ("F32", ()),
    }
    found = recognised(tmp_path, tensors)
    assert found.weights["layers.0.wq.weight"].format.spelling.scale == ".qscale_weight"
    assert len(found.statistics) == 1


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_minimax_m3_mxfp8(tmp_path: Path, dtype: str) -> None:
    config = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head", "vision_tower"]}
    tensors = {
        f"{L}.self_attn.q_proj.weight": ("F8_E4M3", (8192, 6144)),
        f"{L}.self_attn.q_proj.weight_scale_inv": (dtype, (8192, 192)),
    }
    found = recognised(tmp_path, tensors, config)
    made = found.weights[f"{L}.self_attn.q_proj.weight"].format
    assert (made.name, made.method, made.recipe) == ("mxfp8", "mxfp8", MXFP8_RECIPE)
    assert (made.rows, made.cols, made.scale.name, made.scale_dtype.safetensors) == (1, 32, "f8_e8m0", dtype)
    assert found.ignored == ("lm_head", "vision_tower")


def test_gpt_oss(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj_blocks": ("U8", (32, 5760, 90, 16)),
        f"{experts}.gate_up_proj_scales": ("U8", (32, 5760, 90)),
        f"{experts}.gate_up_proj_bias": ("BF16", (32, 5760)),
        f"{experts}.down_proj_bias": ("BF16", (32, 2880)),
        f"{experts}.down_proj_scales": ("U8", (32, 2880, 90)),
        f"{experts}.down_proj_blocks": ("U8", (32, 2880, 90, 16)),
        "model.layers.0.mlp.router.weight": ("BF16", (32, 2880)),
        "model.layers.0.self_attn.sinks": ("BF16", (64,)),
    }
    checkpoint = folder_of(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    found, complaints = recognise(checkpoint)
    assert complaints == []
    assert {n: w.shape for n, w in found.weights.items()} == {
        f"{experts}.gate_up_proj": (32, 5760, 2880),
        f"{experts}.down_proj": (32, 2880, 2880),
    }
    for name, weight in found.weights.items():
        assert planes(checkpoint, found, name) == {"codes": f"{name}_blocks", "scale": f"{name}_scales"}
        assert (weight.format.name, weight.format.method, weight.format.recipe) == ("mxfp4", "mxfp4", MXFP4_OPENAI)
        assert weight.format.spelling.of(name, "codes") == f"{name}_blocks"
        assert (weight.format.rows, weight.format.cols, weight.format.scale.name) == (1, 32, "f8_e8m0")
    assert len(found.parts) == 4


@pytest.mark.parametrize("codes", ["F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_other_fp8_codes_are_read(tmp_path: Path, codes: str) -> None:
    tensors = {"a.weight": (codes, (256, 512)), "a.weight_scale": ("F32", (256, 1))}
    made = recognised(tmp_path, tensors).weights["a.weight"].format
    assert (made.name, made.codec, made.codes_dtype.safetensors) == ("fp8-channel", codes.lower(), codes)
