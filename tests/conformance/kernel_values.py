"""Stored codes to test with: adversarial sets for each type, random ones like weights or like anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from paramdelta import reference
from paramdelta.dtypes import DType

Codes = np.ndarray[Any, Any]


def adversarial(dtype: DType) -> Codes:
    """Return codes at which shortcuts go wrong, both signs of each.

    Zeros, subnormals, powers of two at every few exponents, their neighbours on both sides, odd and even
    mantissas (ties), the largest finite values, infinities, NaNs with payloads.
    """
    form = reference.FORMATS[dtype.name]
    fields = (1 << (dtype.bits - 1 - form.mantissa)) - 1
    one = 1 << form.mantissa
    middle = fields // 2
    exponents = {1, 2, 3, fields - 2, fields - 1, fields}
    exponents |= {
        e for d in (0, 1, 2, form.mantissa, form.mantissa + 1, form.mantissa + 2) for e in (middle - d, middle + d)
    }
    exponents |= {middle - 2 * form.mantissa - k for k in (0, 1, 2, 3, 8)}
    # A sum that is inexact in binary32, or in binary64, and whose rounding to it looks like a tie.
    exponents |= {middle - k for k in (22, 23, 24, 25, 31, 32, 44, 45, 51, 52, 53, 54, 60)}
    codes = {
        0,
        1,
        2,
        3,
        one - 1,
        one // 2,
        form.largest,
        form.largest - 1,
        form.nan,
        (1 << (dtype.bits - 1)) - 1,
    }
    for e in exponents:
        if 0 < e <= fields:
            codes |= {e * one + m for m in (0, 1, 2, one // 2, one - 1)}
    magnitudes = np.array(sorted(c for c in codes if 0 <= c < 1 << (dtype.bits - 1)), reference.code_type(dtype))
    return np.concatenate([magnitudes, magnitudes | reference.code_type(dtype).type(1 << (dtype.bits - 1))])


def cross(*sets: Codes) -> tuple[Codes, ...]:
    """Return the full product of the sets, one contiguous array for each."""
    return tuple(np.ascontiguousarray(g.reshape(-1)) for g in np.meshgrid(*sets, indexing="ij"))


def uniform(rng: np.random.Generator, dtype: DType, size: int) -> Codes:
    """Return any bits at all."""
    return rng.integers(0, 1 << dtype.bits, size, dtype=np.uint64).astype(reference.code_type(dtype))


def weights(rng: np.random.Generator, dtype: DType, size: int) -> tuple[Codes, Codes, Codes]:
    """Return (post, base, new_base) such as a model's: small numbers, post close to base, a few equal to it."""
    base = rng.normal(0.0, 0.03, size)
    post = base + rng.normal(0.0, 0.001, size) * (rng.random(size) < 0.8)
    new_base = base + rng.normal(0.0, 0.01, size)
    return tuple(reference.encode(x, dtype)[0] for x in (post, base, new_base))  # type: ignore[return-value]


def clustered(rng: np.random.Generator, dtype: DType, size: int) -> tuple[Codes, Codes, Codes]:
    """Return (post, base, new_base) with few mantissa bits and exponents near each other: many ties, cancellations."""
    form = reference.FORMATS[dtype.name]

    def one() -> Codes:
        exponent = rng.integers(-form.mantissa - 4, form.mantissa + 4, size)
        mantissa = rng.integers(-4, 5, size) + rng.choice([0.0, 2.0**form.mantissa], size)
        return reference.encode(np.ldexp(mantissa.astype(np.float64), exponent), dtype)[0]

    return one(), one(), one()


def shifted(codes: Codes, offset: int) -> Codes:
    """Return a copy whose first byte lies ``offset`` bytes behind a 64-byte boundary."""
    memory = np.zeros(codes.nbytes + 128, np.uint8)
    start = -memory.__array_interface__["data"][0] % 64 + offset
    view = memory[start : start + codes.nbytes].view(codes.dtype)
    view[...] = codes
    return view
