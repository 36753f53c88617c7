"""Which weights ``--format`` takes, and what is said about those that have no place in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from plan_folders import BF16, complaint, plan, three

import paramdelta
from paramdelta.checkpoint import describe, open_checkpoint

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (32, 40),
    "model.layers.0.mlp.experts.down_proj": (2, 32, 64),
    "model.norm.weight": (64,),
}


def folders(root: Path, *names: str) -> dict[str, Path]:
    rng = np.random.default_rng(4)
    models = [{n: rng.normal(size=SHAPES[n]).astype(BF16) for n in names} for _ in range(3)]
    return three(root, *models)


def test_weights_that_stay_plain_are_named(tmp_path: Path) -> None:
    made = plan(folders(tmp_path, *SHAPES), format="nvfp4")
    assert made.policies["formats"] == {"nvfp4": 1}
    (warning,) = made.warnings
    assert "not stored as nvfp4: model.layers.0.mlp.experts.down_proj" in warning
    assert "no names for stacks of experts" in warning
    assert warning.endswith("and 1 more")


def test_nothing_is_said_of_weights_that_nobody_quantises(tmp_path: Path) -> None:
    made = plan(folders(tmp_path, "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"), format="nvfp4")
    assert made.warnings == ()


def test_reasons_why_nothing_fits(tmp_path: Path) -> None:
    stack = folders(tmp_path / "stack", "model.layers.0.mlp.experts.down_proj")
    assert "no names for stacks of experts" in complaint(stack, format="nvfp4")
    odd = folders(tmp_path / "odd", "model.layers.0.self_attn.o_proj.weight")
    assert "its rows of 40 do not go in whole groups of 32" in complaint(odd, format="mxfp4")
    assert "no weights of linear layers" in complaint(folders(tmp_path / "none", "model.norm.weight"), format="mxfp4")


def test_parameters_are_those_of_the_weights(tmp_path: Path) -> None:
    """Neither scales nor packed bytes count."""
    plain = folders(tmp_path, "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
    for name in ("fp8-block", "nvfp4", "int4"):
        paramdelta.merge(**plain, out=tmp_path / name, format=name)
        assert describe(open_checkpoint(tmp_path / name))["parameters"] == 32 * 64 + 64
