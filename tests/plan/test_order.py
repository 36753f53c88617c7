"""The looks at data before a merge: operands in the wrong order, and integer tensors that post changed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from plan_folders import llama, plan, three
from safetensors.numpy import load_file, save_file

import paramdelta
from paramdelta.plan.order import data_warnings, judge_order, samples_of

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


QUANTISED = ["fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "mxfp4", "nvfp4", "int4"]


def quantised(root: Path, models: list[dict[str, np.ndarray]], name: str) -> dict[str, Path]:
    """Write three folders, and each again in a format: a merge with itself changes nothing else."""
    plain = three(root, *models)
    for role, folder in plain.items():
        paramdelta.merge(post=folder, base=folder, new_base=folder, out=root / f"{role}-{name}", format=name)
    return {role: root / f"{role}-{name}" for role in plain}


def matrices(far: float, near: float) -> list[dict[str, np.ndarray]]:
    """Return a family whose weights are 192 × 160, larger than a sample, behind names of linear layers."""
    rng = np.random.default_rng(11)
    base = {f"model.layers.{i}.mlp.down_proj.weight": rng.standard_normal((192, 160)) for i in range(2)}
    moved = {n: t + far * rng.standard_normal(t.shape) for n, t in base.items()}
    child = {n: t + near * rng.standard_normal(t.shape) for n, t in moved.items()}
    return [{n: t.astype(ml_dtypes.bfloat16) for n, t in m.items()} for m in (base, moved, child)]


def add_zero_points(folder: Path) -> None:
    """Let the int4 weights of a folder have zero points other than 8."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("weight_packed")]:
        words = np.random.default_rng(3).integers(-(2**31), 2**31, (192 // 8, 160 // 32), np.int32)
        tensors[name.replace("packed", "zero_point")] = words
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = (folder / "config.json").read_text()
    assert '"symmetric": true' in text
    (folder / "config.json").write_text(text.replace('"symmetric": true', '"symmetric": false'))


@pytest.mark.parametrize("name", [*QUANTISED, "int4 with zero points"])
def test_samples_of_quantised_weights_are_their_values(name: str, tmp_path: Path) -> None:
    folders = quantised(tmp_path, matrices(0.5, 0.05), name.split()[0])
    if name not in QUANTISED:
        for folder in folders.values():
            add_zero_points(folder)
    samples = [s for s in samples_of(plan(folders).work) if s[0].ndim == 2]
    assert len(samples) == 2
    for number, (role, folder) in enumerate(folders.items()):
        decoded = tmp_path / f"decoded-{role}"
        paramdelta.merge(post=folder, base=folder, new_base=folder, out=decoded, format="f32")
        values = load_file(decoded / "model.safetensors")
        expected = [values[f"model.layers.{i}.mlp.down_proj.weight"][:128, :128] for i in range(2)]
        for sample, whole in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(sample[number].astype(np.float32), whole)


@pytest.mark.parametrize("name", QUANTISED)
def test_wrong_order_of_quantised_folders(name: str, tmp_path: Path) -> None:
    base, moved, child = matrices(0.5, 0.05)
    folders = quantised(tmp_path, [child, moved, base], name)
    assert data_warnings(plan(folders)) == ()
    (warning,) = data_warnings(plan(folders | {"base": folders["new_base"], "new_base": folders["base"]}))
    assert "nearer to new_base than to base" in warning
    (warning,) = data_warnings(plan(folders | {"post": folders["base"]}))
    assert "post and base are equal" in warning
