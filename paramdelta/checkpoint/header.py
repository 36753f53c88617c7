"""The safetensors header, read strictly and written plainly: 8 bytes of length, JSON, data.

Reading follows the format's own rules to the letter and refuses what the reference library lets pass but the format
forbids (two spellings of one name). Nothing but the header is read, with pread, never through a memory map.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import BY_SAFETENSORS, DType
from paramdelta.errors import CheckpointError, Complaint, remedy_of, shown

MAX_HEADER_READ = 100_000_000  # the reference library's cap
MAX_VALUES = 4_000_000  # half a million tensors; bounds the memory that 100 MB of hostile JSON can take
MAX_DIMENSIONS = 64  # NumPy and PyTorch have no more
MAX_HEADER_WRITTEN = 25_000_000  # the Hub's cap
DATA_ALIGNMENT = 4096  # direct I/O wants the data to start at a page
_MOST_SHOWN = 20
_LIMIT = 2**64


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors of one file as columns, in the order of their data.

    ``begin`` and ``nbytes`` are bytes from the start of the data, which lies at ``data_start`` in the file; ``digest``
    is the SHA-256 of the JSON as stored.
    """

    names: list[str]
    dtypes: NDArray[np.uint8]
    shapes: list[tuple[int, ...]]
    begin: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    metadata: dict[str, str]
    data_start: int
    digest: str


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that duplicate keys are seen."""


@dataclass(frozen=True)
class _NotNatural:
    """A JSON number that is no natural number below 2^64, as it was spelled."""

    text: str


class _Refused(Exception):  # noqa: N818  (it never leaves this file)
    """The header as a whole cannot be read; the text says why."""


def read_header(path: Path, *, subject: str | None = None) -> Header:
    """Read and check the header of a safetensors file. Raises CheckpointError with every complaint about it."""
    subject = subject or str(path)
    try:
        # A pipe without a writer would block an ordinary open for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                _fail(subject, "is not a regular file")
            length = _json_length(_pread(fd, 8, 0), status.st_size, subject)
            raw = _pread(fd, length, 8)
        finally:
            os.close(fd)
    except OSError as error:
        _fail(subject, f"cannot be read: {error.strerror}", remedy_of(error))
    return parse_header(raw, file_size=status.st_size, subject=subject)


def _json_length(prefix: bytes, file_size: int, subject: str) -> int:
    """Return the length of the JSON from the first 8 bytes, once it is known to lie within the file."""
    if len(prefix) < 8:
        _fail(subject, f"is {len(prefix)} bytes long: too short for a safetensors file, which starts with 8 bytes")
    if prefix == b"version ":
        _fail(subject, "is a Git LFS pointer, not the file it stands for", "git lfs pull in the folder fetches it")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_READ:
        _fail(
            subject,
            f"names a header of {length:,} bytes; the most allowed is {MAX_HEADER_READ:,}: "
            "it is no safetensors file, or damaged",
        )
    if 8 + length > file_size:
        _fail(subject, f"ends before its header does: {file_size:,} bytes, header of {length:,}: the file is truncated")
    return int(length)


def parse_header(raw: bytes, *, file_size: int, subject: str) -> Header:
    """Check the JSON of a header (without the 8 bytes of length) against the size of its file.

    Raises CheckpointError whose complaints name ``subject`` and, where one is concerned, the tensor.
    """
    try:
        pairs = _parse_json(raw)
    except _Refused as refusal:
        _fail(subject, f"header: {refusal}")
    complaints: list[tuple[str | None, str]] = []
    metadata = _metadata_of(pairs, complaints)
    rows = _rows_of(pairs, complaints)
    if not complaints:
        _check_layout(rows, file_size - 8 - len(raw), complaints)
    if complaints:
        raise CheckpointError(_listed(subject, complaints))
    order = sorted(range(len(rows.names)), key=lambda i: (rows.begin[i], rows.end[i]))
    begin = np.array([rows.begin[i] for i in order], np.int64)
    return Header(
        names=[rows.names[i] for i in order],
        dtypes=np.array([rows.dtypes[i] for i in order], np.uint8),
        shapes=[rows.shapes[i] for i in order],
        begin=begin,
        nbytes=np.array([rows.end[i] for i in order], np.int64) - begin,
        metadata=metadata,
        data_start=8 + len(raw),
        digest=hashlib.sha256(raw).hexdigest(),
    )


def format_header(
    names: Sequence[str],
    dtypes: Sequence[DType],
    shapes: Sequence[tuple[int, ...]],
    metadata: Mapping[str, str],
    *,
    subject: str = "output",
) -> tuple[bytes, NDArray[np.int64]]:
    """Return the bytes a file starts with and the offset of each tensor from there on.

    Tensors are laid out in the given order without gaps. ``__metadata__`` comes first, its keys sorted, with
    ``format: pt`` where it is not given (loaders check it). Spaces pad the header so that data starts at a multiple of
    4096 bytes. Raises CheckpointError for a name that the format forbids or a header beyond 25 MB.
    """
    if "__metadata__" in names:
        _fail(subject, "a tensor cannot be called __metadata__", "--exclude or --rename it")
    if len(set(names)) != len(names):
        _fail(subject, "two tensors would have the same name")
    if not all(map(is_unicode, (*names, *metadata, *metadata.values()))):
        _fail(subject, "a name or a metadata value holds a lone surrogate, which no Unicode text has")
    sizes = np.array([math.prod(shape) * d.bits // 8 for shape, d in zip(shapes, dtypes, strict=True)], np.int64)
    ends = np.cumsum(sizes, dtype=np.int64)
    begins = ends - sizes
    document: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    for name, dtype, shape, begin, end in zip(names, dtypes, shapes, begins.tolist(), ends.tolist(), strict=True):
        document[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    if len(text) > MAX_HEADER_WRITTEN:
        _fail(
            subject,
            f"its header would have {len(text):,} bytes; the Hub takes {MAX_HEADER_WRITTEN:,}",
            "--max-shard-size with a smaller size puts fewer tensors into a file",
        )
    return struct.pack("<Q", len(text)) + text, begins


@dataclass
class _Rows:
    """Tensors in the order of the JSON. Names are interned, and equal shapes are one object: three checkpoints of
    100,000 tensors hold most of them three times."""

    names: list[str]
    dtypes: list[int]
    shapes: list[tuple[int, ...]]
    begin: list[int]
    end: list[int]
    known_shapes: dict[tuple[int, ...], tuple[int, ...]]


def _parse_json(raw: bytes) -> _Object:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused(f"is not UTF-8 (byte {error.start})") from None
    if not text.strip(" \t\r\n"):
        raise _Refused("is empty")
    if text.startswith("\ufeff"):
        raise _Refused("starts with a byte order mark")
    values = sum(map(raw.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise _Refused(f"holds about {values:,} values; the most allowed is {MAX_VALUES:,}")
    if text.endswith("\0"):
        raise _Refused("is padded with NUL bytes; only spaces are allowed")
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_Object,
            parse_int=_natural,
            parse_float=_fraction,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise _Refused("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Refused(f"is not JSON: {error.msg} (character {error.pos})") from None
    if not isinstance(parsed, _Object):
        raise _Refused("is not a JSON object")
    if "\\u" in text:
        _refuse_lone_surrogates(parsed)
    return parsed


def _natural(text: str) -> int | _NotNatural:
    if text[0] == "-" or len(text) > 20:
        return _NotNatural(text[:40])
    value = int(text)
    return value if value < _LIMIT else _NotNatural(text)


def _fraction(text: str) -> _NotNatural:
    return _NotNatural(text[:40])


def _no_constant(text: str) -> NoReturn:
    raise _Refused(f"is not JSON: it holds {text}")


def _refuse_lone_surrogates(parsed: _Object) -> None:
    """Look at every string there is, without recursion: the parser may have nested deeper than Python calls go."""
    waiting: list[Any] = [parsed]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str) and not is_unicode(value):
            raise _Refused("holds a lone surrogate, which no Unicode text has")


def is_unicode(text: str) -> bool:
    """Whether a string has no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _metadata_of(pairs: _Object, complaints: list[tuple[str | None, str]]) -> dict[str, str]:
    found = [value for key, value in pairs if key == "__metadata__"]
    if len(found) > 1:
        complaints.append((None, "header: __metadata__ appears twice"))
    if not found:
        return {}
    if not isinstance(found[0], _Object):
        complaints.append((None, "header: __metadata__ is not an object"))
        return {}
    bad = [key for key, value in found[0] if not isinstance(value, str)]
    if bad:
        complaints.append((None, f"header: __metadata__ holds values that are not strings: {shown(', '.join(bad))}"))
    if len({key for key, _ in found[0]}) != len(found[0]):
        complaints.append((None, "header: __metadata__ holds a key twice"))
    return {key: value for key, value in found[0] if isinstance(value, str)}


