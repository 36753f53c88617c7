"""A merge that is cut short continues where it was: the same bytes, nothing done twice, never another merge's work."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import paramdelta
from paramdelta import engine, publish, resuming, segments
from paramdelta.errors import InputError, NonFiniteError, StorageError
from paramdelta.plan import make_plan, make_request, open_all

SEGMENT = 1 << 20
ROLES = ("post", "base", "new_base")


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))
    yield
    publish.kept.clear()


def write(root: Path, *, seed: int = 0, inf: bool = False) -> dict[str, Path]:
    """Write three checkpoints of two shards: 4 MiB and 2 MiB of bf16, one tensor of three segments."""
    folders = {}
    for i, role in enumerate(ROLES):
        rng = np.random.default_rng([seed, i])
        folder = root / role
        folder.mkdir(parents=True)
        tensors = {
            "a.weight": rng.standard_normal((1536, 1024)),
            "b.weight": rng.standard_normal((512, 1024)),
            "c.weight": rng.standard_normal((1024, 1024)),
        }
        if inf and role == "post":
            tensors["c.weight"][0, 0] = np.inf
        shards = {"a.weight": 1, "b.weight": 1, "c.weight": 2}
        names = {n: f"model-{k:05d}-of-00002.safetensors" for n, k in shards.items()}
        for file in sorted(set(names.values())):
            part = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items() if names[n] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "tie_word_embeddings": True}))
        folders[role] = folder
    return folders


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class CutShortError(Exception):
    """What stops a run here."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a run carry out ``count`` segments, then fail."""
    done = engine.carry_out
    left = [count]

    def carry_out(*arguments: Any, **options: Any) -> engine.RunResult:
        if not left[0]:
            raise CutShortError
        left[0] -= 1
        return done(*arguments, **options)

    monkeypatch.setattr(resuming.engine, "carry_out", carry_out)


def cut_short(monkeypatch: pytest.MonkeyPatch, count: int, **request: Any) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, count)
        with pytest.raises(CutShortError):
            paramdelta.merge(**request)


@pytest.mark.parametrize("options", [{}, {"format": "fp8-block"}, {"format": "nvfp4", "alpha": 0.5}], ids=str)
def test_segments_are_the_whole_work(tmp_path: Path, options: dict[str, Any]) -> None:
    folders = write(tmp_path)
    request = make_request(**folders, **options)
    plan = make_plan(request, *open_all(request))
    work, _ = engine.settle(plan.work, tensors=len(plan.names))
    whole = [np.zeros(size, np.uint8) for _, size in work.outputs]
    engine.carry_out(work, whole, tensors=len(plan.names))
    for limit in (1 << 18, SEGMENT, 1 << 30):
        parts = segments.cut(work, limit)
        pieces = [np.zeros(size, np.uint8) for _, size in work.outputs]
        for segment in parts:
            before = [piece.copy() for piece in pieces]
            engine.carry_out(segment.work, pieces, tensors=len(plan.names))
            changed = {i for i, (a, b) in enumerate(zip(before, pieces, strict=True)) if not np.array_equal(a, b)}
            assert changed <= set(segment.files)
        assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))
        assert max(segment.nbytes for segment in parts) <= limit + (1 << 18)


@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (3, {}), (5, {}), (1, {"format": "fp8-tensor"}), (2, {"format": "fp8-tensor"})],
    ids=str,
)
def test_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, options: dict[str, Any]
) -> None:
    folders = write(tmp_path)
    whole = paramdelta.merge(**folders, out=tmp_path / "whole", **options)
    cut_short(monkeypatch, count + bool(options), **folders, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    report = paramdelta.merge(**folders, out=tmp_path / "out", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert report.resumed_bytes > 0
    assert report.bytes_written <= whole.bytes_written - report.resumed_bytes
    # What is finished is not read again, and a measuring pass not done again.
    assert report.bytes_read < whole.bytes_read * (1 - report.resumed_bytes / whole.bytes_written) + 10_000
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_another_request_is_refused_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write(tmp_path)
    cut_short(monkeypatch, 2, **folders, out=tmp_path / "out")
    with pytest.raises(InputError, match=r"request\.alphas: .*1\.0.* then, .*0\.5.* now[\s\S]*--restart"):
        paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.5)
    paramdelta.merge(**folders, out=tmp_path / "other", alpha=0.5)
    kept = digests(tmp_path / ".out.partial" / "output")
    with pytest.raises(InputError):
        paramdelta.merge(**folders, out=tmp_path / "out", max_shard_size=1 << 20)
    assert digests(tmp_path / ".out.partial" / "output") == kept  # a refusal takes nothing away
    report = paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.5, restart=True)
    assert report.resumed_bytes == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


