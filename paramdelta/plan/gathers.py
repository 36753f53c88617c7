"""Tensors whose rows are tokens and lie elsewhere, or nowhere, in some of the operands: which row of each operand goes
with each row of the output, and the spans that this makes, one per run of rows that follow each other everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES, DType
from paramdelta.plan.work import SPAN, TERM, Rows

ZEROS = -1  # the operand has no such row: zeros
AS_START = -2  # base has no such row: what the sum starts from stands in
IN_NEW_BASE = -1  # the sum starts from a row of new_base, and not from one of a delta's base
_NO_FILE = -1

Column = NDArray[np.int64]


class Place(NamedTuple):
    """Where a stored tensor lies: its input file (−1: it is zeros), the offset there, and its type."""

    file: int
    offset: int
    dtype: DType


@dataclass(frozen=True, kw_only=True)
class Gather:
    """The rows of the operands, for each row of the output. ``start`` holds what the sum starts from, rows or ZEROS,
    and ``start_in`` where those lie: IN_NEW_BASE, or the number of a delta, in whose base. ``deltas`` gives, by the
    number of a delta, columns for post (ZEROS where the delta adds nothing) and base (ZEROS or AS_START where it has
    no row)."""

    start: Column
    start_in: Column
    deltas: dict[int, tuple[Column, Column]]

    def columns(self) -> list[Column]:
        """Return all columns of rows."""
        return [self.start, *(column for pair in self.deltas.values() for column in pair)]

    def in_place(self) -> bool:
        """Whether the rows of every operand are those of the output, in their order."""
        order = np.arange(len(self.start))
        alike = all(np.array_equal(column, order) for column in self.columns())
        return alike and bool((self.start_in == IN_NEW_BASE).all())

    def starts(self) -> Column:
        """Return the first row of each run of rows that follow each other, or are lacking, in every operand."""
        rows = len(self.start)
        breaks = np.diff(self.start_in) != 0
        for column in self.columns():
            breaks |= np.diff(column) != (column[:-1] >= 0)
        return np.concatenate([np.zeros(min(rows, 1), np.int64), np.flatnonzero(breaks) + 1])


def extended(rows: int, new_base: int, deltas: dict[int, tuple[int, int]]) -> Gather:
    """Return what ``--vocab extend`` pairs: rows by number, where new_base, and post and base of each delta, have so
    many. What post lacks has no delta; what base or new_base lack counts as zeros."""
    order = np.arange(rows)

    def have(count: int) -> Column:
        return np.where(order < count, order, ZEROS)

    return Gather(
        start=have(new_base),
        start_in=np.full(rows, IN_NEW_BASE),
        deltas={number: (have(post), have(min(post, base))) for number, (post, base) in deltas.items()},
    )


def gathered_spans(
    span: Any,
    gather: Gather,
    width: int,
    new_base: Place,
    deltas: Sequence[tuple[int, float, Place, Place]],
    first_term: int,
) -> tuple[Rows, Rows]:
    """Return the spans and terms that replace the one ``span`` of a tensor with rows of ``width`` elements. ``deltas``
    are (number, alpha, post, base); the terms will be numbered from ``first_term``."""
    starts = gather.starts()
    ends = np.append(starts[1:], len(gather.start))
    out: DType = DTYPES[span["out_dtype"]]
    spans = np.empty(len(starts), SPAN)
    spans[:] = span
    spans["out_offset"] += starts * width * out.itemsize
    spans["count"] = (ends - starts) * width
    _set(spans, "new", gather.start[starts], width, new_base)
    for number, _, _, base in deltas:
        chosen = gather.start_in[starts] == number
        own = spans[chosen]
        _set(own, "new", gather.start[starts][chosen], width, base)
        spans[chosen] = own
    rows = [tuple(column[starts] for column in gather.deltas[number]) for number, *_ in deltas]
    added = np.array([post != ZEROS for post, _ in rows]).reshape(len(rows), len(starts))
    counts = added.sum(axis=0)
    firsts = np.cumsum(counts) - counts
    spans["n_terms"] = counts
    spans["first_term"] = np.where(counts > 0, first_term + firsts, 0)
    terms = np.zeros(int(counts.sum()), TERM)
    places = firsts + np.cumsum(added, axis=0) - added
    for (_, alpha, post, base), (in_post, in_base), mine, at in zip(deltas, rows, added, places, strict=True):
        own = np.zeros(int(mine.sum()), TERM)
        own["alpha"] = alpha
        _set(own, "post", in_post[mine], width, post)
        _set(own, "base", in_base[mine], width, base)
        stand_in = in_base[mine] == AS_START
        for part in ("file", "offset", "dtype"):
            own[f"base_{part}"][stand_in] = spans[f"new_{part}"][mine][stand_in]
        terms[at[mine]] = own
    return spans, terms


def _set(target: Rows, prefix: str, rows: Column, width: int, place: Place) -> None:
    """Fill the file, offset and dtype columns ``prefix_*`` with where rows of a tensor lie."""
    there = (rows >= 0) & (place.file != _NO_FILE)
    target[f"{prefix}_file"] = np.where(there, place.file, _NO_FILE)
    target[f"{prefix}_offset"] = np.where(there, place.offset + rows * width * place.dtype.itemsize, 0)
    target[f"{prefix}_dtype"] = place.dtype.code
