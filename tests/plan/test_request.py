"""What the command line and Python may ask for, and how wrong spellings are answered: all of them, each with its
option."""

from __future__ import annotations

import pytest

from paramdelta.dtypes import BF16
from paramdelta.errors import PlanError
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.values import matcher, parse_size


def build(**options: object) -> MergeRequest:
    return MergeRequest.build(post="p", base="b", new_base="n", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("256MiB", 2**28),
        ("1.5kB", 1500),
        ("1T", 10**12),
        ("7", 7),
        (" 2 MB ", 2 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, option="--memory") == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "0", "0.5", "1e9", "5PB", "nan"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--memory: expected"):
        parse_size(text, option="--memory")


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("alpha", "much", "--alpha: expected a number or GLOB=number, got 'much'"),
        ("alpha", float("nan"), "--alpha: expected a finite number, got nan"),
        ("alphas", ["*=inf"], "--alpha: expected a finite number, got inf"),
        ("copy_from", "base", "--copy-from: expected one of error, new-base, post, got 'base'"),
        ("vocab", "shrink", "--vocab: expected one of error, extend, align, got 'shrink'"),
        ("dtype", "int8", "--dtype: expected one of bf16, f16, f32"),
        ("dtype", "f8_e4m3", "--allow-unscaled"),
        ("max_shard_size", "huge", "--max-shard-size: expected a size such as 5GB"),
        ("rename_post", ["model."], "--rename-post: expected REGEX=REPLACEMENT, got 'model.'"),
        ("rename_base", ["(=x"], "--rename-base: '(=x' is no regular expression"),
        ("rename_new_base", [("a", r"\9")], "--rename-new-base: "),
    ],
)
def test_wrong_values(option: str, value: object, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        build(**{option: value})
    assert text in str(caught.value)


def test_wrong_values_are_said_together() -> None:
    with pytest.raises(PlanError) as caught:
        build(alpha="x", vocab="y", dtype="z", max_shard_size="w", rename_post=["v"])
    assert len(caught.value.complaints) == 5
    assert caught.value.exit_code == 2


def test_alpha_spellings() -> None:
    assert [(r.glob, r.value) for r in build().alphas] == [("*", 1.0)]
    by_mapping = build(alpha={"*": 0.5, "*mlp*": 0.7}).alphas
    assert by_mapping == build(alphas=["0.5", "*mlp*=0.7"]).alphas
    assert [(r.glob, r.value) for r in by_mapping] == [("*", 0.5), ("*mlp*", 0.7)]


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("*.mlp.*", "model.layers.0.mlp.up.weight", True),
        ("model.layers.?.x", "model.layers.7.x", True),
        ("model.layers.?.x", "model.layers.17.x", False),
        ("model.layers.[0-3].*", "model.layers.2.x", True),
        ("LM_HEAD*", "lm_head.weight", False),
        ("lm_head", "lm_head.weight", False),
        ("a.b", "axb", False),
    ],
)
def test_globs(glob: str, name: str, matches: bool) -> None:
    assert matcher(["never", glob])(name) is matches


def test_no_glob_matches_nothing() -> None:
    assert not matcher([])("")


def test_a_request_survives_its_record() -> None:
    request = build(
        alphas=["0.5", "*mlp*=0.7"],
        include="*",
        exclude=["a", "b"],
        copy_from="post",
        rename_post=[r"^x\.=y."],
        vocab="extend",
        dtype=BF16,
        max_shard_size="5GB",
    )
    assert build(**request.to_dict()) == request
