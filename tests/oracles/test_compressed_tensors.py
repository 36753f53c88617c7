"""compressed-tensors on the CPU: fp8 per channel, int4, MXFP4 and NVFP4, quantised and read back by its compressors."""

from __future__ import annotations

import numpy as np
import pytest
from oracle_values import (
    FP4_TIES,
    FP8_TIES,
    INT4_TIES,
    as_bf16,
    bits,
    edge_maxima,
    group_weights,
    need,
    same,
    tensor,
    typed,
    units,
)

from paramdelta import reference_scaled as scaled
from paramdelta.formats import COMPRESSED_BF16, COMPRESSED_F32, INT4, INT4_F32, MXFP4_COMPRESSED, NVFP4_COMPRESSED

torch = need("torch")
quantization = need("compressed_tensors.quantization")
helpers = need("compressed_tensors.quantization.utils")
compressors = need("compressed_tensors.compressors")

HUGE = 2.0**127


def scheme_of(preset: str, **changes):
    """Return a preset, with other arguments for its weights."""
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update=changes)})


def scales_of(x, size: int, scheme, global_scale=None):
    """Return (scales, zero points) for groups of ``size`` columns, 0 for whole rows."""
    groups = x.reshape(x.shape[0], -1, size or x.shape[1])
    return helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale)


def compress(fmt: str, state, scheme):
    return compressors.BaseCompressor.get_value_from_registry(fmt).compress(state, scheme)


def decompress(fmt: str, state, scheme):
    return compressors.BaseCompressor.get_value_from_registry(fmt).decompress(state, scheme)["weight"]


@pytest.mark.parametrize("values", ["bf16", "f32"])
def test_channels(values: str) -> None:
    """Scales bit-equal: amax / 448 in the weight's type, epsilon for a scale of 0, also one that underflows.

    Codes bit-equal where the library divides in binary32, as its GPU path does for either type. Its CPU path divides
    bf16 weights in bf16, which rounds the quotient before the code is rounded: given the same weights and scales as
    binary32 it takes the other path's arithmetic, and that is compared here.
    """
    recipe = COMPRESSED_BF16 if values == "bf16" else COMPRESSED_F32
    x = units(edge_maxima(448.0), 64, FP8_TIES)
    x = as_bf16(x) if values == "bf16" else x
    weight = tensor(x).to(torch.bfloat16 if values == "bf16" else torch.float32)
    scheme = scheme_of("FP8_DYNAMIC")
    scales, _ = scales_of(weight, 0, scheme)
    got = scaled.quantise(x.astype(np.float64), recipe, 1, 0, values)
    same(got.scales, bits(scales), "scales")
    state = {"weight": weight.float(), "weight_scale": scales.float()}
    same(got.codes, bits(compress("float-quantized", state, scheme)["weight"]), "codes")


@pytest.mark.parametrize("values", ["bf16", "f32"])
@pytest.mark.parametrize("size", [32, 64])
def test_int4(values: str, size: int) -> None:
    """Scales amax / 7.5 in the weight's type, codes and their packing bit-equal; the division as in test_channels."""
    recipe = INT4 if values == "bf16" else INT4_F32
    x = units(edge_maxima(7.5), 64, INT4_TIES)
    x = as_bf16(x) if values == "bf16" else x
    weight = tensor(x).to(torch.bfloat16 if values == "bf16" else torch.float32)
    scheme = scheme_of("W4A16", group_size=size)
    scales, _ = scales_of(weight, size, scheme)
    got = scaled.quantise(x.astype(np.float64), recipe, 1, size, values)
    same(got.scales, bits(scales), "scales")
    state = {"weight": weight.float(), "weight_scale": scales.float()}
    packed = compress("pack-quantized", state, scheme)
    same(scaled.pack(got.codes, "i4"), bits(packed["weight_packed"]).view(np.uint8), "packed codes")
    m = scaled.Scaled(got.codes, "i4", got.scales, values, 1, size)
    with np.errstate(over="ignore"):
        read = scaled.decode(m).astype(np.float32)  # 4 bits · 24 bits: rounded once there too
    same(read, decompress("pack-quantized", packed, scheme).numpy(), "values")


