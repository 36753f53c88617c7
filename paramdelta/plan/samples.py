"""Samples of operands, by a few small reads: the first elements of a span, a corner of a region's matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES
from paramdelta.errors import storage_errors
from paramdelta.formats import CODEC_BITS, CODECS
from paramdelta.memory import Memory
from paramdelta.plan.work import Work
from paramdelta.reference_codes import code_values, scale_values, unpack, unpack_zero_points

SAMPLED_ELEMENTS = 1 << 15
SAMPLED_CORNER = 128  # rows, and columns, of a matrix

Values = NDArray[np.float64]
Operands = tuple[Values, Values, Values]  # post, base, new_base


def of_span(work: Work, span: Any, term: Any) -> Operands | None:
    """Return the first elements of the operands of a span and one of its terms, None where base is zeros."""
    if term["base_file"] < 0:
        return None
    count = min(int(span["count"]), SAMPLED_ELEMENTS)
    p = _plain(work, term["post_file"], term["post_offset"], term["post_dtype"], count)
    b = _plain(work, term["base_file"], term["base_offset"], term["base_dtype"], count)
    if span["new_file"] < 0:
        return p, b, np.zeros(count)
    return p, b, _plain(work, span["new_file"], span["new_offset"], span["new_dtype"], count)


def of_region(work: Work, region: Any, term: Any) -> Operands | None:
    """Return the values of the same corner of a region's and a term's operands, None where one is zeros."""
    rows, cols = (min(int(region[side]), SAMPLED_CORNER) for side in ("rows", "cols"))
    views = [work.views[number] for number in (term["post_view"], term["base_view"], region["new_view"])]
    if 0 in (rows, cols) or any(view["file"] < 0 for view in views):
        return None
    p, b, n = (view_values(work, view, rows, cols) for view in views)
    return p, b, n


@np.errstate(all="ignore")
def view_values(work: Work, view: Any, rows: int, cols: int) -> Values:
    """Return what the first rows and columns of a view decode to, as :func:`paramdelta.reference_codes.decode` says."""
    codec = CODECS[view["codec"]]
    bits = CODEC_BITS[codec]
    item = max(bits // 8, 1)
    turned = view["col_stride"] != item
    lines, length, stride = (cols, rows, view["col_stride"]) if turned else (rows, cols, view["row_stride"])
    raw = _lines(_source(work, view["file"]), view["offset"], lines, stride, (length * bits + 7) // 8)
    codes = unpack(raw, codec, length)
    values = code_values(codes.T if turned else codes, codec)
    row = _blocks(rows, view["row_phase"], view["grid_rows"])
    col = _blocks(cols, view["col_phase"], view["grid_cols"])
    if codec == "i4":
        values = values - _zero_points(work, view, rows, col)
    if view["scale_file"] >= 0:
        values = values * _scales(work, view, int(row[-1]) + 1, int(col[-1]) + 1)[row][:, col]
    return values


def _scales(work: Work, view: Any, rows: int, cols: int) -> Values:
    dtype = DTYPES[view["scale_dtype"]]
    item = dtype.itemsize
    across = view["scale_col_stride"] == item or cols == 1
    stride = view["scale_row_stride"] if across else view["scale_col_stride"]
    lines, length = (rows, cols) if across else (cols, rows)
    raw = _lines(_source(work, view["scale_file"]), view["scale_offset"], lines, stride, length * item)
    codes = raw.view(f"<u{item}")
    scales = scale_values(codes if across else codes.T, dtype.name)
    if not view["second"]:
        return scales
    second = _lines(_source(work, view["second_file"]), view["second_offset"], 1, 4, 4).view("<f4")[0, 0]
    product: Values = scales * np.float64(second)
    quotient: Values = (scales.astype(np.float32) / second).astype(np.float64)
    return product if view["second"] == 1 else quotient


def _zero_points(work: Work, view: Any, rows: int, col: NDArray[np.int64]) -> Values | float:
    if view["zero_file"] < 0:
        return 8.0
    words = (int(view["row_phase"]) + rows + 7) // 8
    raw = _lines(
        _source(work, view["zero_file"]), view["zero_offset"], words, view["zero_row_stride"], 4 * (col[-1] + 1)
    )
    points = unpack_zero_points(raw.view("<u4"), words * 8)[int(view["row_phase"]) :][:rows]
    return points[:, col].astype(np.float64)


def _blocks(count: int, phase: int, block: int) -> NDArray[np.int64]:
    """Return the block of each element, all 0 where the whole extent is one."""
    return (np.arange(count) + int(phase)) // int(block) if block else np.zeros(count, np.int64)


def _plain(work: Work, file: int, offset: int, code: int, count: int) -> Values:
    dtype = DTYPES[code]
    codes = _lines(_source(work, file), offset, 1, 0, count * dtype.itemsize)[0].view(f"<u{dtype.itemsize}")
    return code_values(codes, dtype.name)


def _source(work: Work, file: int) -> Path | Memory:
    source = work.inputs[file]
    assert not isinstance(source, bytearray)  # literals are no operands
    return source


def _lines(source: Path | Memory, offset: int, lines: int, stride: int, length: int) -> NDArray[np.uint8]:
    """Read ``lines`` of ``length`` bytes."""
    data = b"".join(read_bytes(source, int(offset) + line * int(stride), int(length)) for line in range(lines))
    return np.frombuffer(data, np.uint8).reshape(lines, int(length))


def read_bytes(source: Path | Memory, offset: int, count: int) -> bytes:
    """Read bytes for a warning, zeros beyond the end of the file. Raises StorageError."""
    if isinstance(source, Memory):
        return source.read(offset, count)
    with storage_errors(source, f"reading at byte {offset} failed"), open(source, "rb") as file:
        file.seek(offset)
        data = file.read(count)
    return data + bytes(count - len(data))
