"""Groups along K: MXFP8, MXFP4 and NVFP4 against torchao, the published formulas of triton and modelopt, gpt-oss."""

from __future__ import annotations

import numpy as np
import pytest
from oracle_values import FP4_TIES, FP8_TIES, bits, edge_maxima, group_weights, need, same, tensor, units

from paramdelta import reference_scaled as scaled
from paramdelta.formats import MXFP4_DEEPSEEK, MXFP4_OPENAI, MXFP8, NVFP4_MODELOPT

torch = need("torch")

BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def rows_of(x: np.ndarray, recipe, size: int = 32) -> scaled.Quantised:
    return scaled.quantise(x.astype(np.float64), recipe, 1, size, "f8_e8m0")


@pytest.mark.parametrize(
    ("recipe", "element", "ties"),
    [(MXFP8, "float8_e4m3fn", FP8_TIES), (MXFP4_OPENAI, "float4_e2m1fn_x2", FP4_TIES)],
    ids=["mxfp8", "mxfp4"],
)
def test_torchao(recipe, element: str, ties) -> None:
    """to_mx, scaling mode RCEIL. Scales bit-equal but in two places, both by the library's arithmetic.

    Its ceil(log2(ratio)) rounds the logarithm: ratios up to 64 steps of binary32 above a power of two may get that
    power. And below 2^-126 it goes on down to byte 0, where the rule by bits, as the GPU's instruction for normal
    numbers, stops at 1. Codes are bit-equal for given scales everywhere, but for byte 0, which it takes for 1.
    """
    mx = need("torchao.prototype.mx_formats.mx_tensor")
    config = need("torchao.prototype.mx_formats.config")
    x = units(edge_maxima(recipe.largest), 32, ties)
    scales, codes = mx.to_mx(tensor(x), getattr(torch, element), 32, config.ScaleCalculationMode.RCEIL)
    theirs = bits(scales)
    ratio = np.abs(x).max(axis=1) / np.float32(recipe.largest)
    above = ratio.view(np.uint32) & 0x7FFFFF
    exact = ((above == 0) | (above > 64)) & ((ratio >= 2.0**-126) | (ratio == 0))
    assert exact.mean() > 0.5
    ours = rows_of(x, recipe)
    same(ours.scales[exact], theirs[exact], "scales")
    near = (ratio >= 2.0**-126) & ~exact
    assert near.sum() > 100
    assert np.isin(ours.scales[near].astype(int) - theirs[near], (0, 1)).all()
    given = scaled.quantise(x.astype(np.float64), recipe, 1, 32, "f8_e8m0", scales=theirs)
    usable = (theirs[:, 0] > 0) & (theirs[:, 0] < 254)
    packed = scaled.pack(given.codes, recipe.codec)
    same(packed[usable], bits(codes).view(np.uint8).reshape(packed.shape)[usable], "codes")


def by_bits(ratio):
    """The least power of two that is not below a ratio, as an E8M0 byte and as a number."""
    pattern = (ratio.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return (pattern >> 23).to(torch.uint8), pattern.view(torch.float32)


def nearest_f4(ratio) -> np.ndarray:
    """E2M1 by search among the middles, ties to the even code; a value below 0 has its sign, also where it is 0."""
    values = ratio.double().numpy()
    magnitude = np.abs(values)
    code = np.searchsorted(BOUNDS, magnitude)  # a middle counts as below
    tie = (code < 7) & (BOUNDS[np.minimum(code, 6)] == magnitude)
    code = code + (tie & (code % 2 == 1))
    return (code | np.where(values < 0, 8, 0)).astype(np.uint8)


@pytest.mark.parametrize("recipe", [MXFP4_OPENAI, MXFP4_DEEPSEEK], ids=lambda r: r.name)
def test_mxfp4_by_bits(recipe) -> None:
    """triton's downcast_to_mxfp: (bits(amax / 6) + 0x7FFFFF) & 0x7F800000, x · (1 / scale), 0 for a scale of 0.
    DeepSeek V4 has a floor for amax, 6 · 2^-126, and multiplies by a rounded 1 / 6: the ratios differ, the powers of
    two do not. Bit-equal."""
    x = units(edge_maxima(6.0), 32, FP4_TIES)
    t = tensor(x)
    amax = t.abs().amax(dim=1, keepdim=True)
    if recipe is MXFP4_DEEPSEEK:
        stored, scale = by_bits(amax.clamp(6.0 * 2.0**-126) * torch.tensor(1.0 / 6.0))
    else:
        stored, scale = by_bits(amax / torch.tensor(6.0))
    ratio = t * torch.where(scale == 0, torch.tensor(0.0), 1.0 / scale)
    got = rows_of(x, recipe)
    same(got.scales, stored.numpy(), "scales")
    # With a scale of 0 the formula's ratios are ±0, ours are below 2^-19: the sign of a code 0 is all that differs.
    codes = np.where((stored.numpy() == 0) & (x < 0), 8, nearest_f4(ratio))
    same(got.codes, codes, "codes")


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_powers_of_two_do_not_depend_on_the_division(largest: float) -> None:
    """amax / largest and amax · (1 / largest), as kernels have it and torch on a GPU, differ for a third and for half
    of all mantissas. The least power of two above is the same for every one."""
    amax = (np.arange(1 << 23, dtype=np.uint32) + np.uint32(0x3F800000)).view(np.float32) * np.float32(largest)
    ratio, product = amax / np.float32(largest), amax * (np.float32(1) / np.float32(largest))
    assert (ratio != product).mean() > 0.3
    up = [(v.view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23) for v in (ratio, product)]
    assert np.array_equal(up[0], up[1])


def test_ragged_groups() -> None:
    """The last group of a row may be short: as if padded with zeros."""
    x = units(edge_maxima(6.0)[::50], 40, FP4_TIES)
    got = rows_of(x, MXFP4_OPENAI)
    whole = rows_of(np.pad(x, ((0, 0), (0, 24))), MXFP4_OPENAI)
    same(got.scales, whole.scales, "scales")
    same(got.codes, whole.codes[:, :40], "codes")


def test_gpt_oss_decode() -> None:
    """transformers' convert_moe_packed_tensors: blocks [E, rows, K / 32, 16], transposed to [E, K, rows]; exact."""
    mxfp4 = need("transformers.integrations.mxfp4")
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 16, 4, 16)).astype(np.uint8)
    scales = rng.integers(1, 250, (3, 16, 4)).astype(np.uint8)
    want = mxfp4.convert_moe_packed_tensors(tensor(blocks), tensor(scales), dtype=torch.float32)
    for expert in range(3):
        codes = scaled.unpack(blocks[expert].reshape(16, 64), "f4", 128)
        m = scaled.Scaled(codes, "f4", scales[expert], "f8_e8m0", 1, 32)
        same(scaled.decode(m), want[expert].T.double().numpy(), f"expert {expert}")


