"""Quantised checkpoints are recognised, by genuine configs or headers alone; plain ones are never taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import write_json, write_shard

from paramdelta.checkpoint import SINGLE, Checkpoint, open_checkpoint, quantisation_complaint, quantised_as

Tensors = dict[str, tuple[str, tuple[int, ...]]]
PLAIN: Tensors = {"model.norm.weight": ("BF16", (4,))}

FP8_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
FP8_MODELOPT = {
    "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 8, "type": "float"}}},
    "ignore": ["lm_head"],
    "quant_algo": "FP8",
    "kv_cache_scheme": "FP8",
    "producer": {"name": "modelopt", "version": "0.31.0"},
}
INT4_PACKED = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 32, "num_bits": 4, "type": "int"}}},
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
MXFP4 = {"modules_to_not_convert": ["model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}
MINIMAX = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
MODELOPT_FILE = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}

# repository: (its config.json, its hf_quant_config.json or None, the words it is recognised by)
GENUINE: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "DeepSeek-R1": ({"quantization_config": FP8_BLOCKS}, None, "fp8 in blocks of 128×128"),
    "DeepSeek-V3.2": ({"quantization_config": FP8_BLOCKS | {"scale_fmt": "ue8m0"}}, None, "fp8 in blocks of 128×128"),
    "MiniMax-M2.5": ({"quantization_config": MINIMAX}, None, "fp8 in blocks of 128×128"),
    "Qwen3-32B-FP8-Static-PerTensor": ({"quantization_config": FP8_MODELOPT}, MODELOPT_FILE, "FP8"),
    "Llama-3.1-70B-Instruct-FP8": ({"model_type": "llama"}, MODELOPT_FILE, "modelopt"),
    "Kimi-K2.5": (
        {"model_type": "kimi_k25", "text_config": {"quantization_config": INT4_PACKED}},
        None,
        "compressed-tensors pack-quantized",
    ),
    "gpt-oss-20b": ({"quantization_config": MXFP4}, None, "mxfp4"),
    "fp8 per tensor": ({"quantization_config": FP8_BLOCKS | {"weight_block_size": None}}, None, "fp8 per tensor"),
    "compression_config": ({"compression_config": INT4_PACKED}, None, "compressed-tensors pack-quantized"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, None, "gptq 4 bits"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": True}}, None, "awq 4 bits"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, None, "bitsandbytes"),
    "nameless": ({"quantization_config": {"load_in_4bit": True}}, None, "unnamed method"),
}


def checkpoint_of(folder: Path, tensors: Tensors, config: Any = None, modelopt: Any = None) -> Checkpoint:
    write_shard(folder / SINGLE, **tensors)
    if config is not None:
        write_json(folder / "config.json", config)
    if modelopt is not None:
        write_json(folder / "hf_quant_config.json", modelopt)
    return open_checkpoint(folder, role="post")


@pytest.mark.parametrize(("config", "modelopt", "words"), GENUINE.values(), ids=GENUINE.keys())
def test_genuine_configs(tmp_path: Path, config: dict[str, Any], modelopt: Any, words: str) -> None:
    checkpoint = checkpoint_of(tmp_path, PLAIN, config, modelopt)
    found = quantised_as(checkpoint)
    assert found is not None
    assert found.startswith(words)
    (complaint,) = quantisation_complaint(checkpoint)
    assert complaint.subject == str(tmp_path)
    assert complaint.problem.startswith(f"post is quantised: {found}")
    assert complaint.remedy


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "aqlm", "gguf"])
def test_what_has_no_differences_says_why(tmp_path: Path, method: str) -> None:
    (complaint,) = quantisation_complaint(
        checkpoint_of(tmp_path, PLAIN, {"quantization_config": {"quant_method": method}})
    )
    assert "Differences of such codes mean nothing" in complaint.problem
    assert complaint.remedy == "use the checkpoint it was made from"


def test_what_could_be_dequantised_says_so(tmp_path: Path) -> None:
    (complaint,) = quantisation_complaint(checkpoint_of(tmp_path, PLAIN, {"quantization_config": FP8_BLOCKS}))
    assert "dequantise it first" in complaint.remedy


W, S = "layers.0.w", "layers.0.w"
BY_HEADERS: dict[str, tuple[Tensors, str]] = {
    "fp8 blocks": (
        {f"{W}.weight": ("F8_E4M3", (4, 4)), f"{S}.weight_scale_inv": ("F32", (1, 1))},
        "F8_E4M3 codes with scales",
    ),
    "fp8 e5m2 per row": (
        {f"{W}.weight": ("F8_E5M2", (4, 4)), f"{S}.weight_scale": ("BF16", (4, 1))},
        "F8_E5M2 codes with scales",
    ),
    "fp8 of AMD": (
        {f"{W}.weight": ("F8_E4M3FNUZ", (4, 4)), f"{S}.weight_scale": ("F32", ())},
        "F8_E4M3FNUZ codes with scales",
    ),
    "DeepSeek V4, dense": (
        {f"{W}.weight": ("F8_E4M3", (4, 4)), f"{S}.scale": ("F8_E8M0", (1, 1))},
        "F8_E4M3 codes with scales",
    ),
    "DeepSeek V4, experts": (
        {f"{W}.weight": ("I8", (4, 16)), f"{S}.scale": ("F8_E8M0", (4, 1))},
        "I8 codes with scales",
    ),
    "Mistral": (
        {f"{W}.weight": ("F8_E4M3", (4, 4)), f"{S}.qscale_weight": ("F32", ())},
        "F8_E4M3 codes with scales",
    ),
    "MXFP8": (
        {f"{W}.weight": ("F8_E4M3", (4, 32)), f"{S}.weight_scale_inv": ("U8", (4, 1))},
        "F8_E4M3 codes with scales",
    ),
    "NVFP4 of modelopt": (
        {f"{W}.weight": ("U8", (4, 8)), f"{S}.weight_scale": ("F8_E4M3", (4, 1)), f"{S}.weight_scale_2": ("F32", ())},
        "U8 codes with scales",
    ),
    "compressed-tensors, packed": (
        {f"{W}.weight_packed": ("I32", (4, 4)), f"{S}.weight_scale": ("BF16", (4, 1))},
        "compressed-tensors, packed",
    ),
    "gpt-oss": (
        {"experts.gate_up_proj_blocks": ("U8", (1, 2, 1, 16)), "experts.gate_up_proj_scales": ("U8", (1, 2, 1))},
        "MXFP4 as in gpt-oss",
    ),
    "GPTQ": ({f"{W}.qweight": ("I32", (4, 4)), f"{W}.qzeros": ("I32", (1, 4))}, "GPTQ or AWQ"),
    "bitsandbytes, 4 bits": ({f"{W}.weight": ("U8", (8, 1)), f"{W}.weight.absmax": ("F32", (1,))}, "bitsandbytes"),
    "bitsandbytes, 8 bits": ({f"{W}.weight": ("I8", (4, 4)), f"{W}.SCB": ("F32", (4,))}, "bitsandbytes"),
}


@pytest.mark.parametrize("order", [1, -1], ids=["as given", "reversed"])
@pytest.mark.parametrize(("tensors", "words"), BY_HEADERS.values(), ids=BY_HEADERS.keys())
def test_headers_alone_give_it_away(tmp_path: Path, tensors: Tensors, words: str, order: int) -> None:
    found = quantised_as(checkpoint_of(tmp_path, dict(list((PLAIN | tensors).items())[::order])))
    assert found is not None
    assert found.startswith(words)
    assert any(name in found for name in tensors), "it names a tensor"


def test_a_scale_in_another_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.safetensors", **{"w.weight": ("F8_E4M3", (4, 4))})
    write_shard(tmp_path / "2.safetensors", **{"w.weight_scale_inv": ("F32", (1, 1))})
    weight_map = {"w.weight": "1.safetensors", "w.weight_scale_inv": "2.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    assert quantised_as(open_checkpoint(tmp_path)) is not None


NOT_QUANTISED: dict[str, Tensors] = {
    "nothing odd": PLAIN,
    "parameters called scale": {
        "layers.0.hc_attn_scale": ("F32", (3,)),
        "layers.0.hc_attn.weight": ("BF16", (3, 4)),
        "embed_scale": ("F32", ()),
        "logit_scale": ("F32", ()),
        "q_l2_clip.scale": ("F32", ()),
    },
    "a scale of a float weight": {"norm.weight": ("BF16", (4,)), "norm.scale": ("BF16", (4,))},
    "a weight_scale of a float weight": {"w.weight": ("F32", (4,)), "w.weight_scale": ("F32", ())},
    "a scale without a weight": {"norm.scale": ("BF16", (4,)), "mlp.weight_scale": ("F32", ())},
    "blocks without scales": {"vision.merge_blocks": ("BF16", (4,))},
    "buffers": {
        "attn.bias": ("BOOL", (4, 4)),
        "attn.mask": ("U8", (4, 4)),
        "gate.tid2eid": ("I32", (8,)),
        "embeddings.position_ids": ("I64", (1, 8)),
    },
    "fp8 without a scale": {"w.weight": ("F8_E4M3", (4, 4)), "v.weight": ("F8_E5M2", (4, 4))},
    "calibration of a cache": {"attn.k_scale": ("F32", ()), "attn.v_scale": ("F32", ()), "k.weight": ("BF16", (4,))},
}


@pytest.mark.parametrize("tensors", NOT_QUANTISED.values(), ids=NOT_QUANTISED.keys())
def test_plain_checkpoints(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = checkpoint_of(tmp_path, tensors, {"tie_word_embeddings": False, "torch_dtype": "bfloat16"})
    assert quantised_as(checkpoint) is None
    assert quantisation_complaint(checkpoint) == []


@pytest.mark.parametrize("value", [None, {}, [], "none", False], ids=repr)
def test_an_empty_config_means_nothing(tmp_path: Path, value: Any) -> None:
    config = {"quantization_config": value, "text_config": {"quantization_config": value}}
    assert quantised_as(checkpoint_of(tmp_path, PLAIN, config)) is None


def test_odd_values_in_a_config_are_shown_safely(tmp_path: Path) -> None:
    config = {"quant_method": "a\x1b[31m", "weight_block_size": [None], "format": "\n", "bits": [4]}
    found = quantised_as(checkpoint_of(tmp_path, PLAIN, {"quantization_config": config}))
    assert found is not None
    assert found.isprintable()
