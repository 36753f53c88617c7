"""Tokenizers that differ while tables have equal sizes: rows paired by number are told of, with the option that pairs
them by token, and nothing is said, or parsed, where there is nothing to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_folders import write

import paramdelta
from paramdelta import merging
from paramdelta.plan import make_request, tokenizers

TOKENS = {f"t{n}": n for n in range(200)}
SWAPPED = TOKENS | {"t7": 9, "t9": 7}
EMBED = "model.embed_tokens.weight"


def as_json(vocabulary: dict[str, int], **more: Any) -> dict[str, str]:
    return {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, **more})}


def folder(path: Path, files: dict[str, str], rows: int = 200, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)
    config = {"model_type": "llama", "vocab_size": rows, "hidden_size": 8, "tie_word_embeddings": True}
    return write(path, {EMBED: values, "model.norm.weight": values[0]}, config=config, files=files)


def three(root: Path, **files: dict[str, str]) -> dict[str, Path]:
    return {
        role: folder(root / role, files.get(role, {}), seed=k) for k, role in enumerate(("post", "base", "new_base"))
    }


def plan(folders: dict[str, Path], **options: Any) -> Any:
    return merging.prepare(make_request(**folders, out=folders["post"].parent / "out", **options))


def told(made: Any) -> list[str]:
    return [text for text in made.warnings if text.startswith("tokenizers: ")]


def test_moved_tokens_are_counted_and_named(tmp_path: Path) -> None:
    folders = three(tmp_path, post=as_json(TOKENS), base=as_json(TOKENS), new_base=as_json(SWAPPED))
    made = plan(folders)
    (text,) = told(made)
    assert "new_base has 2 of 200 tokens shared with post under other numbers ('t7' 9, not 7, 't9' 7, not 9)" in text
    assert "--vocab align pairs them by token" in text
    found = made.policies["tokenizers"]["new_base"]
    assert (found["shared"], found["moved"], found["renamed"]) == (200, 2, 0)
    assert found["moved_examples"][0] == {"token": "t7", "post": 7, "new_base": 9}
    assert list(made.policies["tokenizers"]) == ["new_base"]


def test_checkpoints_that_differ_alike_share_a_warning(tmp_path: Path) -> None:
    made = plan(three(tmp_path, post=as_json(SWAPPED), base=as_json(TOKENS), new_base=as_json(TOKENS, truncation=None)))
    (text,) = told(made)
    assert text.startswith("tokenizers: base and new_base have 2 of 200")


@pytest.mark.parametrize("options", [{"vocab": "align"}, {"exclude": [EMBED]}, {"alpha": {EMBED: 0.0}}], ids=str)
def test_rows_that_are_not_paired_by_number(tmp_path: Path, options: dict[str, Any]) -> None:
    if "vocab" in options:
        pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
        tokens = {text: as_json(v) for text, v in (("post", TOKENS), ("base", TOKENS), ("new_base", SWAPPED))}
        for role in tokens:
            document = json.loads(tokens[role]["tokenizer.json"])
            document["model"] |= {"merges": []}
            tokens[role] = {"tokenizer.json": json.dumps({"version": "1.0", "added_tokens": [], **document})}
    else:
        tokens = {"post": as_json(TOKENS), "new_base": as_json(SWAPPED)}
    made = plan(three(tmp_path, **tokens), **options)
    assert told(made) == []
    assert "tokenizers" not in made.policies


@pytest.mark.parametrize("renamed", [2, 3, 30])
def test_a_few_renamed_tokens_are_no_surprise(tmp_path: Path, renamed: int) -> None:
    """One in a hundred is what post-training does with reserved tokens; the report has their number all the same."""
    other = {(f"<chat {n}>" if n < renamed else text): n for text, n in TOKENS.items()}
    made = plan(three(tmp_path, post=as_json(other), base=as_json(TOKENS), new_base=as_json(TOKENS)))
    assert made.policies["tokenizers"]["base"]["renamed"] == renamed
    assert bool(told(made)) == (renamed > 2)
    if renamed > 2:
        assert f"{renamed} numbers whose token post lacks (0 't0', not '<chat 0>'" in told(made)[0]


def test_added_tokens_count(tmp_path: Path) -> None:
    added = [{"id": 150, "content": "<|user|>"}]
    swapped = as_json(TOKENS, added_tokens=[{"id": 7, "content": "t9"}, {"id": True, "content": "t3"}, 5])
    made = plan(three(tmp_path, post=as_json(TOKENS, added_tokens=added), base=as_json(TOKENS), new_base=swapped))
    assert made.policies["tokenizers"]["new_base"]["moved_examples"] == [{"token": "t9", "post": 9, "new_base": 7}]
    assert list(made.policies["tokenizers"]) == ["new_base"]  # what post adds to a number is no other token of base's


def test_grown_vocabularies_are_no_difference_but_moved_ones_are(tmp_path: Path) -> None:
    folders = three(tmp_path, base=as_json(TOKENS), new_base=as_json(TOKENS))
    folders["post"] = folder(tmp_path / "more", as_json(TOKENS | {"<tool>": 200}), rows=201)
    assert "tokenizers" not in plan(folders, vocab="extend").policies
    folders["post"] = folder(tmp_path / "moved", as_json(SWAPPED | {"<tool>": 200}), rows=201)
    assert "base and new_base have 2 of 200" in told(plan(folders, vocab="extend"))[0]


LINES = "\n".join(TOKENS)


@pytest.mark.parametrize(
    ("ours", "theirs", "moved"),
    [
        ({"vocab.json": json.dumps(TOKENS)}, {"vocab.json": json.dumps(SWAPPED)}, 2),
        ({"vocab.json": json.dumps(TOKENS)}, as_json(SWAPPED), 2),
        ({"vocab.txt": LINES}, {"vocab.txt": LINES.replace("t7\n", "x\n").replace("t9\n", "t7\n")}, 1),
        (as_json(TOKENS), {"vocab.txt": LINES}, 0),
        ({"vocab.json": json.dumps(TOKENS)}, {"vocab.json": json.dumps(TOKENS), "added_tokens.json": '{"t3": 4}'}, 1),
        (as_json(TOKENS), {"tokenizer.json": "[" * 90 + "]" * 90}, 0),
        (as_json(TOKENS), {"tokenizer.json": json.dumps({"model": {"vocab": [["t1", -1.0], ["t0", -2.0], 3]}})}, 2),
        ({"tokenizer.model": "a"}, {"tokenizer.model": "b"}, 0),
        (as_json(TOKENS), {}, 0),
    ],
)
def test_files_that_list_tokens(tmp_path: Path, ours: dict[str, str], theirs: dict[str, str], moved: int) -> None:
    made = plan(three(tmp_path, post=ours, base=ours, new_base=theirs))
    assert made.policies.get("tokenizers", {}).get("new_base", {"moved": 0})["moved"] == moved


def test_equal_files_are_not_parsed_and_others_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = tokenizers.token_numbers
    monkeypatch.setattr(tokenizers, "token_numbers", lambda files: read.append(files) or original(files))
    folders = three(tmp_path, post=as_json(TOKENS), base=as_json(TOKENS), new_base=as_json(TOKENS))
    assert told(plan(folders)) == []
    assert read == []
    (folders["new_base"] / "tokenizer.json").write_text(as_json(SWAPPED)["tokenizer.json"])
    assert told(plan(folders))
    assert told(plan(folders, alpha=0.5))
    assert len(read) == 2
    (folders["base"] / "tokenizer.json").write_text(as_json(SWAPPED)["tokenizer.json"])
    assert "base and new_base have 2" in told(plan(folders))[0]
    assert len(read) == 4


def test_deltas_as_folders(tmp_path: Path) -> None:
    """An extracted delta has post's tokenizer, and its base is no checkpoint that has one."""
    folders = three(tmp_path, post=as_json(TOKENS), base=as_json(SWAPPED), new_base=as_json(SWAPPED))
    made = paramdelta.extract(post=folders["post"], base=folders["base"], out=tmp_path / "delta")
    (text,) = [w for w in made.warnings if w.startswith("tokenizers: ")]
    assert text.startswith("tokenizers: base has 2 of 200")
    assert "paramdelta merge --vocab align" in text
    made = paramdelta.apply(new_base=folders["new_base"], deltas=[tmp_path / "delta"], out=tmp_path / "out")
    (text,) = [w for w in made.warnings if w.startswith("tokenizers: ")]
    assert text.startswith("tokenizers: new_base has 2 of 200")


def test_the_command_line_tells_and_the_record_stays(tmp_path: Path) -> None:
    folders = three(tmp_path, post=as_json(TOKENS), base=as_json(TOKENS), new_base=as_json(SWAPPED | {"\x1b[2Jx": 200}))
    names = [f"--{role.replace('_', '-')}={path}" for role, path in folders.items()]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "paramdelta", *more], capture_output=True, text=True, timeout=60)

    done = run("merge", *names, f"--out={tmp_path / 'out'}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["warnings"][0].startswith("tokenizers: new_base has 2 of 200 tokens")
    assert json.loads(done.stdout)["policies"]["tokenizers"]["new_base"]["moved"] == 2
    assert "tokenizers" not in json.loads((tmp_path / "out" / "paramdelta.json").read_text())["policies"]
    assert run("verify", str(tmp_path / "out"), *names).returncode == 0
    assert "tokenizers: new_base has 2" in " ".join(run("plan", *names).stderr.split())
