"""Genuine configs are recognised as what they are; hopeless formats are refused; plain checkpoints stay plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantised_folders import Tensors, folder_of, recognised, write_headers

from paramdelta.checkpoint import Quantisation, describe, open_checkpoint, quantised_as, recognise
from paramdelta.checkpoint.quantised import HOPELESS

PLAIN: Tensors = {"model.norm.weight": ("BF16", (4,))}
GENUINE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "quant_configs.json").read_text())

BLOCKS = "fp8 in blocks of 128×128"
W, S = "l.0.w.weight", "l.0.w.weight_scale"
FP8_BLOCKS: Tensors = {W: ("F8_E4M3", (256, 512)), f"{S}_inv": ("F32", (2, 4))}
FP8_TENSOR: Tensors = {W: ("F8_E4M3", (256, 512)), S: ("F32", ()), "l.0.w.input_scale": ("F32", ())}
NVFP4: Tensors = {W: ("U8", (256, 256)), S: ("F8_E4M3", (256, 32)), f"{S}_2": ("F32", ())}
INT4: Tensors = {"l.0.w.weight_packed": ("I32", (256, 64)), S: ("BF16", (256, 16)), "l.0.w.weight_shape": ("I32", (2,))}
MXFP4: Tensors = {"e.up_blocks": ("U8", (2, 8, 4, 16)), "e.up_scales": ("U8", (2, 8, 4))}
V4: Tensors = {W: ("I8", (256, 256)), "l.0.w.scale": ("F8_E8M0", (256, 16))}

# repository: (tensors of its kind, method, place of the config, dynamic, modules left alone, words, formats)
SEEN: dict[str, tuple[Tensors, str, str, bool, int, str, list[str]]] = {
    "deepseek-ai/DeepSeek-R1": (FP8_BLOCKS, "fp8", "config.json", True, 0, BLOCKS, ["fp8-block"]),
    "deepseek-ai/DeepSeek-V3": (FP8_BLOCKS, "fp8", "config.json", True, 0, BLOCKS, ["fp8-block"]),
    "deepseek-ai/DeepSeek-V3.2": (FP8_BLOCKS, "fp8", "config.json", True, 0, BLOCKS, ["fp8-block"]),
    "deepseek-ai/DeepSeek-V4-Flash": (V4, "fp8", "config.json", True, 0, BLOCKS, ["mxfp4"]),
    "moonshotai/Kimi-K2-Instruct": (FP8_BLOCKS, "fp8", "config.json", True, 0, BLOCKS, ["fp8-block"]),
    "Qwen/Qwen3-30B-A3B-FP8": (FP8_BLOCKS, "fp8", "config.json", True, 13, BLOCKS, ["fp8-block"]),
    "MiniMaxAI/MiniMax-M2.5": (FP8_BLOCKS, "fp8", "config.json", True, 3, BLOCKS, ["fp8-block"]),
    "Qwen/Qwen3-32B-FP8-Static-PerTensor": (
        FP8_TENSOR, "modelopt", "config.json", False, 1, "modelopt FP8", ["fp8-tensor"]
    ),
    "nvidia/Llama-3.1-70B-Instruct-FP8": (
        FP8_TENSOR, "modelopt", "hf_quant_config.json", False, 1, "modelopt FP8", ["fp8-tensor"]
    ),
    "nvidia/Qwen3-235B-A22B-NVFP4": (
        NVFP4, "modelopt", "hf_quant_config.json", False, 13, "modelopt NVFP4", ["nvfp4"]
    ),
    "moonshotai/Kimi-K2.5": (
        INT4, "compressed-tensors", "config.json:text_config", True, 4, "compressed-tensors pack-quantized", ["int4"]
    ),
    "openai/gpt-oss-20b": (MXFP4, "mxfp4", "config.json", True, 4, "mxfp4", ["mxfp4"]),
}  # fmt: skip


@pytest.mark.parametrize("repository", SEEN)
def test_genuine_configs(tmp_path: Path, repository: str) -> None:
    files = GENUINE[repository]
    tensors, method, place, dynamic, ignored, words, formats = SEEN[repository]
    checkpoint = folder_of(tmp_path, {**PLAIN, **tensors}, files["config.json"], files.get("hf_quant_config.json"))
    found, complaints = recognise(checkpoint)
    assert complaints == []
    assert (found.method, found.config_place, found.dynamic, len(found.ignored)) == (method, place, dynamic, ignored)
    assert found.description.startswith(f"{words} (")
    assert place in found.description
    assert [w.format.name for w in found.weights.values()] == formats
    assert {w.format.method for w in found.weights.values()} == {method}
    assert describe(checkpoint)["quantised"] == quantised_as(checkpoint) == found.description


def test_every_genuine_config_is_looked_at() -> None:
    assert set(GENUINE) == {*SEEN, "Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3.1-8B"}


@pytest.mark.parametrize("repository", ["Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3.1-8B"])
def test_genuine_plain_configs(tmp_path: Path, repository: str) -> None:
    assert recognised(tmp_path, PLAIN, GENUINE[repository]["config.json"]) == Quantisation()


@pytest.mark.parametrize("tensors", [PLAIN, FP8_BLOCKS], ids=["no codes", "codes"])
@pytest.mark.parametrize("method", [*HOPELESS, "bnb", "GPTQ"])
def test_what_has_no_differences_says_why(tmp_path: Path, method: str, tensors: Tensors) -> None:
    found, (complaint,) = recognise(folder_of(tmp_path, tensors, {"quant_method": method, "bits": 4}))
    assert complaint.subject == str(tmp_path)
    assert complaint.problem.startswith("post is quantised: ")
    assert "Differences of such codes mean nothing: " in complaint.problem
    assert complaint.remedy.startswith("use the checkpoint it was made from")
    assert found.weights == {}
    assert "4 bits (quantization_config in config.json)" in found.description


BY_HEADERS: dict[str, tuple[Tensors, str]] = {
    "GPTQ": ({"w.qweight": ("I32", (4, 4)), "w.qzeros": ("I32", (1, 4))}, "GPTQ or AWQ (tensor w.qweight)"),
    "reordered": ({"w.weight_packed": ("I32", (4, 4)), "w.weight_g_idx": ("I32", (4,))}, "(tensor w.weight_g_idx)"),
    "4 bits": ({"w.weight": ("U8", (8, 1)), "w.weight.absmax": ("F32", (1,))}, "bitsandbytes (tensor w.weight.absmax)"),
    "8 bits": ({"w.weight": ("I8", (4, 4)), "w.SCB": ("F32", (4,))}, "bitsandbytes (tensor w.SCB)"),
}


@pytest.mark.parametrize("order", [1, -1], ids=["as given", "reversed"])
@pytest.mark.parametrize(("tensors", "words"), BY_HEADERS.values(), ids=BY_HEADERS.keys())
def test_hopeless_formats_by_their_headers(tmp_path: Path, tensors: Tensors, words: str, order: int) -> None:
    checkpoint = folder_of(tmp_path, dict(list({**PLAIN, **tensors}.items())[::order]))
    _, (complaint,) = recognise(checkpoint)
    seen = quantised_as(checkpoint)
    assert seen is not None
    assert seen in complaint.problem
    assert words in seen or order == -1


NOT_QUANTISED: dict[str, Tensors] = {
    "nothing odd": PLAIN,
    "no tensors": {},
    "parameters called scale": {
        "layers.0.hc_attn_scale": ("F32", (3,)),
        "layers.0.hc_attn.weight": ("BF16", (3, 4)),
        "embed_scale": ("F32", ()),
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
    "x_blocks of floats": {"x_blocks": ("BF16", (2,)), "x_scales": ("BF16", (2,))},
    "x.qweight of floats": {"x.qweight": ("BF16", (2,)), "mask": ("U8", (2,))},
    "x.weight_packed of floats": {"x.weight_packed": ("BF16", (2,)), "mask": ("U8", (2,))},
    "x.absmax of floats": {"x": ("BF16", (2,)), "x.absmax": ("F32", (2,)), "mask": ("U8", (2,))},
}


@pytest.mark.parametrize("tensors", NOT_QUANTISED.values(), ids=NOT_QUANTISED.keys())
def test_plain_checkpoints(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = folder_of(tmp_path, tensors, {"model_type": "x", "torch_dtype": "bfloat16"})
    assert recognise(checkpoint) == (Quantisation(), [])
    assert quantised_as(checkpoint) is None


@pytest.mark.parametrize("value", [None, {}, [], "none", False], ids=repr)
def test_an_empty_config_means_nothing(tmp_path: Path, value: Any) -> None:
    config = {"quantization_config": value, "text_config": {"quantization_config": value}}
    assert recognised(tmp_path, PLAIN, config) == Quantisation()


@pytest.mark.parametrize(
    "path", [("llm_config",), ("language_config",), ("thinker_config", "text_config")], ids="/".join
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_nested_configs(tmp_path: Path, path: tuple[str, ...], key: str) -> None:
    inner = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config: dict[str, Any] = {key: inner}
    for part in reversed(path):
        config = {part: config}
    found = recognised(tmp_path, FP8_BLOCKS, {"model_type": "x", **config})
    assert (found.config, found.config_place) == (inner, "config.json:" + ".".join(path))
    assert f"({key} in config.json:" in found.description


def test_odd_values_in_a_config_are_shown_safely(tmp_path: Path) -> None:
    config = {"quant_method": "a\x1b[31m", "weight_block_size": [None], "format": "\n", "bits": [4]}
    found, (complaint,) = recognise(folder_of(tmp_path, PLAIN, config))
    assert found.description.isprintable()
    assert complaint.problem.isprintable()


def test_weights_of_one_shape_share_their_format(tmp_path: Path) -> None:
    tensors = {
        f"layers.{i}.{name}": kind
        for i in range(2000)
        for name, kind in (
            ("up.weight", ("F8_E4M3", (2, 2))),
            ("up.weight_scale_inv", ("F32", (1, 1))),
            ("norm.weight", ("BF16", (2,))),
        )
    }
    write_headers(tmp_path / "model.safetensors", tensors)
    found, complaints = recognise(open_checkpoint(tmp_path))
    assert complaints == []
    assert len(found.weights) == 2000
    assert len({id(w.format) for w in found.weights.values()}) == 1, "formats are shared, not made for each weight"
