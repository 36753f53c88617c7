"""fp8 in blocks, rows and tensors: the published formulas of DeepGEMM, FBGEMM and modelopt, and two decoders."""

from __future__ import annotations

import numpy as np
import pytest
from oracle_values import FP8_TIES, bits, edge_maxima, need, rounded, same, tensor, typed, units

from paramdelta import reference_scaled as scaled
from paramdelta.dtypes import BF16, F32
from paramdelta.formats import DEEPGEMM, DEEPGEMM_UE8M0, FBGEMM, FP8_TENSOR

torch = need("torch")


def deepgemm(x, rows: int, cols: int, ue8m0: bool):
    """DeepGEMM's per_block_cast_to_fp8 by its definition: zero padding, amax ≥ 1e-4, amax / 448, ceil by bits."""
    padded = torch.zeros(-(-x.shape[0] // rows) * rows, -(-x.shape[1] // cols) * cols)
    padded[: x.shape[0], : x.shape[1]] = x
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(1e-4) / torch.tensor(448.0)
    if ue8m0:
        pattern = scale.view(torch.int32)
        field = (pattern >> 23) + ((pattern & 0x7FFFFF) != 0).to(torch.int32)
        scale = (field.clamp(1, 254) << 23).view(torch.float32)
    codes = (blocks * (1.0 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view_as(padded)[: x.shape[0], : x.shape[1]], scale[:, 0, :, 0]


def hard_blocks(shape: tuple[int, int], rows: int, cols: int) -> np.ndarray:
    """Blocks whose maxima go through the edges near 1e-4 and above, in a matrix that need not be divisible."""
    maxima = edge_maxima(448.0, lowest=-30, highest=100)
    grid = scaled.grid_shape(shape, rows, cols)
    picked = np.random.default_rng(3).choice(maxima, grid)
    picked.flat[0] = 0.0
    ones = units(np.ones(shape[0], np.float32), shape[1], FP8_TIES)
    return (ones * scaled.spread(picked, shape, rows, cols)).astype(np.float32)


@pytest.mark.parametrize("recipe", [DEEPGEMM, DEEPGEMM_UE8M0], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("shape", "rows", "cols"),
    [((256, 384), 128, 128), ((200, 300), 128, 128), ((1, 1), 128, 128), ((130, 127), 128, 128), ((70, 100), 32, 32)],
)
def test_deepgemm(recipe, shape, rows, cols) -> None:
    """Bit-equal. The divisor 448 is a tensor in the formula: with a Python number torch on a GPU multiplies by a
    rounded 1 / 448, which is another scale in the last bit."""
    x = hard_blocks(shape, rows, cols)
    codes, scales = deepgemm(tensor(x), rows, cols, recipe is DEEPGEMM_UE8M0)
    got = scaled.quantise(x.astype(np.float64), recipe, rows, cols, "f32")
    same(got.scales, bits(scales), "scales")
    same(got.codes, bits(codes), "codes")


@pytest.mark.parametrize("recipe", [DEEPGEMM, DEEPGEMM_UE8M0], ids=lambda r: r.name)
def test_deepgemm_at_every_edge(recipe) -> None:
    """Each unit a row of 64: amax at largest · 2^e and one step to either side for all e, below the floor too."""
    x = units(edge_maxima(448.0), 64, FP8_TIES)
    codes, scales = deepgemm(tensor(x), 1, 64, recipe is DEEPGEMM_UE8M0)
    got = scaled.quantise(x.astype(np.float64), recipe, 1, 64, "f32")
    same(got.scales, bits(scales), "scales")
    same(got.codes, bits(codes), "codes")
    if recipe is DEEPGEMM_UE8M0:  # stored as bytes, the scales are the same powers of two
        stored = scaled.quantise(x.astype(np.float64), recipe, 1, 64, "f8_e8m0")
        same(scaled.scale_values(stored.scales, "f8_e8m0"), scales.double().numpy(), "E8M0 scales")
        same(stored.codes, got.codes, "codes")


def test_fbgemm() -> None:
    """FBGEMM's fp8_row_quantize_ref: f = min(448 / amax, 448 · 512), codes of x · f, 1 / f stored. Bit-equal.

    The division is its kernel's: written with a Python number, torch would take 448 · (1 / amax) and round twice. The
    clamp is the cast's of the kernel.
    """
    x = units(edge_maxima(448.0), 64, FP8_TIES)
    t = tensor(x)
    factor = (torch.tensor(448.0) / t.abs().amax(dim=1)).clamp(max=448.0 * 512.0)
    codes = (t * factor[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    got = scaled.quantise(x.astype(np.float64), FBGEMM, 1, 0, "f32")
    same(got.scales[:, 0], bits(factor.reciprocal()), "scales")
    same(got.codes, bits(codes), "codes")
    zeros = scaled.scale_values(got.scales, "f32")[(x == 0).all(axis=1)]
    assert zeros.size
    assert (zeros == np.float32(FBGEMM.zero)).all()


def test_tensor() -> None:
    """modelopt's FP8QTensor: amax / 448, x / scale. Bit-equal. A tensor whose scale is 0, of zeros or so small that
    the division underflows, divides by zero there; here its scale is 1."""
    for unit in units(edge_maxima(448.0)[::7], 64, FP8_TIES):
        t = tensor(unit[None, :])
        scale = t.abs().amax() / torch.tensor(448.0)
        got = scaled.quantise(unit[None, :].astype(np.float64), FP8_TENSOR, 0, 0, "f32")
        if scale == 0:
            scale = torch.tensor(1.0)
        same(got.scales, bits(scale).reshape(1, 1), "scales")
        same(got.codes, bits((t / scale).clamp(-448, 448).to(torch.float8_e4m3fn)), "codes")


SCALES = ("f32", "f8_e8m0", "bf16")
TORCH = {"f32": "float32", "f8_e8m0": "float8_e8m0fnu", "bf16": "bfloat16"}


def stored_blocks(shape: tuple[int, int], scale_dtype: str) -> scaled.Scaled:
    """Random codes, NaN among them, and scales of every size that leaves the products normal in binary32."""
    rng = np.random.default_rng(11)
    grid = scaled.grid_shape(shape, 128, 128)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    if scale_dtype == "f8_e8m0":
        scales = rng.integers(20, 240, grid).astype(np.uint8)
    else:
        scales = scaled.scale_codes(2.0 ** rng.uniform(-60, 60, grid), scale_dtype)
    return scaled.Scaled(codes, "f8_e4m3", scales, scale_dtype, 128, 128)


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (5, 129)], ids=str)
def test_decode_as_compressed_tensors(shape, scale_dtype) -> None:
    """FP8BlockDequantizer multiplies in binary32, then rounds to its dtype. Its binary32 is the exact value rounded
    once; with BF16 and E8M0 scales the product is exact there, and so bf16 is rounded once too."""
    converters = need("compressed_tensors.entrypoints.convert.converters")
    m = stored_blocks(shape, scale_dtype)
    for dtype, ours in (("float32", F32), ("bfloat16", BF16)):
        if dtype == "bfloat16" and scale_dtype == "f32":
            continue
        oracle = converters.FP8BlockDequantizer(
            targets=["re:.*"], weight_block_size=(128, 128), dtype=getattr(torch, dtype)
        )
        names = {"x.weight": typed(m.codes, "float8_e4m3fn"), "x.weight_scale_inv": typed(m.scales, TORCH[scale_dtype])}
        want = oracle.process(names)["x.weight"]
        same(rounded(scaled.decode(m), ours), want.double().numpy(), f"values in {dtype}")


@pytest.mark.parametrize("scale_dtype", SCALES)
def test_decode_as_transformers(scale_dtype) -> None:
    """Fp8Dequantize multiplies in binary32 too, then rounds to the scales' dtype unless told: compared in binary32,
    and in bf16 for BF16 scales."""
    fp8 = need("transformers.integrations.finegrained_fp8")
    m = stored_blocks((256, 384), scale_dtype)
    weight, scales = typed(m.codes, "float8_e4m3fn"), typed(m.scales, TORCH[scale_dtype])
    oracle = fp8.Fp8Dequantize(None)
    values = scaled.decode(m)
    same(rounded(values, F32), oracle._dequantize_one(weight, scales, torch.float32).double().numpy(), "values")
    if scale_dtype == "bf16":
        same(rounded(values, BF16), oracle._dequantize_one(weight, scales).double().numpy(), "values in bf16")


def test_decode_packed_experts_as_transformers() -> None:
    """DeepSeek V4's experts: I8 bytes of two E2M1 codes, E8M0 scales for groups of 32."""
    fp8 = need("transformers.integrations.finegrained_fp8")
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (64, 48)).astype(np.uint8)
    scales = rng.integers(1, 250, (64, 3)).astype(np.uint8)
    m = scaled.Scaled(scaled.unpack(raw, "f4", 96), "f4", scales, "f8_e8m0", 1, 32)
    want = fp8.Fp8Dequantize(None)._dequantize_one(
        tensor(raw.view(np.int8)), typed(scales, TORCH["f8_e8m0"]), torch.float32
    )
    same(scaled.decode(m), want.double().numpy(), "values")