def _rows_of(pairs: _Object, complaints: list[tuple[str | None, str]]) -> _Rows:
    rows = _Rows([], [], [], [], [], {})
    seen: set[str] = set()
    for name, value in pairs:
        if name == "__metadata__":
            continue
        problem = "appears twice in the header" if name in seen else _add_row(rows, name, value)
        if problem:
            complaints.append((name, problem))
        seen.add(name)
    return rows


def _add_row(rows: _Rows, name: str, value: Any) -> str | None:
    """Append one tensor, or say what is wrong with it."""
    if not isinstance(value, _Object):
        return "is not described by a JSON object"
    fields = dict(value)
    if len(fields) != len(value):
        return "has a field twice"
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in fields]
    if missing:
        return f"has no {' and no '.join(missing)}"
    dtype = BY_SAFETENSORS.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        return f"has the unknown dtype {_told(fields['dtype'], str)}"
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or isinstance(shape, _Object):
        return "has a shape that is no list"
    if not all(type(d) is int for d in shape):
        return f"has a shape with {_first_bad(shape)}; sizes are natural numbers below 2^64"
    if not isinstance(offsets, list) or isinstance(offsets, _Object) or len(offsets) != 2:
        return "has data_offsets that are not a list of two"
    if not all(type(d) is int for d in offsets):
        return f"has data_offsets with {_first_bad(offsets)}; offsets are natural numbers below 2^64"
    begin, end = offsets
    if end < begin:
        return f"has data_offsets that run backwards: {begin} to {end}"
    if len(shape) > MAX_DIMENSIONS:
        return f"has a shape of {len(shape):,} dimensions; the most allowed is {MAX_DIMENSIONS}"
    bits = dtype.bits
    for size in shape:
        bits *= size
        if bits >= 8 * _LIMIT:
            return "has a shape whose size overflows 64 bits"
    if bits % 8:
        return f"ends within a byte: {bits} bits of {dtype.safetensors}"
    if bits // 8 != end - begin:
        return f"has {end - begin:,} bytes of data, but its shape and dtype make {bits // 8:,}"
    rows.names.append(sys.intern(name))
    rows.dtypes.append(dtype.code)
    rows.shapes.append(rows.known_shapes.setdefault(tuple(shape), tuple(shape)))
    rows.begin.append(begin)
    rows.end.append(end)
    return None


