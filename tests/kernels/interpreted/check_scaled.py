"""Quantised matrices that ``paramdelta.scaled`` merges with Triton, in its interpreter: what the registry chooses, what
it refuses, and whole units, which go by words of four codes: the same bits as elsewhere.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from check_blocks import check
from scaled_check import Kind, stored, weights

from paramdelta import backends, formats, reference_scaled, scaled
from paramdelta.backends import triton
from paramdelta.errors import BackendError
from paramdelta.formats import RECIPES
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm
from paramdelta.scaled import Grid, Matrix, Part, PendingResult, Result

BLOCKS = Grid(codec="f8_e4m3", rows=128, cols=128)
WHOLE = Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "f32")
SMALL = Output("f8_e4m3", RECIPES["deepgemm-ue8m0"], 32, 32, "f8_e8m0")


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramdelta._cuda", None)  # as where it is not built


def matrix(seed: int) -> Matrix:
    x = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.05, (256, 160)).astype(np.float32))
    return Matrix(*scaled.quantise(x, formats.DEEPGEMM, 128, 128), BLOCKS)


def both(monkeypatch: pytest.MonkeyPatch, *operands: Matrix, **options: object) -> tuple[Result, Result]:
    post, base, new_base = operands
    want = scaled.merge_scaled(new_base, [(post, base, -0.7)], **options)  # type: ignore[arg-type]
    monkeypatch.setenv(backends.VARIABLE, "triton")
    got = scaled.merge_scaled(new_base, [(post, base, -0.7)], **options)  # type: ignore[arg-type]
    assert isinstance(want, Result)
    assert isinstance(got, PendingResult)
    assert got.counts == want.counts
    return want, got.wait()


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_it_is_what_scaled_merges_with(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = {"recipe": formats.DEEPGEMM, "grid": BLOCKS, "keep": keep}
    want, got = both(monkeypatch, matrix(1), matrix(2), matrix(3), **quantised)
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(got.scales, want.scales)
    assert got[2:5] == want[2:5]
    assert got.relative_error == pytest.approx(want.relative_error, rel=1e-3)


def test_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [m._replace(codes=m.codes[128:], scales=m.scales[1:]) for m in (matrix(1), matrix(2), matrix(3))]
    want, got = both(monkeypatch, *shards, dtype="bf16", part=Part(row=128, rows=256, cols=160))
    assert torch.equal(got.codes.view(torch.int16), want.codes.view(torch.int16))


def test_what_it_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 64)
    four = Matrix(*scaled.quantise(x, formats.INT4, 1, 32, "bf16"), Grid(codec="i4", rows=1, cols=32, scale="bf16"))
    assert backends.choose("merge_scaled", device="cpu") == "cpu"
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(
        BackendError, match=r"no merge_scaled on cpu memory; cpu: has it; .*not built.*; triton: has merge_scaled, but "
        "not with operands of i4",
    ):  # fmt: skip
        scaled.merge_scaled(four, [], dtype="bf16")
    with pytest.raises(BackendError, match="but not with output of f64"):
        scaled.merge_scaled(Matrix(x), [], dtype="f64")
    plane = (0, formats.CODECS.index("i4"), 32, None)
    with pytest.raises(BackendError, match="no matrices with operands of i4; build the backend cuda"):
        triton.merge_scaled(new_base=plane, terms=[], rows=4, cols=64, out=(0, 128), out_dtype=0, totals=0)


@pytest.mark.parametrize("alpha", [1.0, 0.3, -1.0, 5e-324, -5e-324])
def test_zeros_of_either_sign(alpha: float) -> None:
    """All eight ways in which −0 and +0 meet, deltas of 0, and ties, in units that keep to words."""
    rng = np.random.default_rng(1)
    codes = [rng.choice(np.array([0, 0x80, 1, 0x81, 2, 0x30], np.uint8), (64, 64)) for _ in range(3)]
    codes = [np.where(np.arange(64)[:, None] < 32, c & 0x80, c).astype(np.uint8) for c in codes]
    scales = np.full((2, 2), 0x3F800000, np.uint32)
    scales[1] = 0x3A123456
    post, base, new_base = (Scaled(c, "f8_e4m3", scales, "f32", 32, 32) for c in codes)
    check(new_base, [ScaledTerm(post, base, alpha)], SMALL._replace(scale_dtype="f32"))


@pytest.mark.parametrize(
    "kind", [Kind("bf16"), Kind("f16"), Kind("f8_e4m3"), Kind("f8_e4m3", 32, 32, "f8_e8m0")], ids=str
)
@pytest.mark.parametrize("terms", [0, 1, 2])
def test_operands_in_words(kind: Kind, terms: int) -> None:
    rng = np.random.default_rng(2)
    sets = [weights(rng, (64, 96), (kind,) * 3, 0.3) for _ in range(2)]
    got = check(sets[0][2], [ScaledTerm(s[0], s[1], a) for s, a in zip(sets, (-0.7, 1.0), strict=True)][:terms], SMALL)
    acc, _ = reference_scaled.accumulate(
        sets[0][2], [ScaledTerm(s[0], s[1], a) for s, a in zip(sets, (-0.7, 1.0), strict=True)][:terms]
    )
    back = reference_scaled.decode(Scaled(got.codes, "f8_e4m3", got.scales, "f8_e8m0", 32, 32))
    np.testing.assert_allclose(got.value, np.sum(acc**2), rtol=1e-3)
    np.testing.assert_allclose(got.error, np.sum((back - acc) ** 2), rtol=1e-3)


def test_every_magnitude_to_codes() -> None:
    """Values on and beside every tie of e4m3, subnormal ones too, in a unit whose scale is 1."""
    table = reference_scaled.code_values(np.arange(0x7F, dtype=np.uint8), "f8_e4m3")
    middle = (table[:-1] + table[1:]) / 2
    near = np.concatenate([table, middle, middle * (1 + 2.0**-7), middle * (1 - 2.0**-7)])  # all are bf16's
    values = np.resize(np.concatenate([[448.0], near, -near]), (32, 32))
    check(stored(np.random.default_rng(0), Kind("bf16"), values), [], SMALL._replace(scale_dtype="f32"))


@pytest.mark.parametrize("held", [{"PARTS": 4, "STRIP": 32}, {"PARTS": 2, "STRIP": 64}], ids=str)
def test_units_in_parts_and_strips(held: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    kind = Kind("f8_e4m3", 128, 128, "f32")
    post, base, new_base = weights(rng, (128, 256), (kind,) * 3, 0.5)
    post = post._replace(codes=np.where(np.arange(256) < 128, post.codes, 0x7F).astype(np.uint8))  # NaN: not by words
    check(new_base, [ScaledTerm(post, base)], WHOLE, held=held)
