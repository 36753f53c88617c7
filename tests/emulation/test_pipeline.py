"""Whole merges through nvcc's code, host and device, on the emulated GPU: streams that run beside the caller, memory
that must be page-locked or the device's, calls that fail when they are told to."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hand_made_work import sample
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))

import emulated_cuda

import paramdelta
from paramdelta import engine, merging, publish
from paramdelta.errors import DeviceError
from paramdelta.plan import make_request

REASON = emulated_cuda.why_not()
if os.environ.get("PARAMDELTA_EMULATE") != "all":
    REASON = "nvcc's code takes a minute to translate and compile: make emulate does"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OUT_OF_MEMORY, LAUNCH_FAILURE = 2, 719


@pytest.fixture
def device() -> Iterator[Any]:
    """The emulated device; afterwards it must have all its memory again, and know of no page-locked one."""
    library = emulated_cuda.library()
    library.emulated_reset()
    gc.collect()
    before = library.emulated_memory(0), library.emulated_pinned()  # another test's, which failed
    yield library
    library.emulated_reset()
    gc.collect()
    assert (library.emulated_memory(0), library.emulated_pinned()) == before


def options(**changed: Any) -> engine.EngineOptions:
    return engine.EngineOptions(stage=emulated_cuda.module().stage(0), device="cuda:0", **changed)


def run(folder: Path, chosen: engine.EngineOptions) -> None:
    folder.mkdir(exist_ok=True)
    builder = sample(folder)
    arrays = [np.zeros(len(output), np.uint8) for output in builder.outputs]
    engine.run(builder.build(), arrays, tensors=builder.tensors, options=chosen)
    assert [a[6:].tobytes() for a in arrays] == [bytes(o[6:]) for o in builder.outputs]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [None, 1 << 18, 900_000], ids=["default", "smallest", "odd"])
def test_loads_come_back_as_the_reference(device: Any, tmp_path: Path, threads: int, memory: int | None) -> None:
    run(tmp_path, options(threads=threads, memory=memory))


def test_device_memory_is_bounded_by_the_slots(device: Any, tmp_path: Path) -> None:
    memory = 1 << 18
    run(tmp_path, options(threads=2, memory=memory))
    assert memory // 2 <= device.emulated_memory(1) <= 2 * memory


def outcome(folder: Path, chosen: engine.EngineOptions) -> str | None:
    """Run, and return what a failure of the device said."""
    try:
        run(folder, chosen)
    except DeviceError as error:
        return str(error)
    return None


def count_calls(device: Any, tmp_path: Path, call: str) -> int:
    device.emulated_reset()
    run(tmp_path / "counted", options(threads=2, memory=1 << 18))
    return int(device.emulated_calls(call.encode()))


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("cudaMalloc", "allocating"),
        ("cudaHostRegister", "page-locking"),
        ("cudaStreamCreateWithFlags", "making a stream"),
        ("cudaEventCreateWithFlags", "making an event"),
    ],
)
def test_whatever_cannot_be_had_nothing_of_it_is_kept(device: Any, tmp_path: Path, call: str, what: str) -> None:
    """Every call of this kind fails once, the first, the second, …: an error says which, and the stage serves again."""
    for nth in range(1, count_calls(device, tmp_path, call) + 1):
        device.emulated_reset()
        chosen = options(threads=2, memory=1 << 18)
        device.emulated_fail(call.encode(), nth, OUT_OF_MEMORY)
        said = outcome(tmp_path / "failing", chosen)
        if device.emulated_calls(call.encode()) < nth:  # what each worker needs depends on who was where first
            assert said is None
            device.emulated_reset()
        else:
            assert re.search(f"{what}.* failed: emulated: as was asked for", said or "nothing was said")
        run(tmp_path / "after", chosen)


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaLaunchKernel", "cudaMemsetAsync", "cudaEventRecord"])
def test_a_call_that_fails_in_a_run_ends_it(device: Any, tmp_path: Path, call: str) -> None:
    calls = count_calls(device, tmp_path, call)
    for nth in sorted({1, calls // 2, calls}):
        device.emulated_reset()
        chosen = options(threads=2, memory=1 << 18)
        device.emulated_fail(call.encode(), nth, LAUNCH_FAILURE)
        with pytest.raises(DeviceError, match="failed: emulated: as was asked for"):
            run(tmp_path / "failing", chosen)
        run(tmp_path / "after", chosen)


def test_merges_of_files_copy_page_locked_memory_only(device: Any, tmp_path: Path) -> None:
    """Copies of other memory are the ones that CUDA makes the caller wait for."""
    builder = sample(tmp_path)
    work = builder.build()
    (tmp_path / "out").mkdir()
    paths = engine.create_outputs(work, tmp_path / "out")
    engine.run(work, paths, tensors=builder.tensors, options=options(threads=2))
    assert device.emulated_calls(b"cudaMemcpyAsync") > 2
    assert device.emulated_calls(b"pageable") == 0
    run(tmp_path, options(threads=2))
    assert device.emulated_calls(b"pageable") > 0


def write_checkpoints(root: Path) -> dict[str, Path]:
    """Three folders of 6 MiB of bf16 in one file."""
    folders = {}
    for seed, role in enumerate(("post", "base", "new_base")):
        folders[role] = root / role
        folders[role].mkdir()
        rng = np.random.default_rng(seed)
        tensors = {f"{i}.weight": rng.standard_normal((512, 1024)).astype(ml_dtypes.bfloat16) for i in range(6)}
        save_file(tensors, folders[role] / "model.safetensors", metadata={"format": "pt"})
        (folders[role] / "config.json").write_text(json.dumps({"model_type": "x"}))
    return folders


def test_a_device_that_is_lost_ends_a_merge_which_goes_on_elsewhere(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(1 << 20))
    folders = write_checkpoints(tmp_path)
    plan = merging.prepare(make_request(**folders, out=tmp_path / "out"))
    chosen = options(threads=2, memory=1 << 20)
    device.emulated_fail(b"kernel", 20, LAUNCH_FAILURE)  # a segment is done by then
    with pytest.raises(DeviceError, match="failed: emulated: the device is lost"):
        merging.run_merge(plan, options=chosen)
    with pytest.raises(DeviceError, match="the device is lost"):  # for good, as far as this process goes
        merging.run_merge(plan, options=chosen)
    assert not (tmp_path / "out").exists()
    publish.kept.clear()
    report = merging.run_merge(merging.prepare(make_request(**folders, out=tmp_path / "out")))
    assert report.resumed_bytes > 0
    paramdelta.merge(**folders, out=tmp_path / "whole")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
