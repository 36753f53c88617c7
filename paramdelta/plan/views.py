"""Views: where the elements and scales of an operand lie in files, turned as the output is stored."""

from __future__ import annotations

from typing import Any

from paramdelta.checkpoint import QuantisedWeight
from paramdelta.dtypes import F32, DType
from paramdelta.errors import Complaint, shown
from paramdelta.formats import CODECS, Format
from paramdelta.plan.bridges import Slice
from paramdelta.plan.naming import Names
from paramdelta.plan.outputs import grid_shape, matrix_shape
from paramdelta.plan.pairing import NONE

ABSENT = -1
_SECOND = {"": 0, "multiply": 1, "divide": 2}


class Views:
    """The views of a plan, as rows of VIEW. ``first_files`` are the numbers of each role's first input file; what
    cannot be read in the output's order is complained about in ``wrong``."""

    def __init__(self, names: dict[str, Names], first_files: dict[str, int]) -> None:
        self.names, self.first_files = names, first_files
        self.rows: list[tuple[Any, ...]] = []
        self.wrong: list[Complaint] = []

    def add(self, role: str, at: Slice, out: Slice) -> int:
        """Add a view of a part of an operand, turned as the output is; return its number."""
        names = self.names[role]
        weight = names.weights.get(at.row)
        self.rows.append(
            self.plain_view(role, at, out) if weight is None else self.quantised_view(role, weight, at, out)
        )
        return len(self.rows) - 1

    def location(self, role: str, row: int) -> tuple[int, int]:
        checkpoint = self.names[role].checkpoint
        if checkpoint.zeros:
            return ABSENT, 0
        table = checkpoint.tensors
        return self.first_files[role] + int(table.file[row]), int(table.offset[row])

    def plain_view(self, role: str, at: Slice, out: Slice) -> tuple[Any, ...]:
        _, rows, cols = matrix_shape(self.names[role].shape(at.row))
        dtype = self.names[role].dtype(at.row)
        file, offset = self.location(role, at.row)
        item = dtype.itemsize
        first, strides = _turned(at, out, cols * item, item)
        self.check_view(role, at, strides, item)
        return _view(offset + at.matrix * rows * cols * item + first, *strides, file, CODECS.index(dtype.name))

    def check_view(self, role: str, at: Slice, strides: tuple[int, int], item: int) -> None:
        if item not in strides:
            self.wrong.append(
                Complaint(
                    shown(self.names[role].own_name(at.row)),
                    f"its elements in {role} cannot be read in the output's order: it is interleaved, and transposed",
                    "--exclude GLOB copies it from new_base",
                )
            )

    def quantised_view(self, role: str, weight: QuantisedWeight, at: Slice, out: Slice) -> tuple[Any, ...]:
        _, rows, cols = matrix_shape(weight.shape)
        format_ = weight.format
        file, offset = self.location(role, weight.codes)
        pitch = cols * format_.bits // 8
        first, strides = _turned(at, out, pitch, 1)
        if format_.bits == 4 and at.transposed:
            first //= 2
        self.check_view(role, at, strides, 1)
        view: dict[str, Any] = {}
        if weight.scale != NONE:
            scale_file, scale_offset = self.location(role, weight.scale)
            grid_first, down, across = scale_strides(format_, weight.shape, at.matrix)
            grid, phase, moved, grid_strides = _turned_grid(at, out, (format_.rows, format_.cols), (down, across))
            if at.step > 1 and (format_.cols if at.transposed else format_.rows) > 1:
                self.check_view(role, at, (0, 0), 1)
            view = {
                "scale_file": scale_file,
                "scale": (scale_offset + grid_first + moved, *grid_strides),
                "grid": grid,
                "phase": phase,
                "scale_dtype": format_.scale,
            }
        if weight.second != NONE:
            second_file, second_offset = self.location(role, weight.second)
            several = self.names[role].checkpoint.tensors.nbytes[weight.second] > 4
            view |= {
                "second_file": second_file,
                "second_offset": second_offset + (4 * at.matrix if several else 0),
                "second": _SECOND[format_.second],
            }
        if weight.zero_point != NONE:
            zero_file, zero_offset = self.location(role, weight.zero_point)
            width = 4 * grid_shape(format_, weight.shape)[1]
            words = at.matrix * -(-rows // 8) + at.first // 8
            view |= {"zero_file": zero_file, "zero": (zero_offset + words * width, width)}
            if at.transposed or out.transposed or at.step > 1 or at.first % 8:
                self.check_view(role, at, (0, 0), 1)
        return _view(offset + at.matrix * rows * pitch + first, *strides, file, CODECS.index(format_.codec), **view)


def scale_strides(format_: Format, shape: tuple[int, ...], e: int) -> tuple[int, int, int]:
    """Return where the grid of matrix ``e`` of a weight begins, and its strides, in bytes."""
    grid_rows, grid_cols = grid_shape(format_, shape)
    item = format_.scale_dtype.itemsize
    return e * grid_rows * grid_cols * item, grid_cols * item, item


def _turned(at: Slice, out: Slice, pitch: int, item: int) -> tuple[int, tuple[int, int]]:
    """Return where a part begins in its matrix, and its strides (rows, columns) turned as the output is, in bytes."""
    down, across = (item, pitch) if at.transposed else (pitch, item)
    first, down = at.first * down, at.step * down
    return first, ((across, down) if out.transposed else (down, across))


def _turned_grid(
    at: Slice, out: Slice, grid: tuple[int, int], strides: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], int, tuple[int, int]]:
    """Return the grid of a part turned as the output is: elements per scale, phases, where it begins, and strides."""
    (rows, cols), (down, across) = (grid[::-1], strides[::-1]) if at.transposed else (grid, strides)
    moved = (at.first // rows if rows else 0) * down
    phase = at.first % rows if rows else 0
    if at.step > 1 and rows == 1:
        down *= at.step
    if out.transposed:
        return (cols, rows), (0, phase), moved, (across, down)
    return (rows, cols), (phase, 0), moved, (down, across)


def _view(
    offset: int,
    row_stride: int,
    col_stride: int,
    file: int,
    codec: int,
    *,
    scale: tuple[int, int, int] = (0, 0, 0),
    zero: tuple[int, int] = (0, 0),
    second_offset: int = 0,
    scale_file: int = ABSENT,
    zero_file: int = ABSENT,
    second_file: int = ABSENT,
    grid: tuple[int, int] = (0, 0),
    phase: tuple[int, int] = (0, 0),
    scale_dtype: DType = F32,
    second: int = 0,
) -> tuple[Any, ...]:
    """Return a row of VIEW."""
    places = (offset, row_stride, col_stride, *scale, *zero, second_offset)
    files = (file, scale_file, zero_file, second_file)
    return (*places, *files, *grid, *phase, codec, scale_dtype.code, second, b"")
