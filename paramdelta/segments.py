"""Cuts the work of a merge into segments: what a run that was cut short has to do again is one of them at most.

A segment is work of its own, over the same files: a run of spans and regions in the order of the output files, of about
``limit`` bytes of output. A span or region larger than that is cut: spans anywhere, regions after whole rows of units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES
from paramdelta.formats import CODEC_BITS, CODECS
from paramdelta.plan.work import Rows, Work

SEGMENT_BYTES = 1 << 30
_PIECES = 8  # a segment ends within an eighth of its limit
ITEMS = np.array([max(d.bits // 8, 1) for d in DTYPES], np.int64)  # bytes of an element, by DType.code


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Part of the work, the bytes of codes and plain elements it writes, and the output files it writes to: those of
    all variants."""

    work: Work
    nbytes: int
    files: tuple[int, ...]


def cut(work: Work, limit: int = SEGMENT_BYTES) -> list[Segment]:
    """Cut settled work into segments of about ``limit`` bytes of output; everything is in exactly one."""
    limit = max(limit // work.variants, 1)
    piece = max(limit // _PIECES, 1)
    spans, terms = _cut_spans(work.spans, work.terms, piece)
    regions, scale_tensors = _cut_regions(work, piece)
    sizes = np.concatenate([spans["count"] * ITEMS[spans["out_dtype"]], region_bytes(work, regions)])
    files = np.concatenate([spans["out_file"], regions["out_file"]])
    offsets = np.concatenate([spans["out_offset"], regions["out_offset"] + regions["first_row"] * regions["out_pitch"]])
    order = np.lexsort((offsets, files))
    numbers = np.zeros(len(order), np.int64)
    numbers[order] = (np.cumsum(sizes[order]) - sizes[order]) // limit
    segments = []
    for number in np.unique(numbers).tolist():
        mine = numbers == number
        of_spans, of_regions = mine[: len(spans)], mine[len(spans) :]
        part = replace(
            work,
            spans=spans[of_spans],
            terms=terms,
            regions=regions[of_regions],
            scale_tensors=scale_tensors[of_regions],
        )
        touched = np.concatenate([part.spans["out_file"], part.regions["out_file"], part.regions["scale_out_file"]])
        of_one = np.unique(touched[touched >= 0]).tolist()
        numbers_of_all = (v * len(work.outputs) + file for v in range(work.variants) for file in of_one)
        segments.append(Segment(work=part, nbytes=int(sizes[mine].sum()) * work.variants, files=tuple(numbers_of_all)))
    return segments


def region_bytes(work: Work, regions: Rows) -> NDArray[np.int64]:
    """Return the bytes of codes or plain elements that regions write."""
    bits = np.array([CODEC_BITS[codec] for codec in CODECS], np.int64)
    of_codes = bits[work.recipes["codec"][regions["recipe"]]] if len(work.recipes) else 8
    per_element = np.where(regions["recipe"] < 0, ITEMS[regions["out_dtype"]] * 8, of_codes)
    total: NDArray[np.int64] = (regions["end_row"] - regions["first_row"]) * regions["cols"] * per_element // 8
    return total


def _pieces(sizes: NDArray[np.int64], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return, for every piece of every row: the row, the piece's number in it, and how many pieces it has."""
    counts = np.maximum(-(-sizes // limit), 1)
    rows = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, within, counts[rows]


def _cut_spans(spans: Rows, terms: Rows, limit: int) -> tuple[Rows, Rows]:
    rows, within, counts = _pieces(spans["count"] * ITEMS[spans["out_dtype"]], limit)
    whole = spans["count"][rows]
    return pieces_of_spans(spans, terms, rows, whole * within // counts, whole * (within + 1) // counts)


def pieces_of_spans(
    spans: Rows, terms: Rows, rows: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[Rows, Rows]:
    """Return the elements ``first`` … ``end`` − 1 of the spans ``rows`` as spans, and the terms these refer to."""
    made = spans[rows].copy()
    whole = (first == 0) & (end == made["count"])
    made["count"] = end - first
    made["out_offset"] += first * ITEMS[made["out_dtype"]]
    made["new_offset"] += np.where(made["new_file"] >= 0, first * ITEMS[made["new_dtype"]], 0)
    if whole.all():
        return made, terms
    # Each piece has terms of its own, moved as far.
    own = np.repeat(np.arange(len(made)), made["n_terms"])
    numbers = np.arange(len(own)) - np.repeat(np.cumsum(made["n_terms"]) - made["n_terms"], made["n_terms"])
    moved = terms[made["first_term"][own] + numbers].copy()
    for role in ("post", "base"):
        shift = first[own] * ITEMS[moved[f"{role}_dtype"]]
        moved[f"{role}_offset"] += np.where(moved[f"{role}_file"] >= 0, shift, 0)
    made["first_term"] = np.cumsum(made["n_terms"]) - made["n_terms"]
    return made, moved


def rows_of_units(regions: Rows) -> NDArray[np.int64]:
    """Return the rows of a region that are quantised together, and are not to be cut apart."""
    whole = (regions["recipe"] >= 0) & (regions["given_file"] < 0)
    unit = np.where(whole, np.where(regions["grid_rows"] > 0, regions["grid_rows"], regions["rows"]), 1)
    found: NDArray[np.int64] = np.maximum(np.minimum(unit, regions["rows"]), 1).astype(np.int64)
    return found


def _cut_regions(work: Work, limit: int) -> tuple[Rows, NDArray[np.int64]]:
    regions = work.regions
    unit = rows_of_units(regions)
    units = -(-(regions["end_row"] - regions["first_row"]) // unit)
    wanted = -(-region_bytes(work, regions) // limit)
    rows, within, counts = _pieces(np.minimum(wanted, units), 1)
    made = regions[rows].copy()
    begin, end, unit, units = regions["first_row"][rows], regions["end_row"][rows], unit[rows], units[rows]
    made["first_row"] = begin + units * within // counts * unit
    made["end_row"] = np.minimum(begin + units * (within + 1) // counts * unit, end)
    return made, work.scale_tensors[rows]
