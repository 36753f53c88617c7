"""The public functions for quantised matrices: arrays and tensors in, arrays and tensors out, errors that say why."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from paramdelta import _cpu, formats, reference_scaled
from paramdelta.checkpoint.families import OUTPUT_FORMATS
from paramdelta.errors import OperandError, OperandTypeError
from paramdelta.reference_scaled import Scaled
from paramdelta.scaled import Grid, Matrix, dequantise, merge_scaled, quantise

BLOCKS = Grid(codec="f8_e4m3", rows=128, cols=128)


def values(seed: int, shape: tuple[int, int] = (200, 300)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def test_round_trip() -> None:
    x = values(0)
    codes, scales = quantise(x, formats.DEEPGEMM, 128, 128)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (
        ml_dtypes.float8_e4m3fn,
        (200, 300),
        np.float32,
        (2, 3),
    )
    want = reference_scaled.quantise(x.astype(np.float64), formats.DEEPGEMM, 128, 128, "f32")
    assert (codes.view(np.uint8) == want.codes).all()
    assert (scales.view(np.uint32) == want.scales).all()
    back = dequantise(codes, scales, BLOCKS)
    assert back.dtype == np.float32
    exact = reference_scaled.decode(Scaled(want.codes, "f8_e4m3", want.scales, "f32", 128, 128))
    assert (back == exact.astype(np.float32)).all()
    assert (dequantise(codes, scales, BLOCKS, dtype="f64") == exact).all()
    again = quantise(back, formats.DEEPGEMM, 128, 128)
    assert (again[0].view(np.uint8) == want.codes).all()
    assert (again[1].view(np.uint32) == want.scales).all()


def test_nibbles_and_second_scales() -> None:
    x = values(1, (5, 65))
    codes, scales = quantise(x, formats.NVFP4_MODELOPT, 1, 16, "f8_e4m3", second=1e-4)
    assert (codes.shape, codes.dtype, scales.shape) == ((5, 33), np.uint8, (5, 5))
    grid = Grid(codec="f4", rows=1, cols=16, scale="f8_e4m3", second="multiply")
    back = dequantise(codes, scales, grid, second=1e-4, cols=65)
    assert back.shape == (5, 65)
    assert np.abs(back - x).max() < 0.05
    codes, scales = quantise(x, formats.MXFP8, 1, 32, "f8_e8m0")
    assert scales.dtype == np.uint8
    words = np.ascontiguousarray(np.arange(64, dtype=np.uint8).reshape(2, 32)).view(np.int32)
    unpacked = dequantise(words, np.ones((2, 2), np.float32), Grid(codec="i4", rows=1, cols=32))
    assert unpacked[0, :4].tolist() == [-8.0, -8.0, -7.0, -8.0]


def test_merge_and_keep() -> None:
    post, base, new = ((*quantise(values(seed), formats.DEEPGEMM, 128, 128),) for seed in (2, 3, 4))
    matrices = [Matrix(*m, BLOCKS) for m in (post, base, new)]
    result = merge_scaled(matrices[2], [(matrices[0], matrices[1])], recipe=formats.DEEPGEMM, grid=BLOCKS, keep=True)
    wanted = [Scaled(m.codes.view(np.uint8), "f8_e4m3", m.scales.view(np.uint32), "f32", 128, 128) for m in matrices]
    want = reference_scaled.merge_scaled(
        wanted[2],
        [reference_scaled.ScaledTerm(wanted[0], wanted[1])],
        reference_scaled.Output("f8_e4m3", formats.DEEPGEMM, 128, 128, "f32"),
        True,
    )
    assert (result.codes.view(np.uint8) == want.codes).all()
    assert (result.scales.view(np.uint32) == want.scales).all()
    assert result.touched
    assert result.counts.clean
    assert 0.0 < result.relative_error < 0.05
    same = merge_scaled(matrices[2], [(matrices[0], matrices[0])], recipe=formats.DEEPGEMM, grid=BLOCKS, keep=True)
    assert same.codes.tobytes() == new[0].tobytes()
    assert same.scales.tobytes() == new[1].tobytes()
    assert not same.touched
    assert same.relative_error == 0.0


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(values(5)).to(torch.bfloat16)
    codes, scales = quantise(x, formats.COMPRESSED_BF16, 1, 0, "bf16")
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.bfloat16, (200, 1))
    back = dequantise(codes, scales, Grid(codec="f8_e4m3", rows=1, scale="bf16"), dtype=torch.bfloat16)
    assert torch.equal(back, codes.to(torch.bfloat16) * scales)


def test_errors() -> None:
    x = values(6)
    codes, scales = quantise(x, formats.DEEPGEMM, 128, 128)
    with pytest.raises(OperandError, match=r"scales of the shape \(2, 3\), got \(3, 2\)"):
        dequantise(codes, scales.reshape(3, 2), BLOCKS)
    with pytest.raises(OperandTypeError, match="scales of f32, got dtype bfloat16"):
        dequantise(codes, scales.astype(ml_dtypes.bfloat16), BLOCKS)
    with pytest.raises(OperandError, match="needs the scale of the whole tensor"):
        quantise(x, formats.NVFP4_MODELOPT, 1, 16, "f8_e4m3")
    with pytest.raises(OperandError, match="powers of two"):
        quantise(x, formats.DEEPGEMM, 128, 128, "f8_e8m0")
    with pytest.raises(OperandError, match="new_base's shape"):
        merge_scaled(Matrix(x), [(Matrix(x[:9]), Matrix(x))], dtype="bf16")
    with pytest.raises(OperandError, match="finite alpha"):
        merge_scaled(Matrix(x), [(Matrix(x), Matrix(x), np.inf)], dtype="bf16")
    with pytest.raises(OperandError, match="either dtype"):
        merge_scaled(Matrix(x), [])
    with pytest.raises(OperandTypeError, match="or a torch"):
        quantise([[1.0]], formats.DEEPGEMM, 128, 128)


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("name", ["fp8-block", "mxfp4", "int4"])
def test_the_loss_leaves_out_what_is_not_finite(name: str, isa: str) -> None:
    values = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    values[3, 5], values[200, 300] = np.inf, np.nan
    made = OUTPUT_FORMATS[name]
    result = merge_scaled(Matrix(values), [], recipe=made.recipe, grid=Grid.of(made), isa=isa)
    assert (result.counts.nan, result.counts.inf) == (1, 1)
    assert 0.01 < result.relative_error < 0.2
