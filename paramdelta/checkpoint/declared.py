"""What a checkpoint's config says about its quantisation: method, formats and grids to expect, modules left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from paramdelta.checkpoint.documents import read_json
from paramdelta.checkpoint.folder import Checkpoint
from paramdelta.checkpoint.grids import ROW, Grid
from paramdelta.checkpoint.quantised import hopeless, refusal
from paramdelta.errors import Complaint, shown

MODELOPT_FILE = "hf_quant_config.json"
_KEYS = ("quantization_config", "compression_config")
_NOT_KNOWN = "use the bf16 release, or dequantise it first"
_FIELDS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")

Formats = dict[str, tuple[Grid, ...]]  # format by name: its grids, () where any is possible

_MODELOPT: dict[str, tuple[Formats, bool]] = {  # quant_algo: (formats, dynamic)
    "FP8": ({"fp8-tensor": ()}, False),
    "FP8_PER_CHANNEL_PER_TOKEN": ({"fp8-channel": ()}, True),
    "FP8_PB_WO": ({"fp8-block": ()}, True),
    "MXFP8": ({"mxfp8": ()}, True),
    "NVFP4": ({"nvfp4": ()}, False),
    "W4A16_NVFP4": ({"nvfp4": ()}, True),
    "MIXED_PRECISION": ({}, False),
}
_PRESETS: dict[str, tuple[Formats, bool]] = {  # schemes that compressed-tensors knows by name
    "FP8": ({"fp8-tensor": ()}, False),
    "FP8_DYNAMIC": ({"fp8-channel": ()}, True),
    "FP8_BLOCK": ({"fp8-block": ((128, 128),)}, True),
    "NVFP4": ({"nvfp4": ()}, False),
    "NVFP4A16": ({"nvfp4": ()}, True),
    "MXFP4": ({"mxfp4": ()}, True),
    "MXFP4A16": ({"mxfp4": ()}, True),
    "MXFP8": ({"mxfp8": ()}, True),
    "MXFP8A16": ({"mxfp8": ()}, True),
    "W4A16": ({"int4": ((1, 128),)}, True),
    "W4A16_ASYM": ({"int4": ((1, 128),)}, True),
    "W4AFP8": ({"int4": ((1, 128),)}, True),
}


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A quantisation config, understood. ``formats`` are those it allows, None where it leaves them open;
    ``power_of_two`` tells that scales are powers of two, ``codes`` is its ``fmt``; ``place`` is the file, and the
    path in it, ``words`` what it says in words. ``config`` is all that stands in ``place``."""

    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    words: str = ""
    formats: Formats | None = None
    ignored: tuple[str, ...] = ()
    dynamic: bool = True
    power_of_two: bool = False
    codes: str = ""


class _RefusedError(Exception):
    """What in a config is not known: (problem, remedy)."""

    def __init__(self, problem: str, remedy: str = _NOT_KNOWN) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(problem)


def declared(checkpoint: Checkpoint) -> tuple[Declared | None, list[Complaint]]:
    """Return what the config says, None where there is no quantisation config, and complaints about it."""
    complaints: list[Complaint] = []
    found = next(_configs(checkpoint, complaints), None)
    if found is None:
        return None, complaints
    place, key, document = found
    config = document.get("quantization", document) if place == MODELOPT_FILE else document
    method = _method(config, place)
    words = f"{_described(method, config)} ({key} in {place})" if key else f"{_described(method, config)} ({place})"
    subject = str(checkpoint.path / place.partition(":")[0])
    why = hopeless(method)
    try:
        if why is not None:
            complaints.append(refusal(checkpoint, words, *why))
            return Declared(method=method, config=document, place=place, words=words), complaints
        formats, dynamic = _formats(method, config, checkpoint)
        ignored = _ignored(config)
    except _RefusedError as error:
        complaints.append(Complaint(subject, f"{checkpoint.role} is quantised: {words}: {error.problem}", error.remedy))
        return Declared(method=method, config=document, place=place, words=words), complaints
    return Declared(
        method=method if formats is None or formats else None,
        config=document,
        place=place,
        words=words,
        formats=formats,
        ignored=ignored,
        dynamic=dynamic,
        power_of_two=config.get("scale_fmt") == "ue8m0",
        codes=str(config.get("fmt") or "").removeprefix("float8_").removesuffix("fn") if method == "fp8" else "",
    ), complaints


