"""The laws of merging quantised matrices, kept by the reference: what is kept, requantised, shared."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from scaled_weights import kind_of, stored, weights

from paramdelta import reference_scaled as scaled
from paramdelta.formats import CODEC_BITS, DEEPGEMM, DEEPGEMM_UE8M0, INT4, MXFP4_COMPRESSED, MXFP8, RECIPES
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm

every_recipe = pytest.mark.parametrize("name", RECIPES)


@every_recipe
def test_post_is_base(name: str) -> None:
    """No delta: new_base's codes and scales, whatever they are, NaN and −0 too. Without keeping: fresh ones."""
    m, out = stored(name, weights(3))
    other, _ = stored(name, weights(4))
    codes = m.codes.copy()
    codes[0, :16] = np.arange(16) * (17 if CODEC_BITS[m.codec] == 8 else 1)
    m = m._replace(codes=codes)
    got = scaled.merge_scaled(m, [ScaledTerm(other, other)], out, keep=True)
    assert not got.touched
    assert np.array_equal(got.codes, m.codes)
    assert np.array_equal(got.scales, m.scales)
    fresh = scaled.quantise(scaled.decode(m), out.recipe, out.rows, out.cols, out.scale_dtype, out.second)
    recomputed = scaled.merge_scaled(m, [ScaledTerm(other, other)], out)
    assert np.array_equal(recomputed.codes, fresh.codes)
    assert np.array_equal(recomputed.scales, fresh.scales)


@every_recipe
def test_touched_units_alone_change(name: str) -> None:
    """Kept scales give every untouched element of a touched unit its code again, but for E2M1's −0, which becomes 0."""
    m, out = stored(name, weights(5, (256, 256)))
    post = m._replace(codes=m.codes.copy())
    post.codes[200, 40] ^= 1
    got = scaled.merge_scaled(m, [ScaledTerm(post, m)], out, keep=True)
    assert got.touched
    delta = np.zeros(m.codes.shape, bool)
    delta[200, 40] = True
    touched = scaled.spread(scaled.unit_max(delta, out.rows, out.cols), m.codes.shape, out.rows, out.cols)
    assert np.array_equal(got.codes[~touched], m.codes[~touched])
    acc, _ = scaled.accumulate(m, [ScaledTerm(post, m)])
    fresh = scaled.quantise(acc, out.recipe, out.rows, out.cols, out.scale_dtype, out.second)
    if out.scale_dtype == "f8_e8m0" or out.recipe.codec == "i4" or out.recipe.rule == "ceil2":
        assert np.array_equal(got.scales, m.scales)
        minus_zero = (post.codes == 8) & touched & (m.codec == "f4")
        assert np.array_equal(got.codes, np.where(minus_zero, 0, post.codes))
    else:
        assert np.array_equal(got.codes[touched], fresh.codes[touched])


def test_scales_that_are_outgrown() -> None:
    """448 · s and 6 · s are still held; int4 holds what rounds to −8..7. Ratios and odd powers are never kept."""

    def outgrown(x: float, recipe, scale: float, scale_dtype: str) -> bool:
        codes = scaled.scale_codes(np.array([[scale]]), scale_dtype)
        return bool(scaled.outgrown(np.array([[x, 0.1 * x]]), codes, recipe, 1, 2, scale_dtype)[0, 0])

    assert not outgrown(448 * 0.25, DEEPGEMM_UE8M0, 0.25, "f32")
    assert outgrown(np.nextafter(np.float32(112), np.float32(113)), DEEPGEMM_UE8M0, 0.25, "f32")
    assert outgrown(1.0, DEEPGEMM_UE8M0, 0.75, "f32")
    assert outgrown(0.0, DEEPGEMM_UE8M0, 2.0**-127, "f32")
    assert outgrown(1.0, DEEPGEMM, 0.25, "f32")
    assert not outgrown(-12.0, MXFP4_COMPRESSED, 2.0, "f8_e8m0")
    assert outgrown(-12.01, MXFP4_COMPRESSED, 2.0, "f8_e8m0")
    assert not outgrown(7.5 - 2**-5, INT4, 1.0, "bf16")
    assert outgrown(7.5, INT4, 1.0, "bf16")
    assert not outgrown(-8.5, INT4, 1.0, "bf16")
    assert outgrown(-8.5625, INT4, 1.0, "bf16")
    assert outgrown(1.0, INT4, np.inf, "bf16")
    assert outgrown(1.0, INT4, -1.0, "bf16")
    assert scaled.outgrown(np.zeros((1, 1)), np.array([[255]], np.uint8), MXFP8, 1, 1, "f8_e8m0")[0, 0]


