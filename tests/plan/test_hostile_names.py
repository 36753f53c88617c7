"""Names that file systems allow and callers pass by mistake: a complaint or a result, never a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from plan_folders import complaint, llama, plan, three, write

from paramdelta.errors import PlanError
from paramdelta.plan import MergeRequest


@pytest.mark.parametrize("kind", ["loop", "below a loop", "long"])
def test_outputs_that_cannot_be_looked_at(tmp_path: Path, kind: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    out = {"loop": loop, "below a loop": loop / "out", "long": tmp_path / ("a" * 300)}[kind]
    assert str(out)[:100] in complaint(three(tmp_path / "in", llama(1), llama(2), llama(3)), out=out)


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    """Linux names are bytes; in JSON the odd ones are escapes that read back as they were."""
    odd = os.fsdecode(b"caf\xe9")
    folders = {
        "post": write(tmp_path / odd, llama(1), files={odd: "x"}),
        "base": write(tmp_path / "base", llama(2)),
        "new_base": write(tmp_path / "new_base", llama(3)),
    }
    data = next(f.data for f in plan(folders).side_files if f.name == "paramdelta.json")
    assert data is not None
    record = json.loads(data.decode())
    assert record["inputs"]["post"]["name"] == odd
    assert record["policies"]["files_left_out"] == [odd]


def test_no_licence_is_lost_when_a_merge_is_merged_again(tmp_path: Path) -> None:
    folders = {
        "post": write(tmp_path / "post", llama(1), files={"LICENSE": "c"}),
        "base": write(tmp_path / "base", llama(2)),
        "new_base": write(tmp_path / "new_base", llama(3), files={"LICENSE": "a", "LICENSE.post": "b"}),
    }
    texts = {f.name: f.source.read_text() for f in plan(folders).side_files if f.source}
    assert texts == {"LICENSE": "a", "LICENSE.post": "b", "LICENSE.post2": "c"}


@pytest.mark.parametrize("value", [(1, 2), 5, None, {"a": "b", "c": "d"}])
def test_renames_that_are_no_pair_of_strings(value: Any) -> None:
    with pytest.raises(PlanError, match="expected a pair"):
        MergeRequest.build(post="p", base="b", new_base="n", rename_post=[value])


def test_one_alpha_rule_as_a_string() -> None:
    rules = MergeRequest.build(post="p", base="b", new_base="n", alphas="*.bias=0.5").alphas
    assert [(r.glob, r.value) for r in rules] == [("*", 1.0), ("*.bias", 0.5)]
