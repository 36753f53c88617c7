"""What a merge must be by the formula alone: nothing where nothing changes, post where new_base is base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families_low_bit import ALL
from quantised_merges import Case, Folders, check_same, decoded, expected, operands, places, read, store

import paramdelta
from paramdelta import reference_scaled as scaled
from paramdelta.checkpoint import open_checkpoint, recognise

FoldersOf = Callable[[Case], Folders]
# Merges that store their output as new_base is stored, and those of one layout among them.
KEPT = {name: case for name, case in ALL.items() if not case.converts}
UNIFORM = {name: case for name, case in KEPT.items() if case.post is case.base is case.new_base}


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_no_difference(case: Case, folders_of: FoldersOf, tmp_path: Path) -> None:
    """post == base: new_base's tensors byte for byte, and merged into that once more, its very files."""
    folders, first, second = folders_of(case), tmp_path / "first", tmp_path / "second"
    paramdelta.merge(
        post=folders.post,
        base=folders.post,
        new_base=folders.new_base,
        out=first,
        activation_scales="new-base",
        **case.options,
    )
    check_same(read(first), read(folders.new_base))
    assert places(first) == places(folders.new_base)
    paramdelta.merge(
        post=folders.base, base=folders.base, new_base=first, out=second, activation_scales="new-base", **case.options
    )
    for path in (first / "config.json", *first.glob("*.safetensors*")):
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_alpha_of_zero(case: Case, policy: str, folders_of: FoldersOf, tmp_path: Path) -> None:
    """A term with alpha = 0 is no term: new_base's tensors are copied."""
    folders = folders_of(case)
    paramdelta.merge(
        **folders.sources(), out=tmp_path / "out", alpha=0, scale_policy=policy, activation_scales="new-base"
    )
    check_same(read(tmp_path / "out"), read(folders.new_base))


def test_alpha_of_zero_where_new_base_has_zero_points(folders_of: FoldersOf, tmp_path: Path) -> None:
    case = ALL["compressed-int4-asymmetric"]
    folders = folders_of(case)
    paramdelta.merge(**folders.sources(), out=tmp_path / "out", alpha=0)
    without = Case.of(case.new_base, alpha=0.0)
    check_same(read(tmp_path / "out"), expected(without, folders, "keep"))


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_post_where_base_is_new_base(case: Case, folders_of: FoldersOf, tmp_path: Path) -> None:
    """base == new_base: post's values, quantised once as new_base is. The sums are exact but for values that are 2⁵³
    times smaller than new_base's; the sign of a zero is new_base's or +."""
    folders = folders_of(case)
    sources = {"post": folders.post, "base": folders.new_base, "new_base": folders.new_base}
    paramdelta.merge(**sources, out=tmp_path / "out", scale_policy="recompute")
    stored = operands(case, folders)
    values, inexact = {}, 0
    for name, (shape, _) in case.new_base.weights.items():
        post, new = ([scaled.decode(m) for m in stored[role][name].matrices] for role in ("post", "new_base"))
        wanted = np.stack([np.where(p == n, n, p + 0.0) for p, n in zip(post, new, strict=True)])
        sums = np.stack([n + (p - n) for p, n in zip(post, new, strict=True)])
        inexact += int((sums != wanted).sum())
        values[name] = wanted.reshape(shape)
    assert inexact == 0
    layout = case.new_base
    want = store(layout, values, "new_base")
    post_tensors, new_tensors = read(folders.post), read(folders.new_base)
    want |= {n: post_tensors[n] for n in layout.statistics} | {n: new_tensors[n] for n in layout.integers}
    # An element that nothing touched is new_base's own bits, which plain tensors show: the zeros above keep their sign.
    check_same(read(tmp_path / "out"), want)


@pytest.mark.parametrize("case", UNIFORM.values(), ids=UNIFORM)
def test_what_quantising_again_reproduces(case: Case, folders_of: FoldersOf, tmp_path: Path) -> None:
    """post merged onto its own base: values that a family's quantiser reproduces, it reproduces; scales that follow
    from a maximum that is the largest code, too."""
    folders = folders_of(case)
    sources = {"post": folders.post, "base": folders.base, "new_base": folders.base}
    paramdelta.merge(**sources, out=tmp_path / "out", scale_policy="recompute")
    found, post = read(tmp_path / "out"), read(folders.post)
    values, wanted = decoded(case, found), decoded(case, post)
    for name, (_, form) in case.new_base.weights.items():
        if form.stable:
            assert np.array_equal(values[name], wanted[name]), name
        if form.recipe and form.stable == "codes":
            scale = form.names(name)["scale"]
            assert found[scale] == post[scale], name


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_the_output_is_recognised_as_new_base_is(case: Case, folders_of: FoldersOf, tmp_path: Path) -> None:
    """Opened again, the folder has new_base's formats, statistics and method."""
    folders = folders_of(case)
    paramdelta.merge(**folders.sources(), out=tmp_path / "out", **case.options)
    seen = []
    for folder in (tmp_path / "out", folders.new_base):
        checkpoint = open_checkpoint(folder, role="new_base")
        found, complaints = recognise(checkpoint)
        assert complaints == []
        statistics = sorted(checkpoint.tensors.names[row] for row in found.statistics)
        formats = {name: (weight.shape, weight.format) for name, weight in found.weights.items()}
        seen.append((formats, statistics, found.method, found.ignored, found.dynamic, found.config))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == sum(bool(form.recipe) for _, form in case.new_base.weights.values())
    assert seen[0][1] == sorted(case.new_base.statistics)
