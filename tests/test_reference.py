"""The reference itself, against what others say where they can be trusted, and against figures worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from paramdelta import reference
from paramdelta.dtypes import BF16, BY_NAME, F8_E4M3, F8_E5M2, F16, F32, F64, MERGE_DTYPES, DType

named = pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=lambda d: d.name)


def codes_of(dtype: DType) -> np.ndarray:
    """Every code of the short types, a random million of the long ones."""
    if dtype.bits <= 16:
        return np.arange(1 << dtype.bits, dtype=np.uint64).astype(reference.code_type(dtype))
    bits = np.random.default_rng(0).integers(0, 1 << dtype.bits, 1 << 20, dtype=np.uint64)
    return bits.astype(reference.code_type(dtype))


@named
def test_decode_is_what_ml_dtypes_reads(dtype: DType) -> None:
    codes = codes_of(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        want = codes.view(dtype.to_numpy()).astype(np.float64)
    got = reference.decode(codes, dtype)
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(want)) or np.isnan(got).any()


@named
def test_encode_undoes_decode(dtype: DType) -> None:
    codes = codes_of(dtype)
    values = reference.decode(codes, dtype)
    got, overflow = reference.encode(values, dtype)
    nan = np.isnan(values)
    assert np.array_equal(got[~nan], codes[~nan])
    assert (got[nan] == reference.FORMATS[dtype.name].nan).all()
    assert not overflow.any()


@pytest.mark.parametrize("dtype", [BF16, F16, F8_E4M3, F8_E5M2], ids=lambda d: d.name)
def test_encode_takes_the_nearest(dtype: DType) -> None:
    """By rational arithmetic: no other code is nearer, and a tie goes to the even one."""
    form = reference.FORMATS[dtype.name]
    rng = np.random.default_rng(1)
    codes = rng.integers(0, form.largest, 2000).astype(reference.code_type(dtype))
    low = reference.decode(codes, dtype)
    high = reference.decode((codes + 1).astype(codes.dtype), dtype)
    middle = (low + high) / 2
    values = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), rng.uniform(low, high)])
    got = reference.decode(reference.encode(values, dtype)[0], dtype)
    for i, value in enumerate(values):
        below, above = Fraction(low[i % 2000]), Fraction(high[i % 2000])
        x = Fraction(value)
        even = below if codes[i % 2000] % 2 == 0 else above
        want = even if x - below == above - x else (below if x - below < above - x else above)
        assert Fraction(got[i]) == want, value


def test_encode_to_f32_is_a_cast() -> None:
    rng = np.random.default_rng(2)
    values = rng.integers(0, 1 << 64, 1 << 18, dtype=np.uint64).view(np.float64)
    values = np.concatenate([values, rng.normal(size=1 << 18) * 2.0 ** rng.integers(-155, 130, 1 << 18)])
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore", under="ignore"):
        want = values.astype(np.float32).view(np.uint32)
    assert np.array_equal(reference.encode(values, F32)[0], want)


@pytest.mark.parametrize(
    ("dtype", "value", "code", "overflow"),
    [
        ("bf16", 1 + 2.0**-8 + 2.0**-30, 0x3F81, False),
        ("bf16", 1 + 2.0**-8, 0x3F80, False),
        ("bf16", 2.0**-134, 0x0000, False),
        ("bf16", -(2.0**-134) * (1 + 2.0**-50), 0x8001, False),
        ("bf16", 1e39, 0x7F80, True),
        ("bf16", np.inf, 0x7F80, False),
        ("f16", 1 + 2.0**-11 + 2.0**-30, 0x3C01, False),
        ("f16", 65519.99, 0x7BFF, False),
        ("f16", 65520.0, 0x7C00, True),
        ("f8_e4m3", 1 + 2.0**-4 + 2.0**-30, 0x39, False),
        ("f8_e4m3", 464.0, 0x7E, False),
        ("f8_e4m3", -464.0001, 0xFE, True),
        ("f8_e4m3", np.inf, 0x7E, True),
        ("f8_e4m3", np.nan, 0x7F, False),
        ("f8_e5m2", 1 + 2.0**-3 + 2.0**-30, 0x3D, False),
        ("f8_e5m2", 61440.0, 0x7C, True),
    ],
)
def test_encode_by_hand(dtype: str, value: float, code: int, overflow: bool) -> None:
    codes, overflows = reference.encode(np.array([value]), BY_NAME[dtype])
    assert (int(codes[0]), bool(overflows[0])) == (code, overflow)


def test_the_casts_of_libraries_round_twice() -> None:
    """Why the reference has conversions of its own."""
    value = np.array([1 + 2.0**-8 + 2.0**-30])
    assert value.astype(ml_dtypes.bfloat16).view(np.uint16)[0] == 0x3F80
    assert reference.encode(value, BF16)[0][0] == 0x3F81


def test_one_rounding_of_the_sum() -> None:
    """new_base = 1, base = 0, post = 2^-8 + 2^-31 in f32: binary64 keeps the last bit, bf16 gets 1 + 2^-7."""
    post = np.array([2.0**-8 + 2.0**-31], np.float32).view(np.uint32)
    new_base, zero = reference.Array(np.array([0x3F80], np.uint16), BF16), reference.Array(None, F32)
    merged = reference.merge(new_base, [reference.Term(reference.Array(post, F32), zero)], BF16)
    assert merged.codes[0] == 0x3F81


def test_rules_of_zero_deltas() -> None:
    def merged(post: int, base: int, new: int, alpha: float = 1.0) -> int:
        p, b, n = (reference.Array(np.array([x], np.uint16), BF16) for x in (post, base, new))
        return int(reference.merge(n, [reference.Term(p, b, alpha)], BF16).codes[0])

    assert merged(0x7F80, 0x7F80, 0x3F80) == 0x3F80  # Inf − Inf
    assert merged(0x7FC1, 0x7FC1, 0xFFD5) == 0xFFD5  # NaN − NaN, and new_base's payload
    assert merged(0x0000, 0x8000, 0x8000) == 0x8000  # +0 − −0
    assert merged(0x7FC1, 0x3F80, 0x8000, 0.0) == 0x8000  # alpha = 0
    assert merged(0x0001, 0x0000, 0x8000, 5e-324) == 0x0000  # a delta that is not zero, whose product is
    assert merged(0x7FC1, 0x7FC2, 0x3F80) == 0x7FC0  # different NaNs: the canonical one


@named
def test_norms_by_hand(dtype: DType) -> None:
    values = np.zeros(5000)
    values[[0, 1, 4999]] = 1.0, -2.0, 0.5
    post, _ = reference.encode(values, dtype)
    new_base, _ = reference.encode(2 * values, dtype)
    zeros = reference.encode(np.zeros(5000), dtype)[0]
    got = reference.norms(*(reference.Array(a, dtype) for a in (post, zeros, new_base)))
    assert got == (5.25, 21.0, 10.5, 2.0)


def test_counts() -> None:
    new_base = reference.Array(np.array([np.nan, np.inf, -np.inf, 500.0, 1.0]).view(np.uint64), F64)
    assert reference.merge(new_base, [], F8_E4M3)[1:] == (1, 0, 3)
    assert reference.merge(new_base, [], F16)[1:] == (1, 2, 0)
    assert reference.merge(new_base, [], F64)[1:] == (1, 2, 0)
