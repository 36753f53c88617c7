"""Turns merged weights of which something is quantised into the engine's regions: views of the operands, where codes
and scales go, and the units whose scales must be measured first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES, F32
from paramdelta.errors import Complaint, shown
from paramdelta.formats import Format
from paramdelta.plan.bridges import Piece, Slice
from paramdelta.plan.naming import Names
from paramdelta.plan.outputs import Making, Outputs, fused, matrix_shape
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.views import ABSENT, Views, scale_strides
from paramdelta.plan.work import RECIPE, REGION, REGION_TERM, VIEW, Rows, SharedScale, recipe_row


@dataclass(frozen=True)
class Place:
    """Where an output tensor lies: its number in the order of the files, the file, and the offset there."""

    tensor: int
    file: int
    offset: int


class Places:
    """Where the output tensors lie, by their numbers in the order of the pairing. ``order`` are those numbers in the
    order of the files; ``files`` and ``offsets`` follow it."""

    def __init__(self, order: NDArray[np.int64], files: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self._tensors = np.empty(len(order), np.int64)
        self._tensors[order] = np.arange(len(order))
        self._files, self._offsets = files, offsets

    def __getitem__(self, number: int) -> Place:
        tensor = int(self._tensors[number])
        return Place(tensor, int(self._files[tensor]), int(self._offsets[tensor]))


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
    recipes: dict[tuple[Any, ...], int] = field(default_factory=dict)
    units: list[SharedScale] = field(default_factory=list)
    literals: bytearray = field(default_factory=bytearray)
    copies: list[Copy] = field(default_factory=list)

    def literal(self, data: bytes) -> int:
        """Append bytes to the literals; return where they lie."""
        at = len(self.literals)
        self.literals += data
        return at

    def columns(self, views: Views) -> dict[str, Rows]:
        """Return the collected rows as columns of the work."""
        return {
            "regions": np.array(self.regions, REGION),
            "region_terms": np.array(self.terms, REGION_TERM),
            "views": np.array(views.rows, VIEW),
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
        places: Places,
        first_files: dict[str, int],
        literal_file: int,
        *,
        keep: bool,
    ) -> None:
        self.pairing, self.outputs, self.formats, self.names = pairing, outputs, formats, names
        self.places, self.literal_file, self.keep = places, literal_file, keep
        self.made = Regions()
        self.views = Views(names, first_files)
        self.groups: dict[Any, int] = {}
        self.wrong = self.views.wrong

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
        units = [
            self.unit(i, e, planes, format_) if format_ is not None and format_.whole else -1 for e in range(stack)
        ]
        for piece in self.pairing.pieces(i, stack, rows, cols):
            self.region(i, piece, planes, format_, units[piece.out.matrix])

    def region(self, i: int, piece: Piece, planes: dict[str, int], format_: Format | None, unit: int) -> None:
        """Add the region of a piece of a weight. Its rows and columns are those of the output as it is stored."""
        codes = planes["codes"] if format_ is not None else planes[""]
        place, out = self.places[codes], piece.out
        dtype = DTYPES[self.outputs.dtypes[codes]]
        _, all_rows, all_cols = matrix_shape(self.pairing.shapes[i])
        bits = dtype.bits if format_ is None else format_.bits
        pitch = all_cols * bits // 8
        rows, cols = (out.cols, out.rows) if out.transposed else (out.rows, out.cols)
        row, col = (0, out.first) if out.transposed else (out.first, 0)
        self.check_frame(i, format_, bits, row, rows, col, cols, out)
        from_post = self.pairing.kinds[i] == Kind.FROM_POST
        new = (
            self.views.add("post", piece.post, out)
            if from_post
            else self.views.add("new_base", piece.new_base or out, out)
        )
        first, n_terms = len(self.made.terms), 0
        for delta in self.pairing.deltas(i):
            in_post, in_base = piece.pair(delta.number)
            post = self.views.add(delta.post_role, in_post, out)
            self.made.terms.append((delta.alpha, post, self.views.add(delta.base_role, in_base, out)))
            n_terms += 1
        recipe, scale, strides, given, second, grid, keep = -1, None, (0, 0, 0), None, None, (0, 0), False
        if format_ is not None:
            row_of = recipe_row(format_.recipe, format_.scale)
            recipe = self.made.recipes.setdefault(row_of, len(self.made.recipes))
            grid = (format_.rows, format_.cols)
            own = self.made.units[unit].value_at if unit >= 0 else 0
            if format_.whole and not format_.second:
                given = own
            else:
                scale = self.places[planes["scale"]]
                at, down, across = scale_strides(format_, self.pairing.shapes[i], out.matrix)
                at += (row // format_.rows if format_.rows else 0) * down
                at += (col // format_.cols if format_.cols else 0) * across
                strides = (at, down * (out.step if format_.rows == 1 else 1), across)
                second = own if format_.second else None
            keep = self.keepable(i, format_) and not format_.whole
        self.made.regions.append(
            (
                place.offset + (out.matrix * all_rows + row) * pitch + col * bits // 8,
                pitch * out.step,
                rows,
                cols,
                0,
                rows,
                0 if scale is None else scale.offset + strides[0],
                strides[1],
                strides[2],
                given or 0,
                second or 0,
                place.tensor,
                place.file,
                ABSENT if scale is None else scale.file,
                ABSENT if given is None else self.literal_file,
                ABSENT if second is None else self.literal_file,
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
        self.made.scale_tensors.append(ABSENT if scale is None else scale.tensor)

    def check_frame(
        self, i: int, format_: Format | None, bits: int, row: int, rows: int, col: int, cols: int, out: Slice
    ) -> None:
        """Complain where a piece of the output does not begin and end with its blocks and bytes."""
        _, all_rows, all_cols = matrix_shape(self.pairing.shapes[i])
        alone = (rows, cols) == (all_rows, all_cols)
        if alone:
            return
        problem = ""
        if out.step > 1 and out.transposed:
            problem = "its parts alternate in columns"
        elif out.step > 1 and format_ is not None and format_.rows not in (0, 1):
            problem = f"its parts alternate in rows, which share scales in blocks of {format_.rows}"
        elif format_ is not None and not format_.whole:
            cut = (
                (row % format_.rows or ((row + rows) % format_.rows and row + rows < all_rows))
                if format_.rows and out.step == 1
                else format_.rows == 0 and rows < all_rows
            )
            cut = cut or (
                (col % format_.cols or ((col + cols) % format_.cols and col + cols < all_cols))
                if format_.cols
                else cols < all_cols
            )
            problem = "the border between its parts lies within a block that shares a scale" if cut else ""
        if not problem and bits == 4 and (col % 2 or cols % 2):
            problem = "its parts end within a byte"
        if problem:
            self.complain(i, problem)

    def complain(self, i: int, problem: str) -> None:
        self.wrong.append(
            Complaint(
                shown(self.pairing.names[i]),
                f"post or base store it in other parts, and {problem}",
                "--format bf16 writes it plain; --exclude GLOB copies it from new_base",
            )
        )

    def keepable(self, i: int, format_: Format) -> bool:
        """Whether what the weight is made from, new_base or post, is stored just so, and its scales may be kept."""
        role, row = self.donor(i)
        weight = self.names[role].weights.get(row)
        return (
            self.keep
            and weight is not None
            and self.pairing.kinds[i] != Kind.EXTENDED
            and _same_layout(weight.format, format_, matrix_shape(self.pairing.shapes[i])[1:])
        )

    def donor(self, i: int) -> tuple[str, int]:
        """Return the role and row of what a weight is made from: new_base's, or post's where it is taken from there."""
        if self.pairing.kinds[i] == Kind.FROM_POST:
            return "post", self.pairing.post[i]
        return "new_base", self.pairing.new_base[i]

    def unit(self, i: int, e: int, planes: dict[str, int], format_: Format) -> int:
        """Return the unit of matrix ``e``; make it, with the outputs that wait for it, where it is met first."""
        name = self.pairing.names[i]
        key = (fused(name), e) if format_.second else (i, e)
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
        """Add the copies that an untouched unit gets: the donor's own planes."""
        role, donated = self.donor(i)
        weight = self.names[role].weights[donated]
        table = self.names[role].checkpoint.tensors
        stack = matrix_shape(self.pairing.shapes[i])[0]
        for part, row in (("codes", weight.codes), ("scale", weight.scale), ("second", weight.second)):
            if part not in planes or row == NONE:
                continue
            count = int(table.nbytes[row]) // stack
            place = self.places[planes[part]]
            here = Place(place.tensor, place.file, place.offset + e * count)
            file, offset = self.views.location(role, row)
            self.made.copies.append(Copy(here, file, offset + e * count, count, unit, True))


def _same_layout(stored: Format, wanted: Format, shape: tuple[int, int]) -> bool:
    """Whether matrices of this shape are stored alike; a block that reaches beyond them is one that they fill."""

    def layout(format_: Format) -> tuple[Any, ...]:
        grid = [min(block or n, n) for block, n in zip((format_.rows, format_.cols), shape, strict=True)]
        return (format_.codec, *grid, format_.scale, format_.second, format_.zero_points)

    return layout(stored) == layout(wanted)
