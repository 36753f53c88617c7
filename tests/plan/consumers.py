"""Reads a checkpoint's quantisation config as those do who load it, and compares what it promises of every linear
module with the tensors in the folder. Names are matched and scales shaped by the libraries where there are any."""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from quantised_toys import LINEAR, RAGGED, Planes, Shape, up

from paramdelta.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
configs = pytest.importorskip("transformers.utils.quantization_config")
matching = pytest.importorskip("transformers.quantizers.quantizers_utils")
quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")

_FLOATS = ("BF16", "F16", "F32")
_TORCH = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
# Of a module: the planes that it must have, each with the dtypes it may have; None where its weight is plain.
Promise = dict[str, tuple[tuple[str, ...], Shape]] | None


def check_promises(checkpoint: Checkpoint, modules: Mapping[str, Shape], statistics: set[str] | None = None) -> None:
    """Assert that every linear module is stored just as the config says, and that nothing else is quantised.

    ``modules`` are all linear modules with the shapes of their weights; ``statistics`` the suffixes of calibration
    tensors that quantised modules must have; None means that the config decides.
    """
    promised, calibrated = promises(checkpoint, modules)
    table = checkpoint.tensors
    stored: dict[str, Planes] = {name: {} for name in modules}
    for row, name in enumerate(table.names):
        module, _, suffix = name.rpartition(".")
        plane = (table.dtype_of(row).safetensors, table.shapes[row])
        if module in stored and "." + suffix in _PLANES:
            stored[module]["." + _ALIASES.get(suffix, suffix)] = plane
        else:
            assert plane[0] in (*_FLOATS, "I64"), f"{name} is {plane}, and no linear module's"
    for name, planes in stored.items():
        beside = {s for s in planes if s in (*_STATISTICS, *(statistics or ()))}
        expected = promised[name]
        own = {suffix: plane for suffix, plane in planes.items() if suffix not in beside}
        if expected is None:
            assert set(own) <= {".weight"}, f"{name}: plain by the config, stored as {planes}"
            assert all(dtype in _FLOATS and shape == modules[name] for dtype, shape in own.values()), (name, own)
            assert not beside, f"{name}: plain, with calibration {beside}"
            continue
        assert own.keys() == expected.keys(), f"{name}: stored as {own}, by the config {expected}"
        for suffix, (dtype, shape) in own.items():
            dtypes, wanted = expected[suffix]
            assert dtype in dtypes, (name, suffix, dtype, dtypes)
            assert shape == wanted, (name, suffix, shape, wanted)
        wanted_beside = statistics if statistics is not None else calibrated
        assert beside == wanted_beside, f"{name}: calibration {beside}, by the config {wanted_beside}"


_STATISTICS = (".input_scale", ".activation_scale", ".input_global_scale")
_PARTS = ("", "_packed", "_scale", "_scale_inv", "_scale_2", "_global_scale", "_shape", "_zero_point")
_PLANES = (*(f".weight{part}" for part in _PARTS), ".scale", *_STATISTICS)
_ALIASES = {"scale": "weight_scale_inv"}  # DeepSeek V4's name


def promises(checkpoint: Checkpoint, modules: Mapping[str, Shape]) -> tuple[dict[str, Promise], set[str]]:
    """Return what the config promises of each module, and the suffixes of calibration tensors that it wants."""
    config = checkpoint.config.get("quantization_config")
    assert config is None or isinstance(config, dict)
    document = checkpoint.path / "hf_quant_config.json"
    if document.exists():
        whole = json.loads(document.read_text())
        if config is not None:  # two say it: they must agree
            assert config["quant_method"] == "modelopt"
            assert config["quant_algo"] == whole["quantization"]["quant_algo"]
            assert config["ignore"] == whole["quantization"]["exclude_modules"]
        return _modelopt(whole["quantization"], modules)
    if config is None:
        return dict.fromkeys(modules), set()
    if config["quant_method"] == "compressed-tensors":
        return _compressed_tensors(config, modules)
    return _transformers(config, modules)


