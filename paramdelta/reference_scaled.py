"""The contract for quantised formats, executable: what every backend must compute, in NumPy, for reading and for tests.

Matrices are 2-D and row-major. With c(·) the value of a code, s the scale of its unit and t the tensor's second scale,

    value = c · s                  value = c · (s · t)                value = c · binary32(s / t)
            one level              second_kind "multiply"             second_kind "divide"

the first two exact in binary64. A merge adds deltas up in binary64 as :func:`paramdelta.reference.merge` does. Then
acc is rounded once, to binary32 or bf16, and quantised by a :class:`paramdelta.formats.Recipe`. This module shares no
code with the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta import reference
from paramdelta.dtypes import BY_NAME, F8_E4M3
from paramdelta.formats import Recipe
from paramdelta.reference import Codes, Mask, Values
from paramdelta.reference_codes import (
    Scaled,
    Singles,
    code_values,
    decode,
    grid_shape,
    pack,
    scale_codes,
    scale_values,
    spread,
    unit_max,
    unpack,
    unpack_zero_points,
)

__all__ = [
    "Output",
    "Quantised",
    "Scaled",
    "ScaledTerm",
    "accumulate",
    "alike",
    "code_values",
    "codes_of",
    "decode",
    "grid_shape",
    "merge_scaled",
    "merge_shared",
    "outgrown",
    "pack",
    "quantise",
    "round_values",
    "scale_codes",
    "scale_values",
    "second_of",
    "spread",
    "unit_max",
    "unit_scales",
    "unpack",
    "unpack_zero_points",
]

_LARGEST = {"f8_e4m3": 448.0, "f4": 6.0, "i4": 7.0}


class ScaledTerm(NamedTuple):
    """One summand, alpha · (post − base)."""

    post: Scaled
    base: Scaled
    alpha: float = 1.0


class Output(NamedTuple):
    """What a merge is to be stored as: a plain codec where ``recipe`` is None, else codes with a grid of scales.

    ``given`` is a scale for every unit, in place of the recipe's and of any that could be kept.
    """

    codec: str
    recipe: Recipe | None = None
    rows: int = 0
    cols: int = 0
    scale_dtype: str = "f32"
    second: float | None = None
    given: float | None = None


class Quantised(NamedTuple):
    """Codes [R, C], codes of scales [gr, gc] (None: plain output), the counts, and the largest finite |x|."""

    codes: Codes
    scales: Codes | None
    nan: int
    inf: int
    overflow: int
    amax: float
    touched: bool = True
    second: float | None = None


def round_values(acc: Values, recipe: Recipe) -> Singles:
    """Return acc rounded once, from binary64 to the recipe's ``values`` (f32 or bf16)."""
    dtype = BY_NAME[recipe.values]
    return reference.decode(reference.encode(acc, dtype)[0], dtype).astype(np.float32)


def second_of(amax: float, kind: str) -> float:
    """Return the second scale of tensors whose largest finite |x| is ``amax``, all in binary32.

    multiply: amax / 2688, 1 where that is 0; divide: 2688 · (1 / max(amax, 2^-126)) with the reciprocal rounded too, as
    torch divides a number by a tensor; 1 where that is not finite. 2688 = 6 · 448.
    """
    with np.errstate(all="ignore"):
        if kind == "multiply":
            second = np.float32(amax) / np.float32(2688)
            return float(second) if second > 0 else 1.0
        second = np.float32(2688) * (np.float32(1) / np.maximum(np.float32(amax), np.float32(2.0**-126)))
        return float(second) if np.isfinite(second) else 1.0


def unit_scales(amax: Singles, recipe: Recipe, scale_dtype: str, second: float | None = None) -> Codes:
    """Return the scales, as stored, of units with these largest finite |x|.

    Every operation is binary32. A unit is one of zeros where amax is 0 after the floor, or where its scale comes out
    as 0 (for nv_multiply: before the lower limit).
    """
    one, largest = np.float32, np.float32(recipe.largest)
    amax = np.maximum(amax, one(recipe.floor))
    with np.errstate(all="ignore"):
        if recipe.rule == "ratio":
            scale = amax / largest
        elif recipe.rule == "ceil2":
            field = ((amax / largest).view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23)
            scale = _power_of_two(field, 0 if scale_dtype == "f8_e8m0" else 1)
        elif recipe.rule == "near2":
            field = ((amax.view(np.uint32) + np.uint32(0x200000)) >> np.uint32(23)).astype(np.int64)
            scale = _power_of_two(field - 2, 0)
        elif recipe.rule == "inverse":
            scale = one(1) / _inverse(amax)
        elif recipe.rule == "nv_multiply":
            ratio = amax / (one(6) * one(second))
            scale = np.where(ratio == 0, one(0), np.clip(ratio, one(2.0**-9), one(448)))
        elif recipe.rule == "nv_divide":
            scale = np.minimum(one(second) * (amax / one(6)), one(448))
        else:
            raise ValueError(f"no such rule: {recipe.rule}")
        zero = one(recipe.zero)
        codes = scale_codes(np.where(amax == 0, zero, scale), scale_dtype)
        vanished = scale_values(codes, scale_dtype) == 0
        return np.where(vanished, scale_codes(np.full_like(amax, zero), scale_dtype), codes)


