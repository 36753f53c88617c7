"""A toy model stored in every quantised way, as headers without data, and plans of its merges written out likewise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plan_folders import plan
from quantised_folders import folder_of, state_shapes

from paramdelta.checkpoint import Checkpoint, open_checkpoint
from paramdelta.plan import Plan

Shape = tuple[int, ...]
Planes = dict[str, tuple[str, Shape]]  # suffix: (dtype, shape)
Tensors = dict[str, tuple[str, Shape]]

_DENSE = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (384, 256),
    "mlp.up_proj": (384, 256),
    "mlp.down_proj": (256, 384),
}
_EXPERT = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
# Linear modules that formats quantise, with the shapes of their weights.
LINEAR: dict[str, Shape] = {
    **{f"model.layers.0.{name}": shape for name, shape in _DENSE.items()},
    **{f"model.layers.1.mlp.experts.{e}.{name}": shape for e in range(2) for name, shape in _EXPERT.items()},
}
RAGGED = "model.layers.1.self_attn.kv_a_proj"  # its 100 columns are no whole groups
# Linear modules that stay plain, and everything else.
ROUTER, HEAD = "model.layers.1.mlp.gate", "lm_head"
SPARED: dict[str, Shape] = {ROUTER: (4, 256), HEAD: (64, 256)}
OTHERS: Tensors = {
    "model.embed_tokens.weight": ("BF16", (64, 256)),
    "model.layers.0.input_layernorm.weight": ("BF16", (256,)),
    "model.layers.0.self_attn.q_proj.bias": ("BF16", (256,)),
    "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", (4,)),
    "model.layers.1.linear_attn.conv1d.weight": ("BF16", (64, 1, 4)),
    "model.layers.1.mlp.gate.tid2eid": ("I64", (64,)),
    "model.norm.weight": ("BF16", (256,)),
}
MODULES: dict[str, Shape] = {**LINEAR, RAGGED: (72, 100), **SPARED}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One way of storing the toy: the planes of a weight [n, k], configs, and calibration by suffix. ``names`` are the
    formats that the package calls it by; ``grouped`` ones leave the ragged weight plain; ``listed`` says under which
    key of the config plain modules are."""

    planes: Callable[[int, int], Planes]
    format: str | None = None
    config: Mapping[str, Any] | None = None
    modelopt: Mapping[str, Any] | None = None
    listed: str = ""
    grouped: bool = False
    statistics: Planes = field(default_factory=dict)
    method: str | None = None

    def quantised(self) -> dict[str, Shape]:
        """Return the linear modules that are quantised."""
        if self.format is None:
            return {}
        return LINEAR if self.grouped else {**LINEAR, RAGGED: MODULES[RAGGED]}

    def ignored(self) -> list[str]:
        """Return the linear modules that are not."""
        return [name for name in MODULES if name not in self.quantised()]

    def tensors(self, head: bool = True) -> Tensors:
        """Return the tensors of the toy, sorted by name."""
        found: Tensors = dict(OTHERS)
        for name, shape in MODULES.items():
            quantised = name in self.quantised()
            for suffix, plane in (self.planes(*shape) if quantised else {".weight": ("BF16", shape)}).items():
                found[name + suffix] = plane
            if quantised:
                found |= {name + suffix: plane for suffix, plane in self.statistics.items()}
        if not head:
            del found["lm_head.weight"]
        return dict(sorted(found.items()))

    def write(self, folder: Path, *, head: bool = True, tensors: Tensors | None = None, **config: Any) -> Path:
        """Write a folder of the toy and return it. ``config`` is for config.json."""
        folder.mkdir()
        whole: dict[str, Any] = {"model_type": "toy", "tie_word_embeddings": not head, **config}
        modelopt = None
        if self.config is not None and "quantization_config" not in config:
            whole["quantization_config"] = {**self.config, self.listed: self.ignored()}
        if self.modelopt is not None:
            modelopt = {
                "producer": {"name": "modelopt"},
                "quantization": {**self.modelopt, "exclude_modules": self.ignored()},
            }
        folder_of(folder, self.tensors(head) if tensors is None else tensors, whole, modelopt)
        return folder


