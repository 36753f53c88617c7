"""Merges of checkpoints that store their experts in different structures, bit for bit against the reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from bridged_folders import EXPERTS, PREFIX, expected, read, store, weights

import paramdelta

ROLES = ("post", "base", "new_base")
STRUCTURES = ("separate", "separate fp8", "w1 w2 w3", "w1 w2 w3 fp8", "straight", "transposed", "interleaved")


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
    assert not report.problems


# post and base are each paired with new_base alone: alike in structure, they meet every structure of new_base. Then
# their cuts are made one: unlike, two of new_base's have to show it, in turn all seven.
ALIKE = [(a, a, new_base) for a, new_base in itertools.product(STRUCTURES, STRUCTURES)]
UNLIKE = [
    (*pair, STRUCTURES[(2 * k + n + side) % 7])
    for k, other in enumerate(STRUCTURES[1:])
    for side, pair in enumerate([("separate", other), (other, "separate")])
    for n in (0, 3)
]


@pytest.mark.parametrize(("post", "base", "new_base"), ALIKE + UNLIKE)
def test_experts(post: str, base: str, new_base: str, tmp_path: Path) -> None:
    """fp8 and bf16; one by one under either naming, stacked, stacked and transposed, gate and up alternating."""
    check(tmp_path, (post, base, new_base))


@pytest.mark.parametrize("inner", [96, 128, 256], ids=["oblong", "square gate_up", "square down"])
@pytest.mark.parametrize("plain", ["gpt-oss", "transposed"])
@pytest.mark.parametrize("packed", ["post", "base", "neither", "both"])
def test_blocks_of_nibbles(packed: str, plain: str, inner: int, tmp_path: Path) -> None:
    """gpt-oss's packed experts against plain stacks [E, in, out]: its own, where gate and up alternate in columns,
    which need not be said, and such where they lie side by side."""
    roles = tuple("blocks" if packed in (role, "both") else plain for role in ("post", "base"))
    check(tmp_path, (*roles, "blocks"), inner=inner)


@pytest.mark.parametrize("option", ["alpha", "exclude", "wanted format"])
def test_options_reach_bridged_tensors(option: str, tmp_path: Path) -> None:
    """Globs are about the names that new_base has."""
    for seed, (role, how) in enumerate(zip(ROLES, ("separate fp8", "separate", "transposed"), strict=True)):
        store(tmp_path / role, weights(seed, 96), how)
    sources = {role: tmp_path / role for role in ROLES}
    options = {"alpha": {"alphas": "*gate_up_proj=0"}, "exclude": {"exclude": "*gate_up_proj"}}.get(option, {})
    if option == "wanted format":
        options = {"format": "fp8-block", "block_size": "32x32"}
    paramdelta.merge(**sources, out=tmp_path / "out", **options)
    got, before = read(tmp_path / "out"), read(tmp_path / "new_base")
    gate_up, down = (f"{PREFIX}.{which}_proj" for which in ("gate_up", "down"))
    assert not paramdelta.verify(tmp_path / "out", **sources, everything=True).problems
    if option == "wanted format":
        assert got[f"{gate_up}_scale_inv"].shape == (EXPERTS, 256 // 32, 192 // 32, 4)
        return
    assert got.keys() == before.keys()
    assert np.array_equal(got[gate_up], before[gate_up])
    assert not np.array_equal(got[down], before[down])
