"""Several deltas added to quantised checkpoints, each stored in its own way, bit for bit against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bridged_folders import Key, blocks, expert_name, read, singles, stacks, store, weights
from families_low_bit import ALL
from quantised_merges import Case, Folders
from quantised_merges import read as read_tensors

import paramdelta
from paramdelta import reference_scaled as scaled
from paramdelta.reference_scaled import Scaled, ScaledTerm

ALPHAS = (0.5, -1.25)
ROLES = {"p1": "separate", "b1": "separate", "p2": "separate fp8", "b2": "separate fp8", "n": "separate"}


def merged(root: Path, pairs: list[tuple[str, str]], new_base: str, inner: int = 96) -> tuple[dict[str, Any], Any]:
    """Store post and base of each delta, and new_base, each in a structure; return the folders and the exact sums."""
    posts, bases, terms = [], [], []
    for n, how in enumerate(pairs):
        held = []
        for side, (folders, structure) in enumerate(zip((posts, bases), how, strict=True)):
            folders.append(root / f"{side}{n}")
            held.append(store(folders[-1], weights(2 * n + side, inner), structure))
        terms.append(held)
    start = store(root / "new_base", weights(99, inner), new_base)
    acc = {
        key: scaled.accumulate(value, [ScaledTerm(p[key], b[key], a) for (p, b), a in zip(terms, ALPHAS, strict=True)])[
            0
        ]
        for key, value in start.items()
    }
    return {"post": posts, "base": bases, "new_base": root / "new_base"}, acc


def tensors_of(acc: dict[Key, Any], how: str) -> dict[str, Any]:
    if how == "blocks":
        made, _ = blocks(acc)
    elif how.startswith("separate"):
        made, _ = singles(acc, expert_name, how.endswith("fp8"))
    else:
        made = stacks(acc, how)
    return {n: np.ascontiguousarray(t).view(np.uint8).reshape(*t.shape, -1) for n, t in made.items()}


@pytest.mark.parametrize("new_base", ["separate", "separate fp8", "straight", "transposed"])
@pytest.mark.parametrize(
    "pairs",
    [
        [("straight", "straight"), ("separate", "separate")],
        [("separate fp8", "separate"), ("straight", "transposed")],
        [("transposed", "separate fp8"), ("separate", "straight")],
        [("transposed", "transposed"), ("straight", "straight")],
    ],
    ids=lambda pairs: " and ".join("/".join(pair) for pair in pairs),
)
def test_structures_mix(pairs: list[tuple[str, str]], new_base: str, tmp_path: Path) -> None:
    sources, acc = merged(tmp_path, pairs, new_base)
    out = tmp_path / "out"
    paramdelta.merge(**sources, out=out, alpha=list(ALPHAS), scale_policy="recompute")
    got, wanted = read(out), tensors_of(acc, new_base)
    assert got.keys() == {*wanted, "model.norm.weight"}
    for name, data in wanted.items():
        assert np.array_equal(got[name], data), name
    assert paramdelta.verify(out, **sources, everything=True).problems == ()


@pytest.mark.parametrize("pairs", [[("gpt-oss", "blocks"), ("blocks", "blocks")], [("blocks", "gpt-oss")] * 2])
def test_blocks_mix(pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    """Packed experts of which one delta says how gate and up alternate, and another lies transposed."""
    sources, acc = merged(tmp_path, pairs, "blocks", inner=128)
    paramdelta.merge(**sources, out=tmp_path / "out", alpha=list(ALPHAS), scale_policy="recompute")
    got = read(tmp_path / "out")
    for name, data in tensors_of(acc, "blocks").items():
        assert np.array_equal(got[name], data), name
    assert paramdelta.verify(tmp_path / "out", **sources, everything=True).problems == ()


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_every_family(case: Case, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """The same difference twice, with two alphas, is what the reference makes of two terms; two of 0 are none."""
    folders = folders_of(case)
    twice = {"post": [folders.post] * 2, "base": [folders.base] * 2, "new_base": folders.new_base}
    options = {k: v for k, v in case.options.items() if k != "alpha"}
    paramdelta.merge(**twice, out=tmp_path / "mixed", alpha=[0.75, -0.5], **options)
    assert paramdelta.verify(tmp_path / "mixed", **twice, everything=True).problems == ()
    before = read_tensors(folders.new_base)
    assert any(before.get(name) != tensor for name, tensor in read_tensors(tmp_path / "mixed").items())
    paramdelta.merge(**twice, out=tmp_path / "none", alpha=[0, 0], **options)
    paramdelta.merge(**folders.sources(), out=tmp_path / "zero", alpha=0, **options)
    assert read_tensors(tmp_path / "none") == read_tensors(tmp_path / "zero")


def test_one_delta_plain_another_quantised(tmp_path: Path) -> None:
    """A plain delta and new_base, and one of fp8: the output is plain, and both are added."""
    held = {role: store(tmp_path / role, weights(n), how) for n, (role, how) in enumerate(ROLES.items())}
    sources = {
        "post": [tmp_path / "p1", tmp_path / "p2"],
        "base": [tmp_path / "b1", tmp_path / "b2"],
        "new_base": tmp_path / "n",
    }
    paramdelta.merge(**sources, out=tmp_path / "out", alpha=list(ALPHAS))
    got = read(tmp_path / "out")

    def term(n: int, key: Key) -> ScaledTerm:
        post: Scaled = held[f"p{n}"][key]
        return ScaledTerm(post, held[f"b{n}"][key], ALPHAS[n - 1])

    acc = {key: scaled.accumulate(new, [term(1, key), term(2, key)])[0] for key, new in held["n"].items()}
    for name, data in tensors_of(acc, "separate").items():
        assert np.array_equal(got[name], data), name
