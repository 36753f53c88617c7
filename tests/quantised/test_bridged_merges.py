"""Merges of checkpoints that store their experts in different structures, bit for bit against the reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from bridged_folders import expected, read, store, weights

import paramdelta

ROLES = ("post", "base", "new_base")
STRUCTURES = ("separate", "separate fp8", "w1 w2 w3", "w1 w2 w3 fp8", "straight", "transposed", "interleaved")
BESIDE_BLOCKS = ("blocks", "transposed", "straight")


def stacking(roles: tuple[str, ...]) -> list[str]:
    """Return what must be said of stacks, whose gate_up matrices are square here."""
    told = ("straight", "transposed", "interleaved")
    return [f"{role}={how}" for role, how in zip(ROLES, roles, strict=True) if how in told]


def check(root: Path, roles: tuple[str, ...], inner: int = 128, hidden: int = 256, **options: object) -> None:
    """Merge three structures; compare every byte of the experts, and let verification recompute the folder."""
    held = {}
    for seed, (role, how) in enumerate(zip(ROLES, roles, strict=True)):
        held[role] = store(root / role, weights(seed, inner, hidden), how)
    sources = {role: root / role for role in ROLES}
    paramdelta.merge(**sources, out=root / "out", stacks=stacking(roles), scale_policy="recompute", **options)
    got, wanted = read(root / "out"), expected(held, roles[2])
    assert got.keys() == {*wanted, "model.norm.weight"}
    for name, data in wanted.items():
        assert got[name].shape == data.shape, name
        assert np.array_equal(got[name], data), name
    report = paramdelta.verify(root / "out", **sources, everything=True)
    assert report.problems == []


@pytest.mark.parametrize("new_base", STRUCTURES)
@pytest.mark.parametrize(
    ("post", "base"),
    [(a, b) for a, b in itertools.product(STRUCTURES, STRUCTURES) if "w2" not in a + b or a == b],
)
def test_experts(post: str, base: str, new_base: str, tmp_path: Path) -> None:
    """fp8 and bf16; one by one under either naming, stacked, stacked and transposed, gate and up alternating."""
    check(tmp_path, (post, base, new_base))


@pytest.mark.parametrize("inner", [96, 128, 256], ids=["oblong", "square gate_up", "square down"])
@pytest.mark.parametrize(
    "roles", [r for r in itertools.product(BESIDE_BLOCKS, repeat=3) if "blocks" in r and "straight" not in r], ids=str
)
def test_blocks_of_nibbles(roles: tuple[str, ...], inner: int, tmp_path: Path) -> None:
    """gpt-oss's packed experts against its plain stacks [E, in, out], where gate and up alternate, too."""
    if roles[2] == "transposed":
        pytest.skip("nibbles cannot be read across: see the complaints")
    check(tmp_path, roles, inner=inner)
