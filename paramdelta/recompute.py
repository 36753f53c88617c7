"""Recomputes quantised weights of a merged folder from its sources, by the references in NumPy, with tensors read
through the safetensors library."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16, which safetensors asks it for)
import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize, safe_open

from paramdelta import reference_scaled as reference
from paramdelta.checkpoint import Checkpoint, QuantisedWeight
from paramdelta.dtypes import DType
from paramdelta.errors import shown
from paramdelta.formats import Format
from paramdelta.plan import Kind
from paramdelta.plan.bridges import Slice
from paramdelta.plan.outputs import Making, grid_shape, matrix_shape
from paramdelta.plan.pairing import NONE
from paramdelta.reference_codes import unpack, unpack_zero_points

if TYPE_CHECKING:
    from paramdelta.plan import Plan

_WINDOW = 1 << 20  # elements recomputed at a time, where units are smaller than that
_SAMPLED = 4  # windows of a matrix, unless everything is to be compared


class Readers:
    """Tensors of checkpoints by name, through the safetensors library; files stay open while it lives."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        _deserialized.cache_clear()

    def codes(self, checkpoint: Checkpoint, row: int, first: int, last: int) -> NDArray[Any]:
        """Return rows ``first`` … ``last`` − 1 of a tensor as stored codes, flat."""
        table = checkpoint.tensors
        if checkpoint.zeros:
            return _zeros(table.dtype_of(row), table.shapes[row], first, last)
        name, dtype, path = table.names[row], table.dtype_of(row), checkpoint.files[table.file[row]].path
        if dtype.bits % 8 or dtype.name.startswith("f8") or dtype.name == "c64":
            return _raw_codes(path, name, dtype, table.shapes[row], first, last)
        if path not in self._open:
            self._open[path] = safe_open(path, framework="np").__enter__()  # type: ignore[no-untyped-call]
        file = self._open[path]
        shape = table.shapes[row]
        array = file.get_slice(name)[first:last] if shape and 0 not in shape else file.get_tensor(name)
        flat: NDArray[Any] = np.ascontiguousarray(array).reshape(-1)
        return flat.view(np.dtype(f"u{dtype.itemsize}"))


def _zeros(dtype: DType, shape: tuple[int, ...], first: int, last: int) -> NDArray[Any]:
    """Return rows of a tensor of zeros, as :meth:`Readers.codes` gives them."""
    elements = math.prod(shape[1:]) * (last - first) if shape else 1
    if dtype.bits % 8:
        return np.zeros(elements * dtype.bits // 8, np.uint8)
    return np.zeros(elements, np.dtype(f"u{dtype.itemsize}"))


@functools.lru_cache(maxsize=4)
def _deserialized(path: Path) -> dict[str, Any]:
    """Return a whole file's tensors as the library's other entry gives them. One file of each checkpoint is kept."""
    return dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]


def _raw_codes(path: Path, name: str, dtype: DType, shape: tuple[int, ...], first: int, last: int) -> NDArray[Any]:
    """Read a tensor whose type the library's NumPy front end does not know: bytes, by its other entry."""
    info = _deserialized(path)[name]
    data = np.frombuffer(bytes(info["data"]), np.uint8)
    rows = max(shape[0] if shape else 1, 1)
    width = len(data) // rows
    data = data[first * width : last * width] if shape else data
    return data if dtype.bits % 8 else data.view(np.dtype(f"u{dtype.itemsize}"))


class Member(NamedTuple):
    """Matrix ``e`` of entry ``i`` of the pairing, of rows × cols elements; ``unit`` shares its scale, −1 for none."""

    i: int
    e: int
    rows: int
    cols: int
    unit: int
    planes: dict[str, int]
    format: Format | None
    dimensions: int


class Window(NamedTuple):
    """Rows and columns of a matrix that are whole units."""

    row: int
    rows: int
    col: int
    cols: int