POWERS = (-100, -30, -3, 0, 4, 60)


@pytest.mark.parametrize("spread", [0.0, 6.0, 30.0])
def test_nvfp4_modelopt(spread: float) -> None:
    """modelopt's NVFP4QTensor: second amax / 2688, scale e4m3(clamp(amax / (6 · second), 2^-9, 448)) and 1 for 0, codes
    of x / (scale · second) by search among the middles. Bit-equal."""
    for power in POWERS:
        x = group_weights(power, spread, (480, 64))
        groups = tensor(x).view(480, 4, 16)
        second = groups.abs().amax() / torch.tensor(2688.0)
        ratio = groups.abs().amax(-1) / (torch.tensor(6.0) * second)
        ratio = torch.where(ratio == 0, torch.tensor(1.0), ratio)
        scale = ratio.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        codes = nearest_f4((groups / (scale.float() * second)[..., None]).view(480, 64))
        assert scaled.second_of(float(np.abs(x).max()), "multiply") == second.item()
        got = scaled.quantise(x.astype(np.float64), NVFP4_MODELOPT, 1, 16, "f8_e4m3", second.item())
        same(got.scales, bits(scale), "scales")
        same(got.codes, codes, "codes")
        m = scaled.Scaled(got.codes, "f4", got.scales, "f8_e4m3", 1, 16, second.item(), "multiply")
        exact = scaled.code_values(got.codes, "f4") * np.repeat(scale.double().numpy(), 16, 1) * float(second.double())
        same(scaled.decode(m), exact, "values")


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_nvfp4_torchao(spread: float) -> None:
    """nvfp4_quantize takes (amax / 6) / second for the ratio and x · ((1 / second) / scale) for the quotient.

    Each differs from ours by at most 2 steps of binary32, so scales are equal unless the ratio is that near to a
    middle of two e4m3 values, and codes for equal scales unless the quotient is that near to a middle of E2M1. Below
    2^-6 its scales are clamped, ours go on to 2^-9: the groups here differ by 3 binades at most.
    """
    nvfp4 = need("torchao.prototype.mx_formats.nvfp4_tensor")
    for power in POWERS:
        x = group_weights(power, spread, (480, 64))
        second = scaled.second_of(float(np.abs(x).max()), "multiply")
        scales, packed = nvfp4.nvfp4_quantize(tensor(x), 16, torch.tensor(second))
        got = scaled.quantise(x.astype(np.float64), NVFP4_MODELOPT, 1, 16, "f8_e4m3", second)
        amax = np.abs(x).reshape(480, 4, 16).max(-1).astype(np.float64)
        ratio = amax / 6 / second
        values = np.unique(scaled.code_values(np.arange(127, dtype=np.uint8), "f8_e4m3"))
        clear = far_from((values[1:] + values[:-1]) / 2, ratio) & (ratio > 2.0**-6)
        assert clear.mean() > 0.4  # half of the maxima are made to be near a middle
        same(got.scales[clear], bits(scales)[clear], "scales")
        equal = (got.scales == bits(scales)) & (amax > 0)
        quotient = np.abs(x) / second / np.repeat(scaled.scale_values(got.scales, "f8_e4m3"), 16, 1)
        settled = far_from(BOUNDS, quotient) & np.repeat(equal, 16, 1)
        assert settled.mean() > 0.4
        same(got.codes[settled], scaled.unpack(bits(packed), "f4", 64)[settled], "codes")


def far_from(middles: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether values are more than 4 steps of binary32 from every middle."""
    distance = np.abs(values[..., None] - middles).min(-1)
    return distance > np.abs(values) * 4 * 2.0**-23
