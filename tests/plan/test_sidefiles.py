"""The files beside the weights: whose they are, which are made, which stay behind, and that nothing in them tells of
the machine they were made on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plan_folders import llama, plan, write

from paramdelta.plan import Plan


def made_with(root: Path, post: dict[str, str], new_base: dict[str, str], **options: Any) -> Plan:
    folders = {
        "post": write(root / "post", llama(1), files=post),
        "base": write(root / "base", llama(2)),
        "new_base": write(root / "new_base", llama(3), files=new_base),
    }
    return plan(folders, **options)


def origins(made: Plan) -> dict[str, str]:
    return {f.name: f.origin for f in made.side_files if f.source is not None}


def test_use_comes_from_post(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "vocab.json"]
    names += [
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "preprocessor_config.json",
    ]
    made = made_with(tmp_path, dict.fromkeys(names, "post"), dict.fromkeys(names, "new"))
    assert origins(made) == dict.fromkeys(names, "post")


def test_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    made = made_with(
        tmp_path, {"tokenizer.json": ""}, {"tokenizer.json": "", "chat_template.jinja": "", "merges.txt": ""}
    )
    assert origins(made) == {"tokenizer.json": "post"}
    assert made.policies["files_left_out"] == ["chat_template.jinja", "merges.txt"]


def test_new_base_s_where_post_has_none(tmp_path: Path) -> None:
    made = made_with(tmp_path, {"tokenizer.json": ""}, {"generation_config.json": ""})
    assert origins(made) == {"tokenizer.json": "post", "generation_config.json": "new_base"}


def test_code_and_licences(tmp_path: Path) -> None:
    post = {"LICENSE": "post's", "NOTICE": "same", "USE_POLICY.md": "only post's", "modeling_x.py": "post"}
    new = {"LICENSE": "new's", "NOTICE": "same", "modeling_x.py": "new"}
    made = made_with(tmp_path, post, new)
    assert origins(made) == {
        "LICENSE": "new_base",
        "LICENSE.post": "post",
        "NOTICE": "new_base",
        "USE_POLICY.md": "post",
        "modeling_x.py": "new_base",
    }


def test_what_is_not_known_stays_behind(tmp_path: Path) -> None:
    names = [
        "training_args.bin",
        "optimizer.pt",
        "pytorch_model.bin",
        ".gitattributes",
        "trainer_state.json",
        "notes.txt",
    ]
    made = made_with(tmp_path, dict.fromkeys(names, "x"), dict.fromkeys(names, "x"))
    assert origins(made) == {}
    assert {"notes.txt", "trainer_state.json"} <= set(made.policies["files_left_out"])


def test_model_card(tmp_path: Path) -> None:
    made = made_with(tmp_path, {"README.md": "old"}, {})
    card = next(f.data for f in made.side_files if f.name == "README.md")
    assert card is not None
    front = card.decode().split("---\n")[1]
    assert 'base_model:\n- "new_base"\n- "post"\n' in front
    assert "base_model_relation: merge\n" in front


def test_record(tmp_path: Path) -> None:
    made = made_with(tmp_path, {}, {}, alphas=["*mlp*=0.5"], exclude="lm_head*", out=tmp_path / "out")
    data = next(f.data for f in made.side_files if f.name == "paramdelta.json")
    assert data is not None
    assert str(tmp_path).encode() not in data
    record = json.loads(data)
    assert record["request"]["exclude"] == ["lm_head*"]
    assert "*mlp*=0.5" in record["request"]["alphas"]
    for role in ("post", "base", "new_base"):
        (file,) = record["inputs"][role]["files"]
        assert file["bytes"] == (tmp_path / role / "model.safetensors").stat().st_size
        assert len(file["header_sha256"]) == 64


def test_hub_cache_names(tmp_path: Path) -> None:
    folders = {}
    for i, role in enumerate(("post", "base", "new_base")):
        blobs = write(tmp_path / f"blobs{i}", llama(i))
        snapshot = tmp_path / f"models--org--{role}" / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        for path in blobs.iterdir():
            (snapshot / path.name).symlink_to(path)
        folders[role] = snapshot
    card = next(f.data for f in plan(folders).side_files if f.name == "README.md")
    assert card is not None
    assert b'- "org/new_base"\n- "org/post"' in card