def up(extent: int, per: int) -> int:
    return -(-extent // per) if per else 1


def fp8(suffix: str, scale: str = "F32", rows: int = 128, cols: int = 128) -> Callable[[int, int], Planes]:
    """fp8 codes with a grid of scales; 0 is the whole extent."""
    return lambda n, k: {".weight": ("F8_E4M3", (n, k)), suffix: (scale, (up(n, rows), up(k, cols)))}


def fp8_tensor(suffix: str, scale: str, shape: Shape) -> Callable[[int, int], Planes]:
    return lambda n, k: {".weight": ("F8_E4M3", (n, k)), suffix: (scale, shape)}


def fp4(codes: str, scale: str, cols: int, second: str = "", shape: Shape = ()) -> Callable[[int, int], Planes]:
    """Nibbles in bytes, groups of ``cols``, and perhaps a second level of scales."""

    def planes(n: int, k: int) -> Planes:
        found: Planes = {codes: ("U8", (n, k // 2)), ".weight_scale": (scale, (n, k // cols))}
        return found | ({second: ("F32", shape)} if second else {})

    return planes


def int4(n: int, k: int) -> Planes:
    return {
        ".weight_packed": ("I32", (n, k // 8)),
        ".weight_scale": ("BF16", (n, k // 32)),
        ".weight_shape": ("I64", (2,)),
    }


def plain(dtype: str) -> Callable[[int, int], Planes]:
    return lambda n, k: {".weight": (dtype, (n, k))}


def native(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    } | more


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
_LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
_INPUT = {".input_scale": ("F32", ())}
_compressed = functools.partial(Storage, listed="ignore", method="compressed-tensors")
_native = functools.partial(Storage, listed="modules_to_not_convert", method="fp8")

STORAGES: dict[str, Storage] = {
    "plain": Storage(planes=plain("BF16")),
    "blocks": _native(planes=fp8(".weight_scale_inv"), format="fp8-block", config=native()),
    "blocks with bf16 scales": _native(planes=fp8(".weight_scale_inv", "BF16"), format="fp8-block", config=native()),
    "blocks of 64": _native(
        planes=fp8(".weight_scale_inv", rows=64, cols=64),
        format="fp8-block",
        config=native(weight_block_size=[64, 64]),
    ),
    "blocks with powers of two": _native(
        planes=fp8(".scale", "F8_E8M0"), format="fp8-block", config=native(scale_fmt="ue8m0")
    ),
    "static fp8": _native(
        planes=fp8_tensor(".weight_scale_inv", "F32", ()),
        format="fp8-tensor",
        config=native(weight_block_size=None, activation_scheme="static"),
        statistics={".activation_scale": ("F32", ())},
    ),
    "channels": _compressed(
        planes=fp8(".weight_scale", "BF16", 1, 0),
        format="fp8-channel",
        config=compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, _TOKEN),
    ),
    "static tensors": _compressed(
        planes=fp8_tensor(".weight_scale", "BF16", (1,)),
        format="fp8-tensor",
        config=compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, _STATIC),
        statistics={".input_scale": ("BF16", (1,))},
    ),
    "fbgemm": Storage(
        planes=fp8(".weight_scale", "F32", 1, 0),
        format="fp8-channel",
        config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        listed="modules_to_not_convert",
        method="fbgemm_fp8",
    ),
    "mxfp8": Storage(
        planes=fp8(".weight_scale_inv", "U8", 1, 32),
        format="mxfp8",
        config={"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]},
        listed="ignored_layers",
        grouped=True,
        method="mxfp8",
    ),
    "mxfp4": _compressed(
        planes=fp4(".weight_packed", "U8", 32),
        format="mxfp4",
        config=compressed(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        ),
        grouped=True,
    ),
    "nvfp4": _compressed(
        planes=fp4(".weight_packed", "F8_E4M3", 16, ".weight_global_scale", (1,)),
        format="nvfp4",
        config=compressed(
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            _LOCAL,
        ),
        grouped=True,
        statistics={".input_global_scale": ("F32", (1,))},
    ),
    "int4": _compressed(
        planes=int4,
        format="int4",
        config=compressed(
            "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
        ),
        grouped=True,
    ),
    "modelopt fp8": Storage(
        planes=fp8_tensor(".weight_scale", "F32", ()),
        format="fp8-tensor",
        modelopt={"quant_algo": "FP8", "kv_cache_quant_algo": None},
        statistics=_INPUT,
        method="modelopt",
    ),
    "modelopt nvfp4": Storage(
        planes=fp4(".weight", "F8_E4M3", 16, ".weight_scale_2"),
        format="nvfp4",
        modelopt={"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16},
        grouped=True,
        statistics=_INPUT,
        method="modelopt",
    ),
}
QUANTISED = [name for name, storage in STORAGES.items() if storage.format is not None]


def folders(root: Path, post: str, base: str, new_base: str, **options: Any) -> dict[str, Path]:
    """Write the toy three times, each role in the storage of this name."""
    roles = {"post": post, "base": base, "new_base": new_base}
    return {role: STORAGES[name].write(root / role, **options) for role, name in roles.items()}


def skeleton(made: Plan, folder: Path) -> Checkpoint:
    """Write what a plan writes, with holes in place of the tensors' data (but for the shapes of int4), and open it."""
    folder.mkdir()
    for (name, size), header in zip(made.work.outputs, made.work.headers, strict=True):
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(size)
    for name, content in made.written_files():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    state_shapes(folder)
    return open_checkpoint(folder, role="post")


def planned(root: Path, post: str, base: str, new_base: str, **options: Any) -> Plan:
    """Plan the merge of three toys."""
    return plan(folders(root, post, base, new_base), **options)


def formats_of(made: Plan) -> dict[str, str]:
    """Return the format of each quantised weight of a plan's output, by module."""
    pairs = zip(made.pairing.names, made.stored.formats, strict=True)
    return {name.removesuffix(".weight"): f.name for name, f in pairs if f is not None}