def _first_bad(values: list[Any]) -> str:
    value = next(v for v in values if type(v) is not int)
    return value.text if isinstance(value, _NotNatural) else _told(value, lambda v: json.dumps(v, default=str))


def _told(value: Any, spell: Callable[[Any], str]) -> str:
    """Return a value fit for a terminal; lists and objects may be nested deeper than Python can spell them."""
    try:
        return shown(spell(value))
    except RecursionError:
        return "a value nested too deeply"


def _check_layout(rows: _Rows, data_size: int, complaints: list[tuple[str | None, str]]) -> None:
    """Tensors must tile the data: no hole, no overlap, nothing behind the last."""
    at = 0
    order = sorted(range(len(rows.names)), key=lambda i: (rows.begin[i], rows.end[i]))
    for i in order:
        if rows.begin[i] > at:
            complaints.append((rows.names[i], f"starts at byte {rows.begin[i]:,}, after a hole from {at:,}"))
        elif rows.begin[i] < at:
            complaints.append((rows.names[i], f"starts at byte {rows.begin[i]:,}, within data of another (to {at:,})"))
        at = max(at, rows.end[i])
    if at > data_size:
        complaints.append(
            (None, f"its tensors end at byte {at:,} of {data_size:,} bytes of data: the file is truncated")
        )
    elif at < data_size:
        complaints.append((None, f"holds {data_size - at:,} bytes behind its last tensor"))


def _listed(subject: str, complaints: list[tuple[str | None, str]]) -> list[Complaint]:
    listed = [
        Complaint(subject if name is None else f"{subject}: {shown(name)}", problem)
        for name, problem in complaints[:_MOST_SHOWN]
    ]
    if len(complaints) > _MOST_SHOWN:
        listed.append(Complaint(subject, f"and {len(complaints) - _MOST_SHOWN:,} more problems like these"))
    return listed


def _pread(fd: int, length: int, offset: int) -> bytes:
    chunks = []
    while length:
        chunk = os.pread(fd, length, offset)
        if not chunk:
            break
        chunks.append(chunk)
        length -= len(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def _fail(subject: str, problem: str, remedy: str = "") -> NoReturn:
    raise CheckpointError(Complaint(subject, problem, remedy))
