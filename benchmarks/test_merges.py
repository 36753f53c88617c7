"""Whole merges under pytest-benchmark: ``python -m pytest benchmarks/test_merges.py``. The contenders of
``benchmarks.whole`` in tmpfs (or the test folder), PARAMDELTA_BENCH_SIZE bytes each (default 200MB). No test asserts
a time, and contenders do not take turns here: ratios are for ``python -m benchmarks.run`` to tell."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data, process, whole
from benchmarks.machine import ROOT, threads_allowed
from benchmarks.peers import mergekit

SIZE = os.environ.get("PARAMDELTA_BENCH_SIZE", "200MB")


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with data.workspace(whole.default_places(None)[0], need=data.bytes_needed(SIZE)) as folder:
        yield folder


@pytest.fixture(scope="module")
def folders(scratch: Path) -> data.Folders:
    return data.write_inputs(scratch / "in", SIZE)


@pytest.mark.parametrize(
    "name", ["paramdelta", "copy", "torch script", *(f"mergekit {method}" for method in mergekit.METHODS)]
)
def test_merge(benchmark: Any, scratch: Path, folders: data.Folders, name: str) -> None:
    out, threads = scratch / "out", threads_allowed()
    make = {
        "paramdelta": lambda: whole.ours(folders, out, threads),
        "copy": lambda: whole.copy(folders, out),
        "torch script": lambda: whole.torch_script(folders, out, threads),
    }
    method = name.removeprefix("mergekit ")
    contender = make[name]() if name in make else whole.mergekit_merge(method, folders, out, threads)
    if contender.skipped:
        pytest.skip(contender.skipped)
    usages: list[process.Usage] = []
    benchmark.pedantic(
        lambda: usages.append(process.measure(list(contender.command), env=contender.env, cwd=ROOT)),
        setup=lambda: shutil.rmtree(out, ignore_errors=True),
        rounds=3,
    )
    benchmark.extra_info["command"] = contender.shown
    benchmark.extra_info["peak_rss"] = [usage.peak_rss for usage in usages]
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert written == pytest.approx(folders.nbytes, rel=0.01), "the contender wrote another amount of weights"
