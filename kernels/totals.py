"""What a merge of matrices reports: counts, what was touched, the largest value, and what quantising lost.

Totals are six words of 64 bits: how many elements are NaN, are infinite, overflowed; whether a delta touched one and
the bits of amax (32 bits each); Σ (code · scale − x)² and Σ x² in binary64.
"""

import triton
import triton.language as tl

from paramdelta.kernels.codec import item, of, power, raw
from paramdelta.kernels.operands import add_up
from paramdelta.kernels.quantise import round_values


@triton.jit
def anywhere(mask):
    """Return whether a mask is True somewhere."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0


@triton.jit
def count(totals, acc, over):
    """Add up elements that are NaN, those that are infinite, and those that overflowed.

    Where these are called for, acc is computed again: kept that long, it would not fit the registers.
    """
    numbers = totals.to(tl.pointer_type(tl.int64))
    infinite = (tl.abs(acc) == float("inf")) & (over == 0)
    tl.atomic_add(numbers, tl.sum(tl.sum((acc != acc).to(tl.int64), 1), 0), sem="relaxed")
    tl.atomic_add(numbers + 1, tl.sum(tl.sum(infinite.to(tl.int64), 1), 0), sem="relaxed")
    tl.atomic_add(numbers + 2, tl.sum(tl.sum(over.to(tl.int64), 1), 0), sem="relaxed")


@triton.jit
def count_rounded(totals, planes, alphas, row, col, limits, x, RECIPE: tl.constexpr, TERMS: tl.constexpr,
                  FORMS: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Count for a tile whose values are rounded to x: what overflows is finite until then."""
    if anywhere((tl.abs(x) < float("inf")) == 0):
        acc, _, _, _ = add_up(planes, alphas, row, col, limits, TERMS, FORMS, ALIGN)
        again = round_values(acc, item(RECIPE, 5))
        count(totals, acc, (tl.abs(acc) < float("inf")) & (tl.abs(again) == float("inf")))


@triton.jit
def tell(totals, some, amax):
    """Note whether a delta touched an element (some > 0), and the largest finite |x|, as binary32's bits: int32."""
    halves = totals.to(tl.pointer_type(tl.int32)) + 6
    if some > tl.load(halves):
        tl.atomic_max(halves, some, sem="relaxed")
    if amax > tl.load(halves + 1):
        tl.atomic_max(halves + 1, amax, sem="relaxed")


@triton.jit
def add_sums(totals, error, value):
    """Add to the sums of squares: binary64."""
    sums = totals.to(tl.pointer_type(tl.float64)) + 4
    tl.atomic_add(sums, error, sem="relaxed")
    tl.atomic_add(sums + 1, value, sem="relaxed")


@triton.jit
def weighted_sum(squares, weight):
    """Return Σ squares · weight in binary64, of binary32 [R, C] and binary64 of that shape, or of 1 for R or C."""
    if weight.shape[1] == 1:
        rows = tl.sum(squares, 1, keep_dims=True)
        inner = tl.sum(rows, 0, keep_dims=True) if weight.shape[0] == 1 else rows
    else:
        inner = tl.sum(squares, 0, keep_dims=True) if weight.shape[0] == 1 else squares
    return tl.sum(tl.sum(inner.to(tl.float64) * weight, 1), 0)


@triton.jit
def add_lost(totals, ratio, code, scale, same, within):
    """Add up what quantising lost, from values in units of their scale, and their codes.

    Where `same` the codes are new_base's own, and nothing is lost. For the report: no bit of the output depends on it.
    """
    near = raw(code, "f8_e4m3") * power(of("f8_e4m3", "rebias"))
    finite = within & (tl.abs(ratio) < float("inf"))
    usual = finite & (tl.abs(ratio) < 1e9)  # squares of those do not overflow binary32
    error = tl.where(usual & (same == 0), near - ratio, 0.0)
    value = tl.where(usual, ratio, 0.0)
    weight = tl.where(tl.abs(scale) < float("inf"), scale, 0.0).to(tl.float64)
    weight = weight * weight
    lost, whole = weighted_sum(error * error, weight), weighted_sum(value * value, weight)
    large = finite & (usual == 0)
    if anywhere(large):
        far = tl.where(large, ratio, 0.0).to(tl.float64)
        off = tl.where(large & (same == 0), (near - ratio).to(tl.float64), 0.0)
        lost += tl.sum(tl.sum(off * off * weight, 1), 0)
        whole += tl.sum(tl.sum(far * far * weight, 1), 0)
    add_sums(totals, lost, whole)
