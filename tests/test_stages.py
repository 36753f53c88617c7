"""The engine with another stage than the processor: loads arrive whole, results are written, failures end the run."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made_work import sample
from safetensors.numpy import save_file

import paramdelta
from paramdelta import _cpu, dtypes, engine, ops, reference
from paramdelta.backends import Counts
from paramdelta.plan.work import EXTENT, SPAN, TERM, Work
from paramdelta.stages import Job, KernelStage, Piece


def merged(job: Job) -> Counts:
    """Merge a job by the reference in NumPy."""

    def array(piece: Piece) -> reference.Array:
        return reference.Array(piece.array, piece.dtype)

    terms = [reference.Term(array(post), array(base), alpha) for post, base, alpha in job.terms]
    result = reference.merge(array(job.new_base), terms, job.out.dtype, job.elements)
    job.out.array[:] = result.codes
    return Counts(result.nan, result.inf, result.overflow)


def run(tmp_path: Path, stage: Any, **options: Any) -> tuple[Any, list[bytes], engine.RunResult]:
    builder = sample(tmp_path)
    work = builder.build()
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    result = engine.run(work, arrays, tensors=builder.tensors, options=engine.EngineOptions(stage=stage, **options))
    return builder, [a.tobytes() for a in arrays], result


@pytest.mark.parametrize("threads", [1, 3])
def test_a_kernel_in_python_gives_the_same_bytes(tmp_path: Path, threads: int) -> None:
    builder, outputs, _ = run(tmp_path, KernelStage(merged), threads=threads)
    for made, expected in zip(outputs, builder.outputs, strict=True):
        assert made[6:] == bytes(expected[6:])


def test_every_element_is_handed_over_once(tmp_path: Path) -> None:
    counts: dict[int, int] = {}
    threads = set()

    def kernel(job: Job) -> None:
        counts[job.tensor] = counts.get(job.tensor, 0) + job.elements
        threads.add(threading.get_ident())
        assert all(
            p.array.size == job.elements for p in (job.out, job.new_base, *(x for t in job.terms for x in t[:2]))
        )
        merged(job)

    builder, _, _ = run(tmp_path, KernelStage(kernel), threads=2, memory=1 << 18)
    computed = {row[3]: row[1] for row in builder.spans if row[7] or row[8] != row[9] or row[5] < 0}
    assert counts == {t: n for t, n in computed.items() if n}
    assert threading.get_ident() not in threads


class Recording:
    """A stage that says what it was called with."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.slab: Any = None
        self.inside = 0

    def attach(self, slab: memoryview, workers: int) -> None:
        self.calls.append(f"attach {workers}")
        self.slab = np.frombuffer(slab, np.uint8)

    def detach(self) -> None:
        self.calls.append("detach")

    def merge(self, worker: int, jobs: list[tuple[Any, ...]]) -> None:
        self.calls.append("merge")
        begin = self.slab.__array_interface__["data"][0]
        for _, _, _, (_, memory), _ in jobs:
            if memory is not None:
                at = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
                self.inside += begin <= at < begin + self.slab.size
        KernelStage(merged).merge(worker, jobs)


def test_a_stage_is_told_of_the_slots_before_and_after(tmp_path: Path) -> None:
    stage = Recording()
    run(tmp_path, stage, threads=2)
    assert stage.calls[0] == "attach 2"
    assert stage.calls[-1] == "detach"
    assert stage.calls.count("attach 2") == stage.calls.count("detach") == 1
    assert stage.inside > 0


def test_counts_of_a_stage_are_the_tensors(tmp_path: Path) -> None:
    def kernel(job: Job) -> Counts:
        merged(job)
        return Counts(1 if job.tensor == 2 else 0, 0, job.tensor == 3)

    _, _, result = run(tmp_path, KernelStage(kernel), threads=1)
    assert [(c.tensor, c.nan, c.overflow) for c in result.counts] == [(2, 1, 0), (3, 0, 1)]


class TooFew:
    def merge(self, worker: int, jobs: list[Any]) -> list[Counts]:
        return []


class TooMany:
    def merge(self, worker: int, jobs: list[Any]) -> list[Counts]:
        return [Counts()] * (len(jobs) + 1)


