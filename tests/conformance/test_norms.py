"""Norms: the bits of the reference's definition, for every instruction set, kernel, dtype, length, thread count."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_check import check_norms
from kernel_values import adversarial, shifted, uniform, weights

from paramdelta import reference
from paramdelta.dtypes import BF16, F8_E5M2, F16, F32, F64, MERGE_DTYPES, DType


def ids(value: object) -> str:
    return value.name if isinstance(value, DType) else str(value)


@pytest.mark.parametrize("size", [0, 1, 63, 255, 256, 257, 4095, 4096, 4097, 50_000, 400_001])
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_weights(norm_kernels: str, dtype: DType, size: int) -> None:
    check_norms(*weights(np.random.default_rng(size), dtype, size), (dtype,) * 3, norm_kernels)


def test_mixed_dtypes(norm_kernels: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [weights(rng, d, 9000)[k] for k, d in enumerate((F64, BF16, F8_E5M2))]
    check_norms(*arrays, (F64, BF16, F8_E5M2), norm_kernels)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=ids)
def test_odd_values(norm_kernels: str, dtype: DType) -> None:
    """Infinities, NaNs, subnormals, sums that overflow binary32: anything goes, as long as the bits agree."""
    rng = np.random.default_rng(0)
    finite = adversarial(dtype)
    finite = finite[np.isfinite(reference.decode(finite, dtype))]
    check_norms(*(rng.choice(finite, 30_000) for _ in range(3)), (dtype,) * 3, norm_kernels)
    check_norms(*(uniform(rng, dtype, 30_000) for _ in range(3)), (dtype,) * 3, norm_kernels)


def test_sums_are_correctly_rounded(norm_kernels: str) -> None:
    """Leaves of wildly different sizes, and inner products that cancel to nothing or to a last bit."""
    rng = np.random.default_rng(1)
    leaves = 400
    scale = np.repeat(np.ldexp(1.0, rng.integers(-60, 60, leaves)), 4096)
    sign = np.repeat(rng.choice([-1.0, 1.0], leaves), 4096)
    x = (rng.normal(size=leaves * 4096) * scale).astype(np.float32)
    arrays = ((x * sign).astype(np.float32), np.zeros_like(x), x)
    check_norms(*(a.view(np.uint32) for a in arrays), (F32,) * 3, norm_kernels)
    tiny = np.zeros(3 * 4096, np.float32)
    tiny[[0, 4096, 8192]] = 2.0**50, 2.0**-40, 2.0**50
    other = tiny.copy()
    other[8192] *= -1
    check_norms(*(a.view(np.uint32) for a in (tiny, np.zeros_like(tiny), other)), (F32,) * 3, norm_kernels)


def test_lanes_are_added_as_a_halving_tree(norm_kernels: str) -> None:
    """Lanes of one leaf, of magnitudes so far apart that additions round: another tree gives other bits."""
    rng = np.random.default_rng(2)
    for _ in range(40):
        lanes = np.ldexp(rng.uniform(1.0, 2.0, 256), rng.integers(-16, 16, 256)).astype(np.float32)
        check_norms(
            *(a.view(np.uint32) for a in (lanes, np.zeros_like(lanes), lanes[::-1].copy())), (F32,) * 3, norm_kernels
        )


@pytest.mark.parametrize("last", [0.0, 2.0**-60, -(2.0**-60)])
@pytest.mark.parametrize("first", [1.0, 1.0 + 2.0**-23, -1.0])
def test_ties_of_the_last_rounding(norm_kernels: str, first: float, last: float) -> None:
    """first + 2^-53 lies in the middle of two numbers; what a third leaf adds, far below, decides."""
    post, new_base = np.zeros((2, 3 * 4096), np.float32)
    post[::4096] = first, 2.0**-26, last
    new_base[::4096] = 1.0, 2.0**-27, 2.0**-60
    arrays = (post, np.zeros_like(post), new_base)
    check_norms(*(a.view(np.uint32) for a in arrays), (F32,) * 3, norm_kernels)


@pytest.mark.parametrize("zeros", [0, 1, 2], ids=["post", "base", "new_base"])
@pytest.mark.parametrize("dtype", [BF16, F64], ids=ids)
def test_an_operand_of_zeros(norm_kernels: str, dtype: DType, zeros: int) -> None:
    arrays = list(weights(np.random.default_rng(3), dtype, 5000))
    arrays[zeros] = None
    check_norms(*arrays, (dtype,) * 3, norm_kernels)


@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_unaligned_addresses(norm_kernels: str, dtype: DType) -> None:
    made = weights(np.random.default_rng(4), dtype, 9001)
    for offsets in ((1, 2, 3), (0, dtype.itemsize, 7)):
        check_norms(*(shifted(x, offset) for x, offset in zip(made, offsets, strict=True)), (dtype,) * 3, norm_kernels)


@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["post", "base", "new_base"])
def test_one_infinity_or_nan(norm_kernels: str, dtype: DType, which: int) -> None:
    """Of every type, in a leaf of its own: what the sums and the maximum make of it."""
    codes = adversarial(dtype)
    for code in codes[~np.isfinite(reference.decode(codes, dtype))][:6]:
        made = [x.copy() for x in weights(np.random.default_rng(5), dtype, 3 * 4096)]
        made[which][5000] = code
        check_norms(*made, (dtype,) * 3, norm_kernels)


def test_infinite_leaves_of_both_signs(norm_kernels: str) -> None:
    """+Inf and −Inf among the leaves of the inner product make it NaN, where each alone is kept."""
    post, base, new_base = np.zeros((3, 2 * 4096), np.float32)
    post[[0, 4096]], new_base[[0, 4096]] = 2.0**100, (2.0**100, -(2.0**100))
    for count in (4096, 2 * 4096):
        check_norms(*(a[:count].view(np.uint32) for a in (post, base, new_base)), (F32,) * 3, norm_kernels)
    check_norms(*(a[4096:].view(np.uint32) for a in (post, base, new_base)), (F32,) * 3, norm_kernels)
