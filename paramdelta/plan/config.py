"""config.json merged three ways: new_base's bytes, plus what post-training changed about the model's use, never about
its structure."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramdelta.checkpoint import Checkpoint
from paramdelta.dtypes import DType
from paramdelta.errors import shown, storage_errors
from paramdelta.plan.quantising import QuantConfig

# Fields about use: which tokens begin, end and pad a text. Post-training sets them, the weights do not depend on them.
USE_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# Fields that say how a file was written, not what the model is.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "vocab_size", "auto_map", "use_cache")
# What says how tensors are stored follows from the output's tensors (plan/quantising.py).
_STORAGE = ("quantization_config", "compression_config", "expert_dtype")
_NESTED = ("text_config",)
_ABSENT = "(absent)"
_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True, kw_only=True)
class MergedConfig:
    """The output's config.json (None where new_base has none on disk), what was taken from post, where new_base's
    structure differs from the one post was trained in, and what to warn about."""

    data: bytes | None
    taken: tuple[str, ...]
    moved: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_config(
    post: Checkpoint,
    base: Checkpoint,
    new_base: Checkpoint,
    *,
    vocab_size: int | None,
    dtype: DType | None,
    quant_config: QuantConfig,
    configs: Mapping[str, dict[str, Any]] | None = None,
) -> MergedConfig:
    """Return new_base's config.json, byte for byte unless a field must change.

    A field about use that post changed against base is taken from post where new_base still has base's value. Other
    fields that post changed are warned of. ``vocab_size``, ``dtype`` and the quantisation config are set where the
    output's tensors require it. ``configs`` are what to take for the configs of post, base and new_base where they
    speak of tokens by other ids than the output's.
    """
    path = new_base.path / "config.json"
    held = new_base.memory is not None  # loaded: it has a config, and no file
    if not held and not path.is_file():
        return MergedConfig(
            data=None, taken=(), moved=(), warnings=("new_base has no config.json, so the output has none",)
        )
    configs = configs or {c.role: c.config for c in (post, base, new_base)}
    merged = copy.deepcopy(configs["new_base"])
    taken: list[str] = []
    moved: list[str] = []
    warnings: list[str] = []
    p, b, n = (_aligned(configs[role], new_base.config) for role in ("post", "base", "new_base"))
    _merge_level(p, b, n, merged, "", taken, moved, warnings)
    text = merged.get("text_config") if isinstance(merged.get("text_config"), dict) else merged
    assert isinstance(text, dict)
    if vocab_size is not None and text.get("vocab_size") != vocab_size:
        for level in (merged, text):
            if level is text or "vocab_size" in level:
                level["vocab_size"] = vocab_size
        taken.append(f"vocab_size = {vocab_size}")
    if dtype is not None and dtype.name in _TORCH_NAMES:
        for level in (merged, text):
            for key in ("torch_dtype", "dtype"):
                if isinstance(level.get(key), str):
                    level[key] = _TORCH_NAMES[dtype.name]
    merged = quant_config.applied(merged)
    data = None if held else _bytes_of(path, merged, new_base.config)
    return MergedConfig(data=data, taken=tuple(taken), moved=tuple(moved), warnings=tuple(warnings))


def structure_warnings(post: Checkpoint, base: Checkpoint, new_base: Checkpoint) -> list[str]:
    """Return warnings about fields of structure in which post differs from base, whatever is done about its use."""
    warnings: list[str] = []
    p, b, n = (
        _aligned({k: v for k, v in c.config.items() if k not in USE_FIELDS}, new_base.config)
        for c in (post, base, new_base)
    )
    _merge_level(p, b, n, copy.deepcopy(n), "", [], [], warnings)
    return warnings


def _bytes_of(path: Path, merged: dict[str, Any], original: dict[str, Any]) -> bytes:
    if merged == original:
        with storage_errors(path, "cannot be read"):
            return path.read_bytes()
    return (json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode()


def _merge_level(
    post: dict[str, Any],
    base: dict[str, Any],
    new: dict[str, Any],
    merged: dict[str, Any],
    prefix: str,
    taken: list[str],
    moved: list[str],
    warnings: list[str],
) -> None:
    for key in sorted({*post, *base, *new}):
        ours, theirs, kept = (config.get(key, _ABSENT) for config in (post, base, new))
        if key in _NESTED and all(isinstance(v, dict) for v in (ours, theirs, kept)):
            _merge_level(ours, theirs, kept, merged[key], f"{prefix}{key}.", taken, moved, warnings)
        elif (
            key in _NESTED
            or key in _INCIDENTAL
            or key in _STORAGE
            or (not prefix and kept is _ABSENT and key in _inner(new))
        ):
            continue
        elif key in USE_FIELDS:
            if ours in (theirs, kept, _ABSENT):
                continue
            if kept == theirs:
                merged[key] = ours
                taken.append(f"{prefix}{key} = {json.dumps(ours)}")
            else:
                warnings.append(_kept(f"{prefix}{key}", ours, theirs, kept, "new_base changed it too"))
        elif not _same(ours, theirs) and not _same(ours, kept):
            warnings.append(_kept(f"{prefix}{key}", ours, theirs, kept, "it is about structure"))
        elif _same(ours, theirs) and not _same(theirs, kept) and theirs is not _ABSENT and kept is not _ABSENT:
            moved.append(f"{prefix}{shown(key)}: {_text(theirs)} in base, {_text(kept)} in new_base")


def _aligned(config: dict[str, Any], new_base: dict[str, Any]) -> dict[str, Any]:
    """Return a config for comparison: nested as new_base's is, and rope spelled one way.

    transformers 5 writes ``rope_parameters`` for what was ``rope_theta`` and ``rope_scaling``.
    """
    inner = _inner(config)
    flat = {k: v for k, v in config.items() if k not in _NESTED}
    if _inner(new_base):
        return _one_rope(flat) | {"text_config": _one_rope(inner or flat)}
    return _one_rope({**inner, **flat})


def _inner(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _one_rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        return config
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    rest = {k: v for k, v in config.items() if k != "rope_parameters"}
    if "rope_theta" in rope:
        rest["rope_theta"] = rope["rope_theta"]
    return rest if scaling.get("rope_type") == "default" else {**rest, "rope_scaling": scaling}


def _same(a: Any, b: Any) -> bool:
    """Whether two values mean the same: releases of transformers differ in whether they write out what is off."""
    nothing = (_ABSENT, None, False)
    return (any(a is v for v in nothing) and any(b is v for v in nothing)) or bool(a == b)


def _kept(field: str, ours: Any, theirs: Any, kept: Any, why: str) -> str:
    return (
        f"config.json: {shown(field)} is {_text(ours)} in post, {_text(theirs)} in base, "
        f"{_text(kept)} in new_base: kept new_base's, because {why}"
    )


def _text(value: Any) -> str:
    return _ABSENT if value is _ABSENT else shown(json.dumps(value, sort_keys=True))
