"""Names that a terminal would obey, or that take the reader in: shown escaped and cut, and whole in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bounded import run
from hostile_folders import INDEX, SINGLE, WEIGHT, inputs, tensor, three, write, write_json

NAMES = {
    "escape": "\x1b[2J\x1b[31mevil",
    "title": "\x1b]0;evil\x07",
    "newline": "a\nerror: all is well\r",
    "bidi": "a\u202egnihton\u2066",
    "line separator": "a\u2028b\x85c",
    "nul": "a\x00b",
    "csi": "a\x9b2J",
    "zero width": "a\u200bb\ufeff",
    "private": "a\ue000\U000f0000",
    "markup": "[bold red]evil :skull:",
    "empty": "",
    "long": "x" * 1_000_000,
    "path": "../../etc/passwd",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_tensors(tmp_path: Path, kind: str) -> None:
    name = NAMES[kind]
    folders = three(tmp_path)
    bad = write(tmp_path / "bad", {WEIGHT: tensor([4, 4]), name: tensor([2], 32)})
    for command in (("inspect", bad), ("plan", *inputs(folders | {"post": bad}))):
        outcome = run(*command)
        outcome.check_terminal()
        assert len(outcome.out + outcome.err) < 20_000
    allowed = ("--copy-from", "post")
    same = inputs(dict.fromkeys(folders, bad))
    assert run("merge", *same, "--out", tmp_path / "out", *allowed).code == 0
    verified = run("verify", tmp_path / "out", *same)
    verified.check_terminal()
    assert verified.code == 0


@pytest.mark.parametrize("kind", [k for k in NAMES if k not in ("long", "nul", "empty", "path")])
def test_names_of_files_and_folders(tmp_path: Path, kind: str) -> None:
    name = NAMES[kind]
    folders = three(tmp_path)
    bad = write(tmp_path / f"bad{name}")
    for file in (f"tokenizer{name}.json", f"LICENSE{name}", f"{name}.py"):
        (bad / file).write_text("x")
    (bad / f"{name}.safetensors").write_bytes(b"")
    for command in (("inspect", bad), ("plan", *inputs(folders | {"post": bad, "new_base": bad}))):
        outcome = run(*command)
        assert outcome.code == 0
        outcome.check_terminal()
    label = run("inspect", bad, "--json").document()["name"]
    assert label == bad.name


@pytest.mark.parametrize("kind", NAMES)
def test_values_of_configs(tmp_path: Path, kind: str) -> None:
    text = NAMES[kind]
    fields = {"model_type": text, "architectures": [text], text: text, "eos_token_id": text, "vocab_size": text}
    folders = three(tmp_path)
    bad = write(tmp_path / "bad", config=fields | {"quantization_config": {"quant_method": text, "fmt": text}})
    run("plan", *inputs(folders | {"post": bad})).check_terminal()
    assert run("inspect", bad, "--json").document()["model_type"] == text


@pytest.mark.parametrize("kind", [k for k in NAMES if k not in ("nul", "path", "long")])
def test_names_in_an_index(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "a")
    write_json(folder / INDEX, {"weight_map": {WEIGHT: SINGLE, NAMES[kind]: f"x{NAMES[kind]}", "b": NAMES[kind] + "/"}})
    outcome = run("inspect", folder)
    assert outcome.code == 2
    outcome.check_terminal()


@pytest.mark.parametrize("where", ["name", "dtype", "metadata"])
def test_lone_surrogates(tmp_path: Path, where: str) -> None:
    fields = tensor([2], 0, 4, "\ud800" if where == "dtype" else "BF16")
    header = {"\ud800" if where == "name" else "a": fields}
    whole = {"__metadata__": {"\udfff": "x"}, **header} if where == "metadata" else header
    outcome = run("inspect", write(tmp_path / "a", json.dumps(whole), data=4))
    assert outcome.code == 2
    assert "lone surrogate" in outcome.err


METADATA = ("5", '"x"', "[]", '{"a": 5}', '{"a": {}}', '{"a": "b", "a": "c"}', "null", '{"dtype": "BF16"}')


@pytest.mark.parametrize("text", METADATA)
def test_metadata(tmp_path: Path, text: str) -> None:
    header = '{"__metadata__": ' + text + "," + json.dumps({"a": tensor([2])})[1:]
    outcome = run("inspect", write(tmp_path / "a", header, data=4), "--json")
    sound = text == '{"dtype": "BF16"}'
    assert outcome.code == (0 if sound else 2)
    assert sound or "__metadata__" in outcome.document()["complaints"][0]["problem"]
