"""Quantised checkpoints on the command line: refusals, exit codes, documents of errors, tables, and inspect."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bridged_folders import BLOCKS, store, weights
from quantised_folders import folder_of

from paramdelta.cli import main

Run = Callable[..., tuple[int, str, str]]
Tensors = dict[str, tuple[str, tuple[int, ...]]]
ROLES = ("post", "base", "new_base")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command in this process; return its exit code and what it wrote to either stream."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["paramdelta", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        streams = capsys.readouterr()
        return int(ended.value.code or 0), streams.out, streams.err

    yield run_command
    for number, handler in handlers.items():
        signal.signal(number, handler)


def inputs(*, out: bool = True) -> list[str]:
    named = [("--post", "post"), ("--base", "base"), ("--new-base", "new_base")] + ([("--out", "out")] if out else [])
    return [word for pair in named for word in pair]


def toys(root: Path, how: str = "separate fp8") -> None:
    for seed, role in enumerate(ROLES):
        store(root / role, weights(seed), how)


# -------------------------------------------------------------------------------------------------------- refusals

N = "model.layers.0.mlp.up_proj"
PLAIN: Tensors = {f"{N}.weight": ("BF16", (256, 256)), "model.embed_tokens.weight": ("BF16", (32, 256))}
GOOD: Tensors = {**PLAIN, f"{N}.weight": ("F8_E4M3", (256, 256)), f"{N}.weight_scale_inv": ("F32", (2, 2))}
BARE: Tensors = {**GOOD, f"{N}.down.weight": ("F8_E4M3", (256, 256))}
HOPELESS = {"quant_method": "gptq", "bits": 4}

REFUSED: dict[str, tuple[Tensors, dict[str, Any] | None, str, str]] = {
    "a scale is missing": (BARE, BLOCKS, "but has no scale", "--allow-unscaled"),
    "a grid does not fit": (
        {**GOOD, f"{N}.weight_scale_inv": ("F32", (2, 3))},
        BLOCKS,
        "has a scale of shape [2, 3], which does not fit the weight's [256, 256]; expected [2, 2]",
        "dequantise it first",
    ),
    "a config of another family": (GOOD, {"quant_method": "mxfp4"}, "allows mxfp4", "dequantise it first"),
    "gptq": (PLAIN, HOPELESS, "Differences of such codes mean nothing", "use the checkpoint it was made from"),
    "awq": (PLAIN, {"quant_method": "awq"}, "it folds a smoothing scale into other layers", "it was made from"),
    "gguf": (PLAIN, {"quant_method": "gguf"}, "its blocks mix several code books", "it was made from"),
    "bitsandbytes": (PLAIN, {"quant_method": "bitsandbytes"}, "blocks of one release of one library", "made from"),
    "a method that nobody knows": (PLAIN, {"quant_method": "qq"}, "quant_method 'qq' is not known", "bf16 release"),
    "nothing is quantised": (PLAIN, BLOCKS, "but none of its tensors is", "take the quantisation config out"),
}


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("role", ["post", "new_base"])
@pytest.mark.parametrize(("tensors", "config", "problem", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line_before_anything_is_written(
    tensors: Tensors,
    config: dict[str, Any] | None,
    problem: str,
    remedy: str,
    role: str,
    command: str,
    tmp_path: Path,
    run: Run,
) -> None:
    for other in ROLES:
        (tmp_path / other).mkdir()
        held, said = (tensors, config) if other == role else (PLAIN, None)
        folder_of(tmp_path / other, held, said)
    code, out, err = run(command, *inputs(), "--json")
    assert (code, err) == (2, "")
    document = json.loads(out)
    assert (document["kind"], document["error"], document["exit_code"]) == ("error", "PlanError", 2)
    (complaint,) = document["complaints"]
    assert str(tmp_path / role) not in complaint["problem"]
    assert complaint["subject"].startswith(str(tmp_path / role)) or complaint["subject"].startswith(role)
    assert problem in complaint["problem"]
    assert remedy in complaint["remedy"]
    assert not (tmp_path / "out").exists()


def test_rows_of_a_quantised_vocabulary_cannot_be_added(tmp_path: Path, run: Run) -> None:
    for role, rows in zip(ROLES, (40, 32, 32), strict=True):
        (tmp_path / role).mkdir()
        embedding = {"model.embed_tokens.weight": ("F8_E4M3", (rows, 256))}
        scale = {"model.embed_tokens.weight_scale_inv": ("F32", (1, 2))}
        folder_of(tmp_path / role, {**GOOD, **embedding, **scale}, BLOCKS)
    code, out, _ = run("merge", *inputs(), "--vocab", "extend", "--json")
    assert code == 2
    (complaint,) = json.loads(out)["complaints"]
    assert "rows of quantised tensors cannot be added one by one, because they share scales" in complaint["problem"]


def test_wrong_options_are_told_together_and_in_words(tmp_path: Path, run: Run) -> None:
    toys(tmp_path)
    code, out, err = run("merge", *inputs(), "--format", "fp9", "--scale-type", "f8", "--block-size", "x")
    assert (code, out) == (2, "")
    assert all(option in err for option in ("--format", "--scale-type", "--block-size"))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- merging


def test_a_merge_that_loses_too_much_is_not_published(tmp_path: Path, run: Run) -> None:
    toys(tmp_path, "separate")
    lossy = ("--format", "mxfp4", "--max-quant-error")
    code, out, err = run("merge", *inputs(), *lossy, "0.01")
    assert code == 3
    assert "requantising lost more than 1.000% of a tensor's norm; nothing was published" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "new_base", "post"]
    code, out, _ = run("merge", *inputs(), *lossy, "0.01", "--json")
    assert (code, json.loads(out)["error"], json.loads(out)["exit_code"]) == (3, "PrecisionError", 3)
    assert not (tmp_path / "out").exists()
    code, out, _ = run("merge", *inputs(), *lossy, "0.5", "--json")
    assert code == 0
    (quantised,) = json.loads(out)["quantised"]
    assert (quantised["format"], quantised["tensors"]) == ("mxfp4", 9)
    assert 0.05 < quantised["relative_error"] < 0.2


def test_tables_tell_formats_and_losses(tmp_path: Path, run: Run) -> None:
    toys(tmp_path)
    code, out, _ = run("merge", *inputs(), "--format", "fp8-channel")
    assert code == 0
    assert "9 weights in fp8-channel" in out
    assert "lost by quantising" in out
    assert "all 9 weights" in out
    code, out, _ = run("verify", "out", *inputs(out=False))
    assert code == 0
    assert "none: bit-equal" in out


# -------------------------------------------------------------------------------------------------------- inspect


def test_inspect_tells_what_is_quantised(tmp_path: Path, run: Run) -> None:
    toys(tmp_path)
    told = json.loads(run("inspect", "post", "--json")[1])
    assert told["formats"] == {"fp8-block": {"weights": 9, "parameters": 9 * 128 * 256}}
    assert told["parameters"] == 9 * 128 * 256 + 8
    assert "9 × fp8-block (blocks of 128×128, scales F32)" in told["quantised"]
    assert (told["calibration_tensors"], told["problems"]) == (0, [])
    text = run("inspect", "post")[1]
    assert "quantised weights" in text
    assert "fp8-block" in text


def test_inspect_counts_nibbles_as_parameters(tmp_path: Path, run: Run) -> None:
    toys(tmp_path, "blocks")
    told = json.loads(run("inspect", "post", "--json")[1])
    assert told["formats"] == {"mxfp4": {"weights": 2, "parameters": 9 * 128 * 256}}
    assert told["parameters"] == 9 * 128 * 256 + 8


def test_inspect_tells_what_no_merge_can_treat(tmp_path: Path, run: Run) -> None:
    (tmp_path / "gptq").mkdir()
    folder_of(tmp_path / "gptq", PLAIN, HOPELESS)
    told = json.loads(run("inspect", "gptq", "--json")[1])
    assert "gptq" in told["quantised"]
    (problem,) = told["problems"]
    assert "Differences of such codes mean nothing" in problem
    plain = json.loads(run("inspect", "gptq", "--json")[1])
    assert plain["formats"] == {}
