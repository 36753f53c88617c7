"""Plans of merges that add several deltas: what belongs to which, what is refused, and what the record says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_folders import Tensors, carry_out, complaint, llama, plan, same, values, write
from quantised_folders import folder_of

import paramdelta
from paramdelta.errors import PlanError
from paramdelta.plan import Kind, MergeRequest
from paramdelta.plan.bridges import Piece, Slice
from paramdelta.plan.several import refined

Q = "model.layers.0.self_attn.q_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def deltas(root: Path, *pairs: tuple[Tensors, Tensors], new_base: Tensors, **options: Any) -> dict[str, Any]:
    """Write post and base of each delta, and new_base; return them as options of a merge."""
    posts = [write(root / f"post{n}", post, **options) for n, (post, _) in enumerate(pairs, 1)]
    bases = [write(root / f"base{n}", base, **options) for n, (_, base) in enumerate(pairs, 1)]
    return {"post": posts, "base": bases, "new_base": write(root / "new_base", new_base, **options)}


def two(root: Path, **options: Any) -> dict[str, Any]:
    return deltas(root, (llama(1), llama(2)), (llama(3), llama(4)), new_base=llama(5), **options)


def scales(request: MergeRequest) -> list[list[tuple[str, float]]]:
    return [[(rule.glob, rule.value) for rule in source.alphas] for source in request.sources]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[("*", 1.0)], [("*", 1.0)]]),
        ({"alpha": 0.5}, [[("*", 0.5)], [("*", 0.5)]]),
        ({"alpha": [0.5, 2]}, [[("*", 0.5)], [("*", 2.0)]]),
        ({"alpha": [{"*": 0.5, "a=b*": 0}, "x*=3"]}, [[("*", 0.5), ("a=b*", 0.0)], [("*", 1.0), ("x*", 3.0)]]),
        ({"alphas": ["1:0.5", "2:2"]}, [[("*", 0.5)], [("*", 2.0)]]),
        ({"alphas": ["0.25", "2:x*=2", "y=3"]}, [[("*", 0.25), ("y", 3.0)], [("*", 0.25), ("x*", 2.0), ("y", 3.0)]]),
        ({"alphas": ["2:x=2", "0.5"]}, [[("*", 0.5)], [("*", 0.5)]]),
        ({"alpha": [1, 2], "alphas": "2:0.5"}, [[("*", 1.0)], [("*", 0.5)]]),
    ],
)
def test_alphas_are_read_and_recorded(options: dict[str, Any], expected: list[Any]) -> None:
    folders: dict[str, Any] = {"post": ["a", "c"], "base": ["b", "d"], "new_base": "n"}
    request = MergeRequest.build(**folders, **options)
    assert scales(request) == expected
    assert MergeRequest.build(**folders, **request.to_dict()) == request


def test_one_delta_is_the_same_spelled_as_a_list() -> None:
    one = MergeRequest.build(post="p", base="b", new_base="n", alphas=["0.5", "x*=1"])
    assert MergeRequest.build(post=["p"], base=["b"], new_base="n", alphas=["1:0.5", "1:x*=1"]) == one
    assert one.to_dict()["alphas"] == ["*=0.5", "x*=1.0"]
    assert list(one.folders) == ["post", "base", "new_base"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base": ["b"]}, "there are 2 of post and 1 of base"),
        ({"post": [], "base": []}, "there are 0 of post and 0 of base"),
        ({"alpha": [1.0]}, "expected a number for each of the 2 deltas, got 1"),
        ({"alphas": ["3:0.5"]}, "3: is for delta 3, but there are 2 deltas"),
        ({"alphas": ["2:x"]}, "expected a number or GLOB=number, got 'x'"),
        ({"alpha": [1.0, float("nan")]}, "expected a finite number"),
    ],
)
def test_requests_that_do_not_add_up(options: dict[str, Any], text: str) -> None:
    folders: dict[str, Any] = {"post": ["a", "c"], "base": ["b", "d"], "new_base": "n"}
    with pytest.raises(PlanError, match=re.escape(text)):
        MergeRequest.build(**{**folders, **options})


def test_sums_are_in_the_order_given(tmp_path: Path) -> None:
    """(2⁶⁰ + 1) − 2⁶⁰ is 0 in binary64, and (2⁶⁰ − 2⁶⁰) + 1 is 1."""
    zeros = {"w": np.zeros((2, 2), np.float32)}
    large, one, less = ({"w": np.full((2, 2), x, np.float32)} for x in (2.0**60, 1.0, -(2.0**60)))
    for name, posts, sum_ in (("lost", (large, one, less), 0.0), ("kept", (large, less, one), 1.0)):
        sources = deltas(tmp_path / name, *((post, zeros) for post in posts), new_base=zeros)
        merged = carry_out(plan(sources), tmp_path / f"{name} merged")
        assert same(merged["w"], np.full((2, 2), sum_, np.float32))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_tensor_has_its_own_number_of_terms(tmp_path: Path, count: int) -> None:
    """Alphas of 0 leave gaps in every pattern; each tensor adds exactly its own."""
    rng = np.random.default_rng(count)
    names = [f"t{i:02d}" for i in range(2**count)]
    made = [{n: np.asarray(rng.integers(-8, 8, 3) / 4).astype(np.float32) for n in names} for _ in range(2 * count + 1)]
    sources = deltas(tmp_path, *zip(made[::2], made[1::2], strict=False), new_base=made[-1], shards=2)
    wanted = {n: [float(i >> k & 1) * (k + 1) / 2 for k in range(count)] for i, n in enumerate(names)}
    alpha = [{n: wanted[n][k] for n in names} for k in range(count)]
    merged = carry_out(plan(sources, alpha=alpha), tmp_path / "out")
    for n in names:
        exact = made[-1][n].astype(np.float64)
        for k in range(count):
            exact += wanted[n][k] * (made[2 * k][n].astype(np.float64) - made[2 * k + 1][n].astype(np.float64))
        assert same(merged[n], exact.astype(np.float32)), n


@pytest.mark.parametrize("rows", [(3, 5, 4, 8, 6), (5, 3, 8, 4, 4), (6, 6, 3, 5, 6), (4, 4, 6, 6, 6)])
def test_vocabularies_of_every_size(tmp_path: Path, rows: tuple[int, ...]) -> None:
    types = (np.float32, ml_dtypes.bfloat16, np.float16, np.float32, np.float32)
    tensors = [
        {EMBED: values((n, 4), i, t), "z": values((3,), i)} for i, (n, t) in enumerate(zip(rows, types, strict=True))
    ]
    sources = deltas(tmp_path, (tensors[0], tensors[1]), (tensors[2], tensors[3]), new_base=tensors[4])
    assert "delta 1: vocabulary" in complaint(sources) or "delta 2: vocabulary" in complaint(sources)
    made = plan(sources, vocab="extend", alpha=[0.5, 0.25])
    exact = np.zeros((max(rows[0], rows[2], rows[4]), 4))
    exact[: rows[4]] = tensors[4][EMBED]
    for post, base, alpha in ((tensors[0], tensors[1], 0.5), (tensors[2], tensors[3], 0.25)):
        delta = np.zeros_like(exact)
        delta[: len(post[EMBED])] = post[EMBED]
        both = min(len(base[EMBED]), len(exact))
        delta[:both] -= base[EMBED][:both]
        delta[len(post[EMBED]) :] = 0
        exact += alpha * delta
    assert same(carry_out(made, tmp_path / "out")[EMBED], exact.astype(np.float32))
    assert made.pairing.extended == [EMBED]
    assert paramdelta.verify(tmp_path / "out", **sources, everything=True).problems == ()


def test_what_one_delta_lacks(tmp_path: Path) -> None:
    lacking = {n: t for n, t in llama(3).items() if n != Q}
    sources = deltas(tmp_path, (llama(1), llama(2)), (lacking, llama(4)), new_base=llama(5))
    text = complaint(sources)
    assert f"{tmp_path / 'post2'}" in text
    assert "delta 2: " in text
    assert "delta 1: " not in text
    for copy_from in ("new-base", "post"):
        made = plan(sources, copy_from=copy_from)
        assert made.policies["unpaired"] == [f"{Q} of delta 2"]
        merged = carry_out(made, tmp_path / copy_from)
        wide = [t[Q].astype(np.float64) for t in (llama(5), llama(1), llama(2))]
        assert same(merged[Q], (wide[0] + wide[1] - wide[2]).astype(ml_dtypes.bfloat16))


def test_what_the_first_delta_lacks(tmp_path: Path) -> None:
    """The others are added; post cannot take the place of what they add to."""
    lacking = {n: t for n, t in llama(2).items() if n != Q}
    sources = deltas(tmp_path, (llama(1), lacking), (llama(3), llama(4)), new_base=llama(5))
    made = plan(sources, copy_from="new-base")
    assert made.policies["unpaired"] == [f"{Q} of delta 1"]
    i = made.pairing.names.index(Q)
    assert made.pairing.kinds[i] == Kind.MERGED
    assert [delta.number for delta in made.pairing.deltas(i)] == [1]
    wide = [t[Q].astype(np.float64) for t in (llama(5), llama(3), llama(4))]
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[Q], (wide[0] + wide[1] - wide[2]).astype(ml_dtypes.bfloat16))
    assert "post would take the place of 1 tensors to which other deltas add" in complaint(sources, copy_from="post")


def test_options_are_for_every_delta(tmp_path: Path) -> None:
    """A rename may be about one of the posts alone; a glob, about one delta's alpha."""
    other = {n.replace("model.", "language_model."): t for n, t in llama(3).items()}
    sources = deltas(tmp_path, (llama(1), llama(2)), (other, llama(4)), new_base=llama(5))
    made = plan(sources, rename_post=r"^language_model\.=model.", exclude="*norm*", alphas=["2:*q_proj*=0"])
    counts = dict(zip(made.pairing.names, (len(made.pairing.deltas(i)) for i in range(len(made.names))), strict=True))
    assert counts["model.norm.weight"] == 0
    assert counts[Q] == 1
    assert counts[HEAD] == 2
    assert "'nothing' matches no tensor of post" in complaint(sources, rename_post="nothing=x")
    assert "'nothing' matches no tensor" in complaint(two(tmp_path / "two"), alphas=["2:nothing=1"])


