"""Splits the work of a merge among ranks: deterministically, by bytes moved, in the order of the output files, and so
that no two ranks write to one page of a file.

Everything lies on one line: the bytes of the output files, one file behind the other. What cannot be cut apart forms a
*group*: rows that share the scale of a whole tensor, and rows whose bytes interleave. A border between two ranks lies
between groups, or within a span or region that is a group of its own.

A region is cut after whole rows of units, wherever in a page that may be. What a rank would write to a page that an
earlier rank writes to as well is left out of both: the *seam*, which is written when all ranks are done, by the one
process that publishes. It is a few rows for each border.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES
from paramdelta.plan.work import Work
from paramdelta.segments import ITEMS, pieces_of_spans, region_bytes, rows_of_units

PAGE = 4096
_SLACK = 50  # a border moves to the end of a region that is within this fraction of a rank's share: fewer seams

Column = NDArray[np.int64]
_Strange = Callable[[Column, Column, Column], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank does, in bytes of tensor data, and the output files it writes to."""

    rank: int
    bytes_read: int
    bytes_written: int
    files: tuple[int, ...]


@dataclass(frozen=True)
class _Pieces:
    """Pieces of rows: which row, its elements (spans) or rows of the matrix (regions) from ``first`` to ``end``, the
    rank whose group it belongs to, and the rank that writes it; ``world`` stands for the seam."""

    row: Column
    first: Column
    end: Column
    owner: Column
    rank: Column

    def __getitem__(self, chosen: NDArray[Any]) -> _Pieces:
        return _Pieces(self.row[chosen], self.first[chosen], self.end[chosen], self.owner[chosen], self.rank[chosen])


class Shares:
    """The split of unsettled ``work`` among ``world`` ranks."""

    def __init__(self, work: Work, world: int) -> None:
        self.work, self.world = work, world
        self._line = _Line(work)
        pieces = _without_seams(self._line, _dealt(self._line, world), world)
        order = np.lexsort((pieces.first, pieces.row))
        self._pieces = pieces[order]

    def part(self, rank: int) -> Work:
        """Return the unsettled work that a rank writes."""
        return self._work(self._pieces[self._pieces.rank == rank])

    @cached_property
    def seam(self) -> Work:
        """The unsettled work that is left to the one that publishes."""
        return self.part(self.world)

    def measured_by(self, rank: int) -> Work:
        """Return the work that measures the units of a rank: all of each, the seam included."""
        return self._work(self._pieces[self._pieces.owner == rank]).measuring()

    def _work(self, pieces: _Pieces) -> Work:
        work, count = self.work, len(self.work.spans)
        of_spans, of_regions = pieces[pieces.row < count], pieces[pieces.row >= count]
        spans, terms = pieces_of_spans(work.spans, work.terms, of_spans.row, of_spans.first, of_spans.end)
        rows = of_regions.row - count
        regions = work.regions[rows].copy()
        regions["first_row"], regions["end_row"] = of_regions.first, of_regions.end
        return replace(
            work,
            spans=spans,
            terms=terms,
            regions=regions,
            scale_tensors=work.scale_tensors[rows],
            span_units=None if work.span_units is None else work.span_units[of_spans.row],
            span_kept=None if work.span_kept is None else work.span_kept[of_spans.row],
        )

    def describe(self) -> list[Share]:
        """Return what each rank does; the last row, of rank ``world``, is the seam."""
        line, pieces = self._line, self._pieces
        shares = []
        for rank in range(self.world + 1):
            mine = pieces[pieces.rank == rank]
            size, whole = mine.end - mine.first, line.size[mine.row]
            read, written = (
                int((column[mine.row] * (size / np.maximum(whole, 1))).round().sum())
                for column in (line.read, line.written)
            )
            files = np.concatenate([line.file[mine.row], line.scale_file[mine.row]])
            files = np.unique(files[files >= 0])
            shares.append(Share(rank=rank, bytes_read=read, bytes_written=written, files=tuple(files.tolist())))
        return shares