def test_deltas_of_equal_bits_are_zero() -> None:
    """Bit-equal code and scale, NaN too; a NaN under another scale is a delta, an equal value under another is none."""
    nan, one = np.array([[0x7F]], np.uint8), np.array([[0x38]], np.uint8)
    byte = {b: np.array([[b]], np.uint8) for b in (126, 127)}
    new_base = Scaled(one, "f8_e4m3", byte[127], "f8_e8m0")
    out = Output("bf16")

    def merged(post: Scaled, base: Scaled) -> int:
        return int(scaled.merge_scaled(new_base, [ScaledTerm(post, base)], out).codes[0, 0])

    bad = Scaled(nan, "f8_e4m3", byte[127], "f8_e8m0")
    assert merged(bad, bad) == 0x3F80
    assert merged(bad, bad._replace(scales=byte[126])) == 0x7FC0
    half = Scaled(np.array([[0x40]], np.uint8), "f8_e4m3", byte[126], "f8_e8m0")
    assert merged(new_base, half) == 0x3F80
    other = new_base._replace(scale_dtype="f8_e4m3")  # byte 127 is NaN there
    assert merged(new_base, other) == 0x7FC0
    assert merged(new_base._replace(scales=byte[126]), other._replace(scales=byte[126])) == 0xC3DF
    assert merged(Scaled(np.array([[0x4000]], np.uint16), "bf16"), half) == 0x4000


@pytest.mark.parametrize("name", ["nvfp4-modelopt", "nvfp4-compressed-tensors", "fp8-tensor"])
def test_members_of_a_group_share_a_scale(name: str) -> None:
    """No delta anywhere: everything is new_base's. One delta in one member: all are quantised with the group's amax."""
    firsts = [stored(name, weights(9) * factor) for factor in (1.0, 3.0, 0.5)]
    out = firsts[0][1]
    kept = scaled.merge_shared([(m, [ScaledTerm(m, m)]) for m, _ in firsts], out, keep=True)
    for got, (m, _) in zip(kept, firsts, strict=True):
        assert not got.touched
        assert np.array_equal(got.codes, m.codes)
        assert np.array_equal(got.scales, m.scales)
        assert got.second == m.second
    post = firsts[0][0]._replace(codes=firsts[0][0].codes ^ 1)
    terms = [[ScaledTerm(post, firsts[0][0])], [], []]
    merged = scaled.merge_shared([(m, t) for (m, _), t in zip(firsts, terms, strict=True)], out, keep=True)
    assert all(got.touched for got in merged)
    assert len({got.second for got in merged}) == 1
    amax = max(got.amax for got in merged)
    for got, (m, _), t in zip(merged, firsts, terms, strict=True):
        acc, _ = scaled.accumulate(m, t)
        if kind_of(out.recipe):
            assert got.second == scaled.second_of(amax, kind_of(out.recipe))
            want = scaled.quantise(acc, out.recipe, 1, 16, "f8_e4m3", got.second)
            assert np.array_equal(got.scales, want.scales)
        else:
            scale = np.float32(amax) / np.float32(448)
            want = scaled.quantise(acc, out.recipe, 0, 0, "f32", given=float(scale))
            assert got.scales.view(np.float32)[0, 0] == scale
        assert np.array_equal(got.codes, want.codes)


@pytest.mark.parametrize("name", ["fp8-tensor", "deepgemm-ue8m0", "int4-f32"])
def test_a_group_of_one_is_a_tensor(name: str) -> None:
    """A scale for a whole tensor: merge_shared of one member is merge_scaled."""
    recipe = RECIPES[name]
    out = Output(recipe.codec, recipe, 0, 0, "f32")
    first = scaled.quantise(weights(10), recipe, 0, 0, "f32")
    m = Scaled(first.codes, recipe.codec, first.scales, "f32")
    for step, keep in ((1, True), (1, False), (40, True)):
        post = m._replace(codes=((m.codes.astype(int) + step) % (1 << CODEC_BITS[m.codec])).astype(np.uint8))
        terms = [ScaledTerm(post, m, 3.0)]
        one = scaled.merge_scaled(m, terms, out, keep)
        (shared,) = scaled.merge_shared([(m, terms)], out, keep)
        assert np.array_equal(one.codes, shared.codes)
        assert np.array_equal(one.scales, shared.scales)
        assert one[2:] == shared[2:]


def test_a_merge_across_formats() -> None:
    """post MXFP4, base fp8 blocks, new_base bf16, output int4: the sum in binary64, quantised once."""
    post, _ = stored("mxfp4-openai", weights(6))
    base, _ = stored("deepgemm", weights(7))
    codes = (weights(8).astype(ml_dtypes.bfloat16)).view(np.uint16)
    new_base = Scaled(codes, "bf16")
    acc = codes.view(ml_dtypes.bfloat16).astype(np.float64) + 0.3 * (scaled.decode(post) - scaled.decode(base))
    want = scaled.quantise(acc, INT4, 1, 32, "bf16")
    got = scaled.merge_scaled(new_base, [ScaledTerm(post, base, 0.3)], Output("i4", INT4, 1, 32, "bf16"), keep=True)
    assert np.array_equal(got.codes, want.codes)
    assert np.array_equal(got.scales, want.scales)
