"""The quantisation config of an output: what loaders must read to find its codes and scales."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from paramdelta.checkpoint.declared import MODELOPT_FILE
from paramdelta.checkpoint.weights import Quantisation
from paramdelta.formats import DEEPGEMM_UE8M0, E8M0, Format

Config = dict[str, Any]

# The key that names the modules left alone, by method: the first that a followed config has, else the first.
_IGNORED = {
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "mxfp8": ("ignored_layers", "modules_to_not_convert"),
    "mxfp4": ("modules_to_not_convert",),
    "fbgemm_fp8": ("modules_to_not_convert",),
    "compressed-tensors": ("ignore",),
    "modelopt": ("ignore", "exclude_modules"),
}
_LAYOUTS = {
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4": "pack-quantized",
}
_ALGORITHMS = {
    "fp8-tensor": "FP8",
    "fp8-channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-block": "FP8_PB_WO",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}
_PRODUCER = {"name": "paramdelta"}
_MEASURED = "this modelopt format needs scales of activations that were measured beforehand: keep the donor's"


def output_config(
    formats: Sequence[Format],
    *,
    ignored: Sequence[str],
    source: Quantisation | None,
    dynamic: bool,
    cached: bool = True,
    added: Sequence[str] = (),
) -> tuple[Config | None, Config | None]:
    """Return (``quantization_config`` for config.json, content of hf_quant_config.json), None where there is none.

    ``formats`` are those of the output's quantised weights, ``ignored`` the names of modules that are not quantised,
    ``dynamic`` whether activations are scaled as they come; without ``cached``, scales that the source has for the
    key-value cache are left out, and its scheme with them. Where every format is one of ``source``'s, its config is
    kept as it is, unknown fields too, and only ``added``, modules that are not plain there, are added to its list;
    otherwise a new one is written. Raises ValueError where no config can say what the formats are.
    """
    made = list(dict.fromkeys(formats))
    if not made:
        return None, None
    methods = sorted({f.method for f in made})
    if len(methods) > 1:
        raise ValueError(f"no quantisation config covers formats of {' and '.join(methods)} at once")
    alike = {id(w.format): w.format for w in source.weights.values()} if source is not None else {}
    known = set(alike.values())
    same = known.issuperset(made) and {f.name for f in known} == {f.name for f in made}
    if source is not None and source.config and source.method == methods[0] and same:
        return _followed(source, added, dynamic, cached)
    if methods[0] == "compressed-tensors":
        return _compressed(made, ignored, dynamic), None
    if methods[0] == "modelopt":
        return _modelopt(made, ignored, dynamic)
    return _native(methods[0], made, ignored, dynamic), None


def _followed(
    source: Quantisation, added: Sequence[str], dynamic: bool, cached: bool
) -> tuple[Config | None, Config | None]:
    """Return the source's own config, with what is no longer quantised added to its list."""
    assert source.method is not None
    document = copy.deepcopy(source.config)
    in_file = source.config_place == MODELOPT_FILE
    config = document.get("quantization", document) if in_file else document
    keys = _IGNORED[source.method][::-1] if in_file else _IGNORED[source.method]
    key = next((k for k in keys if config.get(k) is not None), keys[0])
    if added:
        config[key] = [*source.ignored, *added]
    if not cached:
        config.update({k: None for k in ("kv_cache_scheme", "kv_cache_quant_algo") if config.get(k) is not None})
    if source.method in ("fp8", "mxfp8") and dynamic and config.get("activation_scheme") == "static":
        config["activation_scheme"] = "dynamic"
    if source.method == "compressed-tensors" and dynamic and not source.dynamic:
        for group in config["config_groups"].values():
            _make_dynamic(group)
    if source.method != "modelopt":
        return config, None
    if dynamic and not source.dynamic:
        raise ValueError(_MEASURED)
    if in_file:
        return None, document
    return config, _hf_quant_config(str(config.get("quant_algo")), config.get(key) or [], config)


def _make_dynamic(group: Any) -> None:
    """Let a group of a compressed-tensors config scale its activations as they come, or leave them alone."""
    inputs = group.get("input_activations") if isinstance(group, dict) else None
    if not isinstance(inputs, dict) or inputs.get("dynamic") is True:
        return
    if inputs.get("num_bits") == 8:
        inputs["dynamic"] = True
        inputs.pop("observer", None)
    else:  # nvfp4: without a measured scale of activations, weights alone
        group["input_activations"] = None


