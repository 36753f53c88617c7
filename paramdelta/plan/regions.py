"""Turns merged weights of which something is quantised into the engine's regions: views of the operands, where codes
and scales go, and the units whose scales must be measured first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from paramdelta.checkpoint.weights import QuantisedWeight
from paramdelta.dtypes import DTYPES, F32, DType
from paramdelta.formats import CODECS, Format
from paramdelta.plan.naming import Names
from paramdelta.plan.outputs import Making, Outputs, grid_shape, matrix_shape
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.work import RECIPE, REGION, REGION_TERM, VIEW, Rows, SharedScale, recipe_row

_ABSENT = -1
_SECOND = {"": 0, "multiply": 1, "divide": 2}
# Layers that consumers fuse: their parts must have one second-level scale.
_FUSED = (
    (re.compile(r"(.*\.)(?:q|k|v)_proj(\..*)?"), r"\1qkv\2"),
    (re.compile(r"(.*\.)(?:gate|up)_proj(\..*)?"), r"\1gate_up\2"),
    (re.compile(r"(.*\.)w[13](\..*)?"), r"\1w13\2"),
)


@dataclass(frozen=True)
class Place:
    """Where an output tensor lies: its number in the order of the files, the file, and the offset there."""

    tensor: int
    file: int
    offset: int


class Copy(NamedTuple):
    """``nbytes`` bytes at ``offset`` of input ``file`` go to ``place``; ``unit`` and ``kept`` as Work.span_units."""

    place: Place
    file: int
    offset: int
    nbytes: int
    unit: int
    kept: bool


@dataclass
class Regions:
    """Regions and all they refer to, as they are collected. ``literals`` are bytes in memory, read like a file."""

    regions: list[tuple[Any, ...]] = field(default_factory=list)
    scale_tensors: list[int] = field(default_factory=list)
    terms: list[tuple[Any, ...]] = field(default_factory=list)
    views: list[tuple[Any, ...]] = field(default_factory=list)
    recipes: dict[tuple[Any, ...], int] = field(default_factory=dict)
    units: list[SharedScale] = field(default_factory=list)
    literals: bytearray = field(default_factory=bytearray)
    copies: list[Copy] = field(default_factory=list)

    def literal(self, data: bytes) -> int:
        """Append bytes to the literals; return where they lie."""
        at = len(self.literals)
        self.literals += data
        return at

    def columns(self) -> dict[str, Rows]:
        """Return the collected rows as columns of the work."""
        return {
            "regions": np.array(self.regions, REGION),
            "region_terms": np.array(self.terms, REGION_TERM),
            "views": np.array(self.views, VIEW),
            "recipes": np.array(list(self.recipes), RECIPE),
        }


class RegionMaker:
    """Makes the regions of a plan. ``first_files`` are the numbers of each role's first input file; ``literal_file`` is
    that of the literals."""

    def __init__(
        self,
        pairing: Pairing,
        outputs: Outputs,
        formats: list[Format | None],
        names: dict[str, Names],
        places: list[Place],
        first_files: dict[str, int],
        literal_file: int,
        *,
        keep: bool,
    ) -> None:
        self.pairing, self.outputs, self.formats, self.names = pairing, outputs, formats, names
        self.places, self.first_files, self.literal_file, self.keep = places, first_files, literal_file, keep
        self.made = Regions()
        self.groups: dict[Any, int] = {}

    def run(self) -> Regions:
        """Make the regions and literals of every output tensor that needs one."""
        for i, planes in self.outputs.planes.items():
            if i >= 0:
                self.weight(i, planes)
        return self.made

    def weight(self, i: int, planes: dict[str, int]) -> None:
        makings = {self.outputs.making[plane] for plane in planes.values()}
        if makings == {Making.COPY}:
            return
        format_ = self.formats[i]
        if "shape" in planes and self.outputs.making[planes["shape"]] == Making.LITERAL:
            data = np.array(self.pairing.shapes[i], np.int64).tobytes()
            here = self.places[planes["shape"]]
            self.made.copies.append(Copy(here, self.literal_file, self.made.literal(data), len(data), -1, False))
        stack, rows, cols = matrix_shape(self.pairing.shapes[i])
        if 0 in (stack, rows, cols):
            return
        for e in range(stack):
            unit = self.unit(i, e, planes, format_) if format_ is not None and format_.whole else -1
            self.region(i, e, planes, format_, unit, rows, cols)

    def region(
        self, i: int, e: int, planes: dict[str, int], format_: Format | None, unit: int, rows: int, cols: int
    ) -> None:
        """Add the region of matrix ``e`` of a stack."""
        codes = planes["codes"] if format_ is not None else planes[""]
        place = self.places[codes]
        dtype = DTYPES[self.outputs.dtypes[codes]]
        pitch = cols * (dtype.bits if format_ is None else format_.bits) // 8
        new = self.view("post" if self.pairing.kinds[i] == Kind.FROM_POST else "new_base", i, e)
        first, n_terms = len(self.made.terms), 0
        if self.merges(i):
            self.made.terms.append((self.pairing.alphas[i], self.view("post", i, e), self.view("base", i, e)))
            n_terms = 1
        recipe, scale, strides, given, second, grid, keep = -1, None, (0, 0, 0), None, None, (0, 0), False
        if format_ is not None:
            row = recipe_row(format_.recipe, format_.scale)
            recipe = self.made.recipes.setdefault(row, len(self.made.recipes))
            grid = (format_.rows, format_.cols)
            own = self.made.units[unit].value_at if unit >= 0 else 0
            if format_.whole and not format_.second:
                given = own
            else:
                scale = self.places[planes["scale"]]
                strides = self.scale_strides(format_, self.pairing.shapes[i], e)
                second = own if format_.second else None
            keep = self.keepable(i, format_) and not format_.whole
        self.made.regions.append(
            (
                place.offset + e * rows * pitch,
                pitch,
                rows,
                cols,
                0 if scale is None else scale.offset + strides[0],
                strides[1],
                strides[2],
                given or 0,
                second or 0,
                place.tensor,
                place.file,
                _ABSENT if scale is None else scale.file,
                _ABSENT if given is None else self.literal_file,
                _ABSENT if second is None else self.literal_file,
                recipe,
                new,
                first,
                n_terms,
                unit,
                *grid,
                dtype.code if format_ is None else 0,
                keep,
                False,
                b"",
            )
        )
        self.made.scale_tensors.append(_ABSENT if scale is None else scale.tensor)

    def merges(self, i: int) -> bool:
        return self.pairing.kinds[i] in (Kind.MERGED, Kind.EXTENDED) and self.pairing.alphas[i] != 0.0

    @staticmethod
    def scale_strides(format_: Format, shape: tuple[int, ...], e: int) -> tuple[int, int, int]:
        """Return where the grid of matrix ``e`` begins, and its strides, in bytes."""
        grid_rows, grid_cols = grid_shape(format_, shape)
        item = format_.scale_dtype.itemsize
        return e * grid_rows * grid_cols * item, grid_cols * item, item

    def keepable(self, i: int, format_: Format) -> bool:
        """Whether new_base stores the weight just so, and its scales may be kept."""
        weight = self.names["new_base"].weights.get(self.pairing.new_base[i])
        return (
            self.keep
            and weight is not None
            and self.pairing.kinds[i] == Kind.MERGED
            and _same_layout(weight.format, format_)
        )

    def unit(self, i: int, e: int, planes: dict[str, int], format_: Format) -> int:
        """Return the unit of matrix ``e``; make it, with the outputs that wait for it, where it is met first."""
        name = self.pairing.names[i]
        key = (_fused(name), e) if format_.second else (i, e)
        item = format_.scale_dtype.itemsize if not format_.second else 4
        part = "second" if format_.second else "scale"
        place, stored = self.places[planes[part]], self.made.literal(bytes(item))
        kept = self.keepable(i, format_)
        number = self.groups.get(key)
        if number is None:
            number = self.groups[key] = len(self.made.units)
            self.made.units.append(
                SharedScale(
                    recipe=format_.recipe,
                    dtype=F32 if format_.second else format_.scale,
                    value_at=self.made.literal(bytes(4)),
                    stored_at=(stored,),
                    kept=kept,
                )
            )
        else:
            unit = self.made.units[number]
            self.made.units[number] = SharedScale(
                recipe=unit.recipe,
                dtype=unit.dtype,
                value_at=unit.value_at,
                stored_at=(*unit.stored_at, stored),
                kept=unit.kept and kept,
            )
        here = Place(place.tensor, place.file, place.offset + e * item)
        self.made.copies.append(Copy(here, self.literal_file, stored, item, number, False))
        if kept:
            self.keep_planes(i, e, planes, format_, number)
        return number

    def keep_planes(self, i: int, e: int, planes: dict[str, int], format_: Format, unit: int) -> None:
        """Add the copies that an untouched unit gets: new_base's own planes."""
        weight = self.names["new_base"].weights[self.pairing.new_base[i]]
        table = self.names["new_base"].checkpoint.tensors
        stack = matrix_shape(self.pairing.shapes[i])[0]
        for part, row in (("codes", weight.codes), ("scale", weight.scale), ("second", weight.second)):
            if part not in planes or row == NONE:
                continue
            count = int(table.nbytes[row]) // stack
            place = self.places[planes[part]]
            here = Place(place.tensor, place.file, place.offset + e * count)
            file, offset = self.location("new_base", row)
            self.made.copies.append(Copy(here, file, offset + e * count, count, unit, True))

    def view(self, role: str, i: int, e: int) -> int:
        """Add a view of matrix ``e`` of an operand; return its number."""
        row = getattr(self.pairing, role)[i]
        names = self.names[role]
        weight = names.weights.get(row)
        shape = names.shape(row)
        self.made.views.append(
            self.plain_view(role, row, shape, e) if weight is None else self.quantised_view(role, weight, e)
        )
        return len(self.made.views) - 1

    def location(self, role: str, row: int) -> tuple[int, int]:
        table = self.names[role].checkpoint.tensors
        return self.first_files[role] + int(table.file[row]), int(table.offset[row])

    def plain_view(self, role: str, row: int, shape: tuple[int, ...], e: int) -> tuple[Any, ...]:
        _, rows, cols = matrix_shape(shape)
        dtype = self.names[role].dtype(row)
        file, offset = self.location(role, row)
        item = dtype.itemsize
        return _view(offset + e * rows * cols * item, cols * item, item, file, CODECS.index(dtype.name))

    def quantised_view(self, role: str, weight: QuantisedWeight, e: int) -> tuple[Any, ...]:
        _, rows, cols = matrix_shape(weight.shape)
        format_ = weight.format
        file, offset = self.location(role, weight.codes)
        pitch = cols * format_.bits // 8
        view: dict[str, Any] = {}
        if weight.scale != NONE:
            scale_file, scale_offset = self.location(role, weight.scale)
            first, row_stride, col_stride = self.scale_strides(format_, weight.shape, e)
            view = {
                "scale_file": scale_file,
                "scale": (scale_offset + first, row_stride, col_stride),
                "grid": (format_.rows, format_.cols),
                "scale_dtype": format_.scale,
            }
        if weight.second != NONE:
            second_file, second_offset = self.location(role, weight.second)
            several = self.names[role].checkpoint.tensors.nbytes[weight.second] > 4
            view |= {
                "second_file": second_file,
                "second_offset": second_offset + (4 * e if several else 0),
                "second": _SECOND[format_.second],
            }
        if weight.zero_point != NONE:
            zero_file, zero_offset = self.location(role, weight.zero_point)
            width = 4 * grid_shape(format_, weight.shape)[1]
            view |= {"zero_file": zero_file, "zero": (zero_offset + e * -(-rows // 8) * width, width)}
        return _view(offset + e * rows * pitch, pitch, 1, file, CODECS.index(format_.codec), **view)


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
    scale_file: int = _ABSENT,
    zero_file: int = _ABSENT,
    second_file: int = _ABSENT,
    grid: tuple[int, int] = (0, 0),
    phase: tuple[int, int] = (0, 0),
    scale_dtype: DType = F32,
    second: int = 0,
) -> tuple[Any, ...]:
    """Return a row of VIEW."""
    places = (offset, row_stride, col_stride, *scale, *zero, second_offset)
    files = (file, scale_file, zero_file, second_file)
    return (*places, *files, *grid, *phase, codec, scale_dtype.code, second, b"")


def _same_layout(stored: Format, wanted: Format) -> bool:
    def layout(format_: Format) -> tuple[Any, ...]:
        return (format_.codec, format_.rows, format_.cols, format_.scale, format_.second, format_.zero_points)

    return layout(stored) == layout(wanted)


def _fused(name: str) -> str:
    for pattern, replacement in _FUSED:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    return name
