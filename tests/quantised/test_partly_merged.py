"""Merges that leave some weights as they are: what shares a scale with a merged weight changes with it, and what does
not keeps its codes, also where the output has another format of the same layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import families_fp8 as fp8
import families_low_bit as low
import numpy as np
import pytest
from quantised_merges import Case, Folders, check_same, expected, make_folders, read

import paramdelta

FoldersOf = Callable[[Case], Folders]
ALPHA = 100.0  # large enough for the maximum of each group to move
# What is left out: a weight of it, and whether its scales change nevertheless.
LEFT = {
    "*.q_proj.*": ("self_attn.q", True),
    "*.self_attn.*": ("self_attn.q", False),
    "*.gate_proj.*": ("mlp.gate", True),
    "*.o_proj.*": ("self_attn.o", False),
}


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("case", [low.CASES["modelopt-nvfp4"], low.CASES["compressed-nvfp4"]], ids=["modelopt", "ct"])
def test_a_weight_left_out_of_a_group(
    case: Case, left: str, policy: str, folders_of: FoldersOf, tmp_path: Path
) -> None:
    """q, k and v, and gate and up, have one second scale also where one of them is excluded: it is requantised by
    the group's new scale. Where all of a group is excluded, new_base's bytes are copied."""
    folders, out = folders_of(case), tmp_path / "out"
    options = {"alpha": ALPHA, "exclude": left}
    paramdelta.merge(**folders.sources(), out=out, scale_policy=policy, **options)
    found, new_base = read(out), read(folders.new_base)
    form = case.new_base.weights["model.layers.0.self_attn.q_proj.weight"][1]
    for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
        seconds = {found[form.names(f"model.layers.0.{part}_proj.weight")["second"]].data for part in group}
        assert len(seconds) == 1
    assert paramdelta.verify(out, **folders.sources(), everything=True).problems == ()
    weight, changes = LEFT[left]
    for part in form.names(f"model.layers.0.{weight}_proj.weight").values():
        assert (found[part] != new_base[part]) is changes
    if not changes and policy == "recompute":  # copies are copies by either policy; the oracle recomputes everything
        return
    check_same(found, expected(replace(case, options=options), folders, policy))


def test_another_format_of_the_same_layout(folders_of: FoldersOf, tmp_path: Path) -> None:
    """FBGEMM's rows written as compressed-tensors' rows of the same scales: an excluded weight keeps codes and
    scales, which either quantiser would make otherwise."""
    folders, out = folders_of(fp8.CASES["llama-405b-fbgemm"]), tmp_path / "out"
    paramdelta.merge(**folders.sources(), out=out, format="fp8-channel", scale_type="f32", exclude="*up_proj*")
    found, new_base = read(out), read(folders.new_base)
    for part in ("weight", "weight_scale"):
        name = f"model.layers.1.mlp.up_proj.{part}"
        assert found[name] == new_base[name]
    assert paramdelta.verify(out, **folders.sources(), everything=True).problems == ()


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "tensors"])
def test_weights_that_only_post_has(whole: bool, tmp_path: Path) -> None:
    """Taken from post and written in another format of the same layout, they keep post's codes and scales."""
    layout = fp8.CASES["modelopt-fp8" if whole else "llama-405b-fbgemm"].post
    name = next(n for n, (_, form) in layout.weights.items() if form.recipe and "gate_proj" in n)
    less = replace(
        layout,
        weights={n: v for n, v in layout.weights.items() if n != name},
        statistics={n: v for n, v in layout.statistics.items() if not n.startswith(name.removesuffix("weight"))},
    )
    folders = make_folders(tmp_path, Case(post=layout, base=less, new_base=less))
    out = tmp_path / "out"
    paramdelta.merge(
        **folders.sources(),
        out=out,
        copy_from="post",
        format="fp8-tensor" if whole else "fp8-channel",
        scale_type="f32",
        activation_scales="drop",
    )
    found, post = read(out), read(folders.post)
    scale = name.removesuffix("weight") + "weight_scale"
    assert found[name] == post[name]
    assert np.array_equal(*(np.frombuffer(t[scale].data, np.float32) for t in (found, post)))
    assert paramdelta.verify(out, **folders.sources(), everything=True).problems == ()
