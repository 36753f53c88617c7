"""The looks at data before a merge: operands in the wrong order, and integer tensors that post changed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from plan_folders import llama, plan, three

from paramdelta.plan.order import data_warnings, judge_order

SHAPES = {f"model.layers.{i}.w": (64, 32) for i in range(4)}


def family(far: float, near: float, dtype: object = ml_dtypes.bfloat16) -> list[dict[str, np.ndarray]]:
    """Return a base, one that moved far from it, and a child of the latter that stayed near."""
    rng = np.random.default_rng(7)
    base = {n: rng.standard_normal(s) for n, s in SHAPES.items()}
    moved = {n: t + far * rng.standard_normal(t.shape) for n, t in base.items()}
    child = {n: t + near * rng.standard_normal(t.shape) for n, t in moved.items()}
    return [{n: t.astype(dtype) for n, t in m.items()} for m in (base, moved, child)]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_wrong_order(tmp_path: Path, dtype: object) -> None:
    base, moved, child = family(0.5, 0.05, dtype)
    assert data_warnings(plan(three(tmp_path / "right", child, moved, base))) == ()
    (warning,) = data_warnings(plan(three(tmp_path / "wrong", child, base, moved)))
    assert "nearer to new_base than to base" in warning


def test_equal_post_and_base(tmp_path: Path) -> None:
    (warning,) = data_warnings(plan(three(tmp_path, llama(1), llama(1), llama(3))))
    assert "post and base are equal" in warning


def test_unrelated_base(tmp_path: Path) -> None:
    assert "does not look as if it was trained from base" in str(judge_order(2.1, 2.0, 1.0))


def test_non_finite_values_do_not_hide_the_order() -> None:
    assert judge_order(float("nan"), 1.0, 1.0) is None


def test_integers_that_post_changed(tmp_path: Path) -> None:
    base, moved, child = family(0.5, 0.05)
    for i, tensors in enumerate((child, moved, base)):
        tensors["ids"] = np.arange(4) + (i == 0)
        tensors["same"] = np.arange(4)
    (warning,) = data_warnings(plan(three(tmp_path, child, moved, base)))
    assert "taken from new_base: ids" in warning
    assert "same" not in warning
