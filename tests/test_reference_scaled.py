"""The reference of quantised formats: every code of every type, and the rules of scales and codes by hand."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from scaled_weights import STORED, stored, weights

from paramdelta import reference_scaled as scaled
from paramdelta.formats import (
    CODEC_BITS,
    CODECS,
    COMPRESSED_BF16,
    DEEPGEMM,
    DEEPGEMM_UE8M0,
    FBGEMM,
    FP8_TENSOR,
    INT4,
    MXFP4_COMPRESSED,
    MXFP4_DEEPSEEK,
    MXFP4_OPENAI,
    MXFP8,
    NVFP4_COMPRESSED,
    NVFP4_MODELOPT,
    RECIPES,
)
from paramdelta.reference_scaled import Scaled

every_recipe = pytest.mark.parametrize("name", RECIPES)
ML_DTYPES = {
    "f8_e4m3": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2",
    "f8_e4m3fnuz": "float8_e4m3fnuz",
    "f8_e5m2fnuz": "float8_e5m2fnuz",
    "f4": "float4_e2m1fn",
}


@pytest.mark.parametrize("codec", ML_DTYPES)
def test_every_code_as_ml_dtypes(codec: str) -> None:
    """All codes, alone and with scales of every exponent that leaves the product in binary64."""
    codes = np.arange(1 << CODEC_BITS[codec], dtype=np.uint8)
    want = codes.view(getattr(ml_dtypes, ML_DTYPES[codec])).astype(np.float64)
    got = scaled.code_values(codes, codec)
    assert np.array_equal(got, want, equal_nan=True)
    number = ~np.isnan(want)
    assert np.array_equal(np.signbit(got[number]), np.signbit(want[number]))
    scales = np.arange(256, dtype=np.uint8)
    m = Scaled(np.tile(codes, (256, 1)), codec, scales[:, None], "f8_e8m0", 1, 0)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal(scaled.decode(m), want[None, :] * powers[:, None], equal_nan=True)


def test_every_scale_of_a_byte_as_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    for dtype, theirs in (("f8_e8m0", ml_dtypes.float8_e8m0fnu), ("f8_e4m3", ml_dtypes.float8_e4m3fn)):
        want = codes.view(theirs).astype(np.float64)
        got = scaled.scale_values(codes, dtype)
        assert np.array_equal(got, want, equal_nan=True)
        if dtype == "f8_e8m0":
            assert np.array_equal(scaled.scale_codes(got[:255], dtype), codes[:255])


def test_e8m0_holds_powers_of_two_only() -> None:
    for value in (0.0, 1.5, -1.0, 2.0**-128, 2.0**128, np.nan):
        with pytest.raises(ValueError, match="powers of two"):
            scaled.scale_codes(np.array([value]), "f8_e8m0")


@pytest.mark.parametrize("cols", [1, 2, 7, 32])
@pytest.mark.parametrize("codec", CODECS)
def test_unpack_undoes_pack(codec: str, cols: int) -> None:
    bits = CODEC_BITS[codec]
    codes = np.random.default_rng(cols).integers(0, 1 << bits, (5, cols), dtype=np.uint64)
    raw = scaled.pack(codes, codec)
    assert raw.dtype == np.uint8
    assert raw.shape == (5, (cols * bits + 7) // 8)
    assert np.array_equal(scaled.unpack(raw, codec, cols), codes)


def test_packing_by_hand() -> None:
    assert scaled.pack(np.array([[1, 2, 3]]), "f4").tolist() == [[0x21, 0x03]]
    assert scaled.pack(np.array([[0x1234]]), "bf16").tolist() == [[0x34, 0x12]]
    words = np.array([[0x87654321], [0x0000000A]], np.uint32)
    assert scaled.unpack_zero_points(words, 9)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_decode_is_exact() -> None:
    """By rational arithmetic, with two levels of scales that multiply, and with the one rounding where they divide."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 32)).astype(np.uint8)
    scales = rng.integers(1, 127, (4, 2)).astype(np.uint8)
    for kind, second in (("multiply", np.float32(1.2345e-5)), ("divide", np.float32(3126.473))):
        got = scaled.decode(Scaled(codes, "f4", scales, "f8_e4m3", 1, 16, float(second), kind))
        value, scale = scaled.code_values(codes, "f4"), scaled.scale_values(scales, "f8_e4m3")
        for (r, c), x in np.ndenumerate(got):
            s = scale[r, c // 16]
            factor = Fraction(s) * Fraction(float(second))
            if kind == "divide":
                factor = Fraction(float(np.float32(s) / second))
            assert Fraction(x) == Fraction(value[r, c]) * factor


def test_grids() -> None:
    """Which scale an element uses: per tensor, per row, per column, ragged blocks."""
    codes = np.full((3, 5), 0x38, np.uint8)  # 1.0
    for rows, cols, grid in ((0, 0, (1, 1)), (1, 0, (3, 1)), (0, 1, (1, 5)), (2, 4, (2, 2)), (1, 2, (3, 3))):
        assert scaled.grid_shape((3, 5), rows, cols) == grid
        bytes_ = (100 + np.arange(grid[0] * grid[1]).reshape(grid)).astype(np.uint8)
        got = scaled.decode(Scaled(codes, "f8_e4m3", bytes_, "f8_e8m0", rows, cols))
        for (r, c), x in np.ndenumerate(got):
            assert x == 2.0 ** (int(bytes_[r // (rows or 3), c // (cols or 5)]) - 127)
    with pytest.raises(ValueError, match="grid"):
        scaled.decode(Scaled(codes, "f8_e4m3", np.zeros((2, 2), np.uint8), "f8_e8m0", 1, 0))


def test_f4_takes_the_nearest() -> None:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(9)), np.nextafter(x, np.float32(0)), np.float32([7, 1e30])])
    got = scaled.codes_of(x, np.ones_like(x), MXFP4_OPENAI)
    for value, code in zip(x, got, strict=True):
        away = [abs(Fraction(float(value)) - Fraction(v)) for v in values]
        best = [i for i, a in enumerate(away) if a == min(away)]
        assert code == (best[0] if len(best) == 1 else next(i for i in best if i % 2 == 0)), value
        assert scaled.codes_of(-value[None], np.ones(1, np.float32), MXFP4_OPENAI)[0] == code + 8 * (value > 0)


@pytest.mark.parametrize(
    ("recipe", "scale_dtype", "amax", "scale"),
    [
        (DEEPGEMM, "f32", 448.0, 1.0),
        (DEEPGEMM, "f32", 0.0, float(np.float32(1e-4) / np.float32(448))),
        (DEEPGEMM_UE8M0, "f32", 448.0, 1.0),
        (DEEPGEMM_UE8M0, "f32", 448.0001, 2.0),
        (DEEPGEMM_UE8M0, "f8_e8m0", 0.0, 2.0**-22),
        (FP8_TENSOR, "f32", 0.0, 1.0),
        (FP8_TENSOR, "f32", 2.0**-149, 1.0),
        (FBGEMM, "f32", 0.0, float(np.float32(1 / (448 * 512)))),
        (COMPRESSED_BF16, "bf16", 0.0, 2.0**-7),
        (COMPRESSED_BF16, "bf16", 1.0, 0.002227783203125),
        (MXFP8, "f8_e8m0", 0.0, 2.0**-127),
        (MXFP8, "f8_e8m0", 448 * 2.0**-126, 2.0**-126),
        (MXFP8, "f8_e8m0", 448 * 2.0**-128, 2.0**-126),
        (MXFP8, "f8_e8m0", 2.0**-149, 2.0**-127),
        (MXFP8, "f32", 2.0**-149, 2.0**-126),
        (MXFP4_OPENAI, "f8_e8m0", 6.0, 1.0),
        (MXFP4_OPENAI, "f8_e8m0", 3.4e38, 2.0**126),
        (MXFP4_DEEPSEEK, "f8_e8m0", 0.0, 2.0**-126),
        (MXFP4_COMPRESSED, "f8_e8m0", 6.999, 1.0),
        (MXFP4_COMPRESSED, "f8_e8m0", 7.0, 2.0),
        (MXFP4_COMPRESSED, "f8_e8m0", 2.0**-126, 2.0**-127),
        (NVFP4_MODELOPT, "f8_e4m3", 0.0, 1.0),
        (NVFP4_MODELOPT, "f8_e4m3", 1e-9, 2.0**-9),
        (NVFP4_MODELOPT, "f8_e4m3", 1e9, 448.0),
        (NVFP4_COMPRESSED, "f8_e4m3", 0.0, 0.125),
        (NVFP4_COMPRESSED, "f8_e4m3", 1e-9, 0.125),
        (NVFP4_COMPRESSED, "f8_e4m3", 1e9, 448.0),
        (INT4, "bf16", 7.5, 1.0),
        (INT4, "bf16", 0.0, 2.0**-7),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_scales_by_hand(recipe, scale_dtype: str, amax: float, scale: float) -> None:
    """Zeros, ends of ranges and powers of two; second scales are 1."""
    codes = scaled.unit_scales(np.array([[amax]], np.float32), recipe, scale_dtype, 1.0)
    assert scaled.scale_values(codes, scale_dtype)[0, 0] == scale


def test_second_scales_by_hand() -> None:
    assert scaled.second_of(2688.0, "multiply") == 1.0
    assert scaled.second_of(0.0, "multiply") == 1.0
    assert scaled.second_of(2.0**-149, "multiply") == 1.0
    assert scaled.second_of(1.0, "divide") == 2688.0
    assert scaled.second_of(0.0, "divide") == 1.0


@every_recipe
def test_quantising_again_changes_no_code(name: str) -> None:
    """What is quantised to the grid of given scales is a fixed point of it, and errors are half a step at most."""
    x = weights(1)
    m, out = stored(name, x)
    again = scaled.quantise(
        scaled.decode(m), out.recipe, out.rows, out.cols, out.scale_dtype, m.second, scales=m.scales
    )
    values = scaled.decode(m._replace(codes=again.codes))
    assert np.array_equal(values, scaled.decode(m))
    assert np.abs(values - x).max() < 0.2 * np.abs(x).max()


@every_recipe
def test_what_is_not_finite(name: str) -> None:
    """NaN, ±Inf and what overflows in rounding: counted, given the canonical codes, and in no amax."""
    recipe = RECIPES[name]
    scale_dtype, rows, cols = STORED[name]
    x = weights(2, (4, 64))
    plain = scaled.quantise(x, recipe, rows, cols, scale_dtype, 1.0)
    assert plain[2:5] == (0, 0, 0)
    bad = x.copy()
    peak = np.abs(x).argmax(axis=1)
    places = [(r, (int(peak[r]) + 1) % 64) for r in range(4)]
    zeroed = x.copy()
    for at, value in zip(places, (np.nan, np.inf, -np.inf, -1e300), strict=True):
        bad[at], zeroed[at] = value, 0.0
    got = scaled.quantise(bad, recipe, rows, cols, scale_dtype, 1.0)
    want = scaled.quantise(zeroed, recipe, rows, cols, scale_dtype, 1.0)
    assert got[2:5] == (1, 2, 1)
    assert got.amax == want.amax
    assert np.array_equal(got.scales, want.scales)
    nan, high, low = {"f8_e4m3": (0x7F, 0x7E, 0xFE), "f4": (0, 7, 15), "i4": (8, 15, 0)}[recipe.codec]
    assert [got.codes[at] for at in places] == [nan, high, low, low]
    rest = np.ones_like(got.codes, bool)
    rest[tuple(zip(*places, strict=True))] = False
    assert np.array_equal(got.codes[rest], want.codes[rest])


def test_signs_of_zero() -> None:
    x = np.array([[-0.0, 0.0, 1.0, -1e-6]])
    assert scaled.quantise(x, DEEPGEMM, 1, 0, "f32").codes[0].tolist() == [0x80, 0, 0x7E, 0x80]
    assert scaled.quantise(x, MXFP4_OPENAI, 1, 0, "f8_e8m0").codes[0].tolist() == [0, 0, 6, 8]
    assert scaled.quantise(x, INT4, 1, 0, "bf16").codes[0].tolist() == [8, 8, 15, 8]


@every_recipe
def test_nothing_by_nothing(name: str) -> None:
    """Where a divisor underflowed to 0, 0 / 0 is the code of 0; anything else is the largest code."""
    recipe = RECIPES[name]
    x, zero = np.array([0, 1e-30, -1e-30], np.float32), np.zeros(3, np.float32)
    want = {"f8_e4m3": [0, 0x7E, 0xFE], "f4": [0, 7, 15], "i4": [8, 15, 0]}[recipe.codec]
    assert scaled.codes_of(x, zero, recipe).tolist() == want


@every_recipe
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (129, 33)], ids=str)
def test_shapes(name: str, shape) -> None:
    scale_dtype, rows, cols = STORED[name]
    got = scaled.quantise(np.full(shape, 0.5), RECIPES[name], rows, cols, scale_dtype, 1.0)
    assert got.codes.shape == shape
    assert got.scales.shape == scaled.grid_shape(shape, rows, cols)
