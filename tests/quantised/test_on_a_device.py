"""Quantised merges through the stage of csrc/cuda, compiled for the host: the folders are those of the processor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from quantised_merges import Case, Folders, folder_bytes
from test_same_bytes import WIDE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))

import cuda_on_host

import paramdelta
from paramdelta import engine, merging
from paramdelta.plan import make_request

pytestmark = pytest.mark.skipif(cuda_on_host.why_not() is not None, reason=str(cuda_on_host.why_not()))


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_folders_are_the_same(case: Case, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    sources = folders_of(case).sources()
    paramdelta.merge(**sources, out=tmp_path / "cpu", **case.options)
    stage = cuda_on_host.module().stage(0)
    for number, memory in enumerate((None, 1 << 18)):
        request = make_request(**sources, out=tmp_path / f"device-{number}", **case.options)
        options = engine.EngineOptions(stage=stage, device="cuda:0", threads=2, memory=memory)
        merging.run_merge(merging.prepare(request), options=options)
        assert folder_bytes(tmp_path / f"device-{number}") == folder_bytes(tmp_path / "cpu"), memory
