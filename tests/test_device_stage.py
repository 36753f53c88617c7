"""The pipeline of a GPU, page-locked slots, lanes of device memory and kernels, run where there is none: the stage and
the kernels of csrc/cuda compiled for the host, where device memory is memory and a stream is the order of calls."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hand_made_work import WorkBuilder, sample

sys.path.insert(0, str(Path(__file__).parent / "conformance"))

import cuda_on_host

from paramdelta import dtypes, engine
from paramdelta.errors import DeviceError
from paramdelta.memory import DeviceMemory

pytestmark = pytest.mark.skipif(cuda_on_host.why_not() is not None, reason=str(cuda_on_host.why_not()))


def options(**changed: object) -> engine.EngineOptions:
    return engine.EngineOptions(stage=cuda_on_host.module().stage(0), device="cuda:0", **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [None, 1 << 18, 900_000], ids=["default", "smallest", "odd"])
def test_loads_come_back_as_the_reference(tmp_path: Path, threads: int, memory: int | None) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    out = tmp_path / "out"
    out.mkdir()
    paths = engine.create_outputs(work, out)
    engine.run(work, paths, tensors=builder.tensors, options=options(threads=threads, memory=memory))
    for i, expected in enumerate(builder.outputs):
        assert (out / f"out{i}").read_bytes() == bytes(expected), f"output file {i}"


def test_outputs_outside_of_the_slots(tmp_path: Path) -> None:
    """Streams write into memory of the caller's: those outputs are made behind the operands, and copied from there."""
    builder = sample(tmp_path)
    work = builder.build()
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    engine.run(work, arrays, tensors=builder.tensors, options=options(threads=2, memory=1 << 18))
    for array, expected in zip(arrays, builder.outputs, strict=True):
        assert array[6:].tobytes() == bytes(expected[6:])


def test_one_stage_serves_run_after_run(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    chosen = options(threads=2)
    for memory in (None, None, 1 << 18):
        arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
        again = engine.EngineOptions(stage=chosen.stage, device="cuda:0", threads=2, memory=memory)
        engine.run(work, arrays, tensors=builder.tensors, options=again)
        assert [a[6:].tobytes() for a in arrays] == [bytes(o[6:]) for o in builder.outputs]


def test_a_stage_serves_one_engine_at_a_time(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    chosen = options(threads=1)
    running = engine.start(work, arrays, tensors=builder.tensors, options=chosen)
    for _ in range(2):  # a refusal takes nothing from the engine that is served
        with pytest.raises(DeviceError, match="serves another engine"):
            engine.start(work, arrays, tensors=builder.tensors, options=chosen)
    running.finish()
    engine.run(work, arrays, tensors=builder.tensors, options=chosen)
    assert arrays[0][6:].tobytes() == bytes(builder.outputs[0][6:])


def test_counts_come_from_the_device(tmp_path: Path) -> None:
    f16 = dtypes.F16
    work = WorkBuilder(tmp_path)
    for count in (100, 200_000, 7):
        work.add(0, f16, count, [(f16, f16, 1.0)], f16)
    largest = np.float16(65504).view(np.uint16).tobytes()
    for file, offset in ((0, work.spans[1][2]), (1, work.terms[1][1])):
        for at in (5, 199_999):
            work.inputs[file][offset + 2 * at : offset + 2 * at + 2] = largest
    result = engine.run(
        work.build(), [np.zeros(len(work.outputs[0]), np.uint8)], tensors=3, options=options(threads=2, memory=1 << 18)
    )
    assert [(c.tensor, c.nan, c.inf, c.overflow) for c in result.counts] == [(1, 0, 0, 2)]


def test_a_failure_of_the_device_ends_the_run_in_its_words(tmp_path: Path) -> None:
    """More deltas than a kernel takes is what can fail without a GPU."""
    f32 = dtypes.F32
    work = WorkBuilder(tmp_path)
    most = cuda_on_host.module().most_terms()
    work.add(0, f32, 10, [(f32, f32, 1.0)] * (most + 1), f32)
    chosen = options(threads=1)
    with pytest.raises(DeviceError, match=f"at most {most} deltas, not {most + 1}"):
        engine.run(work.build(), [np.zeros(len(work.outputs[0]), np.uint8)], tensors=1, options=chosen)
    (tmp_path / "after").mkdir()
    builder = sample(tmp_path / "after")
    arrays = [np.zeros(len(output), np.uint8) for output in builder.outputs]
    engine.run(builder.build(), arrays, tensors=builder.tensors, options=chosen)
    assert [a[6:].tobytes() for a in arrays] == [bytes(o[6:]) for o in builder.outputs]


def test_rates_are_measured() -> None:
    up, down, merged = cuda_on_host.module().rates(0)
    assert min(up, down, merged) > 1e6


def test_outputs_in_the_memory_of_the_device(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    there = [DeviceMemory(a.__array_interface__["data"][0], a.nbytes) for a in arrays]
    for memory in (None, 1 << 18):
        engine.run(work, there, tensors=builder.tensors, options=options(threads=2, memory=memory))
        for array, expected in zip(arrays, builder.outputs, strict=True):
            assert array[6:].tobytes() == bytes(expected[6:])
            array[:] = 0


def test_the_memory_of_a_device_needs_a_stage_that_computes_there(tmp_path: Path) -> None:
    builder = WorkBuilder(tmp_path)
    builder.copy(0, 1000)
    array = np.zeros(len(builder.outputs[0]), np.uint8)
    there = [DeviceMemory(array.__array_interface__["data"][0], array.nbytes)]
    with pytest.raises(ValueError, match="need a stage that computes there"):
        engine.run(builder.build(), there, tensors=1)
    assert not array.any()
