"""The fused lanes, alpha = 1 and one dtype throughout, on the inputs that break a wrong shortcut."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from kernel_check import apart, check, pick, special
from kernel_values import adversarial, clustered, cross, uniform, weights

from paramdelta import reference
from paramdelta.dtypes import BF16, BY_NAME, F16, F32, DType

LANES = [BF16, F16, F32]


def ids(dtype: DType) -> str:
    return dtype.name


def one_term(post, base, new_base, dtype, alpha=1.0):
    term = reference.Term(reference.Array(post, dtype), reference.Array(base, dtype), alpha)
    return reference.Array(new_base, dtype), [term]


def needs_another_lane(new_base, terms, want, dtype: DType) -> np.ndarray:
    """Which elements the fused lane may give up on: special ones, inexact differences, inexact ties."""
    mask = special(new_base, terms, want, dtype)
    if dtype == F32:
        return mask
    p, b, n = (reference.decode(a.codes, dtype) for a in (terms[0].post, terms[0].base, new_base))
    with np.errstate(all="ignore"):
        delta, acc = p - b, n + (p - b)
        short = acc.astype(np.float32)
        mask |= delta.astype(np.float32) != delta
        below = 23 - reference.FORMATS[dtype.name].mantissa
        tie = (short.view(np.uint32) & np.uint32((1 << below) - 1)) == 1 << (below - 1)
        mask |= tie & (short != acc)
    return mask


@functools.cache
def crossed(dtype: DType):
    """The product of adversarial codes in all three places, what the reference makes of it, and who is difficult."""
    codes = adversarial(dtype)
    if codes.size > 130:  # two to three million triples are enough to ask the reference for
        codes = np.random.default_rng(0).choice(codes, 130, replace=False)
    new_base, terms = one_term(*cross(codes, codes, codes), dtype)
    want = reference.merge(new_base, terms, dtype)
    return new_base, terms, want, needs_another_lane(new_base, terms, want, dtype)


@pytest.mark.parametrize("dtype", LANES, ids=ids)
def test_adversarial_products(kernels: str, dtype: DType) -> None:
    """Sorted, so that what the lane must get right by itself fills whole tiles."""
    new_base, terms, want = apart(*crossed(dtype))
    check(new_base, terms, dtype, kernels=kernels, want=want)


@pytest.mark.parametrize("dtype", LANES, ids=ids)
def test_one_difficult_element_in_a_tile(kernels: str, dtype: DType) -> None:
    """Each must be noticed by itself, and send its tile to the lane that gets it right."""
    new_base, terms, want, mask = crossed(dtype)
    rng = np.random.default_rng(7)
    difficult = rng.choice(np.flatnonzero(mask), 4000, replace=False)
    chosen, chosen_terms, _ = pick(new_base, terms, want, difficult)
    size = difficult.size * 512
    at = np.arange(difficult.size) * 512 + rng.integers(0, 512, difficult.size)
    places = (chosen_terms[0].post, chosen_terms[0].base, chosen)
    triple = tuple(np.zeros(size, a.codes.dtype) for a in places)
    for array, place in zip(triple, places, strict=True):
        array[at] = place.codes
    new, new_terms = one_term(*triple, dtype)
    check(new, new_terms, dtype, kernels=kernels)


@functools.cache
def sampled(dtype: DType, make: str):
    rng = np.random.default_rng(11)
    if make == "uniform":
        triple = tuple(uniform(rng, dtype, 1 << 20) for _ in range(3))
    else:
        triple = {"weights": weights, "clustered": clustered}[make](rng, dtype, 1 << 20)
    new_base, terms = one_term(*triple, dtype)
    return new_base, terms, reference.merge(new_base, terms, dtype)


@pytest.mark.parametrize("make", ["weights", "clustered", "uniform"])
@pytest.mark.parametrize("dtype", LANES, ids=ids)
def test_random(kernels: str, dtype: DType, make: str) -> None:
    new_base, terms, want = sampled(dtype, make)
    check(new_base, terms, dtype, kernels=kernels, want=want)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=ids)
def test_exponent_gaps(kernels: str, dtype: DType) -> None:
    """Every gap between post and base, and between new_base and the delta, for mantissas that make ties."""
    form = reference.FORMATS[dtype.name]
    one = 1 << form.mantissa
    fields = np.arange(1, (1 << (dtype.bits - 1 - form.mantissa)) - 1)
    middle = fields.size // 2
    kind = reference.code_type(dtype)
    mantissas = np.array([0, 1, one - 1])
    moving = (fields[:, None] * one + mantissas).reshape(-1).astype(kind)
    fixed = (np.array([middle, middle - form.mantissa - 1])[:, None] * one + mantissas).reshape(-1).astype(kind)
    signs = np.array([0, 1 << (dtype.bits - 1)], kind)
    still, moves = (np.bitwise_or.outer(signs, x).reshape(-1) for x in (fixed, moving))
    for places in ((moves, still, moves[::7]), (still, moves, still), (moves, moves[::11], still)):
        new_base, terms = one_term(*cross(*places), dtype)
        check(new_base, terms, dtype, kernels=kernels)


@pytest.mark.parametrize(
    ("dtype", "post", "base", "new_base", "want"),
    [
        # The exact sum, rounded once, would be 3f81: binary64 rounds 1 + 2^-8 + 2^-60 to the tie first.
        ("bf16", 0x3B80, 0xA180, 0x3F80, 0x3F80),
        # 1 + (2^-8 + 2^-30): a tie in binary32, above it in binary64.
        ("bf16", 0x3B80, 0xB080, 0x3F80, 0x3F81),
        ("bf16", 0x3B80, 0x3080, 0x3F80, 0x3F80),
        # The difference overflows binary32, the result does not.
        ("bf16", 0x7F7F, 0xFF7F, 0xFF7F, 0x7F7F),
        # A zero delta keeps −0; a delta that is not zero does not.
        ("bf16", 0x3F80, 0x3F80, 0x8000, 0x8000),
        ("bf16", 0x0000, 0x8000, 0x8000, 0x8000),
        ("bf16", 0x8000, 0x0000, 0x8000, 0x8000),
        ("bf16", 0x7F80, 0x7F80, 0x3F80, 0x3F80),
        ("bf16", 0x7FC1, 0x7FC1, 0xFFAA, 0xFFAA),
        ("bf16", 0x7FC1, 0x7FC2, 0x3F80, 0x7FC0),
        ("f16", 0x1400, 0x8001, 0x3C00, 0x3C01),  # 1 + 2^-10 + 2^-24
        ("f16", 0x1000, 0x8001, 0x3C00, 0x3C01),  # 1 + 2^-11 + 2^-24
        ("f16", 0x1000, 0x0000, 0x3C00, 0x3C00),
        ("f16", 0x7BFF, 0xFBFF, 0xFBFF, 0x7BFF),
    ],
)
def test_known_results(kernels: str, dtype: str, post: int, base: int, new_base: int, want: int) -> None:
    kind = BY_NAME[dtype]
    new, terms = one_term(*(np.full(640, x, "u2") for x in (post, base, new_base)), kind)
    assert reference.merge(new, terms, kind).codes[0] == want
    check(new, terms, kind, kernels=kernels)
