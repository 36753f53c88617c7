"""The work a plan hands to the engine: every byte of the output files' data, as columns, never as objects per tensor.

A *span* is a run of consecutive elements of one output tensor that are all computed the same way:

    out[i] = encode(new_base[i] + Σ_k alpha_k · (post_k[i] − base_k[i]))        for i in 0 … count − 1

with the K terms in ``terms[first_term : first_term + n_terms]``. K = 0 and equal dtypes is a copy. A file number of −1
stands for an operand of zeros (vocabulary rows that a checkpoint lacks). Most tensors are one span.

A *region* is the same for a matrix of which some operand, or the output, is quantised: its operands are *views*, planes
of codes with a grid of scales, and its output a plane of codes and one of scales, made by a recipe.

A *unit* is all that shares one scale of a whole tensor. Its scale is known only after a pass that measures it; what
then fills its outputs depends on whether any delta in it is not zero. ``Work.settled`` makes that choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import BF16, BY_NAME, DTYPES, F32, DType
from paramdelta.formats import CODEC_BITS, CODECS, RULES, Recipe
from paramdelta.memory import Memory

# Layouts are those of csrc/io/work.hpp; the extension checks the item sizes and the bounds.
SPAN = np.dtype(
    [
        ("out_offset", "<i8"),  # absolute byte offset in the output file
        ("count", "<i8"),  # elements
        ("new_offset", "<i8"),  # absolute byte offset of new_base's first element
        ("tensor", "<i4"),  # index into Plan.names, for the counts
        ("out_file", "<i4"),  # index into Work.outputs
        ("new_file", "<i4"),  # index into Work.inputs, −1: zeros
        ("first_term", "<i4"),
        ("n_terms", "<i4"),
        ("out_dtype", "u1"),  # DType.code
        ("new_dtype", "u1"),
        ("_pad", "V2"),
    ]
)
TERM = np.dtype(
    [
        ("alpha", "<f8"),
        ("post_offset", "<i8"),
        ("base_offset", "<i8"),
        ("post_file", "<i4"),
        ("base_file", "<i4"),
        ("post_dtype", "u1"),
        ("base_dtype", "u1"),
        ("_pad", "V6"),
    ]
)
VIEW = np.dtype(
    [
        ("offset", "<i8"),  # of the codes; strides in bytes (of nibbles, pairs: columns, or rows where turned)
        ("row_stride", "<i8"),
        ("col_stride", "<i8"),
        ("scale_offset", "<i8"),
        ("scale_row_stride", "<i8"),
        ("scale_col_stride", "<i8"),
        ("zero_offset", "<i8"),
        ("zero_row_stride", "<i8"),
        ("second_offset", "<i8"),
        ("file", "<i4"),  # index into Work.inputs, −1: zeros
        ("scale_file", "<i4"),  # −1: no scales
        ("zero_file", "<i4"),
        ("second_file", "<i4"),
        ("grid_rows", "<u4"),  # elements that share a scale, 0: the whole extent
        ("grid_cols", "<u4"),
        ("row_phase", "<u4"),  # how far within a block the view begins
        ("col_phase", "<u4"),
        ("codec", "u1"),  # index into formats.CODECS
        ("scale_dtype", "u1"),
        ("second", "u1"),  # 0 none, 1 multiply, 2 divide
        ("_pad", "V5"),
    ]
)
REGION = np.dtype(
    [
        ("out_offset", "<i8"),
        ("out_pitch", "<i8"),  # bytes from one row to the next
        ("rows", "<i8"),
        ("cols", "<i8"),
        ("first_row", "<i8"),  # of the rows that are wanted, and the row behind the last one
        ("end_row", "<i8"),
        ("scale_out_offset", "<i8"),
        ("scale_out_row_stride", "<i8"),
        ("scale_out_col_stride", "<i8"),
        ("given_offset", "<i8"),
        ("second_offset", "<i8"),
        ("tensor", "<i4"),  # the output tensor of the codes
        ("out_file", "<i4"),  # −1: nobody wants the codes
        ("scale_out_file", "<i4"),  # −1: no scales, or nobody wants them
        ("given_file", "<i4"),  # where the one scale of the whole tensor lies, −1: scales follow from units
        ("second_file", "<i4"),
        ("recipe", "<i4"),  # index into Work.recipes, −1: plain output
        ("new_view", "<i4"),
        ("first_term", "<i4"),
        ("n_terms", "<i4"),
        ("unit", "<i4"),  # −1: none
        ("grid_rows", "<u4"),
        ("grid_cols", "<u4"),
        ("out_dtype", "u1"),
        ("keep", "u1"),
        ("measure", "u1"),
        ("_pad", "V5"),
    ]
)
REGION_TERM = np.dtype([("alpha", "<f8"), ("post_view", "<i4"), ("base_view", "<i4")])
RECIPE = np.dtype(
    [
        ("largest", "<f4"),
        ("floor", "<f4"),
        ("zero", "<f4"),
        ("codec", "u1"),
        ("scale_dtype", "u1"),
        ("rule", "u1"),
        ("reciprocal", "u1"),
        ("values_bf16", "u1"),
        ("_pad", "V3"),
    ]
)
EXTENT = np.dtype(
    [
        ("begin", "<i8"),  # absolute byte offsets in the output file
        ("end", "<i8"),
        ("file", "<i4"),  # index into Work.outputs
        ("tensor", "<i4"),  # index into Plan.names
    ]
)

Rows = np.ndarray[Any, np.dtype[np.void]]
_F32 = np.float32


def no_rows(dtype: np.dtype[np.void]) -> Rows:
    """Return an empty column."""
    return np.zeros(0, dtype)


def recipe_row(recipe: Recipe, scale: DType) -> tuple[Any, ...]:
    """Return a recipe that stores scales of a type as a row of ``Work.recipes``."""
    return (
        recipe.largest,
        recipe.floor,
        recipe.zero,
        CODECS.index(recipe.codec),
        scale.code,
        RULES.index(recipe.rule),
        recipe.reciprocal,
        recipe.values == "bf16",
        b"",
    )


@dataclass(frozen=True, kw_only=True)
class SharedScale:
    """The scale of a whole tensor, or of several: where its binary32 value and its stored bytes lie in the literals.

    ``recipe`` gives it: amax / largest for a scale of its own, amax / 2688 or 2688 · (1 / amax) for the second level of
    NVFP4. ``kept``: whether an untouched unit may keep new_base's planes.
    """

    recipe: Recipe
    dtype: DType
    value_at: int
    stored_at: tuple[int, ...]
    kept: bool

    def value(self, amax: float) -> Any:
        """Return the scale for a unit's amax. All operations are binary32."""
        largest = _F32(amax)
        with np.errstate(all="ignore"):
            if self.recipe.rule == "nv_multiply":
                scale = largest / _F32(2688.0) or _F32(1.0)
            elif self.recipe.rule == "nv_divide":
                scale = _F32(2688.0) * (_F32(1.0) / max(largest, np.finfo(_F32).tiny))
                scale = scale if np.isfinite(scale) else _F32(1.0)
            else:
                scale = max(largest, _F32(self.recipe.floor)) / _F32(self.recipe.largest)
                scale = scale or _F32(self.recipe.zero)
        return _rounded_to_bf16(scale) if self.dtype == BF16 else scale


