"""Aligned vocabularies by every way a merge can go: streamed, in ranks, cut short and continued, from the command
line; and what becomes of the ids of tokens in configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_folders import read, same, write
from vocabulary_folders import EMBED, Sources, folder_options, sources, three_tokenizers, trained, variant

import paramdelta
from paramdelta import engine, gathering, merging, resuming
from paramdelta.errors import InputError
from paramdelta.plan import make_request
from paramdelta.plan.gathers import AS_START, IN_NEW_BASE, ZEROS, Gather
from paramdelta.ranks import Rank


class CutShortError(Exception):
    """What stops a run here."""


@pytest.fixture
def made(tmp_path: Path) -> Sources:
    return sources(tmp_path, three_tokenizers(), width=512, pads={"post": 64})


def command(made: Sources, *more: str) -> subprocess.CompletedProcess[str]:
    folders = [f"--{role.replace('_', '-')}={path}" for role, path in made.folders.items()]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "paramdelta", *more, *folders, "--vocab=align"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def test_streamed(made: Sources, tmp_path: Path) -> None:
    paramdelta.merge(**folder_options(made), out=tmp_path / "out", vocab="align")
    merged = read(tmp_path / "out")
    for name, values in paramdelta.stream(**folder_options(made), vocab="align", batch_bytes=1 << 16):
        assert same(np.asarray(values), merged.pop(name))
    assert merged == {}


def test_three_ranks(made: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(1 << 16))
    paramdelta.merge(**folder_options(made), out=tmp_path / "one", vocab="align", max_shard_size="200kB")
    for rank in range(3):
        request = make_request(**folder_options(made), out=tmp_path / "out", vocab="align", max_shard_size="200kB")
        gathering.merge_part(merging.prepare(request), Rank(number=rank, world=3))
    gathering.finalize(tmp_path / "out")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_cut_short_and_continued(made: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(1 << 16))
    paramdelta.merge(**folder_options(made), out=tmp_path / "one", vocab="align")
    original, done = engine.carry_out, []

    def cut(*arguments: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == 5:
            raise CutShortError
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(resuming.engine, "carry_out", cut)
        with pytest.raises(CutShortError):
            paramdelta.merge(**folder_options(made), out=tmp_path / "out", vocab="align")
    report = paramdelta.merge(**folder_options(made), out=tmp_path / "out", vocab="align")
    assert report.resumed_bytes > 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_the_plan_says_what_is_paired(made: Sources) -> None:
    done = command(made, "plan")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    found = json.loads(command(made, "plan", "--json").stdout)["policies"]["vocabulary"]
    (delta,) = found["deltas"]
    assert f"post's, {found['tokens']} tokens" in text
    assert f"{delta['in_all']} in all ({delta['moved']} moved)" in text
    assert "only in post (<|only post|>" in text
    assert f"{found['left_out']['new_base']['count']} of new_base (<|new|>" in text


def test_without_the_library_it_says_which_extra(made: Sources, tmp_path: Path) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ImportError")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from paramdelta.cli import main; main()"
    folders = [f"--{role.replace('_', '-')}={path}" for role, path in made.folders.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "plan", *folders, "--vocab=align"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("pip install 'paramdelta[tokenizers]'") == 1


def configs(**by_role: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return by_role


def test_ids_in_configs_are_those_of_the_output(tmp_path: Path) -> None:
    first = trained(specials=("<s>", "</s>", "<pad>"))
    by_role = {
        "post": variant(first, seed=1, added=("<|end|>",)),
        "base": variant(first, seed=2),
        "new_base": variant(first, seed=3, added=("<|stop|>",)),
    }
    plain = sources(tmp_path / "0", by_role)
    post, base, new = (plain.ids(role) for role in ("post", "base", "new_base"))
    stated = configs(
        post={"eos_token_id": [post["</s>"], post["<|end|>"]], "bos_token_id": post["<s>"], "pad_token_id": -1},
        base={"eos_token_id": base["</s>"], "bos_token_id": base["<s>"], "pad_token_id": -1},
        new_base={
            "eos_token_id": new["</s>"],
            "bos_token_id": new["<s>"],
            "pad_token_id": -1,
            "image_token_id": new["<pad>"],
            "text_config": {"sep_token_id": new["<|stop|>"]},
        },
    )
    made = sources(tmp_path, by_role, configs=stated)
    generation = {
        "eos_token_id": [post["<|end|>"], post["</s>"]],
        "bad_words_ids": [[post["<pad>"]], [post["<|end|>"]]],
    }
    (made.folders["post"] / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.5}))

    report = paramdelta.merge(**folder_options(made), out=tmp_path / "by post", vocab="align")
    config = json.loads((tmp_path / "by post" / "config.json").read_text())
    assert config["eos_token_id"] == [post["</s>"], post["<|end|>"]], "post changed it, and new_base has base's"
    assert (config["bos_token_id"], config["pad_token_id"]) == (post["<s>"], -1)
    assert config["image_token_id"] == post["<pad>"]
    assert "sep_token_id" not in config["text_config"]
    assert any("sep_token_id of new_base is '<|stop|>'" in text for text in report.warnings)
    written = (tmp_path / "by post" / "generation_config.json").read_bytes()
    assert written == (made.folders["post"] / "generation_config.json").read_bytes()

    report = paramdelta.merge(**folder_options(made), out=tmp_path / "by new", vocab="align", tokenizer="new-base")
    config = json.loads((tmp_path / "by new" / "config.json").read_text())
    assert config["eos_token_id"] == [new["</s>"]], "what is left of post's"
    assert config["text_config"]["sep_token_id"] == new["<|stop|>"]
    written = json.loads((tmp_path / "by new" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [new["</s>"]], "bad_words_ids": [[new["<pad>"]]], "temperature": 0.5}
    assert report.policies["vocabulary"]["token_ids"]["generation_config.json"]["eos_token_id"] == [
        generation["eos_token_id"],
        [new["</s>"]],
    ]


def test_a_chat_template_that_is_lost_is_told(tmp_path: Path) -> None:
    made = sources(tmp_path, three_tokenizers())
    (made.folders["post"] / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    report = paramdelta.merge(**folder_options(made), out=tmp_path / "by new", vocab="align", tokenizer="new-base")
    assert any("post has a chat template" in text for text in report.warnings)
    assert not (tmp_path / "by new" / "tokenizer_config.json").exists()
    report = paramdelta.merge(**folder_options(made), out=tmp_path / "by post", vocab="align")
    assert not any("chat template" in text for text in report.warnings)


def test_runs_of_rows() -> None:
    new = np.array([0, 1, 2, 3, ZEROS, ZEROS, 9, 10])
    post = np.array([5, 6, 7, ZEROS, 1, 2, 3, 4])
    base = np.array([5, 6, AS_START, ZEROS, ZEROS, ZEROS, AS_START, AS_START])
    here = np.full(8, IN_NEW_BASE)
    assert Gather(start=new, start_in=here, deltas={0: (post, base)}).starts().tolist() == [0, 2, 3, 4, 6]
    here[1] = 0
    assert Gather(start=new, start_in=here, deltas={0: (post, base)}).starts().tolist() == [0, 1, 2, 3, 4, 6]
    assert Gather(start=new[:0], start_in=here[:0], deltas={}).starts().tolist() == []


def fp8_embedding(made: Sources) -> None:
    """Store every embedding in fp8, with a scale for each block of 128 x 128."""
    for number, (role, tensors) in enumerate(made.tensors.items()):
        rows, cols = tensors[EMBED].shape
        rng = np.random.default_rng([9, number])
        stored = {
            **tensors,
            EMBED: rng.standard_normal((rows, cols)).astype(ml_dtypes.float8_e4m3fn),
            f"{EMBED}_scale_inv": rng.uniform(0.1, 1, (-(-rows // 128), cols // 128)).astype(np.float32),
        }
        quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        config = {"model_type": "llama", "tie_word_embeddings": False, "quantization_config": quantisation}
        files = {"tokenizer.json": json.dumps(made.tokenizers[role])}
        made.folders[role] = write(made.folders[role].parent / "fp8" / role, stored, config=config, files=files)


def test_a_quantised_embedding_that_moves_is_refused(tmp_path: Path) -> None:
    moved = sources(tmp_path / "moved", three_tokenizers(), width=128)
    fp8_embedding(moved)
    with pytest.raises(InputError) as caught:
        paramdelta.merge(**folder_options(moved), out=tmp_path / "out", vocab="align")
    assert "--vocab align: rows of quantised tensors cannot be moved one by one" in str(caught.value)
    assert EMBED in str(caught.value)
    alike = sources(tmp_path / "alike", dict.fromkeys(("post", "base", "new_base"), trained()), width=128)
    fp8_embedding(alike)
    paramdelta.merge(**folder_options(alike), out=tmp_path / "out", vocab="align")
    paramdelta.merge(**folder_options(alike), out=tmp_path / "plain")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
