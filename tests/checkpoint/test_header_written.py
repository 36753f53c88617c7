"""Headers as they are written, and files that the safetensors library writes: both read back the same."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_files import file_bytes, tensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_header import B_GOOD, GOOD, assert_same_as_library, fields, one, parse, parse_error

from paramdelta.checkpoint.header import format_header, read_header
from paramdelta.dtypes import BY_SAFETENSORS, DTYPES, DType
from paramdelta.errors import CheckpointError

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tensor_lists(draw: st.DrawFn) -> dict[str, tuple[DType, tuple[int, ...]]]:
    tensors = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
        if dtype.bits % 8:
            shape = (*shape, 4)  # sub-byte elements fill whole bytes
        tensors[name] = (dtype, shape)
    return tensors


@given(tensors=tensor_lists(), metadata=st.dictionaries(NAMES, NAMES, max_size=3), seed=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_back(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], metadata: dict[str, str], seed: int
) -> None:
    dtypes, shapes = [d for d, _ in tensors.values()], [s for _, s in tensors.values()]
    head, begins = format_header(list(tensors), dtypes, shapes, metadata)
    sizes = [int(np.prod(s, dtype=np.int64)) * d.bits // 8 for d, s in tensors.values()]
    content = head + bytes((seed + i) % 256 for i in range(sum(sizes)))
    assert len(head) % 4096 == 0
    assert begins.tolist() == [sum(sizes[:i]) for i in range(len(sizes))]
    header = parse(content)
    assert_same_as_library(header, content)
    assert dict(zip(header.names, header.begin.tolist(), strict=True)) == dict(zip(tensors, begins, strict=True))
    assert header.metadata == {"format": "pt", **metadata}
    assert header.data_start == len(head)


LIBRARY_DTYPES = [d for d in DTYPES if d.numpy in np.sctypeDict or d.name == "bf16"]


@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(LIBRARY_DTYPES), SHAPES), max_size=6),
    metadata=st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_what_the_library_writes_reads_the_same(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    arrays = {}
    for i, (name, (dtype, shape)) in enumerate(tensors.items()):
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        arrays[name] = np.array([(i + j) % 2 for j in range(size)], np.uint8).view(dtype.to_numpy()).reshape(shape)
    content = safetensors.numpy.save(arrays, metadata)
    header = parse(content)
    assert_same_as_library(header, content)
    assert header.metadata == (metadata or {})


def test_files_of_the_library_read_back(tmp_path: Path) -> None:
    arrays = {d.name: np.arange(6).reshape(2, 3).astype(d.to_numpy()) for d in DTYPES if d.numpy in np.sctypeDict}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"who": "them"})
    content = (tmp_path / "x.safetensors").read_bytes()
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"who": "them"}
    for name, code, shape, begin, size in zip(
        header.names, header.dtypes, header.shapes, header.begin, header.nbytes, strict=True
    ):
        assert DTYPES[code].name == name
        assert shape == (2, 3)
        assert content[header.data_start + begin :][:size] == arrays[name].tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_every_dtype_counts_its_bits(dtype: DType) -> None:
    content = tensors_bytes({"a": (dtype.safetensors, (8, 3))})
    header = parse(content)
    assert (DTYPES[header.dtypes[0]], header.shapes, header.nbytes.tolist()) == (dtype, [(8, 3)], [3 * dtype.bits])
    assert_same_as_library(header, content)
    for count in range(1, 9):
        content = one(fields(json.dumps(dtype.safetensors), f"[{count}]", f"[0,{-(-count * dtype.bits // 8)}]"), 65)
        error = str(parse_error(content))  # there are bytes behind the last tensor at the very least
        assert ("within a byte" in error) == (count * dtype.bits % 8 != 0)


def test_the_order_is_that_of_the_data() -> None:
    header = parse(file_bytes(f'{{"b":{B_GOOD},"a":{GOOD}}}', bytes(8)))
    assert header.names == ["a", "b"]
    assert header.begin.tolist() == [0, 4]


def test_the_digest_is_that_of_the_json() -> None:
    assert parse(file_bytes("{} ")).digest == hashlib.sha256(b"{} ").hexdigest()


F32 = BY_SAFETENSORS["F32"]


def test_golden_header() -> None:
    head, begins = format_header(["z", "a"], [F32, BY_SAFETENSORS["BF16"]], [(1,), ()], {"who": "é", "b": "1"})
    text = '{"__metadata__":{"b":"1","format":"pt","who":"é"},"z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    text += '"a":{"dtype":"BF16","shape":[],"data_offsets":[4,6]}}'
    assert head == struct.pack("<Q", 4088) + text.encode().ljust(4088)
    assert begins.tolist() == [0, 4]


def test_a_given_format_stays() -> None:
    assert b'{"format":"flax"}' in format_header([], [], [], {"format": "flax"})[0]


@pytest.mark.parametrize("length", range(3990, 4030))
def test_data_starts_at_a_multiple_of_4096(length: int) -> None:
    head, _ = format_header(["x" * length], [F32], [(1,)], {})
    assert len(head) in (4096, 8192)
    assert int.from_bytes(head[:8], "little") == len(head) - 8


REFUSED_TO_WRITE: dict[str, tuple[list[str], dict[str, str], str]] = {
    "reserved name": (["__metadata__"], {}, "cannot be called __metadata__"),
    "name twice": (["a", "a"], {}, "same name"),
    "25 MB of names": ([f"{i:025d}" * 400 for i in range(2500)], {}, "Hub takes 25,000,000"),
    "25 MB of metadata": (["a"], {"notes": "x" * 25_000_000}, "Hub takes 25,000,000"),
}


@pytest.mark.parametrize(("names", "metadata", "message"), REFUSED_TO_WRITE.values(), ids=REFUSED_TO_WRITE.keys())
def test_is_refused_to_write(names: list[str], metadata: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        format_header(names, [F32] * len(names), [(1,)] * len(names), metadata, subject="out.safetensors")


@pytest.mark.parametrize(("name", "metadata"), [("a\udcff", {}), ("a", {"k": "\udcff"})], ids=["name", "metadata"])
def test_lone_surrogates_are_refused_to_write(name: str, metadata: dict[str, str]) -> None:
    with pytest.raises(CheckpointError):
        format_header([name], [F32], [(1,)], metadata)


def test_a_header_just_below_the_cap_is_written() -> None:
    head, _ = format_header([], [], [], {"notes": "x" * 24_990_000})
    assert parse(head).metadata["notes"] == "x" * 24_990_000
