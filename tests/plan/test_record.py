"""paramdelta.json and the model card: enough to do the merge again, and nothing of the machine or the moment."""

from __future__ import annotations

import getpass
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from plan_folders import carry_out, llama, plan, three, write

from paramdelta.plan import MergeRequest, Plan

REQUESTS: list[dict[str, Any]] = [
    {},
    {"alpha": 1 / 3, "alphas": ["*mlp*=1e-3", "*.0.*=0"]},
    {"include": "*.layers.*", "exclude": ["*.1.*", "lm_head*"], "dtype": "f32", "max_shard_size": "64B"},
    {"rename_post": [r"^model\.=model.", ("norm", "norm")], "vocab": "extend", "copy_from": "post"},
    {"dtype": "f8_e4m3", "allow_unscaled": True},
]


def made_file(made: Plan, name: str) -> str:
    (data,) = (f.data for f in made.side_files if f.name == name)
    assert data is not None
    return data.decode()


def record_of(made: Plan) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(made_file(made, "paramdelta.json"))
    return record


@pytest.mark.parametrize("options", REQUESTS)
def test_the_recorded_request_does_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3), shards=2)
    made = plan(folders, **options)
    recorded = record_of(made)["request"]
    assert MergeRequest.build(**folders, **recorded) == made.request
    again = plan(folders, **recorded)
    assert list(again.written_files()) == list(made.written_files())
    assert again.work.headers == made.work.headers
    assert again.work.spans.tobytes() == made.work.spans.tobytes()
    assert again.work.terms.tobytes() == made.work.terms.tobytes()


def test_nothing_of_the_run_is_recorded(tmp_path: Path) -> None:
    folders = three(tmp_path / "inputs", llama(1), llama(2), llama(3))
    made = plan(folders, out=tmp_path / "out", overwrite=True, allow_nonfinite=True)
    text = made_file(made, "paramdelta.json") + made_file(made, "README.md")
    assert str(tmp_path) not in text
    assert "inputs" not in made_file(made, "README.md")
    assert socket.gethostname() not in text
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)
    assert not re.search(r"\d\d:\d\d", text)
    assert time.strftime("%Y-%m") not in text
    assert not {"out", "overwrite", "allow_nonfinite", *folders} & set(record_of(made)["request"])


def test_where_folders_lie_does_not_show(tmp_path: Path) -> None:
    written = []
    for place in ("here", "there/deep"):
        folders = three(tmp_path / place, llama(1), llama(2), llama(3), shards=2, files={"LICENSE": "x"})
        made = plan(folders, out=tmp_path / f"out {place[:4]}", alpha=0.5)
        contents = [c if isinstance(c, bytes) else c.read_bytes() for _, c in made.written_files()]
        written.append((contents, made.work.headers))
    assert written[0] == written[1]


def test_inputs_are_identified(tmp_path: Path) -> None:
    """A changed header is a changed record."""
    digests = []
    for i in range(2):
        folders = three(tmp_path / str(i), llama(1, layers=1 + i), llama(2, layers=1 + i), llama(3, layers=1 + i))
        inputs = record_of(plan(folders))["inputs"]
        assert list(inputs) == ["post", "base", "new_base"]
        assert [inputs[role]["name"] for role in inputs] == list(inputs)
        digests.append(inputs["base"]["files"][0]["header_sha256"])
    assert digests[0] != digests[1]


def test_policies_are_recorded(tmp_path: Path) -> None:
    post = llama(1, vocab=10) | {"v.weight": llama(1)["model.norm.weight"]}
    folders = three(tmp_path, post, llama(2), llama(3))
    made = plan(folders, vocab="extend", copy_from="post", exclude="*norm*")
    policies = record_of(made)["policies"]
    assert policies == json.loads(json.dumps(made.policies))
    assert policies["tensors"] == {"merged": 6, "copied_from_new_base": 1, "copied_from_post": 1}
    assert policies["unpaired"] == ["v.weight"]
    assert sorted(policies["vocabulary_extended"]) == ["lm_head.weight", "model.embed_tokens.weight"]


def front_matter(card: str) -> dict[str, Any]:
    """Read the subset of YAML that the card uses: keys with a plain value or a list of plain or JSON strings."""
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    fields: dict[str, Any] = {}
    key = ""
    for line in front.splitlines():
        if line.startswith("- "):
            item = line[2:]
            fields[key].append(json.loads(item) if item.startswith('"') else item)
        else:
            match = re.fullmatch(r"(\w+):(?: (\S+))?", line)
            assert match, line
            key = match[1]
            fields[key] = match[2] if match[2] else []
    return fields


@pytest.mark.parametrize("name", ["plain", "- dash: colon", 'quote " quote', "line\nbreak", "Ünïcode 模型", "--- x"])
def test_front_matter_whatever_the_folder_is_called(tmp_path: Path, name: str) -> None:
    folders = {
        "post": write(tmp_path / name, llama(1)),
        "base": write(tmp_path / "b", llama(2)),
        "new_base": write(tmp_path / "n", llama(3)),
    }
    fields = front_matter(made_file(plan(folders), "README.md"))
    assert fields["base_model"] == ["n", name]
    assert fields["base_model_relation"] == "merge"
    assert fields["library_name"] == "transformers"
    assert "merge" in fields["tags"]


def test_the_card_says_alpha(tmp_path: Path) -> None:
    card = made_file(plan(three(tmp_path, llama(1), llama(2), llama(3)), alphas=["0.7", "*mlp*=0.25"]), "README.md")
    assert "alpha = 0.7, 0.25 for `*mlp*`" in card
    assert "new_base + alpha · (post − base)" in card


def test_a_merge_may_be_the_input_of_another(tmp_path: Path) -> None:
    """Its record and card are made anew, not carried along."""
    folders = three(tmp_path, llama(1), llama(2), llama(3), files={"LICENSE": "x"})
    carry_out(plan(folders), tmp_path / "first")
    made = plan({**folders, "new_base": tmp_path / "first"}, out=tmp_path / "second")
    names = [f.name for f in made.side_files]
    assert sorted(names) == sorted({"LICENSE", "README.md", "config.json", "paramdelta.json"})
    assert made.policies["files_left_out"] == []
    assert record_of(made)["inputs"]["new_base"]["name"] == "first"
