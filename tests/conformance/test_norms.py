"""Norms: the same bits as the reference's definition, for every instruction set, dtype, length, thread count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_check import operand
from kernel_values import adversarial, uniform, weights

from paramdelta import reference
from paramdelta.backends import cpu
from paramdelta.dtypes import BF16, F8_E5M2, F16, F32, F64, MERGE_DTYPES, DType


def ids(value: object) -> str:
    return value.name if isinstance(value, DType) else str(value)


def same(got: tuple[float, ...], want: tuple[float, ...]) -> None:
    for name, g, w in zip(reference.Norms._fields, got, want, strict=True):
        assert g == w or (math.isnan(g) and math.isnan(w)), f"{name}: expected {w!r}, got {g!r}"


def check(post, base, new_base, kinds, isa: str, threads: tuple[int, ...] = (1, 3)) -> None:
    arrays = [reference.Array(a, k) for a, k in zip((post, base, new_base), kinds, strict=True)]
    want = reference.norms(*arrays)
    for n in threads:
        same(cpu.norms(*(operand(a) for a in arrays), post.size, threads=n, isa=isa), want)


@pytest.mark.parametrize("size", [0, 1, 63, 255, 256, 257, 4095, 4096, 4097, 50_000, 400_001])
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_weights(isa: str, dtype: DType, size: int) -> None:
    check(*weights(np.random.default_rng(size), dtype, size), (dtype,) * 3, isa)


def test_mixed_dtypes(isa: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [weights(rng, d, 9000)[k] for k, d in enumerate((F64, BF16, F8_E5M2))]
    check(*arrays, (F64, BF16, F8_E5M2), isa)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=ids)
def test_odd_values(isa: str, dtype: DType) -> None:
    """Infinities, NaNs, subnormals, sums that overflow binary32: anything goes, as long as the bits agree."""
    rng = np.random.default_rng(0)
    finite = adversarial(dtype)
    finite = finite[np.isfinite(reference.decode(finite, dtype))]
    check(*(rng.choice(finite, 30_000) for _ in range(3)), (dtype,) * 3, isa)
    check(*(uniform(rng, dtype, 30_000) for _ in range(3)), (dtype,) * 3, isa)


def test_sums_are_correctly_rounded(isa: str) -> None:
    """Leaves of wildly different sizes, and inner products that cancel to nothing or to a last bit."""
    rng = np.random.default_rng(1)
    leaves = 400
    scale = np.repeat(np.ldexp(1.0, rng.integers(-60, 60, leaves)), 4096)
    sign = np.repeat(rng.choice([-1.0, 1.0], leaves), 4096)
    x = (rng.normal(size=leaves * 4096) * scale).astype(np.float32)
    arrays = ((x * sign).astype(np.float32), np.zeros_like(x), x)
    check(*(a.view(np.uint32) for a in arrays), (F32,) * 3, isa)
    tiny = np.zeros(3 * 4096, np.float32)
    tiny[[0, 4096, 8192]] = 2.0**50, 2.0**-40, 2.0**50
    other = tiny.copy()
    other[8192] *= -1
    check(*(a.view(np.uint32) for a in (tiny, np.zeros_like(tiny), other)), (F32,) * 3, isa)


@pytest.mark.parametrize("last", [0.0, 2.0**-60, -(2.0**-60)])
@pytest.mark.parametrize("first", [1.0, 1.0 + 2.0**-23, -1.0])
def test_ties_of_the_last_rounding(isa: str, first: float, last: float) -> None:
    """first + 2^-53 lies in the middle of two numbers; what a third leaf adds, far below, decides."""
    post, new_base = np.zeros((2, 3 * 4096), np.float32)
    post[::4096] = first, 2.0**-26, last
    new_base[::4096] = 1.0, 2.0**-27, 2.0**-60
    arrays = (post, np.zeros_like(post), new_base)
    check(*(a.view(np.uint32) for a in arrays), (F32,) * 3, isa)