def _native(method: str, formats: list[Format], ignored: Sequence[str], dynamic: bool) -> Config:
    """Return the config of the families that a quant_method names outright."""
    only = {"mxfp8": "mxfp8", "mxfp4": "mxfp4", "fbgemm_fp8": "fp8-channel"}.get(method)
    if only is not None and any(f.name != only for f in formats):
        raise ValueError(f"no config of method {method} covers {_listed(formats)}")
    skipped: Config = {_IGNORED[method][0]: list(ignored)} if ignored else {}
    if method in ("mxfp4", "fbgemm_fp8"):
        return {
            "quant_method": method,
            **({"activation_scale_ub": 1200.0} if method == "fbgemm_fp8" else {}),
            **skipped,
        }
    scheme = {"activation_scheme": "dynamic" if dynamic else "static"}
    if method == "mxfp8":
        return {
            "quant_method": method,
            **scheme,
            "fmt": "e4m3",
            "weight_block_size": [1, 32],
            "scale_fmt": "ue8m0",
            **skipped,
        }
    experts = [f for f in formats if f.name == "mxfp4"]
    rest = [f for f in formats if f.name != "mxfp4"]
    grids = {(f.rows, f.cols) for f in rest}
    blocks = {f.name for f in rest} == {"fp8-block"}
    if not rest or len(grids) > 1 or (not blocks and any(f.name not in ("fp8-tensor", "fp8-channel") for f in rest)):
        raise ValueError(f"no config of method fp8 covers {_listed(formats)}")
    config: Config = {"quant_method": method, "fmt": "e4m3", **scheme}
    config["weight_block_size"] = list(next(iter(grids))) if blocks else None
    powers = [f.recipe == DEEPGEMM_UE8M0 or f.scale == E8M0 for f in rest]
    if all(powers):
        config["scale_fmt"] = "ue8m0"
    if experts:
        config["expert_dtype"] = "fp4"
    return config | skipped


def _compressed(formats: list[Format], ignored: Sequence[str], dynamic: bool) -> Config:
    """Return a config of compressed-tensors: one group, all linear modules but ``ignored``."""
    schemes = {(f.name, f.rows, f.cols, f.zero_points, f.scale) for f in formats}
    if len(schemes) > 1:
        raise ValueError(f"which modules have which format must be known to write a config for {_listed(formats)}")
    made = formats[0]
    layout = _LAYOUTS.get(made.name, "float-quantized")
    group = {
        "targets": ["Linear"],
        "weights": _weights(made),
        "input_activations": _inputs(made, dynamic),
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _weights(made: Format) -> Config:
    """Return the arguments of compressed-tensors that say how weights are stored."""
    strategy = made.name.removeprefix("fp8-") if made.name.startswith("fp8-") else "group"
    if made.name == "nvfp4":
        strategy = "tensor_group"
    if made.name == "int4" and not made.cols:
        strategy = "channel"
    if strategy == "block" and made.rows == 1:
        strategy = "group"
    args: Config = {
        "num_bits": made.bits,
        "type": "int" if made.codec == "i4" else "float",
        "strategy": strategy,
        "symmetric": not made.zero_points,
        "dynamic": False,
    }
    if strategy in ("group", "tensor_group"):
        args["group_size"] = made.cols
    if strategy == "block":
        args["block_structure"] = [made.rows, made.cols]
    if made.name in ("mxfp4", "mxfp8"):
        args["scale_dtype"] = "torch.uint8"
    if made.name == "nvfp4":
        args["scale_dtype"] = "torch.float8_e4m3fn"
    return args


def _inputs(made: Format, dynamic: bool) -> Config | None:
    """Return how activations are scaled, None where they are left alone."""
    if made.name == "nvfp4" and not dynamic:
        return _activations(4, "tensor_group", "local", group_size=16, scale_dtype="torch.float8_e4m3fn")
    if not made.name.startswith("fp8-"):
        return None
    if not dynamic:
        return _activations(8, "tensor", False)
    if made.name == "fp8-block":
        return _activations(8, "group", True, group_size=made.cols)
    return _activations(8, "token", True)


def _activations(bits: int, strategy: str, dynamic: bool | str, **more: Any) -> Config:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": dynamic, **more}


def _modelopt(formats: list[Format], ignored: Sequence[str], dynamic: bool) -> tuple[Config, Config]:
    """Return modelopt's config, as config.json and as its own file hold it."""
    names = {f.name for f in formats}
    if len(names) > 1 or not names <= set(_ALGORITHMS):
        raise ValueError(f"which modules have which format must be known to write a config for {_listed(formats)}")
    made = formats[0]
    algorithm = _ALGORITHMS[made.name]
    if dynamic and made.name == "nvfp4":
        algorithm = "W4A16_NVFP4"
    if dynamic and made.name == "fp8-tensor":
        raise ValueError(_MEASURED)
    weights: Config = {"dynamic": False, "num_bits": made.bits, "type": "float"}
    if made.name in ("nvfp4", "mxfp8"):
        weights["group_size"] = made.cols
    group: Config = {"targets": ["Linear"], "weights": weights}
    if algorithm in ("FP8", "NVFP4"):
        group["input_activations"] = dict(weights)
    inline: Config = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "producer": _PRODUCER,
    }
    return inline, _hf_quant_config(algorithm, ignored, {"group_size": made.cols} if made.name == "nvfp4" else {})


def _hf_quant_config(algorithm: str, ignored: Sequence[str], config: Config) -> Config:
    """Return the content of hf_quant_config.json that says the same as a config in config.json."""
    cache = config.get("kv_cache_scheme", config.get("kv_cache_quant_algo"))
    inner: Config = {"quant_algo": algorithm, "kv_cache_quant_algo": cache if isinstance(cache, str) else None}
    if isinstance(cache, dict) and (cache.get("num_bits"), cache.get("type")) == (8, "float"):
        inner["kv_cache_quant_algo"] = "FP8"
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        inner["group_size"] = config.get("group_size", 16)
    return {"producer": config.get("producer", _PRODUCER), "quantization": inner | {"exclude_modules": list(ignored)}}


def _listed(formats: list[Format]) -> str:
    return " and ".join(sorted({f.name for f in formats}))
