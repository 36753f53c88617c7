"""What a recycling computes, what may change before it is continued, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from recycled import digests, make_plan

import paramdelta
from paramdelta.checkpoint import describe, open_checkpoint
from paramdelta.errors import InputError
from paramdelta.recycling import preview


def models_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_it_is_apply_command_extract(models: Path, tmp_path: Path) -> None:
    """The folders are those that the single commands write, with a first delta, an alpha and policies."""
    paramdelta.extract(post=models / "v2", base=models / "v1", out=tmp_path / "first")
    changed = {"first_delta": str(tmp_path / "first"), "alpha": 0.5, "extract": {"dtype": "bf16"}}
    plan = make_plan(models, tmp_path / "out", keep=["starts", "outs"], apply={"exclude": ["*norm*"]}, **changed)
    report = paramdelta.recycle(plan, until=2)
    assert not report.complete
    out = tmp_path / "out"
    for index, before in ((1, tmp_path / "first"), (2, out / "deltas" / "1-v1")):
        start, tuned, delta = (out / kind / f"{index}-v{index}" for kind in ("starts", "outs", "deltas"))
        by_hand = tmp_path / f"by-hand-{index}"
        by_hand.mkdir()
        paramdelta.apply(
            new_base=models / f"v{index}", deltas=before, alpha=0.5, exclude="*norm*", out=by_hand / "start"
        )
        assert models_of(start) == models_of(by_hand / "start")
        assert models_of(start) != models_of(models / f"v{index}")
        assert models_of(tuned) != models_of(start)
        paramdelta.extract(post=tuned, base=models / f"v{index}", out=by_hand / "delta", dtype="bf16")
        assert models_of(delta) == models_of(by_hand / "delta")
        assert report.versions[index - 1].delta == str(delta)


def test_the_command_knows_what_it_is_for(models: Path, tmp_path: Path) -> None:
    """Places in arguments, in a shell's text, and variables; other braces stay."""
    script = (
        'cp -r {start} {out} && printf "%s\\n" {version} {index} "$PARAMDELTA_START" "$MINE" "${X}" '
        """'{"a": 1}' "$(pwd)" '{{epoch}}' > {out}/told"""
    )
    out = tmp_path / "a folder; with $signs"
    versions = [{"model": str(models / "v1"), "name": "first+one"}, str(models / "v2")]
    where = {"workdir": str(tmp_path), "env": {"MINE": 5, "X": "not this"}}
    plan = make_plan(models, out, versions=versions, command=script, shell=True, keep=["starts", "outs"], **where)
    paramdelta.recycle(plan)
    told = (out / "outs" / "2-v2" / "told").read_text().splitlines()
    tail = ["5", "not this", '{"a": 1}', str(tmp_path), "{epoch}"]
    assert told == ["v2", "2", str(out / "starts" / "2-v2"), *tail]
    assert (out / "outs" / "1-first+one" / "told").read_text().splitlines()[2] == str(models / "v1")


def test_versions_are_added_one_by_one(models: Path, tmp_path: Path) -> None:
    """A plan may grow, and stop anywhere, without a difference to the result."""
    plan = make_plan(models, tmp_path / "whole")
    paramdelta.recycle(plan)
    for count in (1, 2, 3):
        grown = make_plan(models, tmp_path / "grown", versions=plan["versions"][:count])
        assert paramdelta.recycle(grown).complete
    assert paramdelta.recycle(make_plan(models, tmp_path / "until"), until=2).versions[-1].name == "v2"
    assert paramdelta.recycle(make_plan(models, tmp_path / "until")).complete
    assert digests(tmp_path / "grown") == digests(tmp_path / "whole") == digests(tmp_path / "until")


