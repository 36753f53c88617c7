"""JSON that was made to break a reader: nested without end, numbers that are none, values of every wrong type. Commands
refuse it or carry it along, and what they print themselves stays valid JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bounded import run
from hostile_folders import INDEX, SINGLE, WEIGHT, inputs, nested, tensor, three, write, write_json

DEPTHS = (65, 500, 100_000)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["config.json", INDEX, "hf_quant_config.json", "paramdelta.json"])
def test_documents_nested_deeply(tmp_path: Path, name: str, depth: int) -> None:
    folders = three(tmp_path)
    bad = folders["new_base"]
    if name == "paramdelta.json":
        bad = tmp_path / "out"
        assert run("merge", *inputs(folders), "--out", bad).code == 0
    write_json(bad / name, nested(depth))
    verified = ("verify", bad) if name == "paramdelta.json" else ("plan",)
    outcome = run(*verified, *inputs(folders), "--json", seconds=5, megabytes=150)
    assert outcome.code == 2
    assert any("nested too deeply" in c["problem"] and name in c["subject"] for c in outcome.document()["complaints"])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("where", ["whole", "dtype", "shape", "data_offsets", "unknown", "__metadata__"])
def test_headers_nested_deeply(tmp_path: Path, where: str, depth: int) -> None:
    fields = {**tensor([4, 4]), **({} if where in ("whole", "__metadata__") else {where: 0})}
    text = json.dumps({"a": fields, "b": 1})
    deep = nested(depth)
    text = deep if where == "whole" else text.replace(f'"{where}": 0', f'"{where}": {deep}')
    if where == "__metadata__":
        text = '{"__metadata__": ' + deep + ', "b": 1}'
    outcome = run("inspect", write(tmp_path / "a", text, data=32), seconds=5, megabytes=150)
    assert outcome.code == 2
    assert SINGLE in outcome.err
    outcome.check_terminal()


def test_documents_that_are_only_copied_may_be_anything(tmp_path: Path) -> None:
    folders = three(tmp_path)
    text = nested(100_000, "NaN")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        write_json(folders["post"] / name, text)
    write_json(folders["post"] / "paramdelta.json", text)
    assert run("merge", *inputs(folders), "--out", tmp_path / "out", seconds=5, megabytes=150).code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == text
    assert run("verify", tmp_path / "out", *inputs(folders), seconds=5, megabytes=150).code == 0


NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 4300, "1" + "0" * 400, "-0.0", "1e-999")
FIELDS = ("model_type", "vocab_size", "eos_token_id", "architectures", "tie_word_embeddings", "num_hidden_layers")


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n[:12])
def test_numbers_in_configs(tmp_path: Path, number: str) -> None:
    folders = three(tmp_path)
    text = json.dumps(dict.fromkeys(FIELDS, 0) | {"text_config": {"eos_token_id": 0}}).replace("0", number)
    write_json(folders["post"] / "config.json", text)
    assert run("inspect", folders["post"], "--json").document()["model_type"] is None
    for command in (("plan",), ("merge", "--out", tmp_path / "out")):
        outcome = run(*command, *inputs(folders), "--json")
        assert outcome.code == 0
        outcome.document()
    assert run("verify", tmp_path / "out", *inputs(folders), "--json").document()["problems"] == []


def test_more_digits_than_python_takes(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    write_json(folder / "config.json", '{"vocab_size": ' + "9" * 5000 + "}")
    outcome = run("inspect", folder)
    assert outcome.code == 2
    assert "config.json" in outcome.err
    outcome.check_terminal()


ODD: tuple[Any, ...] = (None, True, -1, 1e308, "", "\x1b[2J", "re:(((", [], {}, [[]], {"a": {"b": [None]}}, ["*"] * 3)
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "targets": []}},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8},
}
METHODS = ("fp8", "mxfp8", "mxfp4", "modelopt", "compressed-tensors", "fbgemm_fp8", "gptq", 5)
FINE = ("weight_block_size", "fmt", "scale_fmt", "activation_scheme", "modules_to_not_convert", "quant_algo", "bits")


@pytest.mark.parametrize("odd", ODD, ids=lambda value: json.dumps(value)[:20])
def test_quantisation_configs_of_wrong_types(tmp_path: Path, odd: Any) -> None:
    """In one process, since it makes thousands of folders' worth of configs: opening, recognising, planning."""
    from paramdelta.checkpoint import describe, open_checkpoint
    from paramdelta.errors import InputError
    from paramdelta.plan import MergeRequest, make_plan, open_all

    folders = three(tmp_path)
    configs = [odd, *({**QUANTISATION, key: odd} for key in QUANTISATION)]
    configs += [{"quant_method": method, key: odd} for method in METHODS for key in FINE]
    group = QUANTISATION["config_groups"]["group_0"]  # type: ignore[index]
    for key in ("weights", "targets", "input_activations", "format"):
        configs.append({**QUANTISATION, "config_groups": {"group_0": {**group, key: odd}}})
    for key in ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic", "actorder"):
        weights = {**group["weights"], key: odd}
        configs.append({**QUANTISATION, "config_groups": {"a": {**group, "weights": weights}}})
    header = {WEIGHT: tensor([4, 4], 0, 16, "F8_E4M3"), f"{WEIGHT}_scale": tensor([4, 1], 16, 24)}
    bad = write(tmp_path / "bad", header)
    for config in configs:
        write_json(bad / "config.json", {"model_type": "toy", "quantization_config": config})
        told = ""
        try:
            json.dumps(describe(open_checkpoint(bad)))
            request = MergeRequest.build(**folders | {"post": bad})
            make_plan(request, *open_all(request))
        except InputError as error:
            told = str(error)
        assert told.replace("\n", "").isprintable()


RECORDS: dict[str, Any] = {
    "no request": {},
    "a request that is a list": {"request": [1]},
    "a request that is a string": {"request": "alphas"},
    "an unknown policy": {"request": {"evil": 1}},
    "a folder": {"request": {"out": "/tmp/evil", "post": "/etc"}},
    "alphas of numbers": {"request": {"alphas": [5]}},
    "an infinite alpha": {"request": {"alphas": ["*=1e999"]}},
    "a huge alpha": {"request": {"alpha": 10**400}},
    "globs of numbers": {"request": {"include": [5]}},
    "renames of numbers": {"request": {"rename_post": [5]}},
    "renames that are broken": {"request": {"rename_post": [["(", "\x1b[2J"]]}},
    "blocks of lists": {"request": {"block_size": [[1], {}]}},
    "a block of many digits": {"request": {"block_size": "9" * 5000}},
    "a size of many digits": {"request": {"max_shard_size": "9" * 5000}},
    "a dtype of a list": {"request": {"dtype": ["bf16"]}},
    "a vocabulary of an object": {"request": {"vocab": {"a": 1}}},
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_say_anything(tmp_path: Path, kind: str) -> None:
    folders = three(tmp_path)
    out = write(tmp_path / "out")
    write_json(out / "paramdelta.json", RECORDS[kind])
    outcome = run("verify", out, *inputs(folders), seconds=5, megabytes=150)
    assert outcome.code == 2
    outcome.check_terminal()
