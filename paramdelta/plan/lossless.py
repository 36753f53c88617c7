"""What a lossless delta keeps beside post − base, so that post can be made again, byte for byte, from base.

A look at all of post and base finds which differences f32 holds exactly (the others are stored as f64, which is what
the contract computes in), and where encode(base + delta) is not post's bits: there the bits themselves are kept.
Tensors that are no plain floats in both, and those with many such places, are kept whole. All that is in one more file
in the format of safetensors, whose name loaders do not look for."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta import ops
from paramdelta.checkpoint import INDEX, Checkpoint
from paramdelta.checkpoint.header import format_header
from paramdelta.dtypes import BY_NAME, F32, DType
from paramdelta.errors import Complaint, storage_errors
from paramdelta.plan.choice import Stored
from paramdelta.plan.layout import Layout, Tables
from paramdelta.plan.naming import Names
from paramdelta.plan.outputs import Making
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.samples import read_bytes
from paramdelta.plan.sidefiles import REBUILD
from paramdelta.plan.work import EXTENT, SPAN

MANIFEST, HEADER, FILE, WHOLE, POSITIONS, VALUES = "manifest", "header/", "file/", "whole/", "positions/", "values/"
# Files of post that the delta's folder does not carry as they are.
DOCUMENTS = ("config.json", INDEX, "hf_quant_config.json", "README.md")
_CHUNK = 1 << 20  # elements
_MOST_PATCHED = 64  # one element of so many may be kept singly, beyond that the tensor is kept whole
_U8, _I64 = BY_NAME["u8"], BY_NAME["i64"]

Codes = NDArray[Any]


@dataclass(frozen=True)
class Looked:
    """What a look at a tensor's data found: whether f32 holds all differences, the elements that base + delta does not
    give back with post's codes there, and the CRC-32 of post's bytes. ``positions`` is None where they are many."""

    exact: bool
    positions: Codes | None
    values: Codes
    crc32: int


@dataclass(kw_only=True)
class Survey:
    """What was found of each tensor of the pairing that is made from plain floats."""

    looked: dict[int, Looked] = field(default_factory=dict)

    def stored(self, stored: Stored) -> Stored:
        """Return how the delta is stored: f32 for tensors whose differences it holds exactly."""
        dtypes = [F32 if i in self.looked and self.looked[i].exact else d for i, d in enumerate(stored.dtypes)]
        return replace(stored, dtypes=dtypes)

    @property
    def computed(self) -> dict[int, Looked]:
        """The tensors that base and delta give back, but for single elements."""
        return {i: found for i, found in self.looked.items() if found.positions is not None}


def survey(pairing: Pairing, names: dict[str, Names]) -> Survey:
    """Read post and base, and find what a lossless delta of them must keep. Raises StorageError."""
    post, base = names["post"], names["base"]
    found = Survey()
    for i, kind in enumerate(pairing.kinds):
        p, b = pairing.post[i], pairing.base[i]
        plain = kind == Kind.MERGED and i not in pairing.bridges and p not in post.weights and b not in base.weights
        if plain and 0 not in pairing.shapes[i]:
            found.looked[i] = _look(post.checkpoint, p, base.checkpoint, b)
    return found


def _look(post: Checkpoint, p: int, base: Checkpoint, b: int) -> Looked:
    dtype, elements = post.tensors.dtype_of(p), math.prod(post.tensors.shapes[p])
    exact, crc32, patched = True, 0, 0
    positions: list[Codes] = []
    values: list[Codes] = []
    for first in range(0, elements, _CHUNK):
        count = min(_CHUNK, elements - first)
        in_post, in_base = _read(post, p, first, count), _read(base, b, first, count)
        crc32 = zlib.crc32(in_post.tobytes(), crc32)
        zeros = np.zeros(count)
        old = in_base.view(base.tensors.dtype_of(b).to_numpy())
        delta = ops.merge(in_post.view(dtype.to_numpy()), old, zeros).out
        with np.errstate(all="ignore"):
            exact = exact and bool(((delta.astype(np.float32) == delta) | np.isnan(delta)).all())
        made = ops.merge(delta, zeros, old, dtype=dtype).out.view(in_post.dtype)
        wrong = np.flatnonzero(made != in_post)
        patched += len(wrong)
        if patched * _MOST_PATCHED <= elements:
            positions.append(wrong.astype(np.int64) + first)
            values.append(in_post[wrong])
    none = np.zeros(0, f"u{dtype.itemsize}")
    if patched * _MOST_PATCHED > elements:
        return Looked(exact, None, none, crc32)
    return Looked(
        exact, np.concatenate([none[:0].astype(np.int64), *positions]), np.concatenate([none, *values]), crc32
    )


def _read(checkpoint: Checkpoint, row: int, first: int, count: int) -> Codes:
    table = checkpoint.tensors
    item = table.dtype_of(row).itemsize
    path = checkpoint.files[int(table.file[row])].path
    data = read_bytes(path, int(table.offset[row]) + first * item, count * item)
    return np.frombuffer(data, f"<u{item}")


def unlisted(post: Checkpoint) -> list[Complaint]:
    """Return a complaint about files of post with tensors that its index does not name: they would be lost."""
    named = np.bincount(post.tensors.file, post.tensors.nbytes, minlength=len(post.files)).astype(np.int64)
    return [
        Complaint(str(file.path), "holds tensors that the index does not name, and a lossless delta would lose them")
        for file, nbytes in zip(post.files, named.tolist(), strict=True)
        if file.data_start + nbytes != file.size
    ]


class _Parts:
    """The tensors of the file that is added, and where their bytes come from: literals, or a tensor of post."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.dtypes: list[DType] = []
        self.shapes: list[tuple[int, ...]] = []
        self.rows: list[int] = []  # of post's table, NONE: literals
        self.places: list[int] = []  # in the literals
        self.literals = bytearray()

    def literal(self, name: str, dtype: DType, data: bytes) -> None:
        self._add(name, dtype, (len(data) // dtype.itemsize,), NONE, len(self.literals))
        self.literals += data

    def copy(self, name: str, post: Checkpoint, row: int) -> None:
        self._add(name, post.tensors.dtype_of(row), post.tensors.shapes[row], row, 0)

    def _add(self, name: str, dtype: DType, shape: tuple[int, ...], row: int, place: int) -> None:
        self.names.append(name)
        self.dtypes.append(dtype)
        self.shapes.append(shape)
        self.rows.append(row)
        self.places.append(place)


def with_rebuild(layout: Layout, pairing: Pairing, tables: Tables, found: Survey) -> Layout:
    """Return the layout of a delta with the file from which post can be made again."""
    post, base = tables.by_role["post"], tables.by_role["base"]
    table = post.checkpoint.tensors
    parts = _Parts()
    covered: dict[str, Any] = {}
    for i, looked in found.computed.items():
        name, dtype = table.names[pairing.post[i]], table.dtype_of(pairing.post[i])
        covered[name] = {
            "delta": pairing.names[i],
            "base": base.checkpoint.tensors.names[pairing.base[i]],
            "crc32": f"{looked.crc32:08x}",
        }
        if looked.positions is not None and len(looked.positions):
            parts.literal(POSITIONS + name, _I64, looked.positions.astype("<i8").tobytes())
            parts.literal(VALUES + name, dtype, looked.values.tobytes())
    for row, name in enumerate(table.names):
        if name not in covered:
            parts.copy(WHOLE + name, post.checkpoint, row)
    for file in post.checkpoint.files:
        parts.literal(HEADER + file.name, _U8, read_bytes(file.path, 0, file.data_start))
    for name in DOCUMENTS:
        path = post.checkpoint.path / name
        if path.is_file():
            parts.literal(FILE + name, _U8, _content(path))
    manifest = {"version": 1, "files": [file.name for file in post.checkpoint.files], "tensors": covered}
    parts.literal(MANIFEST, _U8, json.dumps(manifest).encode())
    return _added(layout, parts, tables)


def _content(path: Path) -> bytes:
    with storage_errors(path, "cannot be read"):
        return path.read_bytes()


def _added(layout: Layout, parts: _Parts, tables: Tables) -> Layout:
    """Add a file of these parts to a layout."""
    work, outputs = layout.work, layout.outputs
    header, begins = format_header(parts.names, parts.dtypes, parts.shapes, {"paramdelta": "rebuild"}, subject=REBUILD)
    first, file, known = len(layout.order), len(work.outputs), len(outputs.names)
    for name, dtype, shape, row in zip(parts.names, parts.dtypes, parts.shapes, parts.rows, strict=True):
        outputs.add(name, dtype, shape, Making.COPY, logical=-1, donor="post", row=row)
    nbytes = outputs.nbytes()[known:]
    offsets = begins + len(header)
    rows = np.array(parts.rows, np.int64)
    table = tables.by_role["post"].checkpoint.tensors
    spans = np.zeros(len(rows), SPAN)
    spans["tensor"], spans["out_file"], spans["out_offset"] = first + np.arange(len(rows)), file, offsets
    spans["count"], spans["out_dtype"], spans["new_dtype"] = nbytes, _U8.code, _U8.code
    copied = rows != NONE
    spans["new_file"] = np.where(copied, table.file[rows] + tables.first_files["post"], len(work.inputs))
    spans["new_offset"] = np.where(copied, table.offset[rows], np.array(parts.places, np.int64))
    extents = np.zeros(len(rows), EXTENT)
    extents["begin"], extents["end"], extents["file"] = offsets, offsets + nbytes, file
    extents["tensor"] = spans["tensor"]
    spans = spans[nbytes > 0]
    assert not work.units  # a lossless delta is plain, so that nothing else is in memory
    made = replace(
        work,
        inputs=(*work.inputs, parts.literals),
        outputs=(*work.outputs, (REBUILD, len(header) + int(nbytes.sum()))),
        headers=(*work.headers, header),
        spans=np.concatenate([work.spans, spans]),
        extents=np.concatenate([work.extents, extents]),
        span_units=np.full(len(work.spans) + len(spans), -1, np.int64),
        span_kept=np.zeros(len(work.spans) + len(spans), bool),
    )
    return replace(
        layout,
        order=np.concatenate([layout.order, known + np.arange(len(rows))]),
        dtypes=np.concatenate([layout.dtypes, np.array([d.code for d in parts.dtypes], np.uint8)]),
        nbytes=np.concatenate([layout.nbytes, nbytes]),
        files=np.concatenate([layout.files, np.full(len(rows), file, np.int64)]),
        work=made,
    )


def summary(layout: Layout, pairing: Pairing, stored: Stored, found: Survey) -> dict[str, Any]:
    """Return what a lossless delta keeps, for the record and the report."""
    files = dict(layout.work.outputs)
    computed = found.computed
    return {
        "f32": sum(d == F32 for d in stored.dtypes),
        "f64": sum(d.name == "f64" for d in stored.dtypes),
        "whole": sum(name.startswith(WHOLE) for name in layout.outputs.names),
        "single_elements": sum(len(looked.values) for looked in computed.values()),
        "delta_bytes": sum(size for name, size in files.items() if name != REBUILD),
        "rebuild_bytes": files[REBUILD],
    }
