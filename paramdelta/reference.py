"""The contract, executable: what every backend must compute, in NumPy, for reading and for tests.

For one output element, with every operand decoded to its real value:

    delta_k = post_k − base_k                      binary64, nearest even
    acc     = acc + alpha_k · delta_k              binary64, product and sum rounded separately
    out     = encode(acc)                          rounded once from binary64, nearest even

starting from acc = new_base, in the order of the terms. This module shares no code with the kernels, and none
of its conversions is a cast of NumPy's or ml_dtypes': those from binary64 to the short types round twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DType

Codes = NDArray[Any]  # unsigned integers as wide as the type: the stored bits
Values = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEAF = 4096  # elements of one leaf of the norms
LANES = 256  # sums that run side by side within a leaf


class Format(NamedTuple):
    """A binary format: stored mantissa bits, smallest normal exponent, and the codes that are not plain numbers."""

    mantissa: int
    emin: int
    largest: int  # the code of the largest finite value
    nan: int  # the code of the canonical NaN
    inf: int | None


FORMATS = {
    "bf16": Format(7, -126, 0x7F7F, 0x7FC0, 0x7F80),
    "f16": Format(10, -14, 0x7BFF, 0x7E00, 0x7C00),
    "f32": Format(23, -126, 0x7F7FFFFF, 0x7FC00000, 0x7F800000),
    "f64": Format(52, -1022, 0x7FEFFFFFFFFFFFFF, 0x7FF8000000000000, 0x7FF0000000000000),
    "f8_e4m3": Format(3, -6, 0x7E, 0x7F, None),
    "f8_e5m2": Format(2, -14, 0x7B, 0x7E, 0x7C),
}


class Array(NamedTuple):
    """Stored elements: their codes and their type. ``codes`` may be None in an operand of zeros."""

    codes: Codes | None
    dtype: DType


class Term(NamedTuple):
    """One summand, alpha · (post − base)."""

    post: Array
    base: Array
    alpha: float = 1.0


class Merged(NamedTuple):
    """Output codes, and how many are NaN, how many come of an infinite acc, and how many finite ones overflowed."""

    codes: Codes
    nan: int
    inf: int
    overflow: int


class Norms(NamedTuple):
    """‖post − base‖², ‖new_base − base‖², ⟨post − base, new_base − base⟩ and max |post − base|."""

    delta_squared: float
    drift_squared: float
    inner: float
    largest_delta: float


class Facts(NamedTuple):
    """Of a difference: its largest finite |element| and the first place of it (None where all are 0), how many elements
    are not finite, and how many are unchanged: bit-equal, or of equal value where the types differ."""

    largest: float
    at: int | None
    nonfinite: int
    unchanged: int


class Gram(NamedTuple):
    """Inner products of differences, and facts about each difference."""

    products: tuple[float, ...]
    facts: tuple[Facts, ...]


def code_type(dtype: DType) -> np.dtype[Any]:
    """Return the unsigned integer type that holds one stored element."""
    return np.dtype(f"u{dtype.itemsize}")


def decode(codes: Codes, dtype: DType) -> Values:
    """Return the values of stored elements: ± significand · 2^exponent. Nothing is rounded."""
    form = FORMATS[dtype.name]
    sign_bit = np.uint64(1) << np.uint64(dtype.bits - 1)
    wide = codes.astype(np.uint64)
    magnitude = wide & (sign_bit - np.uint64(1))
    field = (magnitude >> np.uint64(form.mantissa)).astype(np.int64)
    fraction = (magnitude & np.uint64((1 << form.mantissa) - 1)).astype(np.int64)
    normal = field > 0
    significand = fraction + np.where(normal, np.int64(1) << form.mantissa, 0)
    exponent = np.where(normal, field - 1, 0) + form.emin - form.mantissa
    with np.errstate(over="ignore"):  # f64's codes of Inf and NaN, put right below
        value = np.ldexp(significand.astype(np.float64), exponent)
    value = np.where(magnitude > form.largest, np.nan, value)
    if form.inf is not None:
        value = np.where(magnitude == form.inf, np.inf, value)
    return np.where(wide & sign_bit != 0, -value, value)


def encode(values: Values, dtype: DType) -> tuple[Codes, Mask]:
    """Return the codes of ``values``, each rounded once, and where the rounding exceeds the largest finite value.

    |x| = k · 2^q with k = rint(|x| · 2^−q) and q = max(exponent of x, emin) − mantissa. The mask is False for
    NaN, and for infinite values where the format has an Inf.
    """
    form = FORMATS[dtype.name]
    with np.errstate(all="ignore"):
        magnitude = np.abs(values)
        finite = np.isfinite(magnitude)
        safe = np.where(finite, magnitude, 0.0)
        exponent = np.frexp(safe)[1].astype(np.int64) - 1
        q = np.where(safe == 0.0, form.emin, np.maximum(exponent, form.emin)) - form.mantissa
        k = np.rint(np.ldexp(safe, -q)).astype(np.int64)
    # Codes count upwards with the value: one binade holds 2^mantissa of them, the subnormals share emin's
    # quantum.
    code = k + ((q - (form.emin - form.mantissa)) << form.mantissa)
    overflow = finite & (code > form.largest)
    infinite = np.isinf(magnitude)
    if form.inf is None:
        overflow |= infinite
    code = np.where(overflow | infinite, form.largest if form.inf is None else form.inf, code)
    code = code.astype(np.uint64) | (np.signbit(values).astype(np.uint64) << np.uint64(dtype.bits - 1))
    code = np.where(np.isnan(values), np.uint64(form.nan), code)
    return code.astype(code_type(dtype)), overflow


def merge(new_base: Array, terms: Sequence[Term], dtype: DType, count: int | None = None) -> Merged:
    """Return encode(new_base + Σ alpha · (post − base)) and its counts.

    A delta is zero where post and base are bit-equal (same dtype), NaN and Inf included, and where their
    difference is; it leaves acc untouched. A term with alpha = 0 is no term. An element that no term touched
    keeps new_base's own bits if the output has its dtype. ``count`` is needed only where every operand is
    None, for zeros.
    """
    arrays = [new_base, *(a for t in terms for a in (t.post, t.base))]
    size = next((a.codes.size for a in arrays if a.codes is not None), count or 0)
    acc = _values(new_base, size)
    touched = np.zeros(size, bool)
    with np.errstate(all="ignore"):
        for term in terms:
            if term.alpha == 0.0:
                continue
            delta = _values(term.post, size) - _values(term.base, size)
            adds = ~_bit_equal(term.post, term.base, size) & (delta != 0.0)
            acc = np.where(adds, acc + np.float64(term.alpha) * delta, acc)
            touched |= adds
    codes, overflow = encode(acc, dtype)
    if new_base.dtype == dtype:
        own = np.zeros(size, code_type(dtype)) if new_base.codes is None else new_base.codes
        codes = np.where(touched, codes, own)
    infinite = np.isinf(acc) & ~overflow
    return Merged(codes, int(np.isnan(acc).sum()), int(infinite.sum()), int(overflow.sum()))


def norms(post: Array, base: Array, new_base: Array) -> Norms:
    """Return ‖post − base‖², ‖new_base − base‖², their inner product and max |post − base|, by a fixed order of sums.

    Operands are rounded to binary32 (exact except for f64) and subtracted in binary32. A leaf is 4096
    consecutive elements, zero-padded. Lane l of 256 adds the products of elements l, l + 256, …, in order,
    product and sum each rounded to binary32. Lanes become binary64 and are added halves to halves, 128 + 128
    down to one. The result is the correctly rounded sum of the leaves. The maximum is the largest
    |difference|, NaN if any is.
    """
    with np.errstate(all="ignore"):
        p, b, n = (_values(a, 0).astype(np.float32) for a in (post, base, new_base))
        delta, drift = p - b, n - b
        sums = [_leaf_sums(x, y) for x, y in ((delta, delta), (drift, drift), (delta, drift))]
        largest = float(np.max(np.abs(delta), initial=0.0))
    return Norms(exact_sum(sums[0]), exact_sum(sums[1]), exact_sum(sums[2]), largest)


def gram(
    operands: Sequence[Array], differences: Sequence[tuple[int, int]], products: Sequence[tuple[int, int]]
) -> Gram:
    """Return inner products of differences of operands, and facts about each difference.

    A difference (i, j) is operand i minus operand j, and with j = −1 operand i itself; a product (k, l) is that of
    differences k and l. Operands are rounded to binary32 and subtracted in binary32; what is not finite is counted
    and enters the sums as 0. Sums are those of :func:`norms`.
    """
    with np.errstate(all="ignore"):
        values = [_values(a, 0).astype(np.float32) for a in operands]
        raw = [values[i] - values[j] if j >= 0 else values[i] for i, j in differences]
        finite = [np.where(np.isfinite(x), x, np.float32(0.0)) for x in raw]
        sums = tuple(exact_sum(_leaf_sums(finite[k], finite[n])) for k, n in products)
    facts = []
    for (i, j), x, own in zip(differences, raw, finite, strict=True):
        largest = float(np.max(np.abs(own), initial=0.0))
        at = int(np.argmax(np.abs(own))) if largest > 0.0 else None
        unchanged = 0
        if j >= 0 and operands[i].dtype == operands[j].dtype:
            unchanged = int(_bit_equal(operands[i], operands[j], own.size).sum())
        elif j >= 0:
            unchanged = int((values[i] == values[j]).sum())
        facts.append(Facts(largest, at, int((~np.isfinite(x)).sum()), unchanged))
    return Gram(sums, tuple(facts))


def exact_sum(values: Values) -> float:
    """Return the correctly rounded sum: NaN if a NaN or both infinities occur, ±Inf where it overflows."""
    positive, negative = bool((values == np.inf).any()), bool((values == -np.inf).any())
    if np.isnan(values).any() or (positive and negative):
        return math.nan
    if positive or negative:
        return math.inf if positive else -math.inf
    return math.fsum(values.tolist()) + 0.0


def _leaf_sums(x: NDArray[np.float32], y: NDArray[np.float32]) -> Values:
    padding = -x.size % LEAF
    products = np.pad(x, (0, padding)) * np.pad(y, (0, padding))
    rows = products.reshape(-1, LEAF // LANES, LANES)
    lanes32 = np.zeros((rows.shape[0], LANES), np.float32)
    for row in range(LEAF // LANES):
        lanes32 = lanes32 + rows[:, row]
    lanes = lanes32.astype(np.float64)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _values(array: Array, size: int) -> Values:
    return np.zeros(size) if array.codes is None else decode(array.codes, array.dtype)


def _bit_equal(a: Array, b: Array, size: int) -> Mask:
    if a.codes is None or b.codes is None:
        return np.full(size, a.codes is None and b.codes is None)
    return a.codes == b.codes if a.dtype == b.dtype else np.zeros(size, bool)