def _transformers(config: dict[str, Any], modules: Mapping[str, Shape]) -> tuple[dict[str, Promise], set[str]]:
    """fp8, mxfp8 and fbgemm_fp8, read with the classes and the matching of transformers."""
    method = config["quant_method"]
    fields = {k: v for k, v in config.items() if k != "quant_method"}
    if method == "fbgemm_fp8":
        made = configs.FbgemmFp8Config(**fields)
        assert made.activation_scale_ub > 0
        planes = _planes(".weight_scale", ("F32",), lambda n, k: (n, 1))
        return _converted(made.modules_to_not_convert, modules, planes), set()
    made = configs.FineGrainedFP8Config(**fields)
    static = made.activation_scheme == "static"
    assert config.get("fmt", "e4m3") == "e4m3"
    dtypes: tuple[str, ...] = ("F32", "BF16")
    if method == "mxfp8":
        assert tuple(made.weight_block_size) == (1, 32)
        dtypes = ("U8",)
    elif made.scale_fmt == "ue8m0":
        dtypes = ("F32", "F8_E8M0")
    block = made.weight_block_size
    planes = _planes(".weight_scale_inv", dtypes, lambda n, k: (up(n, block[0]), up(k, block[1])) if block else ())
    return _converted(made.modules_to_not_convert, modules, planes), {".activation_scale"} if static else set()


def _planes(suffix: str, dtypes: tuple[str, ...], scale: Callable[[int, int], Shape]) -> Callable[[int, int], Promise]:
    return lambda n, k: {".weight": (("F8_E4M3",), (n, k)), suffix: (dtypes, scale(n, k))}


def _converted(
    patterns: list[str] | None, modules: Mapping[str, Shape], planes: Callable[[int, int], Promise]
) -> dict[str, Promise]:
    convert = functools.partial(matching.should_convert_module, patterns=patterns)
    return {name: planes(*shape) if convert(name) else None for name, shape in modules.items()}


def _compressed_tensors(config: dict[str, Any], modules: Mapping[str, Shape]) -> tuple[dict[str, Promise], set[str]]:
    """compressed-tensors, applied by the library to modules of these names; its compressors make the planes."""
    read = quantization.QuantizationConfig.model_validate(config)
    assert read.format == config["format"]
    model = torch.nn.Module()
    for name, (n, k) in modules.items():
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta"))
    quantization.apply_quantization_config(model, read, show_progress=False)
    found: dict[str, Promise] = {}
    calibrated: set[str] = set()
    for name in modules:
        module = model.get_submodule(name)
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            found[name] = None
            continue
        state = {key: (value.dtype, tuple(value.shape)) for key, value in module.state_dict().items()}
        calibrated |= {f".{key}" for key in state if key.startswith("input_")}
        weight = tuple(item for item in state.items() if item[0].startswith("weight"))
        found[name] = _planes_compressed(scheme.format or config["format"], scheme.model_dump_json(), weight)
    return found, calibrated


@functools.cache
def _planes_compressed(layout: str, scheme: str, weight: tuple[tuple[str, Any], ...]) -> Promise:
    """Return what the library stores for a weight of ones."""
    state = {key: torch.ones(shape, dtype=dtype) for key, (dtype, shape) in weight}
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    planes = compressor.compress(state, quantization.QuantizationScheme.model_validate_json(scheme))
    return {f".{key}": ((_TORCH[v.dtype],), tuple(v.shape)) for key, v in planes.items()}


def _modelopt(config: dict[str, Any], modules: Mapping[str, Shape]) -> tuple[dict[str, Promise], set[str]]:
    """modelopt, as its deployment code reads it: names and globs to leave alone, one algorithm for all others."""
    algorithm = config["quant_algo"]
    found: dict[str, Promise] = {}
    for name, (n, k) in modules.items():
        if any(fnmatch.fnmatchcase(name, glob) for glob in config["exclude_modules"]):
            found[name] = None
        elif algorithm == "FP8":
            found[name] = {".weight": (("F8_E4M3",), (n, k)), ".weight_scale": (("F32",), ())}
        else:
            assert algorithm in ("NVFP4", "W4A16_NVFP4")
            assert config["group_size"] == 16
            found[name] = {
                ".weight": (("U8",), (n, k // 2)),
                ".weight_scale": (("F8_E4M3",), (n, k // 16)),
                ".weight_scale_2": (("F32",), ()),
            }
    return found, {".input_scale"} if algorithm in ("FP8", "NVFP4") else set()


def quantised_modules(checkpoint: Checkpoint, modules: Mapping[str, Shape]) -> set[str]:
    """Return the modules that a loader expects to be quantised."""
    return {name for name, promise in promises(checkpoint, modules)[0].items() if promise is not None}


def all_linear() -> set[str]:
    """Return the modules of the toy that formats without groups quantise."""
    return {*LINEAR, RAGGED}


def folder_json(folder: Path, name: str = "config.json") -> Any:
    return json.loads((folder / name).read_text())
