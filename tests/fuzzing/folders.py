"""Small folders that fuzz targets make of choices: plain and quantised weights, nearly always of the right shapes, and
configs that nearly always say what is there."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from choices import Choices

from paramdelta.dtypes import BY_SAFETENSORS

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # files are many and short-lived
Tensors = dict[str, tuple[str, tuple[int, ...]]]
Planes = Callable[[str, int, int], Tensors]


@dataclass(frozen=True)
class Storage:
    """One way of storing a weight: the tensors of [rows, cols], and the quantisation config that says so."""

    planes: Planes
    config: Mapping[str, Any] | None = None


def _up(extent: int, per: int) -> int:
    return -(-extent // per) if per else 1


def _plain(dtype: str) -> Planes:
    return lambda name, rows, cols: {f"{name}.weight": (dtype, (rows, cols))}


def _scaled(suffix: str, scale: str, rows_per: int, cols_per: int, codes: str = "F8_E4M3") -> Planes:
    return lambda name, rows, cols: {
        f"{name}.weight": (codes, (rows, cols)),
        f"{name}{suffix}": (scale, (_up(rows, rows_per), _up(cols, cols_per))),
    }


def _packed(codes: str, dtype: str, per: int, scale: str, cols_per: int, **more: tuple[str, tuple[int, ...]]) -> Planes:
    return lambda name, rows, cols: {
        f"{name}.{codes}": (dtype, (rows, _up(cols, per))),
        f"{name}.weight_scale": (scale, (rows, _up(cols, cols_per))),
        **{f"{name}.{plane}": spec for plane, spec in more.items()},
    }


def _gpt_oss(name: str, rows: int, cols: int) -> Tensors:
    stack = f"{name}.experts.down_proj"
    return {
        f"{stack}_blocks": ("U8", (2, rows, _up(cols, 32), 16)),
        f"{stack}_scales": ("U8", (2, rows, _up(cols, 32))),
    }


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": []}


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_FLOAT = {"type": "float", "symmetric": True}
STORAGES = (
    Storage(_plain("BF16")),
    Storage(_plain("F32")),
    Storage(_plain("F16")),
    Storage(_plain("F8_E5M2")),
    Storage(_plain("I32")),
    Storage(_plain("U8")),
    Storage(_scaled(".weight_scale_inv", "F32", 4, 8), {**_FP8, "weight_block_size": [4, 8]}),
    Storage(_scaled(".weight_scale_inv", "BF16", 128, 128), {**_FP8, "weight_block_size": [128, 128]}),
    Storage(_scaled(".scale", "F8_E8M0", 2, 16), {**_FP8, "weight_block_size": [2, 16], "scale_fmt": "ue8m0"}),
    Storage(
        lambda name, rows, cols: {f"{name}.weight": ("F8_E4M3", (rows, cols)), f"{name}.weight_scale_inv": ("F32", ())},
        {**_FP8, "weight_block_size": None, "activation_scheme": "static"},
    ),
    Storage(
        _scaled(".weight_scale", "BF16", 1, 0),
        _compressed("float-quantized", num_bits=8, strategy="channel", **_FLOAT),
    ),
    Storage(
        _scaled(".weight_scale_inv", "U8", 1, 32),
        {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]},
    ),
    Storage(
        _packed("weight_packed", "U8", 2, "U8", 32),
        _compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32, **_FLOAT),
    ),
    Storage(
        _packed("weight_packed", "U8", 2, "F8_E4M3", 16, weight_global_scale=("F32", (1,))),
        _compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16, **_FLOAT),
    ),
    Storage(
        _packed("weight_packed", "I32", 8, "BF16", 32, weight_shape=("I64", (2,))),
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
    ),
    Storage(_gpt_oss, {"quant_method": "mxfp4"}),
)
CONFIGS = tuple(storage.config for storage in STORAGES if storage.config is not None)
_DTYPES = ("BF16", "F32", "F16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "I32", "I64", "F4", "BOOL", "F64", "C64")
_ODD: tuple[Any, ...] = (None, True, -1, 0, 2**63, 1e308, "", "x", "re:(", [], {}, [[]], {"a": {}}, [1, 2], ["*"])
_SIDE = ("tokenizer.json", "generation_config.json", "LICENSE", "README.md", "a\x1b[2J.py", "chat_template.jinja")


def write_shard(path: Path, tensors: Tensors, choices: Choices) -> None:
    """Write a safetensors file of these tensors, its data from ``choices`` and small patterns."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BY_SAFETENSORS[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    pattern = choices.take(1 + choices.number(0, 40)) or b"\x38\x3f\x01\x80\x3c"
    data = bytearray((pattern * (at // len(pattern) + 1))[:at])
    for name, entry in header.items():
        packed = header.get(name.removesuffix("_shape") + "_packed", {}).get("shape", ())
        begin, end = entry["data_offsets"]
        if name.endswith(".weight_shape") and len(packed) == 2 and end - begin == 16:
            data[begin:end] = struct.pack("<2q", packed[0], 8 * packed[1])
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def odd_tensors(tensors: Tensors, choices: Choices) -> Tensors:
    """Return the tensors, one of them changed: its type, a size, a dimension, its name, or gone."""
    if not tensors:
        return tensors
    name = choices.pick(sorted(tensors))
    dtype, shape = tensors[name]
    rest = {other: spec for other, spec in tensors.items() if other != name}
    kind = choices.number(0, 6)
    if kind == 0:
        return {**rest, name: (choices.pick(_DTYPES), shape)}
    if kind == 1 and shape:
        sizes = list(shape)
        sizes[choices.number(0, len(sizes) - 1)] = choices.pick((0, 1, 2, 3, 5, 8, 9, 64))
        return {**rest, name: (dtype, tuple(sizes))}
    if kind == 2:
        return {**rest, name: (dtype, (choices.pick((0, 1, 2)), *shape))}
    if kind == 3 and shape:
        return {**rest, name: (dtype, shape[1:])}
    if kind == 4:
        return rest
    if kind == 5:
        return {**rest, name: (dtype, (0, choices.pick((2**31, 2**40, 2**59, 2**62))))}
    return {**rest, name + choices.pick(("_scale", ".input_scale", "s", ".weight", "\n")): (dtype, shape)}


def odd_config(config: Any, choices: Choices) -> Any:
    """Return a config with one value, somewhere in it, replaced by something odd."""
    if isinstance(config, dict) and config and not choices.odds(6):
        key = choices.pick(sorted(config))
        return {**config, key: odd_config(config[key], choices)}
    return choices.pick(_ODD)


def whole(tensors: Tensors) -> Tensors:
    """Return the tensors whose data are whole bytes, which is all that a header may hold, and not too many of them."""
    return {
        name: (dtype, shape)
        for name, (dtype, shape) in tensors.items()
        if math.prod(shape) * BY_SAFETENSORS[dtype].bits % 8 == 0 and math.prod(shape) < 1 << 14
    }


def write_folder(folder: Path, tensors: Tensors, config: Any, choices: Choices) -> Path:
    """Write a checkpoint of these tensors: one file, or two with an index."""
    folder.mkdir()
    tensors = whole(tensors)
    (folder / "config.json").write_text(json.dumps(config))
    if choices.odds(4):
        (folder / choices.pick(_SIDE)).write_bytes(choices.take(4))
    if len(tensors) < 2 or not choices.odds(3):
        write_shard(folder / "model.safetensors", tensors, choices)
        return folder
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weight_map = {name: f"{i}.safetensors" for i, part in enumerate(parts) for name in part}
    for i, part in enumerate(parts):
        write_shard(folder / f"{i}.safetensors", part, choices)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
