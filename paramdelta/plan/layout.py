"""Lays the output out: which tensor goes into which file at which byte, and the spans that fill every byte of them.

Work is done by columns; Python loops over tensors only where headers are written and where vocabularies are extended.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.checkpoint import SINGLE, Checkpoint
from paramdelta.checkpoint.header import format_header
from paramdelta.dtypes import BY_NAME, DTYPES
from paramdelta.errors import PlanError
from paramdelta.memory import Memory
from paramdelta.plan.choice import Stored
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.gathers import Place, gathered_spans
from paramdelta.plan.naming import Names
from paramdelta.plan.outputs import Making, Outputs, make_outputs
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.regions import Copy, Places, RegionMaker
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.work import EXTENT, SPAN, TERM, Work

_RAW = BY_NAME["u8"].code
_RAW_ZEROS = BY_NAME["f8_e4m3"].code  # bytes of zeros are made, not copied, and so need a type with arithmetic
_ZEROS = -1

Column = NDArray[Any]


@dataclass(frozen=True)
class Tables:
    """The checkpoints' weights by role, and where their files begin in the common list of input files."""

    by_role: dict[str, Names]

    @property
    def new_base(self) -> Names:
        """new_base's weights."""
        return self.by_role["new_base"]

    def inputs(self) -> tuple[Path | Memory, ...]:
        """Return all input files, or the memory in place of them, in the order of the roles: post's, base's,
        new_base's, those of further deltas."""
        return tuple(source for names in self.by_role.values() for source in names.checkpoint.sources)

    @cached_property
    def first_files(self) -> dict[str, int]:
        """The number of each role's first file."""
        counts = [len(names.checkpoint.sources) for names in self.by_role.values()]
        return dict(zip(self.by_role, itertools.accumulate(counts, initial=0), strict=False))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The output's tensors (columns in the order of the files) and the work that makes them. ``outputs`` are the same
    tensors in the order of the pairing, ``order`` their numbers there."""

    outputs: Outputs
    order: Column
    dtypes: Column  # DType codes
    nbytes: Column
    files: Column  # output file of tensor i
    work: Work
    index: bytes | None


def lay_out(
    request: MergeRequest, pairing: Pairing, stored: Stored, tables: Tables, statistics: list[tuple[str, int]]
) -> Layout:
    """Lay out the output of a pairing. Raises CheckpointError where a header would break the format's limits."""
    outputs = make_outputs(pairing, stored, tables.by_role, statistics)
    dtypes = np.array(outputs.dtypes, np.uint8)
    elements, nbytes = outputs.elements(), outputs.nbytes()
    files, order, file_names = _assign(request, outputs, tables, nbytes)
    headers, offsets = _headers(outputs, tables, order, files, dtypes, file_names)
    sizes = [len(header) + int(nbytes[order[files == i]].sum()) for i, header in enumerate(headers)]
    spans, terms = _spans(pairing, outputs, tables, order, files, offsets, dtypes, elements, nbytes)
    inputs = tables.inputs()
    maker = RegionMaker(
        pairing,
        outputs,
        stored.formats,
        tables.by_role,
        Places(order, files, offsets),
        tables.first_files,
        len(inputs),
        keep=request.scale_policy == "keep",
    )
    made = maker.run()
    if maker.wrong:
        raise PlanError(maker.wrong)
    spans, units, kept = _with_copies(spans, made.copies)
    columns = made.columns(maker.views)
    work = Work(
        inputs=(*inputs, made.literals) if made.literals else inputs,
        outputs=tuple(zip(file_names, sizes, strict=True)),
        headers=tuple(headers),
        spans=spans,
        terms=terms,
        regions=columns["regions"],
        region_terms=columns["region_terms"],
        views=columns["views"],
        recipes=columns["recipes"],
        scale_tensors=np.array(made.scale_tensors, np.int64),
        extents=_extents(files, offsets, nbytes[order]),
        units=tuple(made.units),
        span_units=units,
        span_kept=kept,
    )
    index = None
    if file_names != [SINGLE]:
        names = [outputs.names[i] for i in order]
        parameters = sum(math.prod(shape) for shape in pairing.shapes)
        index = _index(tables.new_base.checkpoint, names, files, file_names, int(nbytes.sum()), parameters)
    return Layout(
        outputs=outputs, order=order, dtypes=dtypes[order], nbytes=nbytes[order], files=files, work=work, index=index
    )


