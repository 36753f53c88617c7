"""The streaming engine on work made by hand: every layout of spans must come out as the reference computes it, for any
number of threads and any slot size, and what fails must fail with a reason."""

from __future__ import annotations

import dataclasses
import errno
import resource
from pathlib import Path

import numpy as np
import pytest
from hand_made_work import WorkBuilder, sample

from paramdelta import _cpu, dtypes, engine
from paramdelta.errors import OperandError, StorageError
from paramdelta.plan.work import SPAN, TERM, Work


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("memory", [None, 1 << 17, 700_000], ids=["default", "smallest", "odd"])
def test_files_come_out_as_the_reference(tmp_path: Path, threads: int, memory: int | None) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    out = tmp_path / "out"
    out.mkdir()
    paths = engine.create_outputs(work, out)
    seen: list[tuple[int, int]] = []
    options = engine.EngineOptions(threads=threads, memory=memory)
    result = engine.run(work, paths, tensors=builder.tensors, options=options, on_progress=lambda *at: seen.append(at))
    for i, expected in enumerate(builder.outputs):
        assert (out / f"out{i}").read_bytes() == bytes(expected), f"output file {i}"
    assert result.counts == ()
    assert result.bytes_written == sum(map(len, builder.outputs)) - len("header") * 2
    assert seen[-1] == (result.bytes_read, result.bytes_written)
    assert result.threads * result.slot_bytes <= (memory or threads * engine.SLOT_BYTES)


def test_memory_is_an_output_like_a_file(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    engine.run(work, arrays, tensors=builder.tensors)
    for array, expected in zip(arrays, builder.outputs, strict=True):
        assert array[6:].tobytes() == bytes(expected[6:])


def test_counts_are_reported_per_tensor(tmp_path: Path) -> None:
    f16 = dtypes.F16
    work = WorkBuilder(tmp_path)
    work.add(0, f16, 100, [(f16, f16, 1.0)], f16)
    work.add(0, f16, 2_000_000, [(f16, f16, 1.0)], f16)
    largest = np.float16(65504).view(np.uint16)
    for i, at in ((0, 5), (0, 1_999_999)):
        row = work.spans[1]
        for file, offset in ((0, row[2]), (1, work.terms[1][1])):
            begin = offset + 2 * at
            work.inputs[file][begin : begin + 2] = largest.tobytes()
        assert i == 0
    result = engine.run(
        work.build(), [np.zeros(len(work.outputs[0]), np.uint8)], tensors=2, options=engine.EngineOptions()
    )
    assert [(c.tensor, c.nan, c.inf, c.overflow) for c in result.counts] == [(1, 0, 0, 2)]


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    (tmp_path / "in1").write_bytes(b"short")
    with pytest.raises(ValueError, match="reaches beyond the end of its file"):
        engine.run(work, [np.zeros(s, np.uint8) for _, s in work.outputs], tensors=builder.tensors)


def test_a_file_that_becomes_shorter_while_the_merge_runs_is_named(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    running = _cpu.Engine(
        columns={name: getattr(work, name) for name in engine.COLUMNS},
        tensors=builder.tensors,
        units=0,
        inputs=[(bytes(path), "cached") for path in work.inputs],
        outputs=[np.zeros(s, np.uint8) for _, s in work.outputs],
        threads=2,
        slot_bytes=1 << 20,
        isa=None,
    )
    (tmp_path / "in1").write_bytes(b"short")
    running.start()
    with pytest.raises(StorageError, match=r"in1: reading at byte \d+ met the end of the file"):
        running.finish()


def test_what_lies_between_spans_is_left_alone(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    left_out = work.spans[3::5]
    kept = np.delete(work.spans, np.arange(3, len(work.spans), 5))
    arrays = [np.full(size, 0xA5, np.uint8) for _, size in work.outputs]
    engine.run(dataclasses.replace(work, spans=kept), arrays, tensors=builder.tensors)
    for i, expected in enumerate(builder.outputs):
        wanted = np.frombuffer(bytes(expected), np.uint8).copy()
        wanted[:6] = 0xA5
        for span in left_out[left_out["out_file"] == i]:
            size = int(span["count"]) * dtypes.DTYPES[span["out_dtype"]].itemsize
            wanted[span["out_offset"] : span["out_offset"] + size] = 0xA5
        np.testing.assert_array_equal(arrays[i], wanted)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    (tmp_path / "in2").unlink()
    with pytest.raises(StorageError, match=r"in2: opening failed: No such file") as caught:
        engine.run(work, [np.zeros(s, np.uint8) for _, s in work.outputs], tensors=builder.tensors)
    assert caught.value.errno == 2


def test_a_write_that_fails_is_named(tmp_path: Path) -> None:
    """A limit on file sizes makes pwrite fail for real."""
    builder = sample(tmp_path)
    work = builder.build()
    out = tmp_path / "out"
    out.mkdir()
    paths = engine.create_outputs(work, out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"out0: writing at byte \d+ failed: File too large") as caught:
            engine.run(work, paths, tensors=builder.tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_what_progress_raises_stops_the_run(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()

    def interrupt(read: int, written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(
            work,
            [np.zeros(s, np.uint8) for _, s in work.outputs],
            tensors=builder.tensors,
            on_progress=interrupt,
        )


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tensor", 10_000, "tensor number"),
        ("out_file", 9, "output file number"),
        ("new_file", 9, "input file number"),
        ("out_dtype", 250, "dtype code"),
        ("new_dtype", 9, "dtype code"),
        ("count", -1, "does not fit its output file"),
        ("count", 2**62, "does not fit its output file"),
        ("out_offset", -8, "does not fit its output file"),
        ("out_offset", 2**62, "does not fit its output file"),
        ("new_offset", 2**62, "beyond the end of its file"),
        ("n_terms", 10_000, "terms out of range"),
        ("first_term", -1, "terms out of range"),
    ],
)
def test_work_that_points_nowhere_is_refused(tmp_path: Path, column: str, value: int, message: str) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    work.spans[column][0] = value
    with pytest.raises(ValueError, match=message):
        engine.run(work, [np.zeros(s, np.uint8) for _, s in work.outputs], tensors=builder.tensors)


def test_spans_out_of_order_are_refused(tmp_path: Path) -> None:
    builder = sample(tmp_path)
    work = builder.build()
    work.spans[[0, 1]] = work.spans[[1, 0]]
    with pytest.raises(ValueError, match="out of order"):
        engine.run(work, [np.zeros(s, np.uint8) for _, s in work.outputs], tensors=builder.tensors)


@pytest.mark.parametrize("field", ["threads", "memory"])
def test_options_are_checked(field: str) -> None:
    with pytest.raises(OperandError, match=field):
        engine.EngineOptions(**{field: 0})


def test_small_memory_means_fewer_threads() -> None:
    work = Work(inputs=(), outputs=(), headers=(), spans=np.zeros(0, SPAN), terms=np.zeros(0, TERM))
    options = engine.EngineOptions(threads=8, memory=3 << 17)
    assert options.resolve(work, engine.paths_for(work, [])) == (3, 1 << 17)


def test_columns_have_the_layout_of_the_extension() -> None:
    work = Work(inputs=(), outputs=(), headers=(), spans=np.zeros(0, SPAN), terms=np.zeros(0, TERM))
    assert {name: getattr(work, name).dtype.itemsize for name in engine.COLUMNS} == _cpu.ROW_BYTES