@dataclass(frozen=True, kw_only=True)
class Work:
    """Columns of spans, regions and what they refer to, and the files.

    ``inputs`` are the input files by number, or the memory of tensors that are loaded already; the last may be
    ``literals``, bytes that planning made; ``outputs`` the
    output files by number, as (name, size in bytes); ``headers`` the bytes each output file starts with. ``spans`` is
    sorted by (out_file, out_offset). Together, spans and regions cover every byte behind the headers exactly once.

    ``span_units`` and ``span_kept`` say of each span which unit it waits for (−1: none) and whether it is the choice
    for an untouched unit; regions with a unit are the choice for a touched one.

    ``extents`` say, in order of (file, begin), where the tensors lie whose checksums are wanted.

    Work may have ``variants``: the same with other alphas, each written to files of its own, from operands that are
    read once. The columns of terms have the alphas of those behind the first in a field ``more``. In results, tensor t
    of variant v has the number v · T + t, unit u the number v · U + u, and in what the engine writes to, output file f
    the number v · F + f. ``own_input`` is the first of as many inputs of which each variant reads its own: literals.
    """

    inputs: tuple[Path | Memory | bytearray, ...]
    outputs: tuple[tuple[str, int], ...]
    headers: tuple[bytes, ...]
    spans: Rows
    terms: Rows
    regions: Rows = field(default_factory=lambda: no_rows(REGION))
    region_terms: Rows = field(default_factory=lambda: no_rows(REGION_TERM))
    views: Rows = field(default_factory=lambda: no_rows(VIEW))
    recipes: Rows = field(default_factory=lambda: no_rows(RECIPE))
    scale_tensors: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # of each region, −1: none
    extents: Rows = field(default_factory=lambda: no_rows(EXTENT))
    units: tuple[SharedScale, ...] = ()
    span_units: NDArray[np.int64] | None = None
    span_kept: NDArray[np.bool_] | None = None
    variants: int = 1
    own_input: int = -1

    def with_variants(self, alphas: NDArray[np.float64], region_alphas: NDArray[np.float64]) -> Work:
        """Return the work with as many more variants as there are columns: row t has the alphas of term t."""
        return replace(
            self,
            terms=_with_more(self.terms, alphas),
            region_terms=_with_more(self.region_terms, region_alphas),
            variants=1 + alphas.shape[1],
        )

    def bytes_read(self) -> int:
        """Return the bytes that carrying the work out reads; regions that are measured first count twice."""
        return int(sum(rows.sum() for rows in self.reads()))

    def reads(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the bytes that each span and each region reads; regions that are measured first count twice."""
        items = np.array([d.bits for d in DTYPES]) // 8
        spans, terms = self.spans, self.terms
        of_spans = spans["count"] * items[spans["new_dtype"]] * (spans["new_file"] >= 0)
        several = np.repeat(np.arange(len(spans)), spans["n_terms"])
        rows = terms[spans["first_term"][several] + _within(spans["n_terms"])]
        for role in ("post", "base"):
            read = spans["count"][several] * items[rows[f"{role}_dtype"]] * (rows[f"{role}_file"] >= 0)
            np.add.at(of_spans, several, read)
        regions = self.regions
        times = 1 + (regions["unit"] >= 0)
        of_regions = times * self._view_bytes(regions, regions["new_view"])
        several = np.repeat(np.arange(len(regions)), regions["n_terms"])
        region_terms = self.region_terms[regions["first_term"][several] + _within(regions["n_terms"])]
        for role in ("post", "base"):
            read = self._view_bytes(regions[several], region_terms[f"{role}_view"])
            np.add.at(of_regions, several, times[several] * read)
        return of_spans, of_regions

    def reading(self, file: int, offset: int, count: int) -> Work:
        """Return work that reads ``count`` bytes of one of the inputs into an output of that size, as one tensor."""
        byte = BY_NAME["u8"].code
        span = np.array([(0, count, offset, 0, 0, 0, 0, 0, byte, byte, b"")], SPAN)
        return Work(inputs=(self.inputs[file],), outputs=(("", count),), headers=(), spans=span, terms=no_rows(TERM))

    def _view_bytes(self, regions: Rows, numbers: NDArray[Any]) -> NDArray[np.int64]:
        """Return the bytes of codes and scales that regions read of views."""
        views = self.views[numbers]
        bits = np.array([CODEC_BITS[codec] for codec in CODECS])[views["codec"]]
        codes = regions["rows"] * regions["cols"] * bits // 8
        grid_rows = np.where(views["grid_rows"] > 0, -(-regions["rows"] // np.maximum(views["grid_rows"], 1)), 1)
        grid_cols = np.where(views["grid_cols"] > 0, -(-regions["cols"] // np.maximum(views["grid_cols"], 1)), 1)
        items = np.array([d.bits for d in DTYPES])[views["scale_dtype"]] // 8
        scales = np.where(views["scale_file"] >= 0, grid_rows * grid_cols * items, 0)
        total: NDArray[np.int64] = codes + scales + 4 * (views["second_file"] >= 0)
        return total

    @property
    def unsettled(self) -> bool:
        """Whether units must be measured before this work can be carried out."""
        return bool(self.units)

    def measuring(self) -> Work:
        """Return the work of the pass that measures: regions of units, and no output."""
        chosen = self.regions[self.regions["unit"] >= 0].copy()
        chosen["measure"], chosen["out_file"], chosen["scale_out_file"] = 1, -1, -1
        return replace(self, spans=self.spans[:0], regions=chosen, outputs=(), headers=(), extents=self.extents[:0])

    def settled(self, measured: Sequence[tuple[float, bool]]) -> Work:
        """Return the work that is left when every unit's (amax, touched) is known, those of all variants in turn. Which
        units are touched is the same in each: it depends on the deltas, not on their alphas."""
        if not self.units:
            return self
        literals = self.inputs[-1]
        assert isinstance(literals, bytearray)
        each = [literals, *(bytearray(literals) for _ in range(1, self.variants))]
        kept = np.zeros(len(self.units) + 1, bool)  # the last: of what waits for no unit
        count = len(self.units)
        for number, (amax, touched) in enumerate(measured):
            variant, unit = number // count, self.units[number % count]
            keeps = unit.kept and not touched
            if variant and keeps != kept[number % count]:
                raise AssertionError(f"unit {number % count}: touched in some variants only")
            kept[number % count] = keeps
            _store(unit, unit.value(amax), each[variant])
        assert self.span_units is not None
        assert self.span_kept is not None
        chosen = (self.span_units < 0) | (kept[self.span_units] == self.span_kept)
        regions = self.regions[~kept[self.regions["unit"]]]
        return replace(
            self,
            spans=self.spans[chosen],
            regions=regions,
            scale_tensors=self.scale_tensors[~kept[self.regions["unit"]]],
            units=(),
            span_units=None,
            span_kept=None,
            inputs=(*self.inputs[:-1], *each),
            own_input=len(self.inputs) - 1,
        )


def _with_more(terms: Rows, alphas: NDArray[np.float64]) -> Rows:
    """Return the terms with the alphas of more variants beside their own."""
    if not alphas.shape[1]:
        return terms
    made = np.zeros(len(terms), np.dtype([*terms.dtype.descr, ("more", "<f8", (alphas.shape[1],))]))
    for name in terms.dtype.names or ():
        made[name] = terms[name]
    made["more"] = alphas
    return made


def _store(unit: SharedScale, value: Any, literals: bytearray) -> None:
    """Write a unit's scale to where it is read from."""
    literals[unit.value_at : unit.value_at + 4] = value.tobytes()
    for at in unit.stored_at:
        stored = value.tobytes() if unit.dtype == F32 else value.tobytes()[2:]
        literals[at : at + len(stored)] = stored


def _within(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return 0 … n − 1 for each n in ``counts``, joined."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


def _rounded_to_bf16(value: Any) -> Any:
    bits = int(value.view(np.uint32))
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.uint32(rounded).view(np.float32)