@pytest.mark.parametrize("where", ["first", "last"])
def test_changed_inputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    folders = write(tmp_path)
    cut_short(monkeypatch, 2, **folders, out=tmp_path / "out")
    file = folders["post"] / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[2000 if where == "first" else -1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"inputs\.post\.model-00001-of-00002\.safetensors\.{where}_mib"):
        paramdelta.merge(**folders, out=tmp_path / "out")


def test_allowing_more_is_no_other_request(tmp_path: Path) -> None:
    folders = write(tmp_path, inf=True)
    with pytest.raises(NonFiniteError):
        paramdelta.merge(**folders, out=tmp_path / "out")
    report = paramdelta.merge(**folders, out=tmp_path / "out", allow_nonfinite=True)
    assert report.bytes_written == 0
    assert [(row.tensor, row.inf) for row in report.nonfinite] == [("c.weight", 1)]


def test_a_journal_cut_within_a_line_is_used_up_to_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write(tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "whole")
    cut_short(monkeypatch, 4, **folders, out=tmp_path / "out")
    journal = tmp_path / ".out.partial" / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])
    report = paramdelta.merge(**folders, out=tmp_path / "out")
    assert report.resumed_bytes == (len(lines) - 2) * SEGMENT
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_journal_without_its_folder_is_worth_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write(tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "whole")
    cut_short(monkeypatch, 4, **folders, out=tmp_path / "out")
    partial = tmp_path / ".out.partial" / "output"
    for file in partial.iterdir():
        file.unlink()
    partial.rmdir()
    assert paramdelta.merge(**folders, out=tmp_path / "out").resumed_bytes == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_refused_merge_does_not_cost_the_unfinished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write(tmp_path)
    cut_short(monkeypatch, 3, **folders, out=tmp_path / "out")
    with pytest.raises(InputError):
        paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.5)
    with monkeypatch.context() as patched:
        patched.setattr("paramdelta.merging._SPARE_BYTES", 1 << 60)
        with pytest.raises(StorageError, match=r"only .* are free"):
            paramdelta.merge(**folders, out=tmp_path / "out")
    assert paramdelta.merge(**folders, out=tmp_path / "out").resumed_bytes == 3 * SEGMENT


def test_an_output_file_that_is_gone_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write(tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "whole")
    cut_short(monkeypatch, 5, **folders, out=tmp_path / "out")
    (tmp_path / ".out.partial" / "output" / "model-00001-of-00002.safetensors").unlink()
    assert paramdelta.merge(**folders, out=tmp_path / "out").resumed_bytes == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_second_merge_into_the_same_folder_waits_for_nobody(tmp_path: Path) -> None:
    folders = write(tmp_path)
    with (
        publish.Staging(tmp_path / "out"),
        pytest.raises(StorageError, match=r"out: another merge is writing it \(its folder .*\.out\.partial is locked"),
    ):
        paramdelta.merge(**folders, out=tmp_path / "out")


def test_killed_at_random_instants(tmp_path: Path) -> None:
    folders = write(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    inputs = [f"--{role.replace('_', '-')}={folder}" for role, folder in folders.items()]

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-m", "paramdelta", "merge", *inputs, f"--out={folder}", "--quiet", "--threads=1"]

    environment = os.environ | {"PARAMDELTA_SEGMENT_BYTES": str(SEGMENT // 8)}
    subprocess.run(command(whole), check=True, env=environment)
    random_ = random.Random(0)
    kills = 0
    latest = 0.6  # seconds; earlier where a merge is done by then
    for _ in range(30):
        process = subprocess.Popen(command(out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(random_.uniform(latest / 3, latest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if out.exists():  # whenever it is there, it is whole
            assert digests(out) == digests(whole)
            shutil.rmtree(out)
            latest = max(latest * 0.8, 0.1)
        if kills == 8:
            break
    if not out.exists():
        subprocess.run(command(out), check=True, env=environment)
    assert kills == 8
    assert digests(out) == digests(whole)