def codes_of(x: Singles, divisor: Singles, recipe: Recipe, inverse: Singles | None = None) -> Codes:
    """Return the codes of x for given scales of the elements: of x · inverse, x · (1 / divisor) or x / divisor.

    f8_e4m3 and f4: nearest, ties to even, within ±448 and ±6. −0 keeps its sign in f8; in f4 it is the code 0, and a
    quotient below 0 has its sign also where it rounds to 0. i4: rint within −8..7, plus 8. NaN: 0x7F, in f4 and i4
    the code of 0. ±Inf: ± the largest. 0 / 0, where a divisor underflowed, is 0.
    """
    with np.errstate(all="ignore"):
        if inverse is None and recipe.reciprocal:
            inverse = np.float32(1) / divisor
        ratio = x / divisor if inverse is None else x * inverse
        ratio = np.where(np.isinf(x), x, np.where(x == 0, x, ratio)).astype(np.float64)
    if recipe.codec == "i4":
        return np.where(np.isnan(x), 8, np.clip(np.rint(np.nan_to_num(ratio, nan=0.0)), -8, 7) + 8).astype(np.uint8)
    limit = _LARGEST[recipe.codec]
    if recipe.codec == "f8_e4m3":
        return reference.encode(np.clip(ratio, -limit, limit), F8_E4M3)[0]
    magnitude = np.where(np.isnan(x), 0.0, np.minimum(np.abs(ratio), limit))
    # The quantum is 1/2 below 2, then 1, then 2; a binade of normal numbers has two codes.
    binade = (magnitude >= 2).astype(np.int64) + (magnitude >= 4)
    code = np.rint(np.ldexp(magnitude, 1 - binade)).astype(np.int64) + 2 * binade
    return (code | np.where(ratio < 0, 8, 0)).astype(np.uint8)


def quantise(
    acc: Values,
    recipe: Recipe,
    rows: int,
    cols: int,
    scale_dtype: str,
    second: float | None = None,
    given: float | Values | None = None,
    scales: Codes | None = None,
) -> Quantised:
    """Return acc [R, C] quantised in units of rows × cols (0: the whole extent), codes against the scales as stored.

    ``second`` is the second scale for the rules nv_*, ``given`` a scale for every unit in place of the recipe's, and
    ``scales`` the stored scales [gr, gc] to use. Neither NaN nor Inf, nor what rounding made infinite, is in an amax.
    """
    x = round_values(acc, recipe)
    finite = np.isfinite(x)
    magnitude = np.where(finite, np.abs(x), np.float32(0))
    amax = unit_max(magnitude, rows, cols)
    inverse = None
    if given is not None:
        stored = np.broadcast_to(np.asarray(given, np.float64), amax.shape)
    else:
        if scales is None:
            scales = unit_scales(amax, recipe, scale_dtype, second)
            if recipe.rule == "inverse":
                inverse = spread(_inverse(np.maximum(amax, np.float32(recipe.floor))), x.shape, rows, cols)
        stored = scale_values(scales, scale_dtype)
    divisor = stored.astype(np.float32)
    with np.errstate(all="ignore"):
        if recipe.rule == "nv_multiply":
            divisor = divisor * np.float32(second)
        elif recipe.rule == "nv_divide":
            divisor = divisor / np.float32(second)
    codes = codes_of(x, spread(divisor, x.shape, rows, cols), recipe, inverse)
    nan, inf, overflow = np.isnan(acc), np.isinf(acc), np.isfinite(acc) & np.isinf(x)
    largest = float(np.max(magnitude, initial=0.0))
    return Quantised(codes, scales, int(nan.sum()), int(inf.sum()), int(overflow.sum()), largest, second=second)