def _extents(files: Column, offsets: Column, nbytes: Column) -> Column:
    """Return where each tensor lies, in order of their files."""
    extents = np.zeros(len(files), EXTENT)
    extents["file"], extents["begin"], extents["end"] = files, offsets, offsets + nbytes
    extents["tensor"] = np.arange(len(files))
    return extents[np.lexsort((extents["begin"], extents["file"]))]


def _with_copies(spans: Column, copies: list[Copy]) -> tuple[Column, Column, Column]:
    """Add spans for copied bytes; return all in order, the unit each waits for, and whether it is for an untouched
    unit."""
    extra = np.zeros(len(copies), SPAN)
    extra["out_dtype"] = extra["new_dtype"] = _RAW
    for column, value in (
        ("tensor", [c.place.tensor for c in copies]),
        ("out_file", [c.place.file for c in copies]),
        ("out_offset", [c.place.offset for c in copies]),
        ("new_file", [c.file for c in copies]),
        ("new_offset", [c.offset for c in copies]),
        ("count", [c.nbytes for c in copies]),
    ):
        extra[column] = value
    units = np.concatenate([np.full(len(spans), -1, np.int64), np.array([c.unit for c in copies], np.int64)])
    kept = np.concatenate([np.zeros(len(spans), bool), np.array([c.kept for c in copies], bool)])
    spans = np.concatenate([spans, extra])
    order = np.lexsort((spans["out_offset"], spans["out_file"]))
    return spans[order], units[order], kept[order]


def _take(column: Column, rows: Column) -> Column:
    """Return ``column[rows]``, zeros where a row is NONE."""
    if not len(column):
        return np.zeros(len(rows), column.dtype)
    return np.where(rows == NONE, np.zeros(1, column.dtype), column[np.where(rows == NONE, 0, rows)])


def _assign(
    request: MergeRequest, outputs: Outputs, tables: Tables, nbytes: Column
) -> tuple[Column, Column, list[str]]:
    """Return the file of each output tensor, the order of tensors, and the files' names."""
    if request.max_shard_size is not None:
        return _split(nbytes, request.max_shard_size)
    checkpoint = tables.new_base.checkpoint
    table = checkpoint.tensors
    # What only post has goes behind the last tensor of the last file.
    last = len(checkpoint.files) - 1
    home = np.array(outputs.homes, np.int64)
    files = np.where(home == NONE, last, _take(table.file, home))
    position = np.where(home == NONE, np.iinfo(np.int64).max, _take(table.offset, home))
    order = np.lexsort((np.arange(len(files)), np.where(home == NONE, len(table), home), position, files))
    # Files whose tensors are all gone are left out.
    used, numbers = np.unique(files[order], return_inverse=True)
    names = [checkpoint.files[i].name for i in used]
    if not names:
        names = [f.name for f in checkpoint.files[:1]]
    return numbers.astype(np.int64), order, names


def _split(nbytes: Column, limit: int) -> tuple[Column, Column, list[str]]:
    """Fill files in order up to ``limit`` bytes; a larger tensor gets a file of its own."""
    files = np.zeros(len(nbytes), np.int64)
    file, used = 0, 0
    for i, size in enumerate(nbytes.tolist()):
        if used and used + size > limit:
            file, used = file + 1, 0
        files[i] = file
        used += size
    count = file + 1
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return files, np.arange(len(nbytes)), names