class _Line:
    """The rows of work, spans and then regions, as extents on the line of all output bytes. Of each row: where its
    codes or elements and its scales begin and end (scales −1: none), what it moves, and how many elements or matrix
    rows it has in units of what may be cut apart."""

    def __init__(self, work: Work) -> None:
        spans, regions = work.spans, work.regions
        self.spans, self.regions, self.count = spans, regions, len(spans)
        pages = np.array([-(-size // PAGE) for _, size in work.outputs], np.int64)
        base = (np.cumsum(pages) - pages) * PAGE
        items = ITEMS[spans["out_dtype"]]
        self.first = np.concatenate([np.zeros(len(spans), np.int64), regions["first_row"]])
        self.end = np.concatenate([spans["count"], regions["end_row"]])
        self.size = self.end - self.first
        self.unit_rows = np.concatenate([np.ones(len(spans), np.int64), rows_of_units(regions)])
        self.file = np.concatenate([spans["out_file"], regions["out_file"]]).astype(np.int64)
        self.scale_file = np.concatenate([np.full(len(spans), -1), regions["scale_out_file"]]).astype(np.int64)
        codes = region_bytes(work, regions) // np.maximum(regions["end_row"] - regions["first_row"], 1)
        self.row_bytes = np.concatenate([items, codes])  # of an element, or of a row of the matrix
        self.pitch = np.concatenate([items, regions["out_pitch"]])
        self.origin = base[self.file] + np.concatenate([spans["out_offset"], regions["out_offset"]])
        self._scales(work, base)
        self.begin, self.stop = self.extent(np.arange(len(self.file)), self.first, self.end)
        self.scale_begin, self.scale_stop = self.scale_extent(np.arange(len(self.file)), self.first, self.end)

        of_spans, of_regions = work.reads()
        self.read = np.concatenate([of_spans, of_regions])
        self.written = np.concatenate([spans["count"] * items, region_bytes(work, regions)])
        self.written += (self.scale_rows(self.end) - self.scale_rows(self.first)) * self.scale_cols * self.scale_item
        self.unit = np.concatenate(
            [np.full(len(spans), -1) if work.span_units is None else work.span_units, regions["unit"]]
        ).astype(np.int64)
        if work.span_kept is not None:  # of two ways to fill the same bytes, the longer one counts
            kept = np.flatnonzero(work.span_kept)
            self.read[kept] = self.written[kept] = 0
        self.cost = self.read + self.written

    def _scales(self, work: Work, base: Column) -> None:
        regions, none = work.regions, np.zeros(self.count, np.int64)
        has = regions["scale_out_file"] >= 0
        self.scale_origin = np.concatenate(
            [none, np.where(has, base[np.maximum(regions["scale_out_file"], 0)] + regions["scale_out_offset"], 0)]
        )
        self.scale_down = np.concatenate([none, regions["scale_out_row_stride"]])
        self.scale_across = np.concatenate([none, regions["scale_out_col_stride"]])
        self.grid_rows = np.concatenate([none, regions["grid_rows"]]).astype(np.int64)
        grid_cols = np.maximum(np.where(regions["grid_cols"] > 0, regions["grid_cols"], regions["cols"]), 1)
        self.scale_cols = np.concatenate([none, np.where(has, -(-regions["cols"] // grid_cols), 0)])
        widths = np.array([max(d.bits // 8, 1) for d in DTYPES], np.int64)
        recipes = work.recipes["scale_dtype"] if len(work.recipes) else np.zeros(1, np.uint8)
        self.scale_item = np.concatenate([none, np.where(has, widths[recipes[regions["recipe"]]], 0)])

    def extent(self, row: Column, first: Column, end: Column) -> tuple[Column, Column]:
        """Return where the codes or elements of pieces of rows begin and end on the line."""
        begin = self.origin[row] + first * self.pitch[row]
        return begin, begin + np.maximum(end - first - 1, 0) * self.pitch[row] + self.row_bytes[row]

    def scale_rows(self, matrix_row: Column, row: Column | slice = slice(None)) -> Column:
        """Return in which row of scales a row of the matrix begins."""
        grid = self.grid_rows[row]
        rows: Column = np.where(grid > 0, -(-matrix_row // np.maximum(grid, 1)), np.minimum(matrix_row, 1))
        return rows

    def scale_extent(self, row: Column, first: Column, end: Column) -> tuple[Column, Column]:
        """Return where the scales of pieces of rows begin and end on the line, −1 where they have none."""
        top, bottom = self.scale_rows(first, row), np.maximum(self.scale_rows(end, row) - 1, 0)
        begin = self.scale_origin[row] + top * self.scale_down[row]
        stop = self.scale_origin[row] + bottom * self.scale_down[row] + self.scale_item[row]
        stop += np.maximum(self.scale_cols[row] - 1, 0) * self.scale_across[row]
        has = self.scale_file[row] >= 0
        return np.where(has, begin, -1), np.where(has, stop, -1)

    @property
    def cuttable(self) -> NDArray[np.bool_]:
        """Which rows may have a border within: not those whose scales lie column by column."""
        across = (self.scale_cols - 1) * self.scale_across + self.scale_item
        in_rows = (self.scale_file < 0) | (self.scale_down >= across)
        return np.asarray(in_rows & (self.unit < 0) & (self.size > self.unit_rows))

    def groups(self) -> Column:
        """Return the group of each row: the same number for rows that cannot go to different ranks."""
        rows, scaled = len(self.file), np.flatnonzero(self.scale_file >= 0)
        extents = _overlapping(
            np.concatenate([self.begin, self.scale_begin[scaled]]), np.concatenate([self.stop, self.scale_stop[scaled]])
        )
        together = [(np.arange(rows), extents[:rows]), (scaled, extents[rows:])]
        waiting = np.flatnonzero(self.unit >= 0)
        together.append((waiting, self.unit[waiting] + int(extents.max(initial=-1)) + 1))
        labels = np.arange(rows)
        while True:  # each round joins what is tied by one more step
            least = np.full(max((int(keys.max(initial=-1)) for _, keys in together)) + 1, rows)
            for members, keys in together:
                np.minimum.at(least, keys, labels[members])
            before = labels.copy()
            for members, keys in together:
                labels[members] = np.minimum(labels[members], least[keys])
            if np.array_equal(before, labels):
                return labels


def _overlapping(begin: Column, stop: Column) -> Column:
    """Return numbers for extents, the same for those that overlap."""
    order = np.argsort(begin, kind="stable")
    furthest = np.maximum.accumulate(stop[order])
    new = np.ones(len(order), bool)
    new[1:] = begin[order][1:] >= furthest[:-1]
    numbers = np.zeros(len(order), np.int64)
    numbers[order] = np.cumsum(new) - 1
    return numbers


def _dealt(line: _Line, world: int) -> _Pieces:
    """Cut the line into ``world`` runs of about the same cost."""
    rows = len(line.file)
    if not rows:
        return _Pieces(*(np.zeros(0, np.int64) for _ in range(5)))
    place = _places(line)
    borders = _borders(line, place, world)
    # Each border at the start of a group or before it, within others too, counts one rank on.
    starts = np.array([at for at, inside in borders if not inside], np.int64)
    within = np.array([at for at, inside in borders if inside], np.int64)
    rank = (np.searchsorted(starts, place, "right") + np.searchsorted(within, place, "left")).astype(np.int64)
    row, first, end = np.arange(rows), line.first.copy(), line.end.copy()
    extra: list[tuple[int, int, int, int]] = []
    for at in np.unique(within).tolist():
        one = int(np.flatnonzero(place == at)[0])
        begin, stop = int(line.first[one]), int(line.end[one])
        bounds = [*(begin + inside for where, inside in borders if where == at and inside), stop]
        end[one] = bounds[0]
        extra += [(one, a, b, int(rank[one]) + i) for i, (a, b) in enumerate(itertools.pairwise(bounds), 1) if a < b]
    more = np.array(extra, np.int64).reshape(-1, 4)
    columns = [np.concatenate([old, more[:, i]]) for i, old in enumerate((row, first, end, rank))]
    return _Pieces(columns[0], columns[1], columns[2], columns[3], columns[3])


def _places(line: _Line) -> Column:
    """Return the position of each row's group in the order of the line."""
    _, group = np.unique(line.groups(), return_inverse=True)
    begins = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(begins, group, line.begin)
    order = np.argsort(begins, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[group].astype(np.int64)


def _borders(line: _Line, place: Column, world: int) -> list[tuple[int, int]]:
    """Return where each rank but the first begins: before a group (its position, 0), or so many elements or matrix rows
    into one."""
    groups = int(place.max()) + 1
    costs = np.zeros(groups, np.int64)
    np.add.at(costs, place, line.cost)
    ends, members = np.cumsum(costs), np.bincount(place)
    only = np.zeros(groups, np.int64)
    only[place] = np.arange(len(place))
    cuttable, total = line.cuttable, int(ends[-1])
    borders = []
    for rank in range(1, world):
        target = total * rank // world
        at = min(int(np.searchsorted(ends, target, "right")), groups - 1)
        row, cost = int(only[at]), int(costs[at])
        into, inside = target - int(ends[at]) + cost, 0
        if members[at] == 1 and cuttable[row] and cost:
            inside = _border(line, row, into, cost, slack=total // world // _SLACK)
            borders.append((at, inside) if inside < line.size[row] else (at + 1, 0))
        else:
            borders.append((at + (2 * into >= cost), 0))
    return sorted(borders)


def _border(line: _Line, row: int, into: int, cost: int, *, slack: int) -> int:
    """Return how many elements or matrix rows into a row the border nearest to ``into`` of its ``cost`` lies."""
    size = int(line.size[row])
    wanted = size * into // cost
    if row < line.count:
        begin, item = int(line.begin[row]), int(line.row_bytes[row])
        page = (begin + wanted * item) // PAGE * PAGE
        return min(max(-(-(page - begin) // item), 0), size)
    if min(into, cost - into) <= slack:
        return 0 if 2 * into < cost else size
    unit = int(line.unit_rows[row])
    return min((wanted + unit // 2) // unit * unit, size)


def _without_seams(line: _Line, pieces: _Pieces, world: int) -> _Pieces:
    """Give what would be written to the page of an earlier rank to the seam."""
    begin, stop = line.extent(pieces.row, pieces.first, pieces.end)
    scale_begin, scale_stop = line.scale_extent(pieces.row, pieces.first, pieces.end)
    scaled = scale_begin >= 0
    pages = np.concatenate(
        [begin // PAGE, (stop - 1) // PAGE, scale_begin[scaled] // PAGE, (scale_stop[scaled] - 1) // PAGE]
    )
    ranks = np.concatenate([pieces.rank, pieces.rank, pieces.rank[scaled], pieces.rank[scaled]])
    order = np.lexsort((ranks, pages))
    pages, ranks = pages[order], ranks[order]
    new = np.ones(len(pages), bool)
    new[1:] = pages[1:] != pages[:-1]
    owner = ranks[new][np.cumsum(new) - 1]
    shared, which = np.unique(pages[ranks != owner], return_index=True)
    owners = owner[ranks != owner][which]
    if not len(shared):
        return pieces

    def strange(begin: Column, stop: Column, rank: Column) -> NDArray[np.bool_]:
        """Whether extents touch a page of an earlier rank. Only their ends can."""
        found = np.zeros(len(begin), bool)
        for page in (begin // PAGE, (stop - 1) // PAGE):
            at = np.minimum(np.searchsorted(shared, page), len(shared) - 1)
            found |= (shared[at] == page) & (owners[at] < rank) & (begin >= 0)
        return np.asarray(found)

    touched = strange(begin, stop, pieces.rank) | strange(scale_begin, scale_stop, pieces.rank)
    made = [pieces[~touched]]
    for i in np.flatnonzero(touched).tolist():
        made.append(_torn(line, pieces, i, strange, world))
    return _Pieces(
        *(np.concatenate([getattr(p, name) for p in made]) for name in ("row", "first", "end", "owner", "rank"))
    )


def _torn(line: _Line, pieces: _Pieces, i: int, strange: _Strange, world: int) -> _Pieces:
    """Return piece ``i`` in parts: those that touch a page of an earlier rank go to the seam."""
    row, begin, end, rank = (int(column[i]) for column in (pieces.row, pieces.first, pieces.end, pieces.rank))
    if row < line.count:  # elements up to the end of the first page, and from the begin of the last
        item, origin = int(line.row_bytes[row]), int(line.origin[row])
        first_page_end = (origin + begin * item) // PAGE * PAGE + PAGE
        last_page = (origin + end * item - 1) // PAGE * PAGE
        inner = (-(-(first_page_end - origin) // item), (last_page - origin) // item)
        bounds = sorted({begin, end, *(min(max(at, begin), end) for at in inner)})
    else:
        bounds = [*range(begin, end, int(line.unit_rows[row])), end]
    first, last = np.array(bounds[:-1], np.int64), np.array(bounds[1:], np.int64)
    rows, ranks = np.full(len(first), row), np.full(len(first), rank)
    left = strange(*line.extent(rows, first, last), ranks) | strange(*line.scale_extent(rows, first, last), ranks)
    # Neighbours with the same fate are one piece.
    starts = np.flatnonzero(np.concatenate([[True], left[1:] != left[:-1]]))
    stops = np.concatenate([starts[1:], [len(first)]]) - 1
    ranks = np.where(left[starts], world, rank)
    owner = np.full(len(starts), pieces.owner[i])
    return _Pieces(rows[: len(starts)], first[starts], last[stops], owner, ranks)