class Recomputed:
    """The quantised weights of a plan, and what was made of them in the folder ``made``."""

    def __init__(self, plan: Plan, made: Checkpoint, readers: Readers, *, everything: bool) -> None:
        self.plan, self.made, self.readers, self.everything = plan, made, readers, everything
        self.outputs = plan.layout.outputs

    def check_all(self) -> Iterator[tuple[int, str | None]]:
        """Yield, for each matrix of a weight, the elements compared and what is wrong."""
        members = list(self.members())
        units = self.measured(members) if self.everything else {}
        for member in members:
            yield self.check(member, units.get(member.unit))

    def members(self) -> Iterator[Member]:
        """Yield the matrices that regions make, in the order of the regions."""
        number = 0
        for i, planes in self.outputs.planes.items():
            if i < 0 or {self.outputs.making[p] for p in planes.values()} == {Making.COPY}:
                continue
            stack, rows, cols = matrix_shape(self.plan.pairing.shapes[i])
            pieces = self.plan.pairing.bridges.get(i)
            for e in range(stack if rows and cols else 0):
                unit = int(self.plan.work.regions["unit"][number])
                number += 1 if pieces is None else sum(piece.out.matrix == e for piece in pieces)
                dimensions = len(self.plan.pairing.shapes[i])
                yield Member(i, e, rows, cols, unit, planes, self.plan.stored.formats[i], dimensions)

    def measured(self, members: list[Member]) -> dict[int, tuple[float, bool]]:
        """Return (amax, touched) of every unit that is the scale of whole tensors."""
        units: dict[int, tuple[float, bool]] = {}
        for member in members:
            if member.unit < 0 or member.format is None:
                continue
            amax, touched = units.get(member.unit, (0.0, False))
            for window in self.windows(member, everything=True):
                acc, mask = reference.accumulate(*self.operands(member, window))
                x = reference.round_values(acc, member.format.recipe)
                amax = max(amax, float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x))))
                touched |= bool(mask.any())
            units[member.unit] = (amax, touched)
        return units

    def check(self, member: Member, unit: tuple[float, bool] | None) -> tuple[int, str | None]:
        """Compare the planes of one matrix."""
        name = shown(self.outputs.names[member.planes["codes" if member.format else ""]])
        where = f" of matrix {member.e}" if member.dimensions > 2 else ""
        if "shape" in member.planes and self.outputs.making[member.planes["shape"]] == Making.LITERAL:
            shape = self.plan.pairing.shapes[member.i]
            if self.codes_of(member.planes["shape"], 0, len(shape)).tolist() != list(shape):
                return 0, f"{name}: another shape is stored with it"
        checked = 0
        for window in self.windows(member, everything=self.everything):
            checked += window.rows * window.cols
            problem = self.compare(member, window, unit)
            if problem:
                rows = f"rows {window.row}…{window.row + window.rows - 1}, columns from {window.col}"
                return checked, f"{name}: {problem} in {rows}{where}"
        return checked, None

    def windows(self, member: Member, *, everything: bool) -> Iterator[Window]:
        """Cut a matrix into windows of whole blocks of every grid; all of them, or some spread over it."""
        grids = [(w.format.rows, w.format.cols) for w in self.weights(member) if w is not None]
        if member.i in self.plan.pairing.bridges:
            first = self.weights(member)[0]  # the others are read whole
            grids = [] if first is None else [(first.format.rows, first.format.cols)]
        rows = math.lcm(*(max(r, 1) for r, _ in grids), 8)
        cols = math.lcm(*(max(c, 1) for _, c in grids), 8)
        if member.format is not None and not (member.format.whole and not member.format.second):
            rows = member.rows if member.format.rows == 0 else math.lcm(rows, member.format.rows)
            cols = member.cols if member.format.cols == 0 else math.lcm(cols, member.format.cols)
        cols = min(member.cols, cols * max(1, _WINDOW // (rows * cols)))
        rows = min(member.rows, rows * max(1, _WINDOW // (rows * cols)))
        places = [(r, c) for r in range(0, member.rows, rows) for c in range(0, member.cols, cols)]
        if not everything and len(places) > _SAMPLED:
            places = [places[k] for k in np.linspace(0, len(places) - 1, _SAMPLED).astype(int)]
        for r, c in places:
            yield Window(r, min(rows, member.rows - r), c, min(cols, member.cols - c))

    def weights(self, member: Member) -> list[QuantisedWeight | None]:
        return [self.plan.names_by_role[role].weights.get(row) for role, row in self.sources(member)]

    def sources(self, member: Member) -> list[tuple[str, int]]:
        """Return (role, row) of what a matrix is made of: what acc starts from, then post and base of every delta."""
        pairing, i = self.plan.pairing, member.i
        if pairing.kinds[i] == Kind.FROM_POST:
            return [("post", pairing.post[i])]
        found = [("new_base", pairing.new_base[i])]
        for delta in pairing.deltas(i):
            found += [(delta.post_role, delta.post), (delta.base_role, delta.base)]
        return found

    def operands(self, member: Member, window: Window) -> tuple[reference.Scaled, list[reference.ScaledTerm]]:
        """Return new_base (or what else acc starts from) and the terms."""
        first = self.sources(member)[0]
        pieces = self.plan.pairing.bridges.get(member.i)
        if pieces and pieces[0].new_base is not None:
            from_post = first[0] == "post"
            start = self.assembled(first[0], [p.post if from_post else p.new_base for p in pieces], member, window)
        else:
            start = self.operand(*first, member, window)
        terms = []
        for d in self.plan.pairing.deltas(member.i):
            if pieces:
                at = [piece.pair(d.number) for piece in pieces]
                post = self.assembled(d.post_role, [in_post for in_post, _ in at], member, window)
                base = self.assembled(d.base_role, [in_base for _, in_base in at], member, window)
            else:
                post = self.operand(d.post_role, d.post, member, window)
                base = self.operand(d.base_role, d.base, member, window)
            terms.append(reference.ScaledTerm(post, base, d.alpha))
        return start, terms

    def assembled(self, role: str, places: Sequence[Slice | None], member: Member, window: Window) -> reference.Scaled:
        """Return a window of an operand whose parts lie elsewhere, each in the place given for a piece: its values, put
        where new_base has them."""
        whole = np.zeros((member.rows, member.cols))
        for piece, there in zip(self.plan.pairing.bridges[member.i], places, strict=True):
            if piece.out.matrix != member.e:
                continue
            assert there is not None
            values = self.part(role, there)
            out = piece.out
            place = slice(out.first, out.first + out.rows * out.step, out.step)
            if out.transposed:
                whole[:, place] = values.T
            else:
                whole[place] = values
        cut = whole[window.row : window.row + window.rows, window.col : window.col + window.cols]
        return reference.Scaled(np.ascontiguousarray(cut).view(np.uint64), "f64")

    def part(self, role: str, at: Slice) -> NDArray[np.float64]:
        """Return the values of a part of a stored weight."""
        shape = self.plan.names_by_role[role].shape(at.row)
        _, rows, cols = matrix_shape(shape)
        there = Member(-1, at.matrix, rows, cols, -1, {}, None, len(shape))
        values = reference.decode(self.operand(role, at.row, there, Window(0, rows, 0, cols)))
        values = values.T if at.transposed else values
        return values[at.first : at.first + at.rows * at.step : at.step]

    def operand(self, role: str, row: int, member: Member, window: Window) -> reference.Scaled:
        """Read a window of an operand."""
        names = self.plan.names_by_role[role]
        weight = names.weights.get(row)
        if weight is None:
            dtype = names.dtype(row)
            codes = self.matrix(names.checkpoint, row, dtype.name, member, window)
            return reference.Scaled(codes, dtype.name)
        format_ = weight.format
        codes = self.matrix(names.checkpoint, weight.codes, format_.codec, member, window)
        if weight.scale == NONE:
            return reference.Scaled(codes, format_.codec)
        zeros = None
        if weight.zero_point != NONE:
            words = self.grid(names.checkpoint, weight.zero_point, format_, member, rows=-(-member.rows // 8))
            zeros = _within(unpack_zero_points(words.view(np.uint32), member.rows), format_, window)
        second = self.second(names.checkpoint, weight.second, member.e) if weight.second != NONE else None
        scales = _within(self.grid(names.checkpoint, weight.scale, format_, member), format_, window)
        grid = (format_.rows, format_.cols)
        return reference.Scaled(codes, format_.codec, scales, format_.scale.name, *grid, second, format_.second, zeros)

    def matrix(self, checkpoint: Checkpoint, row: int, codec: str, member: Member, window: Window) -> NDArray[Any]:
        """Read the codes of a window, one to an element."""
        several = member.dimensions > 2
        first, last = (member.e, member.e + 1) if several else (window.row, window.row + window.rows)
        if member.dimensions < 2:
            first, last = 0, member.cols
        raw = self.readers.codes(checkpoint, row, first, last).view(np.uint8)
        rows = member.rows if several else window.rows
        lines = raw.reshape(rows, -1)[window.row : window.row + window.rows] if several else raw.reshape(rows, -1)
        codes: NDArray[Any] = unpack(lines, codec, member.cols)[:, window.col : window.col + window.cols]
        return codes

    def grid(
        self, checkpoint: Checkpoint, row: int, format_: Format, member: Member, rows: int | None = None
    ) -> NDArray[Any]:
        """Read the scales of a matrix."""
        shape = grid_shape(format_, (member.rows, member.cols))
        stored = checkpoint.tensors.shapes[row]
        codes = self.readers.codes(checkpoint, row, 0, stored[0] if stored else 1)
        planes: NDArray[Any] = codes.reshape(-1, rows or shape[0], shape[1])
        plane: NDArray[Any] = planes[member.e if len(planes) > 1 else 0]
        return plane

    def second(self, checkpoint: Checkpoint, row: int, e: int) -> float:
        stored = checkpoint.tensors.shapes[row]
        values = self.readers.codes(checkpoint, row, 0, stored[0] if stored else 1).view(np.float32).reshape(-1)
        return float(values[e if len(values) > 1 else 0])

    def codes_of(self, output: int, first: int, last: int) -> NDArray[Any]:
        """Read rows of a tensor of the merged folder as its own type."""
        row = self.made.tensors.row(self.outputs.names[output])
        codes = self.readers.codes(self.made, row, first, last)
        return codes.view(np.int64) if self.made.tensors.dtype_of(row).name == "i64" else codes

    def compare(self, member: Member, window: Window, unit: tuple[float, bool] | None) -> str | None:
        """Return how a window differs from what the sources give, None where it does not."""
        new_base, terms = self.operands(member, window)
        codes = self.planes_row(member, "codes" if member.format else "")
        dtype = self.made.tensors.dtype_of(codes)
        if member.format is None:
            output = reference.Output(dtype.name)
            expected = reference.merge_scaled(new_base, terms, output)
            return _difference("elements", self.matrix(self.made, codes, dtype.name, member, window), expected.codes)
        format_ = member.format
        found = self.matrix(self.made, codes, format_.codec, member, window)
        stored = self.grid(self.made, self.planes_row(member, "scale"), format_, member)
        scales = _within(stored, format_, window)
        keep = self.plan.request.scale_policy == "keep"
        second = self.second(self.made, self.planes_row(member, "second"), member.e) if format_.second else None
        output = reference.Output(format_.codec, format_.recipe, format_.rows, format_.cols, format_.scale.name, second)
        if not format_.whole:
            expected = reference.merge_scaled(new_base, terms, output, keep)
        else:
            alike = keep and reference.alike(new_base, output._replace(second=new_base.second))
            untouched = not reference.accumulate(new_base, terms)[1].any()
            if unit is not None:
                untouched = not unit[1]
            if alike and untouched and (unit is not None or _same(new_base, found, scales, second)):
                expected = reference.Quantised(new_base.codes, new_base.scales, 0, 0, 0, 0.0)
                return _difference("codes", found, expected.codes) or self.difference_of_scales(
                    scales, expected, second, new_base.second
                )
            if unit is not None:
                problem = self.wrong_shared(format_, unit[0], second, stored)
                if problem:
                    return problem
            given = None if format_.second else float(reference.scale_values(stored, format_.scale.name).flat[0])
            expected = reference.merge_scaled(new_base, terms, output._replace(given=given))
        return _difference("codes", found, expected.codes) or (
            None if expected.scales is None else _difference("scales", scales, expected.scales)
        )

    @staticmethod
    def difference_of_scales(
        scales: NDArray[Any], expected: reference.Quantised, second: float | None, wanted: float | None
    ) -> str | None:
        assert expected.scales is not None
        if second != wanted:
            return f"the second scale is {second}, not new_base's {wanted}"
        return _difference("scales", scales, expected.scales)

    @staticmethod
    def wrong_shared(format_: Format, amax: float, second: float | None, stored: NDArray[Any]) -> str | None:
        """Return what is wrong with the scale of whole tensors."""
        if format_.second:
            wanted = reference.second_of(amax, format_.second)
            return None if second == wanted else f"the second scale is {second}, expected {wanted}"
        scale = reference.unit_scales(np.full((1, 1), amax, np.float32), format_.recipe, format_.scale.name)
        return _difference("scales", stored, scale)

    def planes_row(self, member: Member, part: str) -> int:
        return self.made.tensors.row(self.outputs.names[member.planes[part]])


def _within(grid: NDArray[Any], format_: Format, window: Window) -> NDArray[Any]:
    """Return the part of a grid that a window uses."""
    rows = slice(None)
    if format_.rows:
        rows = slice(window.row // format_.rows, -(-(window.row + window.rows) // format_.rows))
    if not format_.cols:
        return grid[rows]
    return grid[rows, window.col // format_.cols : -(-(window.col + window.cols) // format_.cols)]


def _same(new_base: reference.Scaled, codes: NDArray[Any], scales: NDArray[Any], second: float | None) -> bool:
    assert new_base.scales is not None
    return bool((new_base.codes == codes).all() and (new_base.scales == scales).all() and new_base.second == second)


def _difference(what: str, found: NDArray[Any], expected: NDArray[Any]) -> str | None:
    wrong = np.flatnonzero((found != expected).reshape(-1))
    if not len(wrong):
        return None
    at = int(wrong[0])
    return (
        f"{len(wrong):,} of {found.size:,} {what} differ, the first: expected bits {int(expected.flat[at]):x}, "
        f"found {int(found.flat[at]):x}"
    )
