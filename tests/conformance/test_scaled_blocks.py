"""Blocks of 128 × 128 whose rows lie on multiples of 16 bytes: what the lanes for such matrices could get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scaled_check import Kind, Ran, check, output_id, outputs, stored

from paramdelta.formats import RECIPES
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm

BLOCKS = [o for o in outputs() if o.recipe is not None and o.codec == "f8_e4m3" and o.rows == 128 and o.cols == 128]
DEEPGEMM = Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "f32")
POWERS = Output("f8_e4m3", RECIPES["deepgemm-ue8m0"], 128, 128, "f32")
GAPS = (16, 32, 48)


def matrix(
    rng: np.random.Generator, shape: tuple[int, int], scales: np.ndarray, codes: np.ndarray | None = None
) -> Scaled:
    """Return random codes but NaN, with these scales for blocks."""
    if codes is None:
        codes = rng.integers(0, 127, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
    return Scaled(codes, "f8_e4m3", np.asarray(scales, np.float32).view(np.uint32), "f32", 128, 128)


def scales(rng: np.random.Generator, shape: tuple[int, int], low: int = -12, high: int = -8) -> np.ndarray:
    return np.exp2(rng.uniform(low, high, (-(-shape[0] // 128), -(-shape[1] // 128)))).astype(np.float32)


def run(kernels: str, new_base: Scaled, terms: list[ScaledTerm], output: Output = DEEPGEMM, keep: bool = False) -> Ran:
    return check(new_base, terms, output, kernels=kernels, keep=keep, gaps=GAPS)


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.5, -4.0, 0.7, -0.3, 2.0**-64, 2.0**64, 1e-40, 3e30])
def test_any_codes(kernels: str, alpha: float) -> None:
    """Every bit but NaN, more blocks than one processor takes, rows and columns that end within a block."""
    rng = np.random.default_rng(1)
    shape = (300, 656)
    post, base, new_base = (matrix(rng, shape, scales(rng, shape)) for _ in range(3))
    run(kernels, new_base, [ScaledTerm(post, base, alpha)])


@pytest.mark.parametrize("output", BLOCKS, ids=output_id)
@pytest.mark.parametrize("keep", [False, True])
def test_recipes(kernels: str, output: Output, keep: bool) -> None:
    """Weights, of which some blocks are untouched, in every recipe, with scales of its own."""
    rng = np.random.default_rng(2)
    kind = Kind("f8_e4m3", 128, 128, output.scale_dtype)
    values = rng.normal(0, 0.02, (256, 528))
    base, new_base = stored(rng, kind, values), stored(rng, kind, values + rng.normal(0, 0.01, values.shape))
    post = stored(rng, kind, values + rng.normal(0, 0.003, values.shape))
    codes, odd = base.codes.copy(), post.scales.copy()
    codes[:, 128:400] = post.codes[:, 128:400]
    odd[:, 0], odd[:, 4] = base.scales[:, 0], base.scales[:, 4]
    run(kernels, new_base, [ScaledTerm(base._replace(codes=codes, scales=odd), base)], output, keep)
    run(kernels, new_base, [ScaledTerm(post, base, -0.5)], output, keep)


@pytest.mark.parametrize("sizes", [(0, 0), (-149, -140), (-126, -126), (5, 7), (8, 9), (100, 119)], ids=str)
def test_scales_of_every_size(kernels: str, sizes: tuple[int, int]) -> None:
    """Equal scales, subnormal ones, the largest that the lane takes and those that it leaves to the literal way."""
    rng = np.random.default_rng(3)
    shape = (128, 400)
    post, base, new_base = (matrix(rng, shape, scales(rng, shape, *sizes)) for _ in range(3))
    run(kernels, new_base, [ScaledTerm(post, base)])
    run(kernels, new_base, [ScaledTerm(post, base, 0.3)], POWERS)
    tiny = matrix(rng, shape, scales(rng, shape, -149, -130))
    run(kernels, tiny, [ScaledTerm(post, base)])
    run(kernels, new_base, [ScaledTerm(tiny, tiny, -3.0)])


def test_odd_scales(kernels: str) -> None:
    """NaN, infinite, zero, negative, subnormal and huge scales, in each operand."""
    rng = np.random.default_rng(4)
    shape = (256, 1024)
    for which in range(3):
        operands = []
        for i in range(3):
            of = scales(rng, shape)
            if i == which:
                of[0] = [np.nan, np.inf, 0.0, -0.0, -0.01, 1e-45, 256.0, 3.4e38]
            operands.append(matrix(rng, shape, of))
        for alpha in (1.0, -0.7):
            run(kernels, operands[0], [ScaledTerm(operands[1], operands[2], alpha)])
        run(kernels, operands[0], [ScaledTerm(operands[1], operands[1])], keep=True)


def test_signed_zeros(kernels: str) -> None:
    """Zeros of either sign in every operand, and deltas that are zero: the sign of a zero that comes out."""
    rng = np.random.default_rng(5)
    shape = (128, 256)
    codes = [np.where(rng.random(shape) < 0.7, rng.choice(np.uint8([0, 0x80]), shape), 0x81).astype(np.uint8)
             for _ in range(3)]  # fmt: skip
    for signs in ([1, 1, 1], [1, -1, 1], [-1, 1, -1]):
        post, base, new_base = (
            matrix(rng, shape, sign * scales(rng, shape, -9, -9), c) for c, sign in zip(codes, signs, strict=True)
        )
        for alpha in (1.0, -1.0, 0.3, -0.3):
            run(kernels, new_base, [ScaledTerm(post, base, alpha)])
            run(kernels, new_base, [ScaledTerm(post, post, alpha)])


def test_nan_codes(kernels: str) -> None:
    """A NaN here and there: literally where it is, and the same bits for everything else."""
    rng = np.random.default_rng(6)
    shape = (256, 384)
    for which in range(3):
        operands = [matrix(rng, shape, scales(rng, shape)) for _ in range(3)]
        operands[which].codes[rng.integers(0, 256, 5), rng.integers(0, 384, 5)] = rng.choice(np.uint8([0x7F, 0xFF]), 5)
        run(kernels, operands[0], [ScaledTerm(operands[1], operands[2])])
        run(kernels, operands[0], [ScaledTerm(operands[which], operands[which], 0.3)], keep=True)


@pytest.mark.parametrize("output", [DEEPGEMM, POWERS], ids=output_id)
def test_quotients_near_the_middle_of_two_codes(kernels: str, output: Output) -> None:
    """Values that x / scale puts on a middle, or one place beside it: where a product in place of a division errs.

    post = base, so that x = code · scale of new_base, and the scale comes from the block's largest code.
    """
    rng = np.random.default_rng(7)
    shape = (128, 128 * 48)
    tops = rng.integers(0x70, 0x7F, 48)
    codes = rng.integers(0, 0x70, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
    codes[5, np.arange(48) * 128 + 7] = tops
    new_base = matrix(rng, shape, scales(rng, shape), codes)
    other = matrix(rng, shape, scales(rng, shape))
    run(kernels, new_base, [ScaledTerm(other, other)], output)
    # Deltas of few bits with scales alike: sums fall on middles of codes, exactly and by a place.
    ones = np.full((1, 48), 2.0**-9, np.float32)
    near = np.nextafter(ones, np.float32(1))
    for a, b, c in ((ones, ones, ones), (ones, near, ones), (near, ones, ones)):
        post, base = (matrix(rng, shape, s, rng.integers(0, 0x38, shape, np.uint8)) for s in (a, b))
        run(kernels, matrix(rng, shape, c, codes), [ScaledTerm(post, base)], output)


def test_what_is_reported_of_losses(kernels: str) -> None:
    rng = np.random.default_rng(8)
    shape = (256, 400)
    post, base, new_base = (matrix(rng, shape, scales(rng, shape)) for _ in range(3))
    got = run(kernels, new_base, [ScaledTerm(post, base)])
    want = run("scalar", new_base, [ScaledTerm(post, base)])
    assert got.error == pytest.approx(want.error, rel=1e-4)
    assert got.value == pytest.approx(want.value, rel=1e-4)
