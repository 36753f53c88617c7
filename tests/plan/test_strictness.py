"""Cases in which an output would look right and be wrong: types that cannot be subtracted, embeddings that a config
ties over, renames that reach too far, configs spelled by two releases of transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_folders import carry_out, complaint, expected, llama, plan, same, three, values, write

from paramdelta.errors import PlanError
from paramdelta.plan import MergeRequest

HEAD = "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_numbers_in_post_for_codes_in_new_base(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3) | {Q0: np.zeros((4, 4), np.int32)})
    text = complaint(folders)
    assert f"{Q0}: bf16 in post, bf16 in base, i32 in new_base" in text
    assert "--exclude" in text
    assert plan(folders, exclude=Q0).policies["tensors"]["copied_from_new_base"] == 1


def test_types_without_arithmetic_are_no_integers(tmp_path: Path) -> None:
    tensors = [llama(i) | {"freqs": np.ones(3, np.complex64)} for i in (1, 2, 3)]
    assert "freqs: c64 in post, c64 in base, c64 in new_base" in complaint(three(tmp_path, *tensors))


def test_integers_that_others_lack(tmp_path: Path) -> None:
    new = llama(3) | {"ids": np.arange(3)}
    folders = three(tmp_path, llama(1), llama(2), new)
    assert "post lacks 1 tensors that new_base has:\n      ids" in complaint(folders)
    assert same(carry_out(plan(folders, copy_from="new-base"), tmp_path / "out")["ids"], new["ids"])


def test_integers_of_other_shapes(tmp_path: Path) -> None:
    tensors = [llama(i) | {"ids": np.arange(i)} for i in (1, 2, 3)]
    assert "ids: [1] in post, [2] in base, [3] in new_base" in complaint(three(tmp_path, *tensors))


@pytest.mark.parametrize("options", [{"exclude": Q0}, {"copy_from": "new-base"}, {"copy_from": "post"}])
def test_fp8_is_not_converted_unasked(tmp_path: Path, options: dict[str, Any]) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    for tensors in (post, new):
        tensors[Q0] = tensors[Q0].astype(ml_dtypes.float8_e4m3fn)
    del base[Q0]
    folders = three(tmp_path, post, base, new)
    assert plan(folders, **options)
    assert Q0 in complaint(folders, dtype="bf16", **options)
    assert "--allow-unscaled" in complaint(folders, dtype="bf16", **options)
    assert plan(folders, dtype="bf16", allow_unscaled=True, **options)


def test_post_untied_new_base_tied_with_a_stored_head(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    folders = {
        "post": write(tmp_path / "post", llama(1), config={"tie_word_embeddings": False}),
        "base": write(tmp_path / "base", llama(2, head=False), config=tied),
        "new_base": write(tmp_path / "new_base", llama(3), config=tied),
    }
    text = complaint(folders)
    assert "ties its output embedding" in text
    assert f"--exclude '{HEAD}'" in text
    assert HEAD in plan(folders, exclude=HEAD).names


def test_renames_of_new_base_are_for_pairing_alone(tmp_path: Path) -> None:
    post, base = llama(1), llama(2)
    new = llama(3, prefix="language_model.")
    folders = three(tmp_path, post, base, new)
    made = plan(folders, rename_new_base=r"^language_model\.=", alphas=["lm_head*=0.5"])
    merged = carry_out(made, tmp_path / "out")
    assert merged.keys() == new.keys()
    for name in post:
        alpha = 0.5 if name == HEAD else 1.0
        assert same(
            merged[f"language_model.{name}"], expected(post[name], base[name], new[f"language_model.{name}"], alpha)
        )


def proposed(text: str, role: str) -> str:
    found = re.search(rf"--rename-{role} '([^']*)'", text)
    assert found, text
    return found[1]


@pytest.mark.parametrize(
    ("old", "new"),
    [("", "model."), ("model.", ""), ("model.", "model.language_model."), ("a.b.", "c."), ("model.layers.", "blocks.")],
)
def test_proposed_renames_leave_alone_what_pairs(tmp_path: Path, old: str, new: str) -> None:
    paired = {"lm_head.weight": values((4, 4), 1), "model.visual.proj": values((2,), 2), "embed": values((2,), 3)}
    tails = [f"{part}.{i}.weight" for part in ("x", "y_") for i in range(5)]
    post = paired | {old + tail: values((3,), i) for i, tail in enumerate(tails)}
    base = paired | {new + tail: values((3,), i + 50) for i, tail in enumerate(tails)}
    third = paired | {new + tail: values((3,), i + 99) for i, tail in enumerate(tails)}
    folders = three(tmp_path, post, base, third)
    option = proposed(complaint(folders), "post")
    made = plan(folders, rename_post=option)
    assert made.policies["tensors"]["merged"] == len(third)


def test_no_rename_is_proposed_where_nothing_is_alike(tmp_path: Path) -> None:
    post = llama(1) | {"odd.thing": values((3,), 1)}
    new = llama(3) | {"other.weight": values((3,), 1)}
    assert "--rename" not in complaint(three(tmp_path, post, llama(2), new))


@pytest.mark.parametrize("rename", [r"a=\g<x>", r"a=\2"])
def test_renames_with_groups_that_are_not_there(rename: str) -> None:
    with pytest.raises(PlanError, match="--rename-post"):
        MergeRequest.build(post="p", base="b", new_base="n", rename_post=[rename])


def test_renames_may_look_behind() -> None:
    request = MergeRequest.build(post="p", base="b", new_base="n", rename_post=r"(?<=model)\.x=.y")
    assert (request.rename_post[0].pattern, request.rename_post[0].replacement) == (r"(?<=model)\.x", ".y")


def test_a_rename_is_a_pair() -> None:
    with pytest.raises(PlanError, match="expected a pair"):
        MergeRequest.build(post="p", base="b", new_base="n", rename_post=[("a",)])  # type: ignore[list-item]


def config_of(root: Path, *configs: dict[str, Any], rows: tuple[int, ...] = (8, 8, 8), **options: Any) -> Any:
    folders = {
        role: write(root / role, llama(i, vocab=rows[i]), config=configs[i])
        for i, role in enumerate(("post", "base", "new_base"))
    }
    made = plan(folders, **options)
    data = next(f.data for f in made.side_files if f.name == "config.json")
    assert data is not None
    return json.loads(data), (*made.warnings, *made.policies["config_new_base_differs"])


@pytest.mark.parametrize("off", [None, False])
def test_what_is_off_may_be_left_out(tmp_path: Path, off: object) -> None:
    assert config_of(tmp_path, {"attention_bias": off}, {}, {}) == ({}, ())


def test_rope_is_spelled_in_two_ways(tmp_path: Path) -> None:
    old = {"rope_theta": 1e4, "rope_scaling": None}
    new = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert config_of(tmp_path, new, old, old) == (old, ())


def test_rope_that_differs_is_reported(tmp_path: Path) -> None:
    old = {"rope_theta": 1e4}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8}}
    config, reported = config_of(tmp_path, old, old, new)
    assert config == new
    assert reported == ("rope_theta: 10000.0 in base, 500000.0 in new_base",)


def test_a_field_that_post_dropped_stays(tmp_path: Path) -> None:
    assert config_of(tmp_path, {}, {"pad_token_id": 0}, {"pad_token_id": 0}) == ({"pad_token_id": 0}, ())


def test_vocab_size_stays_where_rows_stay(tmp_path: Path) -> None:
    sizes = [{"vocab_size": 8}, {"vocab_size": 8}, {"vocab_size": 9}]  # new_base pads its embedding to 10 rows
    assert config_of(tmp_path, *sizes, rows=(8, 8, 10), vocab="extend")[0] == {"vocab_size": 9}


def test_vocab_size_follows_on_every_level(tmp_path: Path) -> None:
    sizes = [{"vocab_size": n, "text_config": {"vocab_size": n}} for n in (10, 8, 8)]
    config, _ = config_of(tmp_path, *sizes, rows=(10, 8, 8), vocab="extend")
    assert config == sizes[0]


def test_flat_and_nested_configs_are_compared(tmp_path: Path) -> None:
    flat = {"eos_token_id": 1, "tie_word_embeddings": False}
    nested = {"text_config": flat}
    config, warnings = config_of(tmp_path, flat | {"eos_token_id": [1, 2]}, flat, nested)
    assert config == {"text_config": flat | {"eos_token_id": [1, 2]}}
    assert warnings == ()
    config, _ = config_of(tmp_path / "b", {"text_config": flat | {"eos_token_id": 5}}, nested, flat)
    assert config == flat | {"eos_token_id": 5}
