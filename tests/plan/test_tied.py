"""Tied embeddings in every combination: each of the three stores a head or not, and its config says tied, untied or
nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from plan_folders import carry_out, complaint, expected, llama, plan, same, write

HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
ROLES = ("post", "base", "new_base")
SAYS = (True, False, None)


def folders_of(root: Path, heads: tuple[bool, ...], says: tuple[bool | None, ...], nested: bool = False) -> dict:
    made = {}
    for i, role in enumerate(ROLES):
        tie = {} if says[i] is None else {"tie_word_embeddings": says[i]}
        config = {"model_type": "toy", "text_config": tie} if nested else {"model_type": "toy", **tie}
        made[role] = write(root / role, llama(i, head=heads[i]), config=config)
    return made


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize(("post", "base"), list(itertools.product(SAYS, SAYS)))
def test_new_base_has_a_head(tmp_path: Path, post: bool | None, base: bool | None, nested: bool) -> None:
    """A head left out is the input embedding, unless the config says untied: then it is missing."""
    for heads in itertools.product((True, False), repeat=2):
        root = tmp_path / "".join("hn"[h] for h in heads)
        folders = folders_of(root, (*heads, True), (post, base, False), nested)
        missing = [
            r for r, stored, says in zip(ROLES, heads, (post, base), strict=False) if not stored and says is False
        ]
        if missing:
            text = complaint(folders)
            assert all(f"{role} lacks 1 tensors that new_base has:\n      {HEAD}" in text for role in missing)
            assert text.count(HEAD) == len(missing)
            continue
        made = plan(folders)
        p, b = (llama(i, head=h)[HEAD if h else EMBED] for i, h in enumerate(heads))
        want = expected(p, b, llama(2)[HEAD])
        assert same(carry_out(made, root / "out")[HEAD], want), heads
        assert made.policies["tied"] == [f"{HEAD} of {r}" for r, h in zip(ROLES, heads, strict=False) if not h]


@pytest.mark.parametrize("new", [True, None])
@pytest.mark.parametrize("post", SAYS)
def test_new_base_leaves_its_head_out(tmp_path: Path, post: bool | None, new: bool | None) -> None:
    """A head that only post has changes the meaning; one that post's config calls tied is a copy."""
    folders = folders_of(tmp_path, (True, False, False), (post, True, new))
    if post is True:
        made = plan(folders)
        assert f"{HEAD} of post (tied)" in made.policies["dropped"]
    else:
        text = complaint(folders)
        assert "new_base ties its output embedding to the input embedding" in text
        made = plan(folders, exclude=HEAD)
    merged = carry_out(made, tmp_path / "out")
    assert HEAD not in merged
    assert same(merged[EMBED], expected(*(llama(i, head=False)[EMBED] for i in range(3))))


def test_new_base_untied_without_a_head(tmp_path: Path) -> None:
    text = complaint(folders_of(tmp_path, (True, True, False), (False, False, False)))
    assert f"post has 1 tensors that new_base lacks:\n      {HEAD}" in text
    assert f"base has 1 tensors that new_base lacks:\n      {HEAD}" in text


def test_only_base_has_a_head(tmp_path: Path) -> None:
    text = complaint(folders_of(tmp_path, (False, True, False), (True, False, True)))
    assert f"base has 1 tensors that new_base lacks:\n      {HEAD}" in text
    assert "post" not in text.split(HEAD)[0].split(":")[1]


@pytest.mark.parametrize("donor", ["new-base", "post"])
def test_copy_from_does_not_untie(tmp_path: Path, donor: str) -> None:
    text = complaint(folders_of(tmp_path, (True, False, False), (False, True, True)), copy_from=donor)
    assert f"--exclude '{HEAD}'" in text


def test_alpha_of_the_head_holds_for_a_tied_post(tmp_path: Path) -> None:
    made = plan(folders_of(tmp_path, (False, True, True), (True, False, False)), alpha={HEAD: 0.5})
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[HEAD], expected(llama(0)[EMBED], llama(1)[HEAD], llama(2)[HEAD], 0.5))
    assert same(merged[EMBED], expected(*(llama(i)[EMBED] for i in range(3))))


def test_a_head_under_a_prefix(tmp_path: Path) -> None:
    tensors = [llama(i, head=i == 2, prefix="language_model.") for i in range(3)]
    folders = {role: write(tmp_path / role, t, config={}) for role, t in zip(ROLES, tensors, strict=True)}
    merged = carry_out(plan(folders), tmp_path / "out")
    head, embed = f"language_model.{HEAD}", f"language_model.{EMBED}"
    assert same(merged[head], expected(tensors[0][embed], tensors[1][embed], tensors[2][head]))


def test_two_input_embeddings_stand_for_no_head(tmp_path: Path) -> None:
    """Which of them the head would be is not known."""
    second = {"audio.embed_tokens.weight": np.zeros((2, 4), llama(0)[EMBED].dtype)}
    folders = {role: write(tmp_path / role, llama(i, head=i > 0) | second, config={}) for i, role in enumerate(ROLES)}
    assert f"post lacks 1 tensors that new_base has:\n      {HEAD}" in complaint(folders)
