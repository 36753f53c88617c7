"""Which tensors are merged, copied or refused: every policy on small folders, its result carried out in NumPy, and
every refusal checked for the names it lists and the option it offers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from plan_folders import carry_out, complaint, expected, llama, plan, read, same, three, values, write

from paramdelta.errors import PlanError

HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"


def test_all_paired(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    merged = carry_out(plan(three(tmp_path, post, base, new)), tmp_path / "out")
    assert merged.keys() == new.keys()
    for name, got in merged.items():
        assert same(got, expected(post[name], base[name], new[name])), name


def test_shards_differ(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    folders = {
        "post": write(tmp_path / "post", post, shards=3),
        "base": write(tmp_path / "base", base),
        "new_base": write(tmp_path / "new_base", new, shards=2),
    }
    made = plan(folders)
    merged = carry_out(made, tmp_path / "out")
    assert [name for name, _ in made.work.outputs] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(same(merged[n], expected(post[n], base[n], new[n])) for n in new)


def test_alpha_last_match_wins(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    made = plan(three(tmp_path, post, base, new), alphas=["0.5", "*q_proj*=2", "model.layers.1.*=0"])
    merged = carry_out(made, tmp_path / "out")
    for name, alpha in ((NORM, 0.5), (Q0, 2.0), (Q1, 0.0)):
        assert same(merged[name], expected(post[name], base[name], new[name], alpha)), name


def test_alpha_for_every_tensor_hides_earlier_rules(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    made = plan(three(tmp_path, post, base, new), alphas=["*q_proj*=2", "0.5"])
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[Q0], expected(post[Q0], base[Q0], new[Q0], 0.5))


def test_alpha_zero_reads_neither_post_nor_base(tmp_path: Path) -> None:
    new = llama(3)
    made = plan(three(tmp_path, llama(1), llama(2), new), alpha=0)
    assert made.bytes_read == sum(t.nbytes for t in new.values())
    assert len(made.work.terms) == 0


def test_exclude_and_include(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    folders = three(tmp_path, post, base, new)
    merged = carry_out(plan(folders, include="*.layers.*", exclude=["*.layers.1.*"]), tmp_path / "out")
    changed = {name for name in new if not same(merged[name], new[name])}
    assert changed == {name for name in new if ".layers.0." in name}


def test_excluded_names_need_no_partner(tmp_path: Path) -> None:
    new = llama(3) | {"vision.proj.weight": values((2, 2), 9)}
    post = llama(1) | {"reward.weight": values((2,), 8)}
    made = plan(three(tmp_path, post, llama(2), new), exclude=["vision.*", "reward.*"])
    merged = carry_out(made, tmp_path / "out")
    assert same(merged["vision.proj.weight"], new["vision.proj.weight"])
    assert "reward.weight" not in merged


@pytest.mark.parametrize("option", ["alphas", "include", "exclude"])
def test_globs_that_match_nothing(tmp_path: Path, option: str) -> None:
    glob = "*.lm_haed.*"
    value = f"{glob}=0.5" if option == "alphas" else glob
    text = complaint(three(tmp_path, llama(1), llama(2), llama(3)), **{option: [value]})
    assert glob in text
    assert {"alphas": "--alpha"}.get(option, f"--{option}") in text
    assert "matches no tensor" in text


def test_missing_names_are_grouped_and_named(tmp_path: Path) -> None:
    new = llama(3, layers=3)
    for layer in range(3):
        new[f"model.layers.{layer}.self_attn.q_proj.bias"] = values((4,), layer)
    text = complaint(three(tmp_path, llama(1, layers=3), llama(2, layers=3), new))
    assert text.count("model.layers.{0..2}.self_attn.q_proj.bias (3 tensors)") == 2
    assert "post lacks 3 tensors" in text
    assert "base lacks 3 tensors" in text
    assert "--copy-from new-base" in text


def test_long_lists_are_capped(tmp_path: Path) -> None:
    new = llama(3) | {f"extra{i}x.weight": values((1,), i) for i in range(50)}
    text = complaint(three(tmp_path, llama(1), llama(2), new))
    assert "post lacks 50 tensors" in text
    assert "and 30 more" in text


def test_extra_names_are_named(tmp_path: Path) -> None:
    post = llama(1) | {"value_head.weight": values((4,), 9)}
    text = complaint(three(tmp_path, post, llama(2), llama(3)))
    assert "value_head.weight" in text
    assert "--copy-from post" in text


@pytest.mark.parametrize("donor", ["new-base", "post"])
def test_copy_from(tmp_path: Path, donor: str) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    del base[Q0]  # cannot be paired: base lacks it
    post["value_head.weight"] = values((4,), 9)  # only post has it
    made = plan(three(tmp_path, post, base, new), copy_from=donor)
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[Q0], {"new-base": new, "post": post}[donor][Q0])
    assert ("value_head.weight" in merged) == (donor == "post")
    assert same(merged[Q1], expected(post[Q1], base[Q1], new[Q1]))
    assert Q0 in made.policies["unpaired"]
    if donor == "new-base":
        assert any("value_head.weight" in line for line in made.policies["dropped"])


def test_copy_from_post_that_lacks_it_too(tmp_path: Path) -> None:
    post = llama(1)
    del post[Q0]
    text = complaint(three(tmp_path, post, llama(2), llama(3)), copy_from="post")
    assert Q0 in text
    assert "--exclude" in text


@pytest.mark.parametrize("donor", ["error", "new-base", "post"])
def test_shapes_that_differ(tmp_path: Path, donor: str) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    post[Q0] = values((4, 2), 9)
    folders = three(tmp_path, post, base, new)
    if donor == "error":
        text = complaint(folders)
        assert f"{Q0}: [4, 2] in post, [4, 4] in base, [4, 4] in new_base" in text
        assert "--copy-from" in text
        assert "--exclude" in text
    else:
        merged = carry_out(plan(folders, copy_from=donor), tmp_path / "out")
        assert same(merged[Q0], {"new-base": new, "post": post}[donor][Q0])


def test_integers_are_new_base_s(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    for seed, tensors in enumerate((post, base, new)):
        tensors["model.inv.ids"] = np.arange(5, dtype=np.int64) + seed
        tensors["model.mask"] = np.array([True, seed == 1])
    made = plan(three(tmp_path, post, base, new))
    merged = carry_out(made, tmp_path / "out")
    assert same(merged["model.inv.ids"], new["model.inv.ids"])
    assert same(merged["model.mask"], new["model.mask"])
    assert sorted(name for name, _, _ in made.integer_pairs) == ["model.inv.ids", "model.mask"]


def test_codes_in_post_for_numbers_in_new_base(tmp_path: Path) -> None:
    post = llama(1) | {Q0: np.zeros((4, 4), np.int32)}
    text = complaint(three(tmp_path, post, llama(2), llama(3)))
    assert Q0 in text
    assert "i32 in post" in text
    assert "--exclude" in text


def test_mixed_float_types_follow_new_base(tmp_path: Path) -> None:
    post, base, new = llama(1, dtype=np.float32), llama(2, dtype=np.float16), llama(3)
    merged = carry_out(plan(three(tmp_path, post, base, new)), tmp_path / "out")
    assert all(same(merged[n], expected(post[n], base[n], new[n])) for n in new)


@pytest.mark.parametrize("operand", ["post", "base", "new_base"])
def test_unscaled_fp8(tmp_path: Path, operand: str) -> None:
    import ml_dtypes

    tensors = {role: llama(i) for i, role in enumerate(("post", "base", "new_base"))}
    tensors[operand][Q0] = tensors[operand][Q0].astype(ml_dtypes.float8_e4m3fn)
    folders = three(tmp_path, *tensors.values())
    text = complaint(folders)
    assert Q0 in text
    assert "--allow-unscaled" in text
    made = plan(folders, allow_unscaled=True)
    assert made.dtype_of(made.names.index(Q0)).name == ("f8_e4m3" if operand == "new_base" else "bf16")


def test_dtype_of_the_output(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    for tensors in (post, base, new):
        tensors["ids"] = np.arange(3, dtype=np.int32)
    made = plan(three(tmp_path, post, base, new), dtype="f32", exclude="lm_head*")
    merged = carry_out(made, tmp_path / "out")
    assert merged["ids"].dtype == np.int32
    assert same(merged[HEAD], new[HEAD].astype(np.float32))
    assert same(merged[Q0], expected(post[Q0], base[Q0], new[Q0].astype(np.float32)))


def test_rename_pairs(tmp_path: Path) -> None:
    post, base, new = llama(1, prefix="language_model."), llama(2), llama(3)
    folders = three(tmp_path, post, base, new)
    text = complaint(folders)
    proposed = re.search(r"--rename-post '([^']*)'", text)
    assert proposed, text
    merged = carry_out(plan(folders, rename_post=proposed[1]), tmp_path / "out")
    assert all(same(merged[n], expected(post[f"language_model.{n}"], base[n], new[n])) for n in new)


def test_rename_onto_one_name(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3))
    text = complaint(folders, rename_post=r"layers\.\d+=layers.0")
    assert "--rename-post" in text
    assert "would both be called model.layers.0.self_attn.q_proj.weight" in text


def test_rename_that_matches_nothing(tmp_path: Path) -> None:
    text = complaint(three(tmp_path, llama(1), llama(2), llama(3)), rename_base="^transformer=model")
    assert "--rename-base" in text
    assert "matches no tensor" in text


def test_post_tied_others_not(tmp_path: Path) -> None:
    post, base, new = llama(1, head=False), llama(2), llama(3)
    made = plan(three(tmp_path, post, base, new))
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[HEAD], expected(post[EMBED], base[HEAD], new[HEAD]))
    assert made.policies["tied"] == [f"{HEAD} of post"]


def test_post_and_base_tied_new_base_not(tmp_path: Path) -> None:
    post, base, new = llama(1, head=False), llama(2, head=False), llama(3)
    merged = carry_out(plan(three(tmp_path, post, base, new)), tmp_path / "out")
    assert same(merged[HEAD], expected(post[EMBED], base[EMBED], new[HEAD]))


def test_all_tied_without_heads(tmp_path: Path) -> None:
    post, base, new = (llama(i, head=False) for i in (1, 2, 3))
    made = plan(three(tmp_path, post, base, new, config={"model_type": "gemma3"}))
    assert HEAD not in made.names
    assert made.policies["tied"] == []


def test_post_untied_new_base_tied(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2, head=False), llama(3, head=False))
    for options in ({}, {"copy_from": "new-base"}, {"copy_from": "post"}):
        text = complaint(folders, **options)
        assert "ties its output embedding" in text
        assert f"--exclude '{HEAD}'" in text
    assert HEAD not in plan(folders, exclude=HEAD).names


def test_head_stored_beside_a_tied_config(tmp_path: Path) -> None:
    config = {"tie_word_embeddings": True}
    folders = {
        "post": write(tmp_path / "post", llama(1), config=config),
        "base": write(tmp_path / "base", llama(2, head=False), config=config),
        "new_base": write(tmp_path / "new_base", llama(3, head=False), config=config),
    }
    made = plan(folders)
    assert HEAD not in made.names
    assert any(HEAD in line for line in made.policies["dropped"])


def test_heads_stored_in_all_three_beside_tied_configs(tmp_path: Path) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    made = plan(three(tmp_path, post, base, new, config={"tie_word_embeddings": True}))
    merged = carry_out(made, tmp_path / "out")
    assert same(merged[HEAD], expected(post[HEAD], base[HEAD], new[HEAD]))


def test_head_missing_without_a_tied_config(tmp_path: Path) -> None:
    config = {"tie_word_embeddings": False}
    text = complaint(three(tmp_path, llama(1, head=False), llama(2), llama(3), config=config))
    assert f"post lacks 1 tensors that new_base has:\n      {HEAD}" in text


def test_vocabulary_needs_the_option(tmp_path: Path) -> None:
    text = complaint(three(tmp_path, llama(1, vocab=10), llama(2), llama(3)))
    assert f"{EMBED}: [10, 4] in post, [8, 4] in base, [8, 4] in new_base" in text
    assert HEAD in text
    assert "--vocab extend" in text


@pytest.mark.parametrize("rows", [(10, 8, 8), (8, 8, 11), (10, 8, 9), (9, 12, 10), (9, 7, 12), (8, 9, 8), (12, 10, 9)])
def test_vocabulary_extended(tmp_path: Path, rows: tuple[int, int, int]) -> None:
    post, base, new = (llama(i + 1, vocab=v) for i, v in enumerate(rows))
    made = plan(three(tmp_path, post, base, new), vocab="extend", alpha=0.5)
    merged = carry_out(made, tmp_path / "out")
    assert sorted(made.policies["vocabulary_extended"]) == sorted([EMBED, HEAD])
    count = max(rows[0], rows[2])
    for name in (EMBED, HEAD):

        def padded(tensor: np.ndarray, height: int) -> np.ndarray:
            out = np.zeros((height, 4), tensor.dtype)
            out[: min(height, len(tensor))] = tensor[:height]
            return out

        p, b, n = padded(post[name], count), padded(base[name], count), padded(new[name], count)
        want = expected(p, b, n, 0.5)
        want[rows[0] :] = n[rows[0] :]  # rows that post lacks have no delta
        assert same(merged[name], want), name


def test_position_embeddings_are_no_vocabulary(tmp_path: Path) -> None:
    tensors = [llama(i) | {"model.wpe.weight": values((16 + 4 * (i == 1), 4), i)} for i in (1, 2, 3)]
    text = complaint(three(tmp_path, *tensors), vocab="extend")
    assert "model.wpe.weight: [20, 4] in post" in text


def test_vocabulary_by_config(tmp_path: Path) -> None:
    folders = {}
    for i, (role, rows) in enumerate({"post": 10, "base": 8, "new_base": 8}.items()):
        tensors = llama(i) | {"shared.weight": values((rows, 4), i)}
        folders[role] = write(tmp_path / role, tensors, config={"vocab_size": rows})
    assert plan(folders, vocab="extend").policies["vocabulary_extended"] == ["shared.weight"]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    post = llama(1, vocab=10) | {"odd.weight": values((1,), 9)}
    post[Q0] = values((4, 2), 9)
    post[Q1] = np.zeros((4, 4), np.int32)
    new = llama(3) | {"bias": values((1,), 9)}
    folders = three(tmp_path, post, llama(2), new)
    (tmp_path / "out").mkdir()
    text = complaint(folders, out=tmp_path / "out", exclude=["no.such"], rename_base="^zz=y")
    for part in (
        "odd.weight",
        "bias",
        Q0,
        Q1,
        EMBED,
        "no.such",
        "^zz",
        "exists already",
        "--vocab extend",
        "--overwrite",
    ):
        assert part in text, part


def test_all_folders_that_cannot_be_opened_are_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan({role: tmp_path / role for role in ("post", "base", "new_base")}, out=tmp_path / "no" / "out")
    assert all(str(tmp_path / role) in str(caught.value) for role in ("post", "base", "new_base", "no"))


def test_quantised_folder(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3))
    (folders["post"] / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    text = complaint(folders)
    assert "post is quantised: awq" in text


@pytest.mark.parametrize("place", ["same", "inside", "around"])
def test_output_and_inputs_apart(tmp_path: Path, place: str) -> None:
    folders = three(tmp_path / "in", llama(1), llama(2), llama(3))
    out = {"same": folders["base"], "inside": folders["base"] / "out", "around": tmp_path / "in"}[place]
    text = complaint(folders, out=out, overwrite=True)
    assert "base" in text
    assert "name another --out" in text


def test_overwrite_replaces_only_merges(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "has no paramdelta.json" in complaint(folders, out=out, overwrite=True)
    (out / "paramdelta.json").write_text("{}")
    assert plan(folders, out=out, overwrite=True).request.out == out


def test_reading_back_new_base_by_zero_alpha(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3), shards=2)
    merged = carry_out(plan(folders, alpha=0), tmp_path / "out")
    original = read(folders["new_base"])
    assert all(same(merged[name], original[name]) for name in original)
