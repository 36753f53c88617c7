"""Quantised checkpoints in which something does not fit: every complaint at once, with what was expected and found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantised_folders import Tensors, folder_of, recognised, refused

from paramdelta.checkpoint import Checkpoint, recognise

BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
GOOD: Tensors = {"good.weight": ("F8_E4M3", (256, 256)), "good.weight_scale_inv": ("F32", (2, 2))}


def blocks(weight: tuple[int, ...], scale: tuple[int, ...], codes: str = "F8_E4M3", scales: str = "F32") -> Tensors:
    return {"a.weight": (codes, weight), "a.weight_scale_inv": (scales, scale)}


def test_a_fused_weight_whose_parts_were_quantised_alone(tmp_path: Path) -> None:
    (complaint,) = refused(tmp_path, blocks((27136, 6144), (216, 48)), BLOCKS)
    assert complaint.subject == f"{tmp_path / 'model.safetensors'}: a.weight"
    assert "[216, 48], which does not fit the weight's [27136, 6144]" in complaint.problem
    assert "expected [212, 48] (blocks of 128×128)" in complaint.problem
    assert "8 parts of 3392 rows" in complaint.problem
    assert complaint.remedy


MISFITS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "other blocks": (blocks((256, 512), (4, 8)), BLOCKS, "It would fit blocks of 64×64"),
    "per tensor": (
        blocks((256, 512), ()),
        BLOCKS,
        "expected [2, 4] (blocks of 128×128). It would fit one scale per tensor",
    ),
    "per row": (blocks((256, 512), (256, 1)), BLOCKS, "It would fit one scale per row"),
    "transposed": (blocks((256, 512), (4, 2)), BLOCKS, "[4, 2], which does not fit the weight's [256, 512]"),
    "blocks, not per tensor": (
        blocks((256, 512), (2, 4)),
        BLOCKS | {"weight_block_size": None},
        "expected [256, 1] (one scale per row) or [1, 1] (one scale per tensor). It would fit blocks of 128×128",
    ),
    "one scale for a stack": (
        {"e.up": ("F8_E4M3", (4, 256, 512)), "e.up_scale_inv": ("F32", ())},
        BLOCKS | {"weight_block_size": None},
        "[4, 1, 512] (one scale per column) or [4, 1, 1] (one scale per tensor)",
    ),
    "groups of another size": (
        blocks((64, 128), (64, 8), scales="U8"),
        {"quant_method": "mxfp8"},
        "expected [64, 4] (groups of 32)",
    ),
    "gpt-oss with other blocks": (
        {"x_blocks": ("U8", (2, 8, 2, 8)), "x_scales": ("U8", (2, 8, 2))},
        {"quant_method": "mxfp4"},
        "of shape [2, 8, 2, 8], which is no such matrix",
    ),
    "no columns": (blocks((), (1, 1)), BLOCKS, "of shape [], which is no such matrix"),
}


@pytest.mark.parametrize(("tensors", "config", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_grids_that_do_not_fit(tmp_path: Path, tensors: Tensors, config: dict[str, Any], words: str) -> None:
    (complaint,) = refused(tmp_path, tensors, config)
    assert words in complaint.problem


CONTRADICTIONS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "fp4 experts that no config announces": (
        {"a.weight": ("I8", (64, 64)), "a.scale": ("F8_E8M0", (64, 4))},
        BLOCKS,
        "I8 codes with scales of F8_E8M0 (mxfp4), but the config, fp8 in blocks of 128×128 "
        "(quantization_config in config.json), allows fp8-block",
    ),
    "fp8 under mxfp4": (blocks((256, 256), (2, 2)), {"quant_method": "mxfp4"}, "allows mxfp4"),
    "floats under mxfp8": (blocks((64, 64), (64, 2)), {"quant_method": "mxfp8"}, "allows mxfp8"),
    "another fp8": (blocks((256, 256), (2, 2), codes="F8_E5M2"), BLOCKS, "is F8_E5M2, but the config"),
    "fp8 of modelopt's fp4": (
        {"a.weight": ("F8_E4M3", (64, 64)), "a.weight_scale": ("F32", ())},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "allows nvfp4",
    ),
    "quantised against a config of the cache alone": (
        blocks((256, 256), (2, 2)),
        {"quant_method": "modelopt", "quant_algo": None},
        "allows no quantised weights",
    ),
    "scales of codes": (blocks((64, 64), (64, 2), scales="I32"), BLOCKS, "F8_E4M3 with a scale of I32"),
    "int8": ({"a.weight": ("I8", (64, 64)), "a.weight_scale": ("F32", (64, 1))}, BLOCKS, "I8 with a scale of F32"),
    "bytes with scales of bytes": (
        {"a.weight": ("U8", (64, 64)), "a.weight_scale": ("U8", (64, 4))},
        BLOCKS,
        "no format that is known here",
    ),
    "integers packed, no config": (
        {"a.weight_packed": ("I32", (64, 8)), "a.weight_scale": ("BF16", (64, 2))},
        {},
        "no config says of how many bits",
    ),
    "packed and as it is": (
        {
            "a.weight": ("BF16", (64, 128)),
            "a.weight_packed": ("U8", (64, 64)),
            "a.weight_scale": ("U8", (64, 4)),
        },
        {},
        "is the weight a.weight, which is there under that name, too",
    ),
    "two scales": (
        {**blocks((64, 64), (1, 1)), "a.weight_scale": ("F32", ())},
        BLOCKS,
        "several scales, a.weight_scale_inv and a.weight_scale",
    ),
    "no second level, packed": (
        {"a.weight_packed": ("U8", (64, 64)), "a.weight_scale": ("F8_E4M3", (64, 8))},
        {},
        "there is no a.weight_global_scale",
    ),
    "no second level, modelopt": (
        {"a.weight": ("U8", (64, 64)), "a.weight_scale": ("F8_E4M3", (64, 8))},
        {},
        "there is no a.weight_scale_2",
    ),
    "a second level of another shape": (
        {
            "a.weight": ("U8", (64, 64)),
            "a.weight_scale": ("F8_E4M3", (64, 8)),
            "a.weight_scale_2": ("F32", (64,)),
        },
        {},
        "is F32 [64], but the second level of scales is F32 [] or [1]",
    ),
}


@pytest.mark.parametrize(("tensors", "config", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions(tmp_path: Path, tensors: Tensors, config: dict[str, Any], words: str) -> None:
    (complaint,) = refused(tmp_path, tensors, config)
    assert words in complaint.problem
    assert complaint.remedy


BARE: Tensors = {**GOOD, "b.weight": ("F8_E4M3", (64, 64)), "experts.up": ("F8_E4M3", (2, 64, 64))}


def test_codes_without_a_scale(tmp_path: Path) -> None:
    first, second = refused(tmp_path, BARE, BLOCKS)
    assert first.subject.endswith(": b.weight")
    assert first.problem == (
        "is F8_E4M3 in a quantised checkpoint, but has no scale "
        "(tried .weight_scale_inv, .scale, .weight_scale, .qscale_weight, .scale_weight)"
    )
    assert first.remedy.startswith("--allow-unscaled")
    assert "(tried _scale_inv, .scale, _scale, _weight_scale)" in second.problem


@pytest.mark.parametrize("config", [BLOCKS, None], ids=["by config", "by its other codes"])
def test_codes_without_a_scale_can_be_allowed(tmp_path: Path, config: dict[str, Any] | None) -> None:
    checkpoint = folder_of(tmp_path, BARE, config)
    assert len(recognise(checkpoint)[1]) == 2
    found, complaints = recognise(checkpoint, allow_unscaled=True)
    assert complaints == []
    assert [w.scale for w in found.weights.values()].count(-1) == 2
    assert found.weights["b.weight"].format.codec == "f8_e4m3"


def test_codes_in_bytes_without_a_scale_are_never_values(tmp_path: Path) -> None:
    tensors: Tensors = {**GOOD, "b.weight": ("U8", (64, 64)), "c.weight_packed": ("I32", (64, 64))}
    _, complaints = recognise(folder_of(tmp_path, tensors), allow_unscaled=True)
    assert len(complaints) == 2
    assert not any("allow-unscaled" in c.remedy for c in complaints)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("b.weight_scale_inv", "F32"),
        ("b.weight_scale", "F8_E4M3"),
        ("e.up_scale_inv", "BF16"),
        ("b.weight_shape", "I64"),
    ],
)
def test_scales_without_a_weight(tmp_path: Path, name: str, dtype: str) -> None:
    (complaint,) = refused(tmp_path, {**GOOD, name: (dtype, (2,))}, BLOCKS)
    assert complaint.subject.endswith(f": {name}")
    assert "has no codes" in complaint.problem


def test_a_scale_beside_a_weight_that_is_no_longer_quantised(tmp_path: Path) -> None:
    tensors: Tensors = {**GOOD, "b.weight": ("BF16", (64, 64)), "b.weight_scale_inv": ("F32", (1, 1))}
    (complaint,) = refused(tmp_path, tensors, BLOCKS)
    assert "b.weight is BF16" in complaint.problem


def test_a_config_without_codes(tmp_path: Path) -> None:
    (complaint,) = refused(tmp_path, {"a.weight": ("BF16", (2, 2))}, BLOCKS)
    assert "quantised by its config" in complaint.problem
    assert "none of its tensors" in complaint.problem


def test_all_complaints_at_once_and_not_too_many(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i in range(30):
        tensors |= {f"{i}.weight": ("F8_E4M3", (256, 256)), f"{i}.weight_scale_inv": ("F32", (3, 3))}
    complaints = refused(tmp_path, tensors, BLOCKS)
    assert len(complaints) == 21
    assert complaints[-1].problem == "and 10 more like these"


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "new-thing"}, "quant_method 'new-thing' is not known"),
    "no method": ({"anything": 1}, "quant_method None is not known"),
    "method of another type": ({"quant_method": ["fp8"]}, "is not known"),
    "block size": (BLOCKS | {"weight_block_size": [128]}, "weight_block_size is [128]"),
    "block of zero": (BLOCKS | {"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
    "block of truth": (BLOCKS | {"weight_block_size": [True, 128]}, "weight_block_size is [True, 128]"),
    "scale_fmt": (BLOCKS | {"scale_fmt": "int"}, "scale_fmt is 'int'"),
    "fmt": (BLOCKS | {"fmt": {"a": 1}}, "fmt is {'a': 1}"),
    "mxfp8 in blocks": ({"quant_method": "mxfp8", "weight_block_size": [128, 128]}, "expected [1, 32]"),
    "ignored": (BLOCKS | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list"),
    "quant_algo": ({"quant_method": "modelopt", "quant_algo": "NF4"}, "quant_algo 'NF4' is not known"),
    "quant_algo, a list": ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, "is not known"),
    "AWQ of modelopt": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "smoothing scale"),
    "mixed with the unknown": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": []}}},
        "quant_algo [] of a is not known",
    ),
    "no groups": ({"quant_method": "compressed-tensors"}, "no config_groups"),
    "group": ({"quant_method": "compressed-tensors", "config_groups": {"g": 1}}, "config_groups.g is not an object"),
    "preset": ({"quant_method": "compressed-tensors", "config_groups": {"W2A16": ["Linear"]}}, "scheme W2A16"),
    "int8": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}},
        "8 bits (int, tensor)",
    ),
    "rotation": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"u": {}}},
        "rotates weights",
    ),
    "sparsity": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": {"format": "sparse-bitmask"}},
        "sparse-bitmask",
    ),
}


@pytest.mark.parametrize(("config", "words"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_configs_that_are_not_known_are_not_guessed(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (complaint,) = refused(tmp_path, GOOD, config)
    assert complaint.subject == str(tmp_path / "config.json")
    assert words in complaint.problem
    assert complaint.problem.startswith("post is quantised: ")
    assert complaint.remedy


@pytest.mark.parametrize("inner", [1, [], "FP8"], ids=repr)
def test_a_malformed_file_of_modelopt(tmp_path: Path, inner: Any) -> None:
    (complaint,) = refused(tmp_path, GOOD, None, {"quantization": inner})
    assert complaint.subject == str(tmp_path / "hf_quant_config.json")


def values(depth: int = 2) -> list[Any]:
    simple: list[Any] = [None, True, 0, -1, 1.5, "x", "fp8", [], [1], {}, {"a": 1}]
    return simple if depth == 1 else [*simple, *([v] for v in simple), *({"g": v} for v in simple)]


@pytest.mark.parametrize(
    "field",
    ["quant_method", "weight_block_size", "fmt", "scale_fmt", "config_groups", "quant_algo", "format", "ignore",
     "modules_to_not_convert", "quantized_layers", "producer", "expert_dtype", "activation_scheme", "bits"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4", "modelopt", "compressed-tensors", "fbgemm_fp8"])
def test_odd_values_end_in_complaints_or_not_at_all(tmp_path: Path, method: str, field: str) -> None:
    checkpoint = folder_of(tmp_path, GOOD, {"quant_method": method})
    for value in values():
        for more in ({}, {"quant_algo": "MIXED_PRECISION"}, {"config_groups": {"g": {"weights": {field: value}}}}):
            config = {"quant_method": method, **more, field: value}
            odd = Checkpoint(**{**checkpoint.__dict__, "config": {"quantization_config": config}})
            found, complaints = recognise(odd)
            assert all(str(c) for c in complaints)
            assert json.dumps(found.config) in (json.dumps(config), "{}")


PARAMETERS: Tensors = {
    "hc_attn_scale": ("F32", (3,)),
    "q_l2_clip.scale": ("F32", (64,)),
    "norm.scale": ("BF16", (64,)),
    "norm.weight": ("BF16", (64,)),
    "logit_scale": ("F32", ()),
    "gate.tid2eid": ("I32", (64, 6)),
    "attn.mask": ("U8", (64, 64)),
    "vision.merge_blocks": ("I32", (4,)),
    "embeddings.weight": ("I32", (4, 4)),
}


def test_parameters_called_scale_are_plain_tensors(tmp_path: Path) -> None:
    found = recognised(tmp_path, {**PARAMETERS, **GOOD}, BLOCKS)
    assert list(found.weights) == ["good.weight"]
    assert len(found.parts) == 2
    assert found.statistics == ()
