"""config.json merged three ways: new_base's bytes, plus what post-training changed about the model's use, never about its
structure."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramdelta.checkpoint import Checkpoint
from paramdelta.dtypes import DType
from paramdelta.errors import shown

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
_NESTED = ("text_config",)
_ABSENT = "(absent)"
_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True, kw_only=True)
class MergedConfig:
    """The output's config.json (None where new_base has none), what was taken from post, and what to warn about."""

    data: bytes | None
    taken: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_config(
    post: Checkpoint, base: Checkpoint, new_base: Checkpoint, *, vocab_size: int | None, dtype: DType | None
) -> MergedConfig:
    """Return new_base's config.json, byte for byte unless a field must change.

    A field about use that post changed against base is taken from post where new_base still has base's value. Other
    fields that post changed are reported. ``vocab_size`` and ``dtype`` are set where the output's tensors require it.
    """
    path = new_base.path / "config.json"
    if not path.is_file():
        return MergedConfig(data=None, taken=(), warnings=("new_base has no config.json, so the output has none",))
    merged = copy.deepcopy(new_base.config)
    taken: list[str] = []
    warnings: list[str] = []
    _merge_level(post.config, base.config, new_base.config, merged, "", taken, warnings)
    text = merged.get("text_config") if isinstance(merged.get("text_config"), dict) else merged
    assert isinstance(text, dict)
    if vocab_size is not None and text.get("vocab_size") != vocab_size:
        text["vocab_size"] = vocab_size
        taken.append(f"vocab_size = {vocab_size}")
    if dtype is not None and dtype.name in _TORCH_NAMES:
        for level in (merged, text):
            for key in ("torch_dtype", "dtype"):
                if isinstance(level.get(key), str):
                    level[key] = _TORCH_NAMES[dtype.name]
    data = _bytes_of(path, merged, new_base.config)
    return MergedConfig(data=data, taken=tuple(taken), warnings=tuple(warnings))


def _bytes_of(path: Path, merged: dict[str, Any], original: dict[str, Any]) -> bytes:
    if merged == original:
        return path.read_bytes()
    return (json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode()


def _merge_level(
    post: dict[str, Any],
    base: dict[str, Any],
    new: dict[str, Any],
    merged: dict[str, Any],
    prefix: str,
    taken: list[str],
    warnings: list[str],
) -> None:
    for key in sorted({*post, *base}):
        ours, theirs = post.get(key, _ABSENT), base.get(key, _ABSENT)
        kept = new.get(key, _ABSENT)
        if key in _NESTED and all(isinstance(v, dict) for v in (ours, theirs, kept)):
            _merge_level(ours, theirs, kept, merged[key], f"{prefix}{key}.", taken, warnings)
        elif ours == theirs or ours == kept or key in _INCIDENTAL:
            continue
        elif key in USE_FIELDS and kept == theirs and ours is not _ABSENT:
            merged[key] = ours
            taken.append(f"{prefix}{key} = {json.dumps(ours)}")
        else:
            why = "new_base changed it too" if key in USE_FIELDS else "it is about structure"
            warnings.append(
                f"config.json: {prefix}{shown(key)} is {_text(ours)} in post, {_text(theirs)} in base, "
                f"{_text(kept)} in new_base: kept new_base's, because {why}"
            )


def _text(value: Any) -> str:
    return _ABSENT if value is _ABSENT else shown(json.dumps(value, sort_keys=True))
