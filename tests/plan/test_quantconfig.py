"""Quantisation configs of outputs: libraries parse them, and the package recognises what it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quantised_folders import state_shapes

from paramdelta.checkpoint import Quantisation, QuantisedWeight, open_checkpoint, recognise
from paramdelta.checkpoint.families import MODELOPT_FP8, OUTPUT_FORMATS, output_format
from paramdelta.checkpoint.grids import grid_shape
from paramdelta.dtypes import BY_SAFETENSORS, F8_E4M3, F32
from paramdelta.formats import (
    DEEPGEMM_UE8M0,
    DOT_SCALE,
    E8M0,
    FBGEMM,
    FP8_TENSOR,
    GPT_OSS_SPELLING,
    I8,
    MODELOPT_SPELLING,
    MXFP4_DEEPSEEK,
    MXFP4_OPENAI,
    NVFP4_MODELOPT,
    U8,
    WEIGHT_SCALE,
    Format,
)
from paramdelta.plan.quantconfig import output_config

BLOCK = OUTPUT_FORMATS["fp8-block"]
EXPERTS = Format(
    name="mxfp4", method="fp8", recipe=MXFP4_DEEPSEEK, rows=1, cols=32, scale=E8M0, spelling=DOT_SCALE,
    codes_dtype=I8, scale_dtype=E8M0,
)  # fmt: skip
GPT_OSS = Format(
    name="mxfp4", method="mxfp4", recipe=MXFP4_OPENAI, rows=1, cols=32, scale=E8M0, spelling=GPT_OSS_SPELLING,
    codes_dtype=U8, scale_dtype=U8,
)  # fmt: skip
LLAMA = Format(name="fp8-channel", method="fbgemm_fp8", recipe=FBGEMM, rows=1, cols=0, scale=F32, spelling=WEIGHT_SCALE)
MODELOPT = Format(
    name="fp8-tensor", method="modelopt", recipe=FP8_TENSOR, rows=0, cols=0, scale=F32, spelling=WEIGHT_SCALE,
    scale_shape="scalar",
)  # fmt: skip
MODELOPT_FP4 = Format(
    name="nvfp4", method="modelopt", recipe=NVFP4_MODELOPT, rows=1, cols=16, scale=F8_E4M3, scale_dtype=F8_E4M3,
    spelling=MODELOPT_SPELLING, codes_dtype=U8, second="multiply",
)  # fmt: skip
IGNORED = ["lm_head", "model.layers.0.mlp.gate"]
WRITTEN: dict[str, list[Format]] = {
    **{name: [made] for name, made in OUTPUT_FORMATS.items()},
    "fp8 in blocks of 64×32": [output_format("fp8-block", block=(64, 32))],
    "fp8, scales of powers of two": [output_format("fp8-block", scale="ue8m0")],
    "fp8, scales of powers of two in bytes": [output_format("fp8-block", scale="e8m0")],
    "fp8 and fp4 of DeepSeek": [output_format("fp8-block", scale="e8m0"), EXPERTS],
    "fp8 per tensor, native": [
        replace(BLOCK, name="fp8-tensor", recipe=FP8_TENSOR, rows=0, cols=0, scale_shape="scalar")
    ],
    "fp8 in blocks of compressed-tensors": [
        replace(OUTPUT_FORMATS["fp8-channel"], name="fp8-block", rows=128, cols=128)
    ],
    "fp8 in groups of compressed-tensors": [replace(OUTPUT_FORMATS["fp8-channel"], name="fp8-block", rows=1, cols=128)],
    "mxfp8 of compressed-tensors": [
        replace(OUTPUT_FORMATS["mxfp8"], method="compressed-tensors", spelling=WEIGHT_SCALE)
    ],
    "int4 per row": [output_format("int4", block=(1, 0), scale="f32")],
    "gpt-oss": [GPT_OSS],
    "Llama of FBGEMM": [LLAMA],
    "fp8 of modelopt": [MODELOPT],
    "nvfp4 of modelopt": [MODELOPT_FP4],
}


def tensors_of(made: Format, name: str) -> dict[str, tuple[str, list[int]]]:
    """The tensors of one weight [256, 512] (a stack of two for gpt-oss), as a merge would write them."""
    shape = (256, 512)
    if made.spelling is GPT_OSS_SPELLING:
        return {f"{name}_blocks": ("U8", [2, 256, 16, 16]), f"{name}_scales": ("U8", [2, 256, 16])}
    weight = f"{name}.weight"
    codes, scale = made.spelling.of(weight, "codes"), made.spelling.of(weight, "scale")
    assert codes is not None
    assert scale is not None
    grid = list(grid_shape(shape, (made.rows, made.cols)))
    grid = {"grid": grid, "row": grid[:1], "one": [1], "scalar": []}[made.scale_shape]
    tensors = {
        codes: (made.codes_dtype.safetensors, [256, 512 * made.bits // made.codes_dtype.bits]),
        scale: (made.scale_dtype.safetensors, grid),
    }
    for part, kind in (("second", ("F32", [])), ("shape", ("I64", [2]))):
        spelt = made.spelling.of(weight, part)
        if spelt is not None:
            tensors[spelt] = kind  # type: ignore[assignment]
    return tensors


def written(folder: Path, formats: Sequence[Format], config: Any, modelopt: Any = None) -> Quantisation:
    """Recognise what a merge would have written."""
    header: dict[str, Any] = {}
    end = 0
    for number, made in enumerate(formats):
        for name, (dtype, shape) in tensors_of(made, f"layers.{number}.up").items():
            size = math.prod(shape) * BY_SAFETENSORS[dtype].bits // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    for name, value in (
        ("config.json", config and {"quantization_config": config}),
        ("hf_quant_config.json", modelopt),
    ):
        if value:
            (folder / name).write_text(json.dumps(value))
    state_shapes(folder)
    found, complaints = recognise(open_checkpoint(folder))
    assert complaints == []
    return found


@pytest.mark.parametrize("formats", WRITTEN.values(), ids=WRITTEN.keys())
def test_what_is_written_is_recognised_as_it_was_meant(tmp_path: Path, formats: list[Format]) -> None:
    dynamic = formats != [MODELOPT]
    config, modelopt = output_config(formats, ignored=IGNORED, source=None, dynamic=dynamic)
    found = written(tmp_path, formats, config, modelopt)
    assert [w.format for w in found.weights.values()] == formats
    assert found.method == formats[0].method
    assert list(found.ignored) == IGNORED
    assert found.dynamic == dynamic
    assert (modelopt is not None) == (found.method == "modelopt")


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", [n for n, f in WRITTEN.items() if f[0].method == "compressed-tensors"])
def test_compressed_tensors_parses_it(name: str, dynamic: bool) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    (made,) = WRITTEN[name]
    config, modelopt = output_config([made], ignored=IGNORED, source=None, dynamic=dynamic)
    assert config is not None
    assert modelopt is None
    parsed = library.QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    assert parsed.format == config["format"]
    assert parsed.ignore == IGNORED
    (scheme,) = parsed.config_groups.values()
    assert scheme.weights.num_bits == made.bits
    assert scheme.weights.symmetric


PRESETS = {
    "fp8-channel": "FP8_DYNAMIC",
    "fp8 in blocks of compressed-tensors": "FP8_BLOCK",
    "nvfp4": "NVFP4A16",
    "mxfp4": "MXFP4A16",
}


@pytest.mark.parametrize(("name", "preset"), PRESETS.items(), ids=PRESETS.keys())
def test_schemes_are_those_of_compressed_tensors(name: str, preset: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    config, _ = output_config(WRITTEN[name], ignored=[], source=None, dynamic=True)
    assert config is not None
    (ours,) = library.QuantizationConfig.model_validate(config).config_groups.values()
    theirs = library.preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations"):
        expected, found = getattr(theirs, part), getattr(ours, part)
        assert (expected is None) == (found is None)
        if expected is not None:
            fields = ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "block_structure")
            assert [getattr(found, f) for f in fields] == [getattr(expected, f) for f in fields]
            assert found.scale_dtype == expected.scale_dtype


@pytest.mark.parametrize("name", [n for n, f in WRITTEN.items() if f[0].method != "modelopt"])
def test_transformers_parses_it(name: str) -> None:
    auto = pytest.importorskip("transformers.quantizers.auto")
    config, _ = output_config(WRITTEN[name], ignored=IGNORED, source=None, dynamic=True)
    assert config is not None
    if config["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    parsed = auto.AutoQuantizationConfig.from_dict(json.loads(json.dumps(config)))
    assert str(getattr(parsed.quant_method, "value", parsed.quant_method)) == config["quant_method"]
    if config["quant_method"] == "fp8":
        assert parsed.modules_to_not_convert == IGNORED
        assert parsed.weight_block_size == config["weight_block_size"]
        assert parsed.scale_fmt == config.get("scale_fmt", "float")
        assert parsed.expert_dtype == config.get("expert_dtype", "fp8")


def test_native_fp8_says_what_deepseek_says() -> None:
    config, modelopt = output_config([BLOCK], ignored=[], source=None, dynamic=True)
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert modelopt is None
    powers = [replace(BLOCK, recipe=DEEPGEMM_UE8M0)]
    assert output_config(powers, ignored=[], source=None, dynamic=True)[0] == config | {"scale_fmt": "ue8m0"}


def test_modelopt_says_the_same_twice() -> None:
    config, modelopt = output_config([MODELOPT_FP4], ignored=IGNORED, source=None, dynamic=False)
    assert config is not None
    assert modelopt is not None
    assert (config["quant_method"], config["quant_algo"], config["ignore"]) == ("modelopt", "NVFP4", IGNORED)
    assert modelopt["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": IGNORED,
    }


def test_a_plain_output_has_none() -> None:
    assert output_config([], ignored=IGNORED, source=None, dynamic=True) == (None, None)


def source_of(made: Format, config: dict[str, Any], place: str = "config.json", **more: Any) -> Quantisation:
    weight = QuantisedWeight(name="a.up.weight", shape=(256, 512), format=made, codes=0, scale=1)
    fields: dict[str, Any] = {"method": made.method, "config": config, "config_place": place, **more}
    return Quantisation(weights={weight.name: weight}, parts=frozenset((0, 1)), **fields)


MINIMAX = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "static",
    "weight_block_size": [128, 128],
    "ignored_layers": ["gate"],
    "unknown": {"kept": True},
}


def test_a_source_of_the_same_formats_is_followed() -> None:
    source = source_of(BLOCK, MINIMAX, ignored=("gate",), dynamic=False)
    before = json.dumps(MINIMAX)
    config, _ = output_config([BLOCK], ignored=["layers.3.gate", "lm_head"], source=source, dynamic=False)
    assert config == MINIMAX, "modules that were not quantised there either need no entry"
    config, _ = output_config([BLOCK], ignored=["a.up", "lm_head"], added=["a.up"], source=source, dynamic=True)
    assert config == MINIMAX | {"ignored_layers": ["gate", "a.up"], "activation_scheme": "dynamic"}
    assert json.dumps(MINIMAX) == before


def test_a_source_of_other_formats_is_not_followed() -> None:
    source = source_of(BLOCK, MINIMAX, ignored=("gate",))
    config, _ = output_config([output_format("fp8-block", block=(64, 64))], ignored=[], source=source, dynamic=True)
    assert config is not None
    assert config["weight_block_size"] == [64, 64]
    assert "unknown" not in config


def test_the_file_of_modelopt_is_followed() -> None:
    file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    source = source_of(MODELOPT, file, "hf_quant_config.json", ignored=("lm_head",), dynamic=False)
    assert output_config([MODELOPT], ignored=["lm_head"], source=source, dynamic=False) == (None, file)
    config, modelopt = output_config([MODELOPT], ignored=["a.up"], added=["a.up"], source=source, dynamic=False)
    assert config is None
    assert modelopt is not None
    assert modelopt["quantization"]["exclude_modules"] == ["lm_head", "a.up"]


def test_measured_activations_can_be_given_up_in_compressed_tensors() -> None:
    made = OUTPUT_FORMATS["nvfp4"]
    static, _ = output_config([made], ignored=[], source=None, dynamic=False)
    assert static is not None
    config, _ = output_config([made], ignored=[], source=source_of(made, static, dynamic=False), dynamic=True)
    assert config is not None
    assert config["config_groups"]["group_0"]["input_activations"] is None
    assert static["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"


IMPOSSIBLE: dict[str, tuple[list[Format], str]] = {
    "two families": ([BLOCK, GPT_OSS], "formats of fp8 and mxfp4"),
    "two block sizes": ([BLOCK, output_format("fp8-block", block=(64, 64))], "no config of method fp8 covers"),
    "two schemes": ([OUTPUT_FORMATS["fp8-channel"], OUTPUT_FORMATS["nvfp4"]], "which modules have which format"),
    "two algorithms": ([MODELOPT, MODELOPT_FP4], "which modules have which format"),
    "fp4 under mxfp8": ([replace(MODELOPT_FP4, method="mxfp8")], "no config of method mxfp8 covers nvfp4"),
    "modelopt without measured activations": (
        [replace(MODELOPT, spelling=MODELOPT_FP8)],
        "scales of activations that were measured beforehand",
    ),
}


@pytest.mark.parametrize(("formats", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_no_config_can_say(formats: list[Format], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        output_config(formats, ignored=[], source=None, dynamic=True)


BAD = {
    "name": ("fp9", {}, "'fp9' is no format of an output; there are fp8-block, "),
    "block of channels": ("fp8-channel", {"block": (128, 128)}, "only fp8-block and int4 vary"),
    "block of nothing": ("fp8-block", {"block": (0, 128)}, "both sides are positive"),
    "groups of 12": ("int4", {"block": (1, 12)}, "a multiple of 8"),
    "groups over rows": ("int4", {"block": (2, 32)}, "a multiple of 8"),
    "scale": ("fp8-block", {"scale": "f8"}, "there are f32, bf16, ue8m0, e8m0"),
    "scale of mxfp4": ("mxfp4", {"scale": "f32"}, "only f8_e8m0, which need not be said"),
}


@pytest.mark.parametrize(("name", "options", "words"), BAD.values(), ids=BAD.keys())
def test_formats_that_cannot_be_asked_for(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        output_format(name, **options)