def _configs(checkpoint: Checkpoint, complaints: list[Complaint]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (place, key, config) of every quantisation config, the one that counts first."""
    for path, config in _nested(checkpoint.config):
        for key in _KEYS:
            value = config.get(key)
            if isinstance(value, dict) and value:
                yield "config.json" + (f":{path}" if path else ""), key, value
    if MODELOPT_FILE in checkpoint.side_files:
        whole = read_json(checkpoint.path, MODELOPT_FILE, complaints)
        if complaints:
            return
        inner = whole.get("quantization", whole)
        if not isinstance(inner, dict):
            complaints.append(Complaint(str(checkpoint.path / MODELOPT_FILE), "has a quantization that is no object"))
        elif inner:
            yield MODELOPT_FILE, "", whole


def _nested(config: dict[str, Any], path: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a config and those it nests: text_config, llm_config, thinker_config.text_config, …"""
    yield path, config
    for key, value in config.items():
        if depth and key.endswith("_config") and key not in _KEYS and isinstance(value, dict):
            yield from _nested(value, f"{path}.{key}".lstrip("."), depth - 1)


def _method(config: dict[str, Any], place: str) -> str:
    method = config.get("quant_method")
    if isinstance(method, str) and method:
        name = method.lower()
        return "modelopt" if name.startswith("modelopt") else name
    producer = config.get("producer")
    if (
        place == MODELOPT_FILE
        or "quant_algo" in config
        or (isinstance(producer, dict) and producer.get("name") == "modelopt")
    ):
        return "modelopt"
    if "load_in_4bit" in config or "load_in_8bit" in config:
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in config else ""


def _described(method: str, config: dict[str, Any]) -> str:
    parts = [shown(method or "unnamed method")]
    block = config.get("weight_block_size")
    if method == "fp8" and (block is None or isinstance(block, list)):
        parts.append(f"in blocks of {shown('×'.join(map(str, block)))}" if block else "per tensor")
    for key in ("format", "quant_algo"):
        if isinstance(config.get(key), str):
            parts.append(shown(config[key]))
    if isinstance(config.get("bits"), int):
        parts.append(f"{config['bits']} bits")
    return " ".join(parts)


def _ignored(config: dict[str, Any]) -> tuple[str, ...]:
    for key in _FIELDS:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise _RefusedError(f"{key} is not a list of names")
        return tuple(value)
    return ()


def _formats(method: str, config: dict[str, Any], checkpoint: Checkpoint) -> tuple[Formats | None, bool]:
    """Return the formats that a config allows ({}: no weight is quantised) and whether activations are dynamic."""
    if method in ("fp8", "mxfp8"):
        return _fine_grained(method, config, checkpoint)
    if method == "mxfp4":
        return {"mxfp4": ()}, True
    if method == "fbgemm_fp8":
        return {"fp8-channel": ()}, True
    if method == "modelopt":
        return _modelopt(config)
    if method == "compressed-tensors":
        return _compressed(config)
    raise _RefusedError(f"quant_method {shown(repr(config.get('quant_method')))} is not known")


def _fine_grained(method: str, config: dict[str, Any], checkpoint: Checkpoint) -> tuple[Formats, bool]:
    dynamic = config.get("activation_scheme") != "static"
    if config.get("scale_fmt") not in (None, "float", "ue8m0"):
        raise _RefusedError(f"scale_fmt is {shown(repr(config['scale_fmt']))}, expected 'ue8m0' or 'float'")
    if config.get("fmt") not in (None, "e4m3", "float8_e4m3fn", "e5m2", "float8_e5m2"):
        raise _RefusedError(f"fmt is {shown(repr(config['fmt']))}, expected 'e4m3' or 'e5m2'")
    block = config.get("weight_block_size")
    grid = _block(block)
    if block is not None and grid is None:
        raise _RefusedError(f"weight_block_size is {shown(block)}, expected two positive numbers")
    formats: Formats
    if method == "mxfp8":
        if grid not in (None, (1, 32)):
            raise _RefusedError(f"weight_block_size is {shown(block)}, expected [1, 32] for mxfp8")
        formats = {"mxfp8": ()}
        if config.get("moe_quant_algo") == "NVFP4":
            formats["nvfp4"] = ()
        return formats, dynamic
    if grid is None:
        formats = {"fp8-tensor": (), "fp8-channel": ()}
        if "weight_block_size" not in config:
            formats["fp8-block"] = ()
    else:
        formats = {"fp8-block": (grid,)}
        if grid == (1, 32):
            formats["mxfp8"] = ()
    if "fp4" in (config.get("expert_dtype"), *(c.get("expert_dtype") for _, c in _nested(checkpoint.config))):
        formats["mxfp4"] = ()
    return formats, dynamic


def _modelopt(config: dict[str, Any]) -> tuple[Formats | None, bool]:
    algorithm = config.get("quant_algo", "")
    if algorithm is None:  # only the key-value cache is quantised
        return {}, True
    if not isinstance(algorithm, str) or algorithm.upper() not in _MODELOPT:
        if "AWQ" in str(algorithm).upper() or "SQ" in str(algorithm).upper():
            raise _RefusedError("it folds a smoothing scale into other layers", "use the checkpoint it was made from")
        raise _RefusedError(f"quant_algo {shown(repr(algorithm))} is not known")
    formats, dynamic = _MODELOPT[algorithm.upper()]
    if algorithm.upper() != "MIXED_PRECISION":
        return dict(formats), dynamic
    layers = config.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        return None, False
    union: Formats = {}
    for name, layer in layers.items():
        inner = layer.get("quant_algo") if isinstance(layer, dict) else None
        if not isinstance(inner, str) or inner not in _MODELOPT or inner == "MIXED_PRECISION":
            raise _RefusedError(f"quant_algo {shown(repr(inner))} of {shown(name)} is not known")
        union |= _MODELOPT[inner][0]
    return union, False


def _compressed(config: dict[str, Any]) -> tuple[Formats, bool]:
    if config.get("transform_config"):
        raise _RefusedError("transform_config: it rotates weights", "use the checkpoint it was made from")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise _RefusedError(f"weights are stored sparse, as {shown(sparsity.get('format'))}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise _RefusedError("it has no config_groups")
    formats: Formats = {}
    dynamic = True
    for name, group in groups.items():
        if isinstance(group, list):
            if name.upper() not in _PRESETS:
                raise _RefusedError(f"the scheme {shown(name)} is not known")
            found, always = _PRESETS[name.upper()]
        elif not isinstance(group, dict):
            raise _RefusedError(f"config_groups.{shown(name)} is not an object")
        else:
            weights, inputs = group.get("weights"), group.get("input_activations")
            if weights is None:
                continue
            if not isinstance(weights, dict):
                raise _RefusedError(f"config_groups.{shown(name)}.weights is not an object")
            found = _scheme(weights, str(group.get("format") or config.get("format")), shown(name))
            always = not isinstance(inputs, dict) or inputs.get("dynamic") is True
        for kind, grids in found.items():
            formats[kind] = (*formats.get(kind, ()), *grids)
        dynamic = dynamic and always
    return formats, dynamic


def _block(value: Any) -> Grid | None:
    """Return a block size from a config ([128, 128], or 128x128 in old ones), None for anything else."""
    if isinstance(value, str):
        value = [int(part) for part in value.split("x") if part.isdecimal() and len(part) < 10]
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def _scheme(weights: dict[str, Any], layout: str, group: str) -> Formats:
    """Return the format of one group's weights."""
    bits, kind, given = weights.get("num_bits"), str(weights.get("type", "int")).lower(), weights.get("group_size")
    size: int = given if type(given) is int else 0
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    grouped = strategy in ("group", "tensor_group") and size > 0
    if (bits, kind) == (8, "float"):
        block = _block(weights.get("block_structure"))
        if strategy == "block" and block:
            return {"fp8-block": (block,)}
        if grouped:
            return {"mxfp8": ()} if layout == "mxfp8-quantized" else {"fp8-block": ((1, size),)}
        if strategy in ("tensor", "channel"):
            return {f"fp8-{strategy}": ()}
    if (bits, kind) == (4, "float") and grouped and size in (16, 32):
        return {"mxfp4": ()} if size == 32 else {"nvfp4": ()}
    if (bits, kind, layout) == (4, "int", "pack-quantized") and (grouped or strategy == "channel"):
        return {"int4": ((1, size),) if grouped else (ROW,)}
    raise _RefusedError(
        f"{group} has weights of {shown(bits)} bits ({shown(kind)}, {shown(strategy)}) as {shown(layout)}: not known"
    )
