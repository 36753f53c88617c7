"""The command line as a person meets it: real processes, exit codes, what is on which stream, and what is on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paramdelta.demo import write_demo

INPUTS = ("--post", "post", "--base", "base", "--new-base", "new_base")


def run(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paramdelta", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """post, base and new_base below a temporary folder."""
    write_demo(tmp_path, size="tiny")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_merge_then_verify(folder: Path) -> None:
    merged = run("merge", *INPUTS, "--out", "out", cwd=folder)
    assert merged.returncode == 0, merged.stderr
    assert "GB/s" in merged.stdout or "MB/s" in merged.stdout
    verified = run("verify", "out", *INPUTS, cwd=folder)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "bit-equal" in verified.stdout


def test_json_is_one_document(folder: Path) -> None:
    for arguments, kind in (
        (("merge", *INPUTS, "--out", "out"), "merge"),
        (("plan", *INPUTS), "plan"),
        (("inspect", "out"), "checkpoint"),
        (("verify", "out", *INPUTS), "verify"),
        (("demo", "demo"), "demo"),
    ):
        done = run(*arguments, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["version"], document["kind"]) == (1, kind)


def test_quiet_says_nothing(folder: Path) -> None:
    for arguments in (("merge", *INPUTS, "--out", "out"), ("plan", *INPUTS), ("demo", "demo")):
        done = run(*arguments, "--quiet", cwd=folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_plan_writes_nothing(folder: Path) -> None:
    before = listing(folder)
    done = run("plan", *INPUTS, "--out", "out", cwd=folder)
    assert done.returncode == 0
    assert "at least" in done.stdout
    assert listing(folder) == before


def test_bad_input_is_exit_2_with_every_complaint_and_nothing_written(folder: Path) -> None:
    before = listing(folder)
    done = run(
        "merge", "--post", "post", "--base", "nowhere", "--new-base", "new_base", "--out", "post",
        "--alpha", "inf", "--dtype", "bf17", "--max-shard-size", "big", "--memory", "1kB", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--memory: expected at least" in done.stderr
    assert done.stdout == ""
    for text in ("nowhere", "finite", "bf17", "'big'", "is post itself", "nothing was written"):
        assert text in done.stderr
    assert listing(folder) == before


def test_errors_are_json_too(folder: Path) -> None:
    done = run("merge", *INPUTS, "--out", "base", "--json", cwd=folder)
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == 2
    assert any("is base itself" in c["problem"] for c in document["complaints"])


def test_an_existing_output_needs_overwrite(folder: Path) -> None:
    assert run("merge", *INPUTS, "--out", "out", cwd=folder).returncode == 0
    refused = run("merge", *INPUTS, "--out", "out", cwd=folder)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    (folder / "out" / "stale").touch()
    assert run("merge", *INPUTS, "--out", "out", "--overwrite", cwd=folder).returncode == 0
    assert not (folder / "out" / "stale").exists()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_non_finite_results_are_exit_3_and_not_published(folder: Path) -> None:
    shard = sorted((folder / "post").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = max(tensors, key=lambda n: tensors[n].size)
    tensors[name].reshape(-1)[7] = np.inf
    save_file(tensors, shard, metadata={"format": "pt"})
    before = listing(folder)
    done = run("merge", *INPUTS, "--out", "out", cwd=folder)
    assert done.returncode == 3
    assert name in done.stderr
    assert "1 Inf" in done.stderr
    assert "--allow-nonfinite" in done.stderr
    assert listing(folder) == before
    allowed = run("merge", *INPUTS, "--out", "out", "--allow-nonfinite", "--json", cwd=folder)
    assert allowed.returncode == 0
    assert [(n["tensor"], n["inf"]) for n in json.loads(allowed.stdout)["nonfinite"]] == [(name, 1)]


def test_verify_finds_a_changed_byte(folder: Path) -> None:
    assert run("merge", *INPUTS, "--out", "out", cwd=folder).returncode == 0
    shard = sorted((folder / "out").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = run("verify", "out", *INPUTS, "--all", cwd=folder)
    assert done.returncode == 1
    assert "elements differ" in done.stderr


def test_verify_finds_a_changed_file(folder: Path) -> None:
    assert run("merge", *INPUTS, "--out", "out", cwd=folder).returncode == 0
    (folder / "out" / "config.json").write_text("{}")
    (folder / "out" / "extra.bin").touch()
    done = run("verify", "out", *INPUTS, cwd=folder)
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "extra.bin" in done.stderr


def test_options_reach_the_result(folder: Path) -> None:
    done = run(
        "merge", *INPUTS, "--out", "out", "--dtype", "f32", "--alpha", "0.5", "--alpha", "*norm*=0",
        "--max-shard-size", "200kB", "--threads", "1", "--memory", "256KiB", "--isa", "scalar", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shards = sorted((folder / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for s in shards for t in load_file(s).values()} == {np.dtype("f4")}
    assert run("verify", "out", *INPUTS, "--all", cwd=folder).returncode == 0


def test_equal_merges_are_equal_folders(folder: Path) -> None:
    for out, extra in (("one", ["--threads", "1"]), ("two", ["--threads", "3", "--memory", "400KiB"])):
        assert run("merge", *INPUTS, "--out", out, *extra, cwd=folder).returncode == 0
    one, two = folder / "one", folder / "two"
    assert listing(one) == listing(two)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    for text in (path.read_text() for path in one.iterdir() if path.suffix in (".json", ".md")):
        assert str(folder) not in text


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    write_demo(tmp_path, size="200MB")
    before = listing(tmp_path)
    for _ in range(10):  # on a busy machine the merge may be done before the signal arrives
        command = [sys.executable, "-m", "paramdelta", "merge", *INPUTS, "--out", "out", "--threads", "1"]
        command += ["--isa", "scalar", "--alpha", "0.3"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not list(tmp_path.glob(".out.partial/output/*.safetensors")):
            time.sleep(0.002)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=30)
        if not (tmp_path / "out").exists():
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert listing(tmp_path) == before


def test_a_closed_pipe_is_no_traceback(folder: Path) -> None:
    command = f"{sys.executable} -m paramdelta merge {' '.join(INPUTS)} --out out | true"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert (folder / "out" / "paramdelta.json").is_file()


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    done = run("demo", "mine", "--overwrite", cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_instruction_set_of_the_environment_is_checked(folder: Path) -> None:
    done = run("merge", *INPUTS, "--out", "out", cwd=folder, env={**os.environ, "PARAMDELTA_ISA": "mmx"})
    assert done.returncode != 0
    assert "mmx" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_help_teaches(tmp_path: Path) -> None:
    text = run("--help", cwd=tmp_path).stdout
    for word in ("merge", "plan", "inspect", "verify", "demo", "Examples", "Exit codes"):
        assert word in text
    for command in ("merge", "extract", "apply", "plan", "inspect", "verify", "demo"):
        assert "--json" in run(command, "--help", cwd=tmp_path).stdout


def test_info_says_why_a_backend_does_not_run(tmp_path: Path) -> None:
    done = run("info", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["kind"] == "info"
    assert document["backends"]["cpu"]["available"]
    assert "scalar" in document["backends"]["cpu"]["variants"]
    cuda = document["backends"]["cuda"]
    assert cuda["available"] == (cuda["why_not"] is None)
    told = run("info", cwd=tmp_path).stdout
    assert "cpu: scalar" in told
    assert cuda["available"] or f"cuda: not available: {cuda['why_not']}" in told