def accumulate(new_base: Scaled, terms: Sequence[ScaledTerm]) -> tuple[Values, Mask]:
    """Return acc = new_base + Σ alpha · (post − base) in binary64, and which elements a delta touched.

    A delta is zero where post and base have the same bits (codec, code, scale with its dtype, second scale, zero
    point), NaN and Inf included, and where their difference is 0. A term with alpha = 0 is no term.
    """
    acc = decode(new_base)
    touched = np.zeros(acc.shape, bool)
    with np.errstate(all="ignore"):
        for post, base, alpha in terms:
            if alpha == 0.0:
                continue
            delta = decode(post) - decode(base)
            adds = ~_bit_equal(post, base) & (delta != 0.0)
            acc = np.where(adds, acc + np.float64(alpha) * delta, acc)
            touched |= adds
    return acc, touched


def merge_scaled(new_base: Scaled, terms: Sequence[ScaledTerm], output: Output, keep: bool = False) -> Quantised:
    """Return new_base + Σ alpha · (post − base) as ``output`` says.

    With ``keep``, where new_base's codec, grid, kind of scale and second scale are the output's: a unit that no delta
    touches has new_base's codes and scale; a touched one has new_base's scale while it holds the unit
    (:func:`outgrown`). Every other unit, and without ``keep`` every unit, is quantised afresh.
    """
    acc, touched = accumulate(new_base, terms)
    recipe = output.recipe
    if recipe is None:
        dtype = BY_NAME[output.codec]
        codes, over = reference.encode(acc, dtype)
        if new_base.scales is None and new_base.codec == output.codec:
            codes = np.where(touched, codes, new_base.codes)
        inf = np.isinf(acc) & ~over
        largest = float(np.max(np.abs(acc), initial=0.0, where=np.isfinite(acc)))
        counts = (int(np.isnan(acc).sum()), int(inf.sum()), int(over.sum()))
        return Quantised(codes, None, *counts, largest, bool(touched.any()))
    rows, cols, kind = output.rows, output.cols, output.scale_dtype
    fresh = quantise(acc, recipe, rows, cols, kind, output.second, output.given)
    fresh = fresh._replace(touched=bool(touched.any()))
    if not keep or output.given is not None or not alike(new_base, output):
        return fresh
    assert new_base.scales is not None
    same = ~unit_max(touched, rows, cols)
    held = ~same & ~outgrown(acc, new_base.scales, recipe, rows, cols, kind)
    again = quantise(acc, recipe, rows, cols, kind, output.second, scales=new_base.scales)
    codes = np.where(spread(held, acc.shape, rows, cols), again.codes, fresh.codes)
    codes = np.where(spread(same, acc.shape, rows, cols), new_base.codes, codes)
    assert fresh.scales is not None
    return fresh._replace(codes=codes, scales=np.where(held | same, new_base.scales, fresh.scales))


def merge_shared(
    members: Sequence[tuple[Scaled, Sequence[ScaledTerm]]], output: Output, keep: bool = False
) -> list[Quantised]:
    """Return the merges of matrices that are one unit: they share a second scale or, with a grid of (0, 0), the scale.

    With ``keep`` and no delta anywhere in the group, every member keeps new_base's codes, scales and second scale;
    with deltas, a scale that all have in common while it holds them (:func:`outgrown`). Otherwise the second scale, of
    the kind of the recipe's rule, or the scale follows from the group's amax, and all is quantised afresh.
    """
    recipe = output.recipe
    if recipe is None:
        raise ValueError("only quantised matrices share a scale")
    rows, cols, kind = output.rows, output.cols, output.scale_dtype
    two_levels = recipe.rule.startswith("nv_")
    if not two_levels and (rows or cols):
        raise ValueError(f"units of {rows} × {cols} do not span matrices")
    sums = [accumulate(new_base, terms) for new_base, terms in members]
    touched = any(bool(mask.any()) for _, mask in sums)
    firsts = [new_base for new_base, _ in members]
    shared = {m.scales.tobytes() for m in firsts if m.scales is not None}
    takes_over = keep and all(alike(m, output._replace(second=m.second)) for m in firsts)
    x = [round_values(acc, recipe) for acc, _ in sums]
    amax = max((float(np.max(np.abs(v), initial=0.0, where=np.isfinite(v))) for v in x), default=0.0)
    second, scales = None, None
    if two_levels:
        second = second_of(amax, recipe.rule.removeprefix("nv_"))
    elif (
        takes_over
        and len(shared) == 1
        and not any(_outgrown_of(m, acc, recipe) for m, (acc, _) in zip(firsts, sums, strict=True))
    ):
        scales = firsts[0].scales
    else:
        scales = unit_scales(np.full((1, 1), amax, np.float32), recipe, kind)
    results = []
    for (acc, _), first in zip(sums, firsts, strict=True):
        done = quantise(acc, recipe, rows, cols, kind, second, scales=scales)._replace(touched=touched)
        results.append(
            done._replace(codes=first.codes, scales=first.scales, second=first.second)
            if takes_over and not touched
            else done
        )
    return results


