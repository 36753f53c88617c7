"""Recognises quantised checkpoints by their configs and headers: raw codes must never be taken for weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from paramdelta.checkpoint.folder import Checkpoint, read_json
from paramdelta.dtypes import BY_NAME
from paramdelta.errors import Complaint, shown

_LOW_BIT = {
    BY_NAME[name].code for name in ("f8_e4m3", "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz", "f4", "u8", "i8", "i32", "u32")
}
# Suffixes of tensors that hold codes, and what they give away.
_CODES = {
    ".weight_packed": "compressed-tensors, packed",
    "_blocks": "MXFP4 as in gpt-oss",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
}
_STATISTICS = (".absmax", ".SCB", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
# Suffixes of scales: they replace ".weight" in the name of the tensor they scale.
SCALES = (
    ".weight_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_global_scale",
    ".scale",
    ".qscale_weight",
    ".scale_weight",
)
# Stacked experts have no ".weight": these are added to the name of the tensor they scale.
_STACKED_SCALES = ("_scale_inv", "_scale")
_HOPELESS = {
    "gptq": "its codes fit one set of scales and zero points",
    "awq": "it folds a smoothing scale into other layers",
    "bitsandbytes": "its codes are blocks of one release of one library",
    "aqlm": "its codes point into code books",
    "gguf": "its blocks mix several code books",
}


def quantised_as(checkpoint: Checkpoint) -> str | None:
    """Return what a quantised checkpoint is quantised as, in words; None for a plain one."""
    return next(_from_config(checkpoint), None) or next(_from_headers(checkpoint), None)


def quantisation_complaint(checkpoint: Checkpoint) -> list[Complaint]:
    """Return the complaint about a quantised checkpoint, or an empty list for a plain one."""
    found = quantised_as(checkpoint)
    if found is None:
        return []
    method = next((m for m in _HOPELESS if m in found.lower()), None)
    if method is not None:
        problem = (
            f"{checkpoint.role} is quantised: {found}. Differences of such codes mean nothing: {_HOPELESS[method]}"
        )
        remedy = "use the checkpoint it was made from"
    else:
        problem = f"{checkpoint.role} is quantised: {found}. This version merges only unquantised checkpoints"
        remedy = "use the bf16 release, or dequantise it first"
    return [Complaint(str(checkpoint.path), problem, remedy)]


def _from_config(checkpoint: Checkpoint) -> Iterator[str]:
    for config in _nested(checkpoint.config):
        for key in ("quantization_config", "compression_config"):
            value = config.get(key)
            if isinstance(value, dict) and value:
                yield f"{_described(value)} ({key} in config.json)"
    if "hf_quant_config.json" in checkpoint.side_files:
        inner = read_json(checkpoint.path, "hf_quant_config.json", []).get("quantization")
        # An algorithm of null leaves the weights alone: only the key-value cache is quantised.
        if not isinstance(inner, dict) or inner.get("quant_algo", "") is not None:
            yield "modelopt (it has an hf_quant_config.json)"


def _nested(config: dict[str, Any], depth: int = 3) -> Iterator[dict[str, Any]]:
    """Yield a config and those it nests: text_config, llm_config, thinker_config.text_config, …"""
    yield config
    for key, value in config.items():
        if depth and key.endswith("_config") and isinstance(value, dict):
            yield from _nested(value, depth - 1)


def _described(config: dict[str, Any]) -> str:
    method = shown(config.get("quant_method", config.get("quant_algo", "unnamed method")))
    block = config.get("weight_block_size")
    parts = [method]
    if method == "fp8":
        parts.append(f"in blocks of {shown('×'.join(map(str, block)))}" if isinstance(block, list) else "per tensor")
    if isinstance(config.get("format"), str):
        parts.append(shown(config["format"]))
    if isinstance(config.get("quant_algo"), str):
        parts.append(shown(config["quant_algo"]))
    if isinstance(config.get("bits"), int):
        parts.append(f"{config['bits']} bits")
    return " ".join(parts)


def _from_headers(checkpoint: Checkpoint) -> Iterator[str]:
    table = checkpoint.tensors
    low_bit = np.isin(table.dtype, list(_LOW_BIT))
    suspects = [name for name in table.names if name.endswith((*_CODES, *SCALES, *_STACKED_SCALES))]
    for name in suspects:
        for suffix, what in _CODES.items():
            if not name.endswith(suffix) or (suffix == "_blocks" and f"{name[:-7]}_scales" not in table):
                continue
            # The statistics of bitsandbytes are floats; codes are not, and a float of that name is a parameter.
            coded = name if suffix not in _STATISTICS else _coded_by(name, suffix)
            if coded in table and low_bit[table.row(coded)]:
                yield f"{what} (tensor {shown(name)})"
    for name in suspects:
        for suffix in (*SCALES, *_STACKED_SCALES):
            if not name.endswith(suffix):
                continue
            stem = name.removesuffix(suffix)
            weight = f"{stem}.weight" if suffix in SCALES else stem
            if weight in table and low_bit[table.row(weight)]:
                dtype = table.dtype_of(table.row(weight)).safetensors
                yield f"{dtype} codes with scales (tensors {shown(weight)} and {shown(name)})"


def _coded_by(name: str, suffix: str) -> str:
    """Return the name of the codes that a tensor of bitsandbytes' statistics belongs to."""
    stem = name.removesuffix(suffix)
    return f"{stem}.weight" if suffix == ".SCB" else stem
