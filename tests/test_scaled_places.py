"""Quantised matrices where they are: in shards, and on a device, for which the kernels' bodies on the host stand."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paramdelta import backends, formats, scaled
from paramdelta.backends import cuda
from paramdelta.device_tensors import PendingCounts
from paramdelta.errors import OperandError
from paramdelta.formats import CODEC_BITS, Recipe
from paramdelta.scaled import Grid, Matrix, Part, PendingResult, Result

torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)

_PATH = Path(__file__).parent / "conformance" / "cuda_on_host.py"
_SPEC = importlib.util.spec_from_file_location("cuda_on_host", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
cuda_on_host = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cuda_on_host)

# name: recipe, rows and columns of a unit, type of the scales, how a second scale takes part
FORMS = {
    "blocks": (formats.DEEPGEMM, 128, 128, "f32", ""),
    "rows": (formats.COMPRESSED_BF16, 1, 0, "bf16", ""),
    "tensor": (formats.FP8_TENSOR, 0, 0, "f32", ""),
    "mxfp8": (formats.MXFP8, 1, 32, "f8_e8m0", ""),
    "mxfp4": (formats.MXFP4_OPENAI, 1, 32, "f8_e8m0", ""),
    "nvfp4": (formats.NVFP4_MODELOPT, 1, 16, "f8_e4m3", "multiply"),
    "int4": (formats.INT4, 1, 32, "bf16", ""),
}
PLACES = ("cpu", "device")
ROWS, COLS = 300, 416
SECOND = 1e-4


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "device":
        enter_device(monkeypatch)
    return str(request.param)


def enter_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda_on_host.why_not()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "_extension", cuda_on_host.module)
    monkeypatch.setenv(backends.VARIABLE, "cuda")


def values(seed: int, shape: tuple[int, int] = (ROWS, COLS)) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32))


def recipe_and_grid(form: str) -> tuple[Recipe, Grid, float | None]:
    recipe, rows, cols, scale, second = FORMS[form]
    grid = Grid(codec=recipe.codec, rows=rows, cols=cols, scale=scale, second=second)
    return recipe, grid, SECOND if second else None


def matrix(form: str, x: Any) -> Matrix:
    if form == "plain":
        return Matrix(x)
    recipe, grid, second = recipe_and_grid(form)
    codes, scales = scaled.quantise(x, recipe, grid.rows, grid.cols, grid.scale, second=second)
    return Matrix(codes, scales, grid, second)


def merge(inputs: list[Matrix], form: str, **options: Any) -> Any:
    post, base, new_base = inputs
    if form == "plain":
        return scaled.merge_scaled(new_base, [(post, base, 0.7)], dtype="bf16", **options)
    recipe, grid, second = recipe_and_grid(form)
    return scaled.merge_scaled(new_base, [(post, base, 0.7)], recipe=recipe, grid=grid, second=second, **options)


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def decoded(m: Matrix, part: Part | None = None) -> Any:
    assert m.grid is not None
    return scaled.dequantise(m.codes, m.scales, m.grid, second=m.second, cols=m.cols, part=part)


def cut(m: Matrix, rows: slice, cols: slice, whole_scales: bool = False) -> Matrix:
    """Return a shard: codes, and the scales of the units that it touches, or all."""
    grid, per_byte = m.grid, 1
    if grid is None:
        return m._replace(codes=m.codes[rows, cols])
    assert isinstance(grid, Grid)
    per_byte = 8 // CODEC_BITS[grid.codec]
    codes = m.codes[rows, cols.start // per_byte : -(-cols.stop // per_byte)]
    touched = [
        slice(along.start // unit, -(-along.stop // unit)) if unit else slice(None)
        for along, unit in ((rows, grid.rows), (cols, grid.cols))
    ]
    return m._replace(codes=codes, scales=m.scales if whole_scales else m.scales[touched[0], touched[1]])


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_a_device_has_the_bits_of_the_cpu(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [matrix(form, values(seed)) for seed in range(3)]
    keep = {} if form == "plain" else {"keep": True}
    want = merge(inputs, form, **keep)
    odd = [matrix("plain", values(seed)) for seed in range(3)]
    odd[0].codes[2, 3], odd[1].codes[9, 9] = float("nan"), float("inf")
    want_odd = merge(odd, form)
    assert isinstance(want, Result)
    enter_device(monkeypatch)
    for operands, wanted, options in ((inputs, want, keep), (odd, want_odd, {})):
        got = merge(operands, form, **options)
        assert isinstance(got, PendingResult)
        assert isinstance(got.counts, PendingCounts)
        assert same(got.codes, wanted.codes)
        assert same(got.scales, wanted.scales)
        assert got.counts == wanted.counts
        assert (got.touched, got.amax) == (wanted.touched, wanted.amax)
        assert got.relative_error == pytest.approx(wanted.relative_error, rel=1e-4)  # its sums have another order
    if form != "plain":
        recipe, grid, second = recipe_and_grid(form)
        made = scaled.quantise(values(7), recipe, grid.rows, grid.cols, grid.scale, second=second)
        back = decoded(Matrix(*made, grid, second))
        monkeypatch.undo()
        assert all(same(*pair) for pair in zip(made, matrix(form, values(7))[:2], strict=True))
        assert same(back, decoded(Matrix(*made, grid, second)))


@pytest.mark.parametrize("whole_scales", [False, True], ids=["scales-of-the-shard", "scales-of-the-whole"])
@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_shards_cut_anywhere_become_plain_as_the_whole_does(place: str, form: str, whole_scales: bool) -> None:
    inputs = [matrix(form, values(seed)) for seed in range(3)]
    want = merge(inputs, "plain")
    rows, cols = [0, 1, 127, 128, 200, ROWS], [0, 2, 34, 130, 256, 402, COLS]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(cols):
            at = slice(top, bottom), slice(left, right)
            part = Part(row=top, col=left, rows=ROWS, cols=COLS)
            got = merge([cut(m, *at, whole_scales) for m in inputs], "plain", part=part)
            assert same(got.codes, want.codes[at]), (at, place)
    if form != "plain":
        m = cut(inputs[0], slice(100, 200), slice(98, 306), whole_scales)
        back = decoded(m, Part(row=100, col=98, rows=ROWS, cols=COLS))
        assert same(back, decoded(inputs[0])[100:200, 98:306])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "tensor"])
def test_shards_of_whole_units_are_quantised_as_the_whole_is(place: str, form: str) -> None:
    """Operands in a grid that the shards do cut, and in the output's own, whose units stay where nothing changes."""
    grid = recipe_and_grid(form)[1]
    wide = [matrix("tensor" if k else "blocks", values(k)) for k in range(2)]
    inputs = [*wide, matrix(form, values(2))]
    want = merge(inputs, form, keep=True)
    cols = [0, COLS] if grid.cols == 0 else [0, 256, 384, COLS]
    for top, bottom in ((0, 128), (128, 256), (256, ROWS)) if grid.rows == 128 else ((0, 77), (77, ROWS)):
        for left, right in pairwise(cols):
            at = slice(top, bottom), slice(left, right)
            part = Part(row=top, col=left, rows=ROWS, cols=COLS)
            got = merge([cut(m, *at) for m in inputs], form, keep=True, part=part)
            wanted = cut(Matrix(want.codes, want.scales, grid), *at)
            assert same(got.codes, wanted.codes), (at, place)
            assert same(got.scales, wanted.scales), (at, place)


