"""Vocabularies of different sizes in every order, against the formula on zero-padded arrays."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from plan_folders import carry_out, plan, same, three, values

EMBED = "model.embed_tokens.weight"
ROWS = list(itertools.product((3, 5, 8), repeat=3))


def formula(post: np.ndarray, base: np.ndarray, new: np.ndarray, alpha: float, dtype: object) -> np.ndarray:
    """new_base + alpha · (post − base) over as many rows as the larger of post and new_base, missing rows zero."""
    rows = max(len(post), len(new))
    p, b, n = (np.zeros((rows, *new.shape[1:])) for _ in range(3))
    p[: len(post)], n[: len(new)] = post, new
    b[: min(len(base), rows)] = base[:rows]
    delta = p - b
    delta[len(post) :] = 0
    return np.asarray(n + alpha * delta).astype(dtype)


@pytest.mark.parametrize("shape", [(4,), (), (2, 3)], ids=["matrix", "bias", "cube"])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: "-".join(map(str, rows)))
def test_every_order_of_sizes(tmp_path: Path, rows: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    types = (np.float32, ml_dtypes.bfloat16, np.float16)  # rows lie at other offsets in each of the three
    name = EMBED if shape else "lm_head.bias"
    tensors = [
        {"a": values((3,), i), name: values((n, *shape), i, t), "z": values((3,), i)}
        for i, (n, t) in enumerate(zip(rows, types, strict=True))
    ]
    made = plan(three(tmp_path, *tensors), vocab="extend", alpha=0.5)
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[name], formula(*(t[name] for t in tensors), 0.5, np.float16))
    assert made.shape_of(made.names.index(name)) == (max(rows[0], rows[2]), *shape)
    assert made.policies["vocabulary_extended"] == ([] if len(set(rows)) == 1 else [name])


@pytest.mark.parametrize("rows", [(5, 3, 8), (8, 3, 5), (3, 8, 5)])
def test_bytes_read_are_rows_that_exist(tmp_path: Path, rows: tuple[int, int, int]) -> None:
    tensors = [{EMBED: values((n, 4), i)} for i, n in enumerate(rows)]
    made = plan(three(tmp_path, *tensors), vocab="extend")
    post, base, new = rows
    assert made.bytes_read == 8 * (new + post + min(post, base))
    assert made.bytes_written == 8 * max(post, new)
    assert made.parameters == 4 * max(post, new)


def test_extended_and_converted(tmp_path: Path) -> None:
    tensors = [{EMBED: values((n, 4), i)} for i, n in enumerate((8, 3, 5))]
    merged = carry_out(plan(three(tmp_path, *tensors), vocab="extend", dtype="f32"), tmp_path / "out")
    assert same(merged[EMBED], formula(*(t[EMBED] for t in tensors), 1.0, np.float32))


def test_extended_with_alpha_zero(tmp_path: Path) -> None:
    tensors = [{EMBED: values((n, 4), i)} for i, n in enumerate((8, 3, 5))]
    made = plan(three(tmp_path, *tensors), vocab="extend", alpha=0)
    assert same(carry_out(made, tmp_path / "out")[EMBED], formula(*(t[EMBED] for t in tensors), 0.0, "bfloat16"))
    assert made.bytes_read == tensors[2][EMBED].nbytes


def test_extended_across_shards(tmp_path: Path) -> None:
    tensors = [{EMBED: values((n, 4), i), "lm_head.weight": values((n, 4), i + 9)} for i, n in enumerate((8, 3, 5))]
    made = plan(three(tmp_path, *tensors, shards=2), vocab="extend", max_shard_size=64)
    merged = carry_out(made, tmp_path / "out")
    assert [name for name, _ in made.work.outputs] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in tensors[0]:
        assert same(merged[name], formula(*(t[name] for t in tensors), 1.0, "bfloat16"))


def test_columns_that_differ_are_no_vocabulary(tmp_path: Path) -> None:
    tensors = [{EMBED: values((5, 4 + (i == 0)), i)} for i in range(3)]
    made = plan(three(tmp_path, *tensors), vocab="extend", copy_from="new-base")
    assert made.policies["vocabulary_extended"] == []
    assert made.policies["unpaired"] == [EMBED]