def test_what_a_kernel_raises_ends_the_run(tmp_path: Path) -> None:
    def kernel(job: Job) -> None:
        raise ZeroDivisionError("in the kernel")

    with pytest.raises(ZeroDivisionError, match="in the kernel"):
        run(tmp_path, KernelStage(kernel), threads=3)
    gc.collect()
    for stage, words in ((TooFew(), "fewer"), (TooMany(), "more")):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, stage)
    with pytest.raises(TypeError, match="a stage is"):
        run(tmp_path, object())


def test_an_engine_dropped_while_kernels_wait(tmp_path: Path) -> None:
    """Its workers want the interpreter, which must not be held while they are waited for."""
    builder = sample(tmp_path)
    work = builder.build()
    arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
    options = engine.EngineOptions(stage=KernelStage(merged), threads=3, memory=3 << 17)
    for _ in range(5):
        running = engine.start(work, arrays, tensors=builder.tensors, options=options)
        del running
    gc.collect()


def test_a_stage_is_no_part_of_the_work(tmp_path: Path) -> None:
    """The processor's way and a stage's are one: files, checksums and bytes moved are the same."""
    builder = sample(tmp_path)
    work = builder.build()
    rows = [(s[0], s[0] + s[1] * dtypes.DTYPES[s[8]].itemsize, s[4], s[3]) for s in builder.spans if s[1]]
    work = dataclasses.replace(work, extents=np.array(rows, EXTENT))
    results = []
    for stage in (None, KernelStage(merged)):
        arrays = [np.zeros(size, np.uint8) for _, size in work.outputs]
        options = engine.EngineOptions(stage=stage, threads=2)
        done = engine.run(work, arrays, tensors=builder.tensors, options=options)
        results.append(([a.tobytes() for a in arrays], done.checksums, done.bytes_read, done.bytes_written))
    assert results[0] == results[1]
    assert results[0][1]


def test_ops_compute_a_job(tmp_path: Path) -> None:
    """What the docstring of the module says of other kernels, with ours: arrays over a slot are operands of ops."""

    def kernel(job: Job) -> Counts:
        if len(job.terms) != 1 or {job.out.dtype, job.new_base.dtype, *(p.dtype for p in job.terms[0][:2])} != {
            dtypes.F32
        }:
            return merged(job)
        (post, base, alpha), f32 = job.terms[0], np.float32
        ops.merge(
            post.array.view(f32), base.array.view(f32), job.new_base.array.view(f32), alpha=alpha,
            out=job.out.array.view(f32), threads=1,
        )  # fmt: skip
        return Counts()

    builder, outputs, _ = run(tmp_path, KernelStage(kernel))
    for made, expected in zip(outputs, builder.outputs, strict=True):
        assert made[6:] == bytes(expected[6:])


def test_no_capsule_and_no_merge_is_no_stage() -> None:
    empty = Work(inputs=(), outputs=(), headers=(), spans=np.zeros(0, SPAN), terms=np.zeros(0, TERM))
    columns = {name: getattr(empty, name) for name in engine.COLUMNS}
    for object_ in (np.zeros(1).__array_struct__, 3, print):
        with pytest.raises(TypeError, match="a stage is"):
            _cpu.Engine(
                columns=columns, tensors=0, units=0, inputs=[], outputs=[], threads=1, slot_bytes=1 << 20, isa=None,
                stage=object_,
            )  # fmt: skip


def test_a_stream_computes_what_its_kernel_says(tmp_path: Path) -> None:
    """The mean of three checkpoints, with tensors that slots cut into pieces."""
    rng = np.random.default_rng(0)
    shapes = {"a": (700, 1000), "b": (3,), "c": ()}
    values = {r: {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for r in ("p", "b", "n")}
    for role, tensors in values.items():
        (tmp_path / role).mkdir()
        save_file({n: np.asarray(v) for n, v in tensors.items()}, tmp_path / role / "model.safetensors")
        (tmp_path / role / "config.json").write_text("{}")

    def mean(job: Job) -> None:
        ((post, base, _),) = job.terms
        total = sum(p.array.view(np.float32) for p in (post, base, job.new_base))
        job.out.array.view(np.float32)[:] = total / np.float32(3)

    made = dict(paramdelta.stream(*(tmp_path / r for r in "pbn"), kernel=mean, threads=2))
    assert set(made) == set(shapes)
    for name in shapes:
        p, b, n = (values[r][name] for r in "pbn")
        expected = ((np.float32(0) + p) + b + n) / np.float32(3)
        assert made[name].tobytes() == expected.tobytes(), name
