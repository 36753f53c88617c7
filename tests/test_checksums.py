"""Every merge records the CRC-32 of every tensor, however its work was cut, ordered or interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hand_made_work import sample
from recorded_sums import check_sums, recorded
from safetensors.numpy import save_file

import paramdelta
from paramdelta import _cpu, checksums, engine, publish, resuming, segments
from paramdelta.plan import make_plan, make_request, open_all
from paramdelta.plan.work import EXTENT, Work

ROLES = ("post", "base", "new_base")
SEGMENT = 1 << 18


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    publish.kept.clear()


def write(root: Path) -> dict[str, Path]:
    """Write three checkpoints of two shards with tensors of all sizes: many segments, one, a few bytes, none at all."""
    shapes = {"a.weight": (256, 1100), "b.weight": (130, 256), "c.weight": (3, 1), "empty": (0, 5), "scalar": ()}
    folders = {}
    for i, role in enumerate(ROLES):
        rng = np.random.default_rng([9, i])
        folder = root / role
        folder.mkdir(parents=True)
        tensors = {n: np.asarray(rng.standard_normal(s)).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
        tensors["same"] = np.zeros(100, np.float32)
        tensors["integers"] = np.arange(1000, dtype=np.int32)
        parts = [{n: t for n, t in tensors.items() if (n == "b.weight") == second} for second in (False, True)]
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name, metadata={"format": "pt"})
        weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
        folders[role] = folder
    return folders


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"format": "fp8-block", "max_shard_size": 100_000},
    {"format": "fp8-channel"},
    {"format": "fp8-tensor"},
    {"format": "nvfp4", "alpha": 0.5},
    {"format": "int4"},
    {"dtype": "f32", "max_shard_size": 50_000},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_record_is_right_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    folders = write(tmp_path)
    found = []
    variants = _cpu.available_isas()
    for number, (threads, isa) in enumerate([(1, variants[0]), (2, variants[len(variants) // 2]), (5, variants[-1])]):
        if number:
            monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT // number))
        out = tmp_path / str(number)
        paramdelta.merge(**folders, out=out, threads=threads, isa=isa, memory=threads << 19, **options)
        check_sums(out)
        found.append(digests(out))
    assert found[0] == found[1] == found[2]


def with_extents(work: Work, tensors: int) -> Work:
    """Return work whose every span is a tensor of its own."""
    assert len(work.spans) == tensors
    extents = np.zeros(tensors, EXTENT)
    items = [engine_dtype_bytes(int(code)) for code in work.spans["out_dtype"]]
    extents["begin"], extents["file"] = work.spans["out_offset"], work.spans["out_file"]
    extents["end"] = extents["begin"] + work.spans["count"] * items
    extents["tensor"] = work.spans["tensor"]
    return dataclasses.replace(work, extents=extents)


def engine_dtype_bytes(code: int) -> int:
    from paramdelta.dtypes import DTYPES

    return DTYPES[code].bits // 8


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_the_engine_sums_up_what_it_writes(tmp_path: Path, threads: int, isa: str) -> None:
    builder = sample(tmp_path)
    work = with_extents(builder.build(), builder.tensors)
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    options = engine.EngineOptions(threads=threads, isa=isa, memory=threads << 18)
    result = engine.run(work, arrays, tensors=builder.tensors, options=options)
    assert result.checksums is not None
    sizes = (work.extents["end"] - work.extents["begin"]).tolist()
    wanted = [
        f"{zlib.crc32(bytes(builder.outputs[row['file']][row['begin'] : row['end']])):08x}" for row in work.extents
    ]
    assert checksums.spelled(result.checksums, sizes) == wanted
    # Into nothing, only sums come of it.
    nothing = engine.run(work, [size for _, size in work.outputs], tensors=builder.tensors, options=options)
    assert nothing.checksums == result.checksums
    without = dataclasses.replace(work, extents=work.extents[:0])
    assert engine.run(without, arrays, tensors=builder.tensors, options=options).checksums is None


@pytest.mark.parametrize("wrong", [("file", 7), ("tensor", 10_000), ("tensor", -1), ("begin", -5), ("end", 1 << 40)])
def test_extents_that_fit_nothing_are_refused(tmp_path: Path, wrong: tuple[str, int]) -> None:
    builder = sample(tmp_path)
    work = with_extents(builder.build(), builder.tensors)
    work.extents[wrong[0]][-1] = wrong[1]
    with pytest.raises(ValueError, match=r"extent \d+: out of order or out of range"):
        engine.run(work, [size for _, size in work.outputs], tensors=builder.tensors)


def test_segments_contribute_in_any_order(tmp_path: Path) -> None:
    folders = write(tmp_path)
    request = make_request(**folders, format="fp8-channel")
    plan = make_plan(request, *open_all(request))
    work, _ = engine.settle(plan.work, tensors=len(plan.names))
    sizes = [size for _, size in work.outputs]
    whole = engine.carry_out(work, sizes, tensors=len(plan.names)).checksums
    parts = [
        engine.carry_out(part.work, sizes, tensors=len(plan.names)).checksums
        for part in segments.cut(work, SEGMENT // 16)
    ]
    assert len(parts) > 5
    random.Random(1).shuffle(parts)
    nbytes = plan.layout.nbytes.tolist()
    assert whole is not None
    assert checksums.spelled(checksums.combined(parts) or {}, nbytes) == checksums.spelled(whole, nbytes)
    assert checksums.combined([*parts, None]) is None


class CutShortError(Exception):
    """What stops a run here."""


def cut_short(monkeypatch: pytest.MonkeyPatch, count: int, **request: Any) -> None:
    """Let a run carry out ``count`` segments, then fail."""
    with monkeypatch.context() as patched:
        done, left = engine.carry_out, [count]

        def carry_out(*arguments: Any, **options: Any) -> engine.RunResult:
            if not left[0]:
                raise CutShortError
            left[0] -= 1
            return done(*arguments, **options)

        patched.setattr(resuming.engine, "carry_out", carry_out)
        with pytest.raises(CutShortError):
            paramdelta.merge(**request)


@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False)])
def test_a_continued_merge_is_right_whatever_was_chosen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, after: bool
) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT // 2))
    folders = write(tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "whole", checksums=after)
    read: list[int] = []
    monkeypatch.setattr(checksums, "read", lambda *a, _read=checksums.read, **k: (read.append(1), _read(*a, **k))[1])
    cut_short(monkeypatch, 3, **folders, out=tmp_path / "out", checksums=before)
    report = paramdelta.merge(**folders, out=tmp_path / "out", checksums=after)
    assert report.resumed_bytes > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    # Only sums that an earlier run did not keep are made by reading the output again.
    assert bool(read) == (after and not before)
    if after:
        check_sums(tmp_path / "out")
    else:
        assert "checksums" not in json.loads((tmp_path / "out" / "paramdelta.json").read_text())


def test_a_merge_killed_and_continued(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    environment = os.environ | {"PARAMDELTA_SEGMENT_BYTES": str(SEGMENT // 16)}
    inputs = [f"--{role.replace('_', '-')}={folder}" for role, folder in folders.items()]
    command = [sys.executable, "-m", "paramdelta", "merge", *inputs, f"--out={out}", "--quiet", "--threads=1"]
    journal = tmp_path / ".out.partial" / "journal"
    for _ in range(5):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not out.exists():
            break
        shutil.rmtree(out)  # it was done first
    assert journal.read_bytes().count(b'"segment"') > 2
    subprocess.run(command, env=environment, check=True)
    check_sums(out)


def test_without_checksums_the_record_is_what_it_was(tmp_path: Path) -> None:
    folders = write(tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "with")
    paramdelta.merge(**folders, out=tmp_path / "without", checksums=False)
    texts = [json.loads((tmp_path / name / "paramdelta.json").read_text()) for name in ("with", "without")]
    assert texts[0].pop("checksums") == recorded(tmp_path / "with")
    assert texts[0] == texts[1]
    command = [sys.executable, "-m", "paramdelta", "merge", "--quiet", "--no-checksums", f"--out={tmp_path / 'cli'}"]
    subprocess.run([*command, *(f"--{r.replace('_', '-')}={f}" for r, f in folders.items())], check=True)
    assert digests(tmp_path / "cli") == digests(tmp_path / "without")