def test_the_record_names_every_delta(tmp_path: Path) -> None:
    sources = two(tmp_path, files={"LICENSE": "x", "tokenizer.json": "{}"})
    (sources["post"][1] / "LICENSE").write_text("y")
    (sources["post"][1] / "tokenizer.json").write_text("[]")
    made = plan(sources, alphas=["1:0.5", "2:*mlp*=0.25"])
    files = {f.name: f for f in made.side_files}
    record = json.loads(files["paramdelta.json"].data or b"")
    assert list(record["inputs"]) == ["post", "base", "new_base", "post_2", "base_2"]
    assert record["inputs"]["post_2"]["name"] == "post2"
    assert record["formula"] == "new_base + alpha * (post - base) + alpha_2 * (post_2 - base_2)"
    assert record["request"]["alphas"] == ["1:*=0.5", "2:*=1.0", "2:*mlp*=0.25"]
    assert MergeRequest.build(**sources, **record["request"]) == made.request
    assert files["tokenizer.json"].origin == "post"
    assert files["LICENSE.post_2"].source == sources["post"][1] / "LICENSE"
    card = (files["README.md"].data or b"").decode()
    assert "- `alpha · (post2 − base2)` with alpha = 1, 0.25 for `*mlp*`" in card
    assert "are those of post1" in card


