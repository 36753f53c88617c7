"""``--vocab align``: the row of every token, looked up by its text; the tokenizers and the merges are real ones."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_folders import read, same, write
from safetensors.numpy import load_file
from vocabulary_folders import (
    EMBED,
    HEAD,
    Sources,
    folder_options,
    reordered,
    sources,
    three_tokenizers,
    trained,
    unigram,
    variant,
)

import paramdelta
from paramdelta.errors import InputError
from paramdelta.plan import make_plan, make_request, open_all

TABLES = (EMBED, HEAD, "lm_head.bias")


def check(
    made: Sources, out: Path, role: str, alpha: tuple[float, ...] = (1.0,), names: tuple[str, ...] = TABLES
) -> None:
    """Look at the row of every token of the output's tokenizer, in every table."""
    merged = read(out)
    for name in names:
        assert len(merged[name]) == len(made.tensors[role][name])
        wrong = [
            text
            for text, number in made.ids(role).items()
            if not same(merged[name][number], made.expected(name, text, alpha))
        ]
        assert wrong == [], f"{name}: {len(wrong)} tokens"


def merge(made: Sources, out: Path, **options: Any) -> Any:
    return paramdelta.merge(**folder_options(made), out=out, vocab="align", threads=1, **options)


def verified(made: Sources, out: Path) -> None:
    """Verify a folder against its sources, all elements."""
    report = paramdelta.verify(out, **folder_options(made), everything=True)
    assert report.problems == ()
    assert report.fraction == 1.0


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("role", ["post", "new_base"])
def test_every_token_has_its_row(tmp_path: Path, role: str, tied: bool, alpha: float) -> None:
    pads = {"post": 16, "base": 1, "new_base": 64}
    made = sources(tmp_path, three_tokenizers(), pads=pads, tied=tied, shards=2)
    report = merge(made, tmp_path / "out", alpha=alpha, tokenizer=role.replace("_", "-"))
    check(made, tmp_path / "out", role, (alpha,), TABLES[:1] if tied else TABLES)
    verified(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(made.tensors[role][EMBED])
    assert filecmp.cmp(tmp_path / "out" / "tokenizer.json", made.folders[role] / "tokenizer.json", shallow=False)
    assert report.policies["vocabulary"]["tokenizer"] == role


def test_a_wrong_row_is_found_by_verify(tmp_path: Path) -> None:
    made = sources(tmp_path, three_tokenizers())
    merge(made, tmp_path / "out", checksums=False)
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    at = bytes(data).index(np.ascontiguousarray(load_file(path)[EMBED][7]).tobytes())
    data[at : at + 48], data[at + 48 : at + 96] = data[at + 48 : at + 96], data[at : at + 48]
    path.write_bytes(data)
    (problem,) = paramdelta.verify(tmp_path / "out", **folder_options(made), everything=True).problems
    assert "embed_tokens.weight" in problem


def test_what_is_told(tmp_path: Path) -> None:
    made = sources(tmp_path, three_tokenizers())
    found = merge(made, tmp_path / "out").policies["vocabulary"]
    post, base, new = (made.ids(role) for role in ("post", "base", "new_base"))
    (delta,) = found["deltas"]
    everywhere = {t for t in post if t in base and t in new}
    assert found["tokens"] == len(post)
    assert delta["in_all"] == len(everywhere)
    assert delta["moved"] == sum(len({post[t], base[t], new[t]}) > 1 for t in everywhere)
    assert set(delta["only_in_post"]["tokens"]) == {t for t in post if t not in base and t not in new}
    assert set(delta["not_in_base"]["tokens"]) == {t for t in post if t not in base and t in new}
    assert set(delta["not_in_new_base"]["tokens"]) == {t for t in post if t in base and t not in new}
    assert delta["not_in_post"]["count"] == 0
    assert "<|both|>" in delta["not_in_base"]["tokens"]
    assert "<|user|>" in delta["not_in_new_base"]["tokens"]
    assert "<|only post|>" in delta["only_in_post"]["tokens"]
    assert set(found["left_out"]["new_base"]["tokens"]) == {t for t in new if t not in post}
    assert found["tensors"] == dict.fromkeys(sorted(TABLES), len(made.tensors["post"][EMBED]))
    recorded = json.loads((tmp_path / "out" / "paramdelta.json").read_text())
    assert recorded["policies"]["vocabulary"] == found
    assert (recorded["request"]["vocab"], recorded["request"]["tokenizer"]) == ("align", "post")


@pytest.mark.parametrize("pads", [{}, {"post": 64, "base": 16, "new_base": 8}], ids=["alike", "padded"])
def test_equal_tokenizers_are_an_ordinary_merge(tmp_path: Path, pads: dict[str, int]) -> None:
    made = sources(tmp_path, dict.fromkeys(("post", "base", "new_base"), trained()), pads=pads)
    merge(made, tmp_path / "aligned", tokenizer="post")
    other: dict[str, Any] = {"vocab": "extend"} if pads else {}
    paramdelta.merge(**folder_options(made), out=tmp_path / "plain", **other)
    names = [p.name for p in (tmp_path / "plain").iterdir() if p.name != "paramdelta.json"]
    assert filecmp.cmpfiles(tmp_path / "plain", tmp_path / "aligned", names, shallow=False) == (names, [], [])
    if not pads:
        request = make_request(**folder_options(made), vocab="align")
        assert make_plan(request, *open_all(request)).pairing.gathers == {}


def test_rows_without_a_token_are_paired_by_number(tmp_path: Path) -> None:
    made = sources(tmp_path, three_tokenizers(), pads={"post": 128, "base": 128, "new_base": 128})
    merge(made, tmp_path / "out")
    merged, tensors = read(tmp_path / "out")[EMBED], {r: t[EMBED] for r, t in made.tensors.items()}
    ends = {role: max(made.ids(role).values()) + 1 for role in tensors}
    assert {len(t) for t in tensors.values()} == {384}
    for number in range(max(ends.values()), 384):  # in none of the three a token
        p, b, n = (tensors[role][number].astype(np.float64) for role in ("post", "base", "new_base"))
        assert same(merged[number], np.asarray(n + (p - b)).astype(merged.dtype))


def test_types_differ_and_bases_stand_in(tmp_path: Path) -> None:
    dtypes = {"base": np.float32}  # where base lacks a token, new_base's row is read by new_base's type
    made = sources(tmp_path, three_tokenizers(), dtypes=dtypes)
    merge(made, tmp_path / "out", alpha=0.3)
    check(made, tmp_path / "out", "post", (0.3,))
    verified(made, tmp_path / "out")


def test_several_deltas_with_tokenizers_of_their_own(tmp_path: Path) -> None:
    first, other = three_tokenizers(), trained(300)
    by_role = {**first, "post_2": variant(other, seed=8, added=("<|maths|>", "<|both|>")), "base_2": other}
    made = sources(tmp_path, by_role)
    merge(made, tmp_path / "out", alpha=[0.8, 0.5], tokenizer="new-base")
    check(made, tmp_path / "out", "new_base", (0.8, 0.5))
    merge(made, tmp_path / "by post", alpha=[0.8, 0.5])
    check(made, tmp_path / "by post", "post", (0.8, 0.5))
    verified(made, tmp_path / "by post")
    assert len(json.loads((tmp_path / "out" / "paramdelta.json").read_text())["policies"]["vocabulary"]["deltas"]) == 2


@pytest.mark.parametrize("options", [{"alpha": 0}, {"exclude": ["*embed*", "lm_head*"]}], ids=["alpha 0", "excluded"])
def test_without_a_delta_rows_still_follow_the_tokenizer(tmp_path: Path, options: dict[str, Any]) -> None:
    made = sources(tmp_path, three_tokenizers())
    report = merge(made, tmp_path / "out", **options)
    merged, new, ids = read(tmp_path / "out"), made.tensors["new_base"], made.ids("new_base")
    lacking = [text for text in made.ids("post") if text not in ids]
    for name in TABLES:
        for text, number in made.ids("post").items():
            row = new[name][ids[text]] if text in ids else np.zeros_like(new[name][0])
            assert same(merged[name][number], row)
    assert any(f"{len(lacking)} tokens that new_base lacks get rows of zeros" in text for text in report.warnings)
    verified(made, tmp_path / "out")
    assert report.policies["tensors"]["merged"] == (1 if "exclude" in options else 4)


def test_a_head_for_fewer_tokens(tmp_path: Path) -> None:
    """Where a table has fewer rows than there are tokens, those beyond are lacking in it, and in it alone."""
    made = sources(tmp_path, three_tokenizers(), tied=True)
    short = {role: {**t, HEAD: t[EMBED][:-2].copy()} for role, t in made.tensors.items()}
    for role, tensors in short.items():
        config = {"model_type": "llama", "vocab_size": len(tensors[EMBED]), "tie_word_embeddings": False}
        files = {"tokenizer.json": json.dumps(made.tokenizers[role])}
        made.folders[role] = write(tmp_path / "short" / role, tensors, config=config, files=files)
    made.tensors = short
    report = merge(made, tmp_path / "out")
    merged = read(tmp_path / "out")
    check(made, tmp_path / "out", "post", names=(EMBED,))
    last = max(made.ids("post").values())
    for text, number in made.ids("post").items():
        if number < last - 1:
            assert same(merged[HEAD][number], made.expected(HEAD, text))
    assert any("none for 2 tokens of post's tokenizer" in text for text in report.warnings)


def test_a_square_matrix_is_no_vocabulary(tmp_path: Path) -> None:
    """A tensor with as many rows as tokens is one only where its config has no other size like that."""
    by_role = dict(zip(("post", "base", "new_base"), [variant(trained(), seed=s) for s in (1, 2, 3)], strict=True))
    extra = {"model.table": (-1, 3), "model.layers.0.mlp.up_proj.weight": (-1, 3)}
    made = sources(tmp_path, by_role, extra=extra)
    found = merge(made, tmp_path / "out").policies["vocabulary"]["tensors"]
    assert sorted(found) == sorted([*TABLES, *extra])
    rows = len(made.tensors["post"][EMBED])
    configs = {role: {"intermediate_size": rows} for role in by_role}
    made = sources(tmp_path / "2", by_role, extra=extra, configs=configs)
    found = merge(made, tmp_path / "2" / "out").policies["vocabulary"]["tensors"]
    assert sorted(found) == sorted(TABLES)


def test_words_without_bytes(tmp_path: Path) -> None:
    """Tokenizers of another kind: Unigram with ▁ for a space, as SentencePiece has it."""
    first = unigram()
    by_role = {role: reordered(first, seed) for seed, role in enumerate(("post", "base", "new_base"))}
    made = sources(tmp_path, by_role)
    report = merge(made, tmp_path / "out")
    found = report.policies["vocabulary"]
    assert found["alphabets"]["post"] == "Unigram, ▁ for a space"
    assert found["deltas"][0]["moved"] > len(made.ids("post")) // 2
    check(made, tmp_path / "out", "post")
    assert report.warnings == tuple(text for text in report.warnings if "sample" in text)


def test_other_normalisers_and_spellings_are_told(tmp_path: Path) -> None:
    by_role = {role: dict(t) for role, t in three_tokenizers().items()}
    by_role["base"]["normalizer"] = {"type": "Lowercase"}
    by_role["new_base"]["model"] = {**by_role["new_base"]["model"], "byte_fallback": True}
    made = sources(tmp_path, by_role)
    config = {"added_tokens_decoder": {"900": {"content": "<|late|>"}, "0": {"content": "<s>"}}}
    (made.folders["base"] / "tokenizer_config.json").write_text(json.dumps(config))
    text = "\n".join(merge(made, tmp_path / "out").warnings)
    assert "the tokenizers of base and post normalise text differently" in text
    assert "new_base: BPE, bytes as letters, Ġ for a space, bytes as <0xNN>; post: BPE, bytes as letters" in text
    assert "base: tokenizer_config.json adds 1 tokens that tokenizer.json lacks" in text
    check(made, tmp_path / "out", "post")


def test_tokenizers_that_share_little_are_refused(tmp_path: Path) -> None:
    metaspace = trained(260, text=["anything else entirely"])
    metaspace["model"]["vocab"] = {"▁" + t: i for i, t in enumerate(metaspace["model"]["vocab"])}
    metaspace["model"]["merges"], metaspace["added_tokens"] = [], []
    metaspace["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    metaspace["decoder"] = metaspace["pre_tokenizer"]
    made = sources(tmp_path, {**three_tokenizers(), "base": metaspace})
    with pytest.raises(InputError) as caught:
        merge(made, tmp_path / "out")
    text = str(caught.value)
    assert "only 0 of 260 tokens of base are among" in text
    assert "▁ for a space, against BPE, bytes as letters, Ġ for a space" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.unlink(), "save_pretrained"),
        (lambda path: path.write_text("{}"), "is no tokenizer that the tokenizers library reads"),
        (lambda path: path.write_bytes(b"\xff"), "is no tokenizer that the tokenizers library reads"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
        (
            lambda path: path.write_text(
                '{"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}'
            ),
            "has a token with the id 4,294,967,295; the most allowed is 16,777,215",
        ),
    ],
    ids=["missing", "empty", "no text", "folder", "large id"],
)
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, spoil: Any, text: str) -> None:
    made = sources(tmp_path, three_tokenizers())
    spoil(made.folders["base"] / "tokenizer.json")
    spoil(made.folders["post"] / "tokenizer.json")
    with pytest.raises(InputError) as caught:
        merge(made, tmp_path / "out")
    assert len(caught.value.complaints) == 2, "both files are complained about"
    assert text in str(caught.value)
    assert str(made.folders["base"] / "tokenizer.json") in str(caught.value)


def test_a_tokenizer_is_chosen_only_where_rows_are_aligned(tmp_path: Path) -> None:
    made = sources(tmp_path, three_tokenizers())
    with pytest.raises(InputError, match="--vocab align pairs rows by token"):
        paramdelta.merge(**folder_options(made), out=tmp_path / "out", tokenizer="post")
    with pytest.raises(InputError, match="expected one of post, new-base"):
        merge(made, tmp_path / "out", tokenizer="base")


def test_copied_rows_of_other_tokens_are_refused(tmp_path: Path) -> None:
    made = sources(tmp_path, three_tokenizers())
    tensors = dict(made.tensors["new_base"])
    del tensors["lm_head.bias"]
    files = {"tokenizer.json": json.dumps(made.tokenizers["new_base"])}
    made.folders["new_base"] = write(tmp_path / "without", tensors, files=files)
    with pytest.raises(InputError, match="would copy rows in the order of post's tokens"):
        merge(made, tmp_path / "out", copy_from="post", tokenizer="new-base")
    merge(made, tmp_path / "out", copy_from="post")
    assert same(read(tmp_path / "out")["lm_head.bias"], made.tensors["post"]["lm_head.bias"])