def outgrown(acc: Values, scales: Codes, recipe: Recipe, rows: int, cols: int, scale_dtype: str) -> Mask:
    """Return which units [gr, gc] cannot keep their stored scale s.

    Powers of two (any f8_e8m0 scale; else by the rule ceil2, with an exponent field from 1 to 254) hold while
    amax ≤ 448 · s, or 6 · s in f4; the scales of i4 while every rint(x / s) is within −8..7. Nothing else holds.
    """
    x = round_values(acc, recipe)
    x = np.where(np.isfinite(x), x, np.float32(0))
    value = scale_values(scales, scale_dtype)
    usable = np.isfinite(value) & (value > 0)
    if recipe.codec == "i4":
        with np.errstate(all="ignore"):
            steps = np.rint(x / spread(value.astype(np.float32), x.shape, rows, cols))
        return unit_max(~((steps >= -8) & (steps <= 7)), rows, cols) | ~usable
    if scale_dtype != "f8_e8m0":
        normal = (value >= 2.0**-126) & (np.frexp(value)[0] == 0.5)
        usable &= normal & (recipe.rule == "ceil2")
    amax = unit_max(np.abs(x), rows, cols).astype(np.float64)
    with np.errstate(all="ignore"):
        return ~usable | (amax > _LARGEST[recipe.codec] * value)


def _outgrown_of(matrix: Scaled, acc: Values, recipe: Recipe) -> bool:
    assert matrix.scales is not None
    assert matrix.scale_dtype is not None
    return bool(outgrown(acc, matrix.scales, recipe, matrix.rows, matrix.cols, matrix.scale_dtype).any())


def _power_of_two(field: NDArray[Any], least: int) -> Singles:
    field = np.clip(field.astype(np.int64), least, 254)
    power: Singles = np.ldexp(np.float32(1), field - 127).astype(np.float32)
    return power


def _inverse(amax: Singles) -> Singles:
    with np.errstate(all="ignore"):
        factor: Singles = np.minimum(np.float32(448) / amax, np.float32(448 * 512))
    return factor


def _bits(second: float | None) -> bytes:
    return b"" if second is None else np.float32(second).tobytes()


def alike(matrix: Scaled, output: Output) -> bool:
    """Whether a matrix is stored as the output is to be, so that its codes and scales can be kept."""
    assert output.recipe is not None
    if matrix.scales is None or matrix.zero_points is not None or matrix.codec != output.recipe.codec:
        return False
    rule = output.recipe.rule
    kind = rule.removeprefix("nv_") if rule.startswith("nv_") else ""
    shape = matrix.codes.shape
    grids = [
        tuple(n if not u or u > n else u for n, u in zip(shape, g, strict=True))
        for g in ((matrix.rows, matrix.cols), (output.rows, output.cols))
    ]
    same_second = not kind or _bits(matrix.second) == _bits(output.second)
    return (
        grids[0] == grids[1] and matrix.scale_dtype == output.scale_dtype and matrix.second_kind == kind and same_second
    )


def _bit_equal(a: Scaled, b: Scaled) -> Mask:
    shape = a.codes.shape
    if a.codec != b.codec or a.second_kind != b.second_kind or (a.scales is None) != (b.scales is None):
        return np.zeros(shape, bool)
    equal: Mask = a.codes == b.codes
    if a.scales is not None and b.scales is not None:
        if a.scale_dtype != b.scale_dtype:
            return np.zeros(shape, bool)
        if a.second_kind and _bits(a.second) != _bits(b.second):
            return np.zeros(shape, bool)
        equal &= spread(a.scales, shape, a.rows, a.cols) == spread(b.scales, shape, b.rows, b.cols)
    if a.codec == "i4":
        eights = [
            np.full(shape, 8) if m.zero_points is None else spread(m.zero_points, shape, m.rows, m.cols) for m in (a, b)
        ]
        equal &= eights[0] == eights[1]
    return equal