def test_every_folder_is_opened_and_kept_apart(tmp_path: Path) -> None:
    sources = two(tmp_path)
    assert "is post_2 itself" in complaint({**sources, "out": sources["post"][1]})
    (sources["base"][1] / "config.json").write_text("[]")
    assert str(sources["base"][1] / "config.json") in complaint(sources)


def test_other_structures_are_told(tmp_path: Path) -> None:
    sources = two(tmp_path)
    config = {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 7.0}
    (sources["post"][1] / "config.json").write_text(json.dumps(config))
    (warning,) = [w for w in plan(sources).warnings if "rope_theta" in w]
    assert warning.startswith("delta 2: ")


def _piece(*out: int, transposed: bool = False, row: int = 10) -> Piece:
    first, step, rows = out
    return Piece(*(Slice(r, 0, first, step, rows, 6, transposed) for r in (0, row, row + 1)))  # type: ignore[arg-type]


def test_cuts_are_refined() -> None:
    """Halves against alternating rows: quarters, each from one place in either."""
    halves = [_piece(0, 1, 4), _piece(4, 1, 4)]
    turns = [_piece(0, 2, 4, row=20), _piece(1, 2, 4, row=20)]
    cut = refined([halves, turns])
    assert cut is not None
    for pieces, row in zip(cut, (10, 20), strict=True):
        assert [(p.out.first, p.out.step, p.out.rows) for p in pieces] == [(0, 2, 2), (1, 2, 2), (4, 2, 2), (5, 2, 2)]
        assert [(p.post.first, p.post.step, p.post.rows) for p in pieces] == [
            (0, 2, 2),
            (1, 2, 2),
            (4, 2, 2),
            (5, 2, 2),
        ]
        assert {p.post.row for p in pieces} == {row}
    assert refined([halves, [_piece(0, 1, 8, transposed=True)]]) is None


def test_a_vocabulary_that_one_delta_extends_and_another_quantises(tmp_path: Path) -> None:
    """Each delta alone could be added; rows of what shares scales cannot be."""
    norm: dict[str, Any] = {"model.norm.weight": ("BF16", (8,))}
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    heads: dict[str, dict[str, Any]] = {
        "quantised": {HEAD: ("F8_E4M3", (64, 256)), f"{HEAD}_scale_inv": ("F32", (1, 2))},
        "longer": {HEAD: ("BF16", (96, 256))},
        "new_base": {HEAD: ("BF16", (64, 256))},
    }
    for name, head in heads.items():
        (tmp_path / name).mkdir()
        whole: dict[str, Any] = {"model_type": "toy", "tie_word_embeddings": False}
        folder_of(tmp_path / name, norm | head, whole | ({"quantization_config": config} if len(head) > 1 else {}))
    quantised, longer, new_base = (tmp_path / name for name in heads)
    for folder in (quantised, longer):
        assert plan({"post": folder, "base": folder, "new_base": new_base}, vocab="extend").names
    for pair in ([quantised, longer], [longer, quantised]):
        text = complaint({"post": pair, "base": pair, "new_base": new_base}, vocab="extend")  # type: ignore[dict-item]
        assert "rows of quantised tensors cannot be added one by one" in text
        assert HEAD in text