def _headers(
    outputs: Outputs, tables: Tables, order: Column, files: Column, dtypes: Column, file_names: list[str]
) -> tuple[list[bytes], Column]:
    """Return the bytes each file starts with, and each output tensor's absolute offset in its file."""
    stored = tables.new_base.checkpoint.files
    metadata = {f.name: f.metadata for f in stored}
    default = dict(stored[0].metadata) if stored else {}
    headers = []
    offsets = np.zeros(len(order), np.int64)
    for file, name in enumerate(file_names):
        members = np.flatnonzero(files == file)
        rows = order[members].tolist()
        shapes = [outputs.shapes[i] for i in rows]
        types = [DTYPES[dtypes[i]] for i in rows]
        header, begins = format_header(
            [outputs.names[i] for i in rows], types, shapes, metadata.get(name, default), subject=name
        )
        offsets[members] = begins + len(header)
        headers.append(header)
    return headers, offsets


def _spans(
    pairing: Pairing,
    outputs: Outputs,
    tables: Tables,
    order: Column,
    files: Column,
    offsets: Column,
    dtypes: Column,
    elements: Column,
    nbytes: Column,
) -> tuple[Column, Column]:
    """Return the spans and terms of plain tensors and of planes that are copied."""
    logical, making = np.array(outputs.logical, np.int64)[order], np.array(outputs.making, np.int64)[order]
    copied = making == Making.COPY
    source = np.array(outputs.rows, np.int64)[order]

    def of_pairing(values: list[Any], dtype: Any) -> Column:
        column = np.array([*values, 0], dtype)  # the last: of what has no entry there
        return column[logical]

    kinds = of_pairing(pairing.kinds, np.int64)
    alphas = of_pairing(pairing.alphas, np.float64)
    rows = {role: of_pairing(getattr(pairing, role), np.int64) for role in ("post", "base", "new_base")}
    from_donor_post = copied & (np.array(outputs.donors)[order] == "post")
    rows["post"] = np.where(from_donor_post, source, rows["post"])
    rows["new_base"] = np.where(copied & ~from_donor_post, source, rows["new_base"])
    kinds = np.where(copied, np.where(from_donor_post, Kind.FROM_POST, Kind.FROM_NEW_BASE), kinds)
    from_post = kinds == Kind.FROM_POST
    scales = [alphas, *(of_pairing(further.alphas, np.float64) for further in pairing.more)]
    plain = (kinds == Kind.MERGED) & (making == Making.SPANS)
    added = np.array([plain & (scale != 0.0) for scale in scales])  # [delta, tensor]
    counts = added.sum(axis=0)
    merged = counts > 0

    spans = np.zeros(len(order), SPAN)
    spans["tensor"] = np.arange(len(order))
    spans["out_file"], spans["out_offset"] = files, offsets
    spans["out_dtype"], spans["count"] = dtypes[order], elements[order]
    source_dtype = _place(spans, "new", tables, "new_base", rows["new_base"])
    post_spans = np.zeros(len(order), SPAN)
    post_dtype = _place(post_spans, "new", tables, "post", rows["post"])
    for column in ("new_file", "new_offset"):
        spans[column] = np.where(from_post, post_spans[column], spans[column])
    source_dtype = np.where(from_post, post_dtype, source_dtype)
    spans["new_dtype"] = source_dtype
    # A copy moves bytes, whatever they mean.
    raw = ~merged & (kinds != Kind.EXTENDED) & (source_dtype == spans["out_dtype"])
    spans["count"] = np.where(raw, nbytes[order], spans["count"])
    for column in ("out_dtype", "new_dtype"):
        spans[column] = np.where(raw, np.where(spans["new_file"] == _ZEROS, _RAW_ZEROS, _RAW), spans[column])

    terms = np.zeros(int(counts.sum()), TERM)
    spans["n_terms"] = counts
    spans["first_term"] = np.where(merged, np.cumsum(counts) - counts, 0)
    places = spans["first_term"] + np.cumsum(added, axis=0) - added  # of each delta's term
    for number, (mine, scale) in enumerate(zip(added, scales, strict=True)):
        own = np.zeros(int(mine.sum()), TERM)
        own["alpha"] = scale[mine]
        further = pairing.more[number - 1] if number else pairing
        post_role, base_role = roles_of(number)
        _place(own, "post", tables, post_role, of_pairing(further.post, np.int64)[mine])
        _place(own, "base", tables, base_role, of_pairing(further.base, np.int64)[mine])
        terms[places[number][mine]] = own

    spans = spans[(making == Making.SPANS) | copied]
    extended = np.flatnonzero(kinds[spans["tensor"]] == Kind.EXTENDED)
    if len(extended):
        spans, terms = _with_extended(spans, terms, pairing, tables, logical, extended)
    return spans[spans["count"] > 0], terms