def test_a_given_scale_needs_no_whole_units(place: str) -> None:
    inputs = [matrix("rows", values(seed)) for seed in range(3)]
    want = merge(inputs, "tensor", given=2.0**-10)
    at = slice(33, 200), slice(5, 77)
    got = merge([cut(m, *at) for m in inputs], "tensor", given=2.0**-10, part=Part(row=33, col=5, rows=ROWS, cols=COLS))
    assert same(got.codes, want.codes[at])
    assert got.scales is None


def test_an_odd_last_column_of_nibbles(place: str) -> None:
    recipe, grid, _ = recipe_and_grid("mxfp4")
    whole = Matrix(*scaled.quantise(values(0, (5, 65)), recipe, 1, 32, "f8_e8m0"), grid, cols=65)
    want = decoded(whole)
    got = scaled.dequantise(whole.codes[:, 16:], whole.scales, grid, part=Part(col=32, rows=5, cols=65))
    assert got.shape == (5, 33)
    assert same(got, want[:, 32:])


def test_refusals(place: str) -> None:
    blocks = matrix("blocks", values(0))
    shard = cut(blocks, slice(64, 192), slice(0, 128))
    part = Part(row=64, rows=ROWS, cols=COLS)
    with pytest.raises(OperandError, match=r"rows 64 to 192 of 300 cut an output unit of 128 rows.*multiples of 128"):
        merge([shard] * 3, "blocks", part=part)
    with pytest.raises(OperandError, match=r"columns 0 to 128 of 416 cut an output unit of 416 columns"):
        merge([shard] * 3, "rows", part=part)
    with pytest.raises(OperandError, match=r"rows 250 to 378 of a matrix of 300"):
        merge([shard] * 3, "plain", part=Part(row=250, rows=ROWS, cols=COLS))
    with pytest.raises(
        OperandError, match=r"scales of the shape \(2, 1\), or \(3, 4\) for the whole matrix of 300 × 416"
    ):
        merge([shard._replace(scales=blocks.scales[:1, :1])] * 3, "plain", part=part)
    nibbles = matrix("mxfp4", values(0))
    with pytest.raises(OperandError, match=r"columns 33 to 449.*cut the matrix at even columns"):
        merge([nibbles] * 3, "plain", part=Part(col=33, rows=ROWS, cols=1000))
    with pytest.raises(OperandError, match=r"out has columns 33 to 449.*even columns"):
        merge([Matrix(values(0))] * 3, "mxfp4", part=Part(col=33, rows=ROWS, cols=1000), given=1.0)


def test_arrays_have_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_device(monkeypatch)
    with pytest.raises(OperandError, match=r"expected a torch\.Tensor, got a NumPy array"):
        merge([Matrix(values(seed).numpy()) for seed in range(3)], "plain")
