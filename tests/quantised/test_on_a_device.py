"""Quantised merges through the stage of csrc/cuda, compiled for the host: the folders are those of the processor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from quantised_merges import Case, Folders, folder_bytes
from test_same_bytes import WIDE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))

import cuda_on_host

import paramdelta
from paramdelta import engine, merging
from paramdelta.memory import DeviceMemory
from paramdelta.plan import make_request
from paramdelta.streaming import into_memory

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


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_codes_and_scales_are_made_in_the_memory_of_the_device(
    case: Case, folders_of: Callable[[Case], Folders], tmp_path: Path
) -> None:
    """Together, and one plane without the other, as batches of a stream may have them. What is not written stays."""
    sources = folders_of(case).sources()
    expected = dict(paramdelta.stream(**sources, **case.options))
    plan = merging.prepare(make_request(**sources, out=None, **case.options))
    stage = cuda_on_host.module().stage(0)
    every = range(len(plan.names))
    for memory, batches in ((None, [every]), (1 << 18, [every[::2], every[1::2]])):
        options = engine.EngineOptions(stage=stage, device="cuda:0", threads=2, memory=memory)
        work, _ = engine.settle(plan.work, tensors=len(plan.names), options=options)
        for batch in batches:
            arrays = [np.full(plan.nbytes_of(t) + 2, 0xA5, np.uint8) for t in batch]
            there = [DeviceMemory(a.__array_interface__["data"][0] + 1, a.nbytes - 2) for a in arrays]
            part = into_memory(work, batch, [memory.nbytes for memory in there])
            engine.run(part, there, tensors=len(plan.names), options=options)
            for tensor, array in zip(batch, arrays, strict=True):
                name = plan.names[tensor]
                assert array[1:-1].tobytes() == expected[name].tobytes(), name
                assert (array[0], array[-1]) == (0xA5, 0xA5), f"{name}: written beyond its ends"
