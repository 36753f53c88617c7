"""Inner products of differences: the same bits as the reference's definition, for every instruction set, dtype,
length and way of cutting."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_check import operand
from kernel_values import adversarial, uniform, weights

from paramdelta import _cpu, reference
from paramdelta.backends import cpu
from paramdelta.dtypes import BF16, F8_E5M2, F16, F32, F64, MERGE_DTYPES, DType

DIFFERENCES = [(0, 1), (2, 1), (3, 1), (1, -1)]
PRODUCTS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 3)]


def ids(value: object) -> str:
    return value.name if isinstance(value, DType) else str(value)


def summed(arrays: list[reference.Array], isa: str, cuts: tuple[int, ...] = ()) -> reference.Gram:
    """Return what the kernel finds, the run cut at ``cuts``."""
    sums = _cpu.GramSums(operands=len(arrays), differences=DIFFERENCES, products=PRODUCTS)
    size = arrays[0].codes.size
    for first, end in zip((0, *cuts), (*cuts, size), strict=True):
        parts = [reference.Array(a.codes[first:end], a.dtype) for a in arrays]
        codes = [(operand(a).address, a.dtype.code) for a in parts]
        sums.add(codes, count=end - first, first=first, isa=isa)
    return reference.Gram(tuple(sums.products()), tuple(reference.Facts(*f) for f in sums.facts()))


def check(codes: list[np.ndarray], kinds: tuple[DType, ...], isa: str) -> None:
    arrays = [reference.Array(np.ascontiguousarray(c), k) for c, k in zip(codes, kinds, strict=True)]
    want = reference.gram(arrays, DIFFERENCES, PRODUCTS)
    for cuts in ((), (4096, 8192)) if arrays[0].codes.size > 8192 else ((),):
        got = summed(arrays, isa, cuts)
        assert got.facts == want.facts
        np.testing.assert_array_equal(got.products, want.products)  # NaN, where lanes overflow both ways, equals NaN


def four(rng: np.random.Generator, dtype: DType, size: int) -> list[np.ndarray]:
    """Return operands of which some elements are bit-equal."""
    post, base, new_base = weights(rng, dtype, size)
    return [np.where(rng.random(size) < 0.3, base, post), base, new_base, np.where(rng.random(size) < 0.9, base, post)]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4096, 4097, 50_000])
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_weights(isa: str, dtype: DType, size: int) -> None:
    check(four(np.random.default_rng(size), dtype, size), (dtype,) * 4, isa)


def test_mixed_dtypes(isa: str) -> None:
    kinds = (F64, BF16, F8_E5M2, BF16)
    check([four(np.random.default_rng(0), d, 9000)[k] for k, d in enumerate(kinds)], kinds, isa)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=ids)
def test_odd_values(isa: str, dtype: DType) -> None:
    """NaN and Inf are counted and left out; subnormals, and sums that overflow binary32, are the reference's."""
    rng = np.random.default_rng(0)
    check([rng.choice(adversarial(dtype), 30_000) for _ in range(4)], (dtype,) * 4, isa)
    check([uniform(rng, dtype, 30_000) for _ in range(4)], (dtype,) * 4, isa)


def test_every_element_of_a_row_unchanged(isa: str) -> None:
    """A count of one row does not fit a byte."""
    for dtype in MERGE_DTYPES:
        same = four(np.random.default_rng(0), dtype, 4096)[1]
        arrays = [reference.Array(same, dtype)] * 4
        assert [f.unchanged for f in summed(arrays, isa).facts] == [4096, 4096, 4096, 0]


def test_finite_sums_are_those_of_the_norms(isa: str) -> None:
    arrays = [reference.Array(c, BF16) for c in four(np.random.default_rng(3), BF16, 30_000)]
    post, base, new_base = (operand(a) for a in arrays[:3])
    norms = cpu.norms(post, base, new_base, 30_000, threads=2, isa=isa)
    found = summed(arrays, isa)
    assert (found.products[0], found.products[3], found.products[1], found.facts[0].largest) == tuple(norms)


def test_a_part_begins_at_a_leaf() -> None:
    sums = _cpu.GramSums(operands=1, differences=[(0, -1)], products=[(0, 0)])
    with pytest.raises(ValueError, match="within a leaf"):
        sums.add([(0, F32.code)], count=1, first=1, isa=None)
    with pytest.raises(ValueError, match="not there"):
        _cpu.GramSums(operands=1, differences=[(0, 1)], products=[])