def _place(target: Column, prefix: str, tables: Tables, role: str, rows: Column) -> Column:
    """Fill the file, offset and dtype columns ``prefix_*`` with where ``rows`` of a role's table lie."""
    checkpoint = tables.by_role[role].checkpoint
    table = checkpoint.tensors
    if checkpoint.zeros:
        target[f"{prefix}_file"], target[f"{prefix}_offset"] = _ZEROS, 0
    else:
        target[f"{prefix}_file"] = _take(table.file, rows) + tables.first_files[role]
        target[f"{prefix}_offset"] = _take(table.offset, rows)
    dtype = _take(table.dtype, rows)
    target[f"{prefix}_dtype"] = dtype
    return dtype


def _with_extended(
    spans: Column, terms: Column, pairing: Pairing, tables: Tables, logical: Column, extended: Column
) -> tuple[Column, Column]:
    """Replace the spans of tensors that are merged row by row by one span per run of rows."""

    def place(role: str, row: int) -> Place:
        checkpoint = tables.by_role[role].checkpoint
        table = checkpoint.tensors
        if checkpoint.zeros:
            return Place(_ZEROS, 0, table.dtype_of(row))
        return Place(int(table.file[row]) + tables.first_files[role], int(table.offset[row]), table.dtype_of(row))

    keep = np.ones(len(spans), bool)
    keep[extended] = False
    all_spans, all_terms, count = [spans[keep]], [terms], len(terms)
    for at in extended.tolist():
        i = int(logical[spans["tensor"][at]])
        deltas = [
            (d.number, d.alpha, place(d.post_role, d.post), place(d.base_role, d.base)) for d in pairing.deltas(i)
        ]
        new_base, width = place("new_base", pairing.new_base[i]), math.prod(pairing.shapes[i][1:])
        own_spans, own_terms = gathered_spans(spans[at], pairing.gathers[i], width, new_base, deltas, count)
        all_spans.append(own_spans)
        all_terms.append(own_terms)
        count += len(own_terms)
    spans, terms = np.concatenate(all_spans), np.concatenate(all_terms)
    return spans[np.lexsort((spans["out_offset"], spans["out_file"]))], terms


def _index(
    new_base: Checkpoint, names: list[str], files: Column, file_names: list[str], total_size: int, elements: int
) -> bytes:
    """Return the index as transformers writes it; metadata keys that are not known are kept."""
    metadata = {**new_base.index_metadata, "total_size": total_size}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = elements
    # json.dumps would hold every line in several pieces: for 100,000 names, more than all else the plan needs.
    frame = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2, sort_keys=True)
    lines = bytearray(frame.removesuffix("{}\n}").encode() + b"{")
    quoted = [json.dumps(name) for name in file_names]
    for number, i in enumerate(sorted(range(len(names)), key=names.__getitem__)):
        comma = "," if number else ""
        lines += f"{comma}\n    {json.dumps(names[i])}: {quoted[int(files[i])]}".encode()
    lines += b"\n  }\n}\n"
    return bytes(lines)
