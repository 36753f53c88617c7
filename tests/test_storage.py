"""Ways to storage: through the page cache or past it, the bytes are the same, and the page cache is left as it was.

Temporary folders that are memory, or whose file system has no direct transfers, cannot show the latter.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hand_made_work import sample

import paramdelta
from paramdelta import _cpu, engine, storage
from paramdelta.errors import OperandError
from paramdelta.storage import CACHED, DIRECT, PASSING, Paths, Trial

WAYS = (CACHED, PASSING, DIRECT)
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a file system with direct transfers."""
    (tmp_path / "probe").write_bytes(b"x")
    if not _cpu.direct_alignment(os.fsencode(tmp_path / "probe")):
        pytest.skip(f"{tmp_path}: the file system has no O_DIRECT, or does not say how it is aligned")
    return tmp_path


def cached(path: Path) -> int:
    return _cpu.cached_bytes(os.fsencode(path))


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize(("read", "written"), list(itertools.product(WAYS, WAYS)))
@pytest.mark.parametrize(("threads", "memory"), [(1, 1 << 18), (3, 1_000_000), (2, 32 * MIB)])
def test_every_way_gives_the_same_bytes(disk: Path, read: str, written: str, threads: int, memory: int) -> None:
    """Files begin and end, and tensors lie, anywhere within their pages."""
    builder = sample(disk)
    work = builder.build()
    (disk / "out").mkdir()
    outputs = engine.create_outputs(work, disk / "out")
    paths = Paths(inputs=(read,) * len(work.inputs), outputs=(written,) * len(outputs))
    options = engine.EngineOptions(threads=threads, memory=memory)
    engine.carry_out(work, outputs, tensors=builder.tensors, options=options, paths=paths)
    for path, expected in zip(outputs, builder.outputs, strict=True):
        assert path.read_bytes() == bytes(expected), path.name


