"""config.json merged three ways: new_base's bytes unless a field about use changed, and everything structural
reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_folders import llama, plan, write

LLAMA = {"model_type": "llama", "eos_token_id": 1, "rope_theta": 1e4, "tie_word_embeddings": False}


def merged(
    root: Path,
    post: dict[str, Any],
    base: dict[str, Any],
    new: dict[str, Any],
    rows: tuple[int, int, int] = (8, 8, 8),
    **options: Any,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    folders = {
        role: write(root / role, llama(i, vocab=rows[i]), config=config)
        for i, (role, config) in enumerate({"post": post, "base": base, "new_base": new}.items())
    }
    made = plan(folders, **options)
    data = next(f.data for f in made.side_files if f.name == "config.json")
    assert data is not None
    return json.loads(data), made.warnings


def test_equal_configs_keep_new_base_s_bytes(tmp_path: Path) -> None:
    odd = '{ "b":1,\n\n"a": [ 2 ] }'
    folders = {role: write(tmp_path / role, llama(1)) for role in ("post", "base", "new_base")}
    for folder in folders.values():
        (folder / "config.json").write_text(odd)
    data = next(f.data for f in plan(folders).side_files if f.name == "config.json")
    assert data == odd.encode()


def test_use_is_taken_from_post(tmp_path: Path) -> None:
    config, warnings = merged(tmp_path, LLAMA | {"eos_token_id": [1, 2], "pad_token_id": 3}, LLAMA, LLAMA)
    assert config == LLAMA | {"eos_token_id": [1, 2], "pad_token_id": 3}
    assert warnings == ()


def test_use_that_new_base_changed_too(tmp_path: Path) -> None:
    config, warnings = merged(tmp_path, LLAMA | {"eos_token_id": 2}, LLAMA, LLAMA | {"eos_token_id": 9})
    assert config["eos_token_id"] == 9
    assert "eos_token_id is 2 in post, 1 in base, 9 in new_base" in warnings[0]


def test_structure_is_reported_never_taken(tmp_path: Path) -> None:
    config, warnings = merged(tmp_path, LLAMA | {"rope_theta": 5e5}, LLAMA, LLAMA)
    assert config["rope_theta"] == 1e4
    assert "rope_theta is 500000.0 in post, 10000.0 in base, 10000.0 in new_base" in warnings[0]


def test_incidental_fields_are_not_mentioned(tmp_path: Path) -> None:
    post = LLAMA | {"transformers_version": "5", "_name_or_path": "x", "torch_dtype": "float32", "use_cache": False}
    config, warnings = merged(tmp_path, post, LLAMA, LLAMA)
    assert config == LLAMA
    assert warnings == ()


def test_nested_text_config(tmp_path: Path) -> None:
    nested = {"text_config": {"eos_token_id": 1, "vocab_size": 8}, "tie_word_embeddings": False}
    post = {"text_config": {"eos_token_id": 7, "vocab_size": 10}, "tie_word_embeddings": False}
    config, _ = merged(tmp_path, post, nested, nested, rows=(10, 8, 8), vocab="extend")
    assert config["text_config"] == {"eos_token_id": 7, "vocab_size": 10}


def test_vocab_size_follows_the_rows(tmp_path: Path) -> None:
    sizes = [LLAMA | {"vocab_size": n} for n in (10, 8, 9)]
    config, _ = merged(tmp_path, *sizes, rows=(10, 8, 9), vocab="extend")
    assert config["vocab_size"] == 10


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_follows(tmp_path: Path, key: str) -> None:
    config = LLAMA | {key: "bfloat16"}
    assert merged(tmp_path, config, config, config, dtype="f16")[0][key] == "float16"


def test_no_config(tmp_path: Path) -> None:
    folders = {role: write(tmp_path / role, llama(1)) for role in ("post", "base", "new_base")}
    (folders["new_base"] / "config.json").unlink()
    made = plan(folders)
    assert all(f.name != "config.json" for f in made.side_files)
    assert any("new_base has no config.json" in w for w in made.warnings)