@pytest.mark.parametrize("shape", [(64, 128), (61, 96), (3, 32)], ids=str)
@pytest.mark.parametrize("size", [32, 0], ids=["groups", "channel"])
def test_int4_with_zero_points_is_read(shape, size: int) -> None:
    """Asymmetric int4: zero points packed along the rows, eight to a word, those of ragged ends too."""
    rng = np.random.default_rng(4)
    x = tensor((rng.normal(size=shape) + rng.normal(size=(shape[0], 1))).astype(np.float32))
    changes = {"group_size": size} if size else {"group_size": None, "strategy": "channel"}
    scheme = scheme_of("W4A16_ASYM", **changes)
    scales, zeros = scales_of(x, size, scheme)
    packed = compress("pack-quantized", {"weight": x, "weight_scale": scales, "weight_zero_point": zeros}, scheme)
    words = bits(packed["weight_zero_point"])
    m = scaled.Scaled(
        scaled.unpack(bits(packed["weight_packed"]).view(np.uint8), "i4", shape[1]),
        "i4",
        bits(scales),
        "f32",
        1,
        size,
        zero_points=scaled.unpack_zero_points(words, shape[0]),
    )
    assert len(np.unique(m.zero_points)) > 1
    want = decompress("pack-quantized", packed, scheme)
    same(scaled.decode(m).astype(np.float32), want.numpy(), "values")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4(dtype: str) -> None:
    """Scales and codes bit-equal, for maxima from 2^-126 to below 1.75 · 2^127.

    A power of two divides exactly, so the library's CPU path agrees in bf16 as well, but for quotients below 2^-126
    · 2^-7, whose code is 0 anyway. Beyond the range its amax becomes Inf; below, log2 of 0 is −Inf, clamped to byte 0.
    """
    x = units(edge_maxima(6.0), 32, FP4_TIES)
    x = as_bf16(x) if dtype == "bfloat16" else x
    x = x[np.abs(x).max(axis=1) < 1.75 * HUGE]
    weight, scheme = tensor(x).to(getattr(torch, dtype)), scheme_of("MXFP4A16")
    scales, _ = scales_of(weight, 32, scheme)
    packed = compress("mxfp4-pack-quantized", {"weight": weight, "weight_scale": scales}, scheme)
    got = scaled.quantise(x.astype(np.float64), MXFP4_COMPRESSED, 1, 32, "f8_e8m0")
    same(got.scales, bits(packed["weight_scale"]), "scales")
    same(scaled.pack(got.codes, "f4"), bits(packed["weight_packed"]), "packed codes")
    m = scaled.Scaled(got.codes, "f4", got.scales, "f8_e8m0", 1, 32)
    same(scaled.decode(m), decompress("mxfp4-pack-quantized", packed, scheme).double().numpy(), "values")


@pytest.mark.parametrize("spread", [0.0, 6.0, 30.0])
def test_nvfp4(spread: float) -> None:
    """Global scale, group scales, codes and values bit-equal for weights in binary32.

    Given bf16 weights the library would also round 2688 / amax and amax / 6 to bf16; a merge computes both in binary32.
    ``spread`` is by how many binades the groups of one tensor differ: scales of 0 become 0.125.
    """
    scheme = scheme_of("NVFP4A16")
    for power in (-100, -30, -3, 0, 4, 60):
        x = group_weights(power, spread, (480, 64))
        weight = tensor(x)
        global_scale = helpers.generate_gparam(weight.min(), weight.max())
        scales, _ = scales_of(weight, 16, scheme, global_scale)
        state = {"weight": weight, "weight_scale": scales, "weight_global_scale": global_scale}
        packed = compress("nvfp4-pack-quantized", state, scheme)
        second = scaled.second_of(float(np.abs(x).max()), "divide")
        assert second == global_scale.item()
        got = scaled.quantise(x.astype(np.float64), NVFP4_COMPRESSED, 1, 16, "f8_e4m3", second)
        same(got.scales, bits(packed["weight_scale"]), "scales")
        same(scaled.pack(got.codes, "f4"), bits(packed["weight_packed"]), "packed codes")
        # Its decompress computes in bf16: the same function in binary32 is the definition.
        m = scaled.Scaled(got.codes, "f4", got.scales, "f8_e4m3", 1, 16, second, "divide")
        codes = tensor(scaled.code_values(got.codes, "f4").astype(np.float32))
        read = quantization.lifecycle.forward.dequantize(
            codes, typed(got.scales, "float8_e4m3fn").float(), args=scheme.weights, global_scale=global_scale
        )
        same(scaled.decode(m).astype(np.float32), read.numpy(), "values")


@pytest.mark.parametrize("amax", [0.0, 1e-45, 2.0**-126, 1e-36, 7.8e-36, 1.0, 3.4e38, np.nan])
def test_global_scale(amax: float) -> None:
    """2688 · (1 / max(amax, tiny)), which is how torch divides a number by a tensor, and 1 where that is not finite."""
    t = torch.tensor([amax], dtype=torch.float32)
    assert scaled.second_of(float(t.item()), "divide") == helpers.generate_gparam(-t, t).item()