def test_another_plan_is_refused(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paramdelta.recycle(make_plan(models, out), until=2)
    made = digests(out)
    other = make_plan(models, out, alpha=0.5, keep=[])
    other["command"] = [*other["command"], "more"]
    for call in (paramdelta.recycle, preview):
        with pytest.raises(InputError) as refused:
            call(other)
        text = str(refused.value)
        assert "version 1 (v1): was begun with another plan or other inputs" in text
        assert 'command.argument 6: null then, "more" now' in text
        assert "alpha: 1.0 then, 0.5 now" in text
        assert "--restart-from 3 keeps all 2 that are done, and the rest is by this plan" in text
    assert digests(out) == made
    with pytest.raises(InputError, match=r"version 3 \(v3\)[\s\S]*model: .* then, null now"):
        paramdelta.recycle(make_plan(models, out)) and paramdelta.recycle(
            make_plan(models, out, versions=make_plan(models, out)["versions"][:2])
        )


def test_restart_from(models: Path, tmp_path: Path) -> None:
    """What is kept is kept as it is, also when the recycling is continued later."""
    out = tmp_path / "out"
    paramdelta.recycle(make_plan(models, out), until=2)
    made = digests(out)
    other = make_plan(models, out, alpha=0.5)
    with pytest.raises(InputError, match=r"--restart-from: expected a number from 1 to 3"):
        paramdelta.recycle(other, restart_from=4)
    assert [step.done for step in preview(other, restart_from=2).steps][:2] == [True, True]
    paramdelta.recycle(other, restart_from=2, until=2)
    halved = digests(out)
    assert {n for n in made if halved[n] != made[n]} >= {"deltas/2-v2/model-00001-of-00002.safetensors"}
    assert all(halved[n] == made[n] for n in made if "1-v1" in n)
    assert paramdelta.recycle(other).complete
    with pytest.raises(InputError, match=r"version 2 \(v2\): was begun with another plan"):
        paramdelta.recycle(make_plan(models, out))
    assert paramdelta.recycle(make_plan(models, out), restart=True).complete
    paramdelta.recycle(make_plan(models, tmp_path / "anew"))
    assert digests(out) == digests(tmp_path / "anew")


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["model", "config", "delta", "state"])
def test_changed_inputs_are_refused(models: Path, tmp_path: Path, what: str) -> None:
    copied, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(models, copied)
    plan = make_plan(copied, out)
    paramdelta.recycle(plan, until=1)
    if what == "model":
        edit(copied / "v1" / "model-00002-of-00002.safetensors")
        expected = r"version 1 \(v1\)[\s\S]*inputs|model\.model-00002-of-00002\.safetensors\.ends_sha256"
    elif what == "config":
        path = copied / "v1" / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 7}))
        expected = r"model\.generation_config\.json\.bytes: \d+ then, \d+ now"
    elif what == "delta":
        edit(out / "deltas" / "1-v1" / "model-00001-of-00002.safetensors")
        expected = r"1-v1: is not as it was extracted:[\s\S]*--restart-from 1"
    else:
        (out / "recycle.json").write_text("{}")
        expected = r"recycle\.json: expected a recycle document"
    with pytest.raises(InputError, match=expected):
        paramdelta.recycle(plan)


def test_a_version_that_is_done_is_not_needed(models: Path, tmp_path: Path) -> None:
    """Not its model; and of what was made of it only the delta, where the next version starts."""
    copied, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(models, copied)
    plan = make_plan(copied, out)
    paramdelta.recycle(plan, until=2)
    shutil.rmtree(copied / "v1")
    shutil.rmtree(out / "outs")
    shutil.rmtree(out / "deltas" / "1-v1")
    assert paramdelta.recycle(plan).complete
    paramdelta.recycle(make_plan(models, tmp_path / "whole"))
    theirs = digests(tmp_path / "whole")
    assert (
        digests(out)["deltas/3-v3/model-00001-of-00002.safetensors"]
        == theirs["deltas/3-v3/model-00001-of-00002.safetensors"]
    )


@pytest.mark.parametrize("keep", [[], ["starts"], ["outs"], ["starts", "outs"]], ids=str)
def test_what_is_kept_and_the_room_it_takes(models: Path, tmp_path: Path, keep: list[str]) -> None:
    out = tmp_path / "out"
    plan: dict[str, Any] = make_plan(models, out, keep=keep)
    planned = preview(plan)
    assert not out.exists()
    assert paramdelta.recycle(plan).complete
    for kind in ("starts", "outs"):
        there = [path.name for path in sorted((out / kind).iterdir())]
        assert there == ([] if kind not in keep else ["1-v1", "2-v2", "3-v3"][kind == "starts" :])
    folders = [path.parent for path in out.rglob("config.json")]
    assert planned.bytes_in_the_end == sum(describe(open_checkpoint(folder))["bytes"] for folder in folders)
    assert planned.bytes_at_most >= planned.bytes_in_the_end
    after = preview(plan)
    assert all(step.done for step in after.steps)
    assert (after.bytes_at_most, after.bytes_in_the_end) == (0, 0)
    made = digests(out)
    assert paramdelta.recycle({**plan, "keep": [], "unfinished": "keep"}).complete
    assert digests(out) == made
