"""Faults of the ways to storage: what a kernel or a file system refuses is done another way, what fails is an error,
and bytes that come back short are asked for again. The files are large enough to go past the page cache."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from faulty_runs import ROLES, Workshop, digests
from safetensors.numpy import save_file

import paramdelta
from paramdelta import _cpu, storage

SHARD = "model.safetensors"
OUTPUT = f"output/{SHARD}"
ELEMENTS = 9 << 20  # float16: 18 MiB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Checkpoints of one large file, and what they merge to by ordinary reads and writes."""
    root = tmp_path_factory.mktemp("large")
    for i, role in enumerate(ROLES):
        values = np.random.default_rng(i).standard_normal(ELEMENTS, np.float32).astype(np.float16)
        (root / role).mkdir()
        save_file({"a.weight": values[:1001], "b.weight": values[1001:]}, root / role / SHARD)
        (root / role / "config.json").write_text("{}")
    if not _cpu.direct_alignment(os.fsencode(root / "post" / SHARD)):
        pytest.skip(f"{root}: the file system has no O_DIRECT, or does not say how it is aligned")
    assert (root / "post" / SHARD).stat().st_size > storage.SMALLEST_DIRECT
    paramdelta.merge(**{role: root / role for role in ROLES}, out=root / "whole", io="buffered")
    return root, digests(root / "whole")


@pytest.fixture
def far(large: tuple[Path, dict[str, str]], workshop: Workshop) -> Workshop:
    """The workshop with the large files, none of which the page cache has."""
    root, expected = large
    for role in ROLES:
        shutil.rmtree(workshop.root / role)
        shutil.copytree(root / role, workshop.root / role)
        fd = os.open(workshop.root / role / SHARD, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return dataclasses.replace(workshop, expected=expected)


@pytest.mark.parametrize(
    "rule",
    [
        f"read post/{SHARD} b:6000000 2 errno=22",
        f"write {OUTPUT} b:6000000 1 errno=22",
        f"read base/{SHARD} b:3000000 40 short=5000",
        f"write {OUTPUT} b:3000000 20 short=5000",
        f"read new_base/{SHARD} b:3000000 50 errno=4",
        f"write {OUTPUT} b:3000000 50 errno=4",
        f"allocate {OUTPUT} 0 1 errno=95",
        f"allocate {OUTPUT} 0 3 errno=4",
    ],
)
def test_what_direct_transfers_refuse_or_leave_is_done_otherwise(far: Workshop, rule: str) -> None:
    far.must_merge(rule, extra=["--io=direct"], segments=False)


@pytest.mark.parametrize("refusal", [95, 38, 22])
@pytest.mark.parametrize("call", [f"read post/{SHARD} b:3000000", f"write {OUTPUT} b:3000000"])
def test_kernels_without_uncached_transfers(far: Workshop, call: str, refusal: int) -> None:
    """Meeting the fault in an ordinary call would be an error: only the flagged one is made again without its flag."""
    far.must_merge(f"{call} 1 errno={refusal}", extra=["--io=buffered"], segments=False)


def test_an_ordinary_call_that_is_refused_is_an_error(far: Workshop) -> None:
    for file in (far.root / role / SHARD for role in ROLES):
        file.read_bytes()  # the page cache has them: nothing is flagged
    saying = [f"post/{SHARD}", "at byte", "not supported"]
    far.must_fail(f"read post/{SHARD} b:3000000 1 errno=95", saying=saying, extra=["--io=buffered"], segments=False)


@pytest.mark.parametrize(
    ("rule", "saying"),
    [
        (f"read post/{SHARD} b:6000000 1 errno=5", [f"post/{SHARD}", "reading at byte", "Input/output", "dmesg"]),
        (f"write {OUTPUT} b:6000000 1 errno=5", [OUTPUT, "writing at byte", "Input/output", "dmesg"]),
        (f"write {OUTPUT} b:6000000 -1 errno=28", [OUTPUT, "writing at byte", "No space", "make room"]),
        (f"allocate {OUTPUT} 0 1 errno=28", [OUTPUT, "cannot be reserved", "No space", "make room"]),
        (f"close {OUTPUT} 2 1 errno=5", [OUTPUT, "closing failed", "Input/output"]),
    ],
)
def test_what_fails_past_the_page_cache_is_an_error(far: Workshop, rule: str, saying: list[str]) -> None:
    far.must_fail(rule, saying=saying, extra=["--io=direct"], segments=False)
    assert not far.out.exists()
    assert not far.partial.exists()