def test_streams_read_past_the_page_cache_too(disk: Path) -> None:
    builder = sample(disk)
    work = builder.build()
    arrays = [np.full(size, 0xA5, np.uint8) for _, size in work.outputs]
    paths = Paths(inputs=(DIRECT,) * len(work.inputs), outputs=(None,) * len(arrays))
    engine.carry_out(work, arrays, tensors=builder.tensors, paths=paths)
    for array, expected in zip(arrays, builder.outputs, strict=True):
        assert array[6:].tobytes() == bytes(expected[6:])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders whose one file is large enough to be worth a choice."""
    root = tmp_path_factory.mktemp("large")
    folders = {}
    for role in ("post", "base", "new_base"):
        values = np.random.default_rng(len(role)).standard_normal((12 * MIB,)).astype(np.float16)
        folders[role] = _write(root / role, values)
    return folders


def _write(folder: Path, values: np.ndarray) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file({"a.weight": values[:1001], "w.weight": values[1001:]}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("io", storage.MODES)
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "hot"])
def test_the_page_cache_is_left_as_it_was_found(disk: Path, large: dict[str, Path], io: str, cold: bool) -> None:
    files = [folder / "model.safetensors" for folder in large.values()]
    size = files[0].stat().st_size
    for attempt in range(4):  # the kernel may reclaim pages of its own accord at any time, but not four times
        for file in files:
            file.read_bytes()
            if cold:
                forget(file)
        before = [cached(file) for file in files]
        if cold and any(before):
            pytest.skip("this file system does not let go of what it has cached")
        report = paramdelta.merge(**large, out=disk / io, io=io, overwrite=attempt > 0)
        after = [cached(file) for file in files]
        if cold or after == before:
            break
    assert all(found <= 0.02 * size if cold else found == was for found, was in zip(after, before, strict=True))
    out = disk / io / "model.safetensors"
    assert cached(out) <= 0.05 * size
    used = {"auto": DIRECT if cold else CACHED, "buffered": PASSING if cold else CACHED, "direct": DIRECT}
    assert report.io["read"] == {used[io]: 3}
    assert report.io["written"] == {PASSING if io == "buffered" else DIRECT: 1}
    whole = paramdelta.merge(**large, out=disk / "again", io="buffered", threads=1, memory=1 << 18)
    assert whole.threads == 1
    assert out.read_bytes() == (disk / "again" / "model.safetensors").read_bytes()


def test_two_ways_to_ask_what_is_cached(large: dict[str, Path]) -> None:
    file = large["post"] / "model.safetensors"
    forget(file)
    with open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(stream.fileno(), 5 * MIB, 2 * MIB)
    ways = [_cpu.cached_bytes(os.fsencode(file), how=how) for how in ("cachestat", "mincore")]
    if ways[0] == -1:
        pytest.skip("cachestat(2) needs Linux 6.5")
    assert ways[0] == ways[1] == cached(file)
    assert ways[0] >= 5 * MIB


def test_what_the_kernel_does_not_know_is_not_made_up(tmp_path: Path) -> None:
    nowhere = os.fsencode(tmp_path / "nothing")
    assert [_cpu.cached_bytes(nowhere, how=how) for how in ("cachestat", "mincore", "")] == [-1, -1, -1]
    assert _cpu.direct_alignment(nowhere) == 0
    assert not _cpu.in_memory(nowhere)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm to write to")
def test_memory_file_systems_are_read_and_written_in_place() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "x"
        file.write_bytes(bytes(20 * MIB))
        paths = storage.choose_paths([file, bytearray(4)], [file], [20 * MIB], "direct")
        assert paths == Paths(inputs=(CACHED, None), outputs=(CACHED,))
        assert not paths.wait
        assert not _cpu.reserve(os.fsencode(file), 40 * MIB)
        assert file.stat().st_size == 20 * MIB


def test_small_files_are_not_worth_it(disk: Path) -> None:
    file = disk / "x"
    file.write_bytes(bytes(1000))
    forget(file)
    assert storage.choose_paths([file], [file], [1000], "direct").outputs == (CACHED,)
    assert DIRECT not in storage.choose_paths([file], [file], [1000], "direct").inputs


def test_the_faster_way_is_kept() -> None:
    paths = Paths(inputs=(PASSING, None, CACHED, PASSING), outputs=(DIRECT,), cold=(0, 3))
    for fast in (PASSING, DIRECT):
        trial = Trial(paths, segments=10)
        used = []
        for _ in range(6):
            now = trial.next()
            assert now.inputs[1:3] == (None, CACHED)
            assert now.inputs[0] == now.inputs[3]
            used.append(str(now.inputs[0]))
            trial.tell(now, 100, 1.0 if now.inputs[0] == fast else 2.0)
        assert used == [DIRECT, PASSING, *[fast] * 4]


def test_few_segments_are_no_trial() -> None:
    paths = Paths(inputs=(PASSING,), outputs=(DIRECT,), cold=(0,))
    trial = Trial(paths, segments=Trial.FEWEST - 1)
    for _ in range(3):
        assert trial.next() == paths
        trial.tell(paths, 100, 1.0)


def test_buffers_follow_storage_and_memory() -> None:
    """Workers that wait are many, and their requests long; a size that was given is kept to."""
    from paramdelta.plan.work import SPAN, TERM, Work

    work = Work(inputs=(), outputs=(), headers=(), spans=np.zeros(0, SPAN), terms=np.zeros(0, TERM))
    hot, cold = Paths(inputs=(CACHED,), outputs=(CACHED,)), Paths(inputs=(DIRECT,), outputs=(CACHED,))
    auto = engine.EngineOptions(threads=2)
    assert auto.resolve(work, hot) == (2, engine.SLOT_BYTES)
    assert auto.resolve(work, cold) == (2, storage.WAITING_SLOT)
    assert engine.EngineOptions().resolve(work, cold)[0] >= storage.WAITING_THREADS
    threads, slot = engine.EngineOptions(memory=8 * MIB).resolve(work, cold)
    assert threads * slot <= 8 * MIB
    assert 0 < storage.memory_limit() < 1 << 50


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(OperandError, match=r"io: expected one of auto, buffered, direct, got 'mmap'"):
        engine.EngineOptions(io="mmap")
