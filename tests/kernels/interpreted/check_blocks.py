"""Merges of matrices of fp8 codes and scales in Triton's interpreter, against the reference: bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scaled_check
from scaled_check import Kind, weights

from paramdelta import reference_scaled
from paramdelta.dtypes import BY_NAME
from paramdelta.formats import RECIPES
from paramdelta.kernels import launch_blocks
from paramdelta.kernels.launch_blocks import Plane, Quantiser, Scales
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm

BLOCKS = Kind("f8_e4m3", 128, 128, "f32")
KINDS = (
    BLOCKS,
    Kind("f8_e4m3", 128, 128, "bf16"),
    Kind("f8_e4m3", 32, 32, "f8_e8m0"),
    Kind("f8_e4m3", 1, 32, "f8_e8m0"),
    Kind("f8_e4m3", 1, 0, "f32"),
    Kind("f8_e4m3", 0, 1, "f32"),
    Kind("f8_e4m3", 0, 0, "f32"),
    Kind("f8_e4m3"),
    Kind("bf16"),
    Kind("f16"),
    Kind("f32"),
)
OUTPUTS = [
    o
    for o in scaled_check.outputs()
    if o.codec in (("bf16", "f16", "f32", "f8_e4m3") if o.recipe is None else ("f8_e4m3",))
]


def address(codes: np.ndarray) -> int:
    return int(codes.__array_interface__["data"][0])


class Stored:
    """A matrix in memory with room between its rows."""

    def __init__(self, matrix: Scaled, gap: int) -> None:
        rows, cols = matrix.codes.shape
        self.codes = np.full((rows, cols + gap), 0x55, matrix.codes.dtype)
        self.codes[:, :cols] = matrix.codes
        scales = None
        if matrix.scales is not None:
            kind = str(matrix.scale_dtype)
            self.scales = np.ascontiguousarray(matrix.scales, f"u{BY_NAME[kind].bits // 8}")
            scales = Scales(address(self.scales), kind, self.scales.shape[1], matrix.rows, matrix.cols)
        self.plane = Plane(address(self.codes), matrix.codec, cols + gap, scales)

    def region(self, row: int, col: int) -> Plane:
        scales = self.plane.scales
        if scales is not None:
            scales = scales._replace(row_phase=row if scales.rows else 0, col_phase=col if scales.cols else 0)
        start = self.plane.address + (row * self.plane.pitch + col) * self.codes.itemsize
        return self.plane._replace(address=start, scales=scales)


def run(
    new_base: Plane,
    terms: Sequence[tuple[Plane, Plane, float]],
    shape: tuple[int, int],
    output: Output,
    keep: bool = False,
    tile: tuple[int, int] = (128, 128),
    held: dict[str, int] | None = None,
) -> scaled_check.Ran:
    rows, cols = shape
    out = np.full((rows + 1, cols + 16), 0x5A, f"u{1 if output.recipe else BY_NAME[output.codec].bits // 8}")
    report, scales, quantiser, units = np.zeros(6, np.int64), None, None, np.zeros(0, np.int32)
    plane = Plane(address(out), output.codec, out.shape[1])
    if output.recipe is not None:
        r = output.recipe
        quantiser = Quantiser(
            r.rule, r.largest, r.floor, r.zero, r.reciprocal, r.values, output.rows, output.cols, output.scale_dtype,
            keep, output.given,
        )  # fmt: skip
        grid = launch_blocks.unit_count(quantiser, rows, cols)
        scales = np.full((grid[0], grid[1] + 3), 0x5A, f"u{BY_NAME[output.scale_dtype].bits // 8}")
        units = np.full(2 * grid[0] * grid[1], 0x55, np.int32)
        if output.given is None:
            where = Scales(address(scales), output.scale_dtype, scales.shape[1], output.rows, output.cols)
            plane = plane._replace(scales=where)
    terms = [term for term in terms if term[2] != 0.0]
    launch_blocks.merge(
        new_base, terms, rows, cols, plane, address(report), quantiser=quantiser, units=address(units), tile=tile,
        held=held,
    )  # fmt: skip
    assert (out[:, cols:] == 0x5A).all(), "elements beyond a row were written"
    assert (out[rows:] == 0x5A).all(), "elements beyond the last row were written"
    if scales is not None:
        assert (scales[:, grid[1] :] == 0x5A).all(), "elements beyond the scales were written"
        scales = None if output.given is not None else scales[:, : grid[1]]
    touched, amax = report[3:4].view(np.uint32)
    lost = (float(x) for x in report[4:].view(np.float64))
    counts = tuple(report[:3].tolist())
    return scaled_check.Ran(out[:rows, :cols], scales, counts, bool(touched), float(amax.view(np.float32)), *lost)


def check(new_base: Scaled, terms: Sequence[ScaledTerm], output: Output, keep: bool = False, gap: int = 16,
          held: dict[str, int] | None = None) -> scaled_check.Ran:  # fmt: skip
    shape: tuple[int, int] = new_base.codes.shape  # type: ignore[assignment]
    first = Stored(new_base, gap)
    pairs = [(Stored(t.post, 3 * gap), Stored(t.base, 0), t.alpha) for t in terms]
    tile = (128, 512) if shape[1] > 128 else (128, 128)
    got = run(first.plane, [(p.plane, b.plane, a) for p, b, a in pairs], shape, output, keep, tile, held)
    scaled_check.equal(got, reference_scaled.merge_scaled(new_base, terms, output, keep), output)
    return got


@pytest.mark.parametrize("output", OUTPUTS, ids=scaled_check.output_id)
def test_every_output_from_blocks(output: Output) -> None:
    rng = np.random.default_rng(1)
    post, base, new_base = weights(rng, (140, 200), (BLOCKS,) * 3, 0.5)
    check(new_base, [ScaledTerm(post, base)], output)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_to_blocks_and_to_bf16(kind: Kind) -> None:
    rng = np.random.default_rng(2)
    post, base, new_base = weights(rng, (133, 261), (kind, kind, kind), 0.5)
    check(new_base, [ScaledTerm(post, base, 0.7)], Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "f32"), gap=1)
    check(new_base, [ScaledTerm(post, base)], Output("bf16"))


def test_mixed_operands_and_several_terms() -> None:
    rng = np.random.default_rng(3)
    for output in (OUTPUTS[0], *(o for o in OUTPUTS if o.recipe is not None and o.rows == 128)):
        kinds = [KINDS[int(k)] for k in rng.integers(0, len(KINDS), 5)]
        first = weights(rng, (70, 190), kinds[:3])
        second = weights(rng, (70, 190), (kinds[3], kinds[4], kinds[4]))
        terms = [ScaledTerm(first[0], first[1], 0.7), ScaledTerm(second[0], second[1], -1.0)]
        check(first[2], [*terms, ScaledTerm(first[0], second[0], 0.0)], output)
        check(first[2], [], output)


@pytest.mark.parametrize("output", [o for o in OUTPUTS if o.recipe is not None], ids=scaled_check.output_id)
def test_scales_that_stay(output: Output) -> None:
    rng = np.random.default_rng(4)
    kind = Kind("f8_e4m3", output.rows, output.cols, output.scale_dtype)
    post, base, new_base = weights(rng, (200, 140), (kind, kind, Kind("bf16")), 0.9)
    x = reference_scaled.decode(new_base)
    done = reference_scaled.quantise(x, output.recipe, output.rows, output.cols, output.scale_dtype)  # type: ignore[arg-type]
    stored = Scaled(done.codes, "f8_e4m3", done.scales, output.scale_dtype, output.rows, output.cols)
    post = post._replace(codes=np.where(np.arange(200)[:, None] < 130, base.codes, post.codes), scales=base.scales)
    for alpha in (0.01, 30.0):
        check(stored, [ScaledTerm(post, base, alpha)], output, keep=True)
    check(stored, [], output, keep=True)
    if output.scale_dtype == "f32":  # no powers of two: such scales do not stay where a delta touched
        uneven = stored._replace(scales=stored.scales ^ np.uint32(0x400000))  # type: ignore[operator]
        check(uneven, [ScaledTerm(post, base, 0.01)], output, keep=True)


def test_any_codes_and_scales() -> None:
    """Every code with every sort of scale: NaN, Inf, subnormal, zero; in amax, in what stays, in the counts."""
    rng = np.random.default_rng(5)
    odd = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x3F800000, 0x00400000], np.uint32)
    for output in (o for o in OUTPUTS if o.codec in ("bf16", "f32") or o.rows == 128):
        matrices = [
            Scaled(
                rng.integers(0, 256, (140, 200)).astype(np.uint8), "f8_e4m3",
                rng.choice(odd, (2, 2)).astype(np.uint32), "f32", 128, 128,
            )
            for _ in range(3)
        ]  # fmt: skip
        check(matrices[0], [ScaledTerm(matrices[1], matrices[2], 0.5)], output)
        quiet = matrices[1]._replace(codes=np.where(matrices[1].codes & 0x7F > 0x60, 0x20, matrices[1].codes))
        check(quiet, [ScaledTerm(quiet, matrices[1], 0.5)], output)


def test_regions_and_phases() -> None:
    """A part of a matrix that starts inside units of its operands."""
    rng = np.random.default_rng(6)
    shape, output = (300, 500), Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "f32")
    for kind in (BLOCKS, KINDS[2], KINDS[4], KINDS[6]):
        whole = weights(rng, shape, (kind, kind, kind), 0.3)
        memory = [Stored(m, 0) for m in whole]
        for row, col, rows, cols in ((5, 6, 100, 313), (129, 144, 9, 300), (128, 256, 172, 244)):
            window = (slice(row, row + rows), slice(col, col + cols))
            parts = [
                m._replace(
                    codes=m.codes[window], rows=1, cols=1,
                    scales=reference_scaled.spread(m.scales, shape, m.rows, m.cols)[window],  # type: ignore[arg-type]
                )
                for m in whole
            ]  # fmt: skip
            post, base, new_base = (m.region(row, col) for m in memory)
            want = reference_scaled.merge_scaled(parts[2], [ScaledTerm(parts[0], parts[1], 0.5)], output)
            scaled_check.equal(run(new_base, [(post, base, 0.5)], (rows, cols), output), want, output)


def test_given_scale_and_zeros() -> None:
    rng = np.random.default_rng(7)
    post, base, new_base = weights(rng, (130, 300), (Kind("bf16"),) * 3)
    for given in (0.001, 1.0, 2.0**-60):
        output = Output("f8_e4m3", RECIPES["fp8-tensor"], 0, 0, "f32", given=float(np.float32(given)))
        check(new_base, [ScaledTerm(post, base)], output)
    zeros = Scaled(np.zeros((130, 300), np.uint32), "f32")
    output = Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "f32")
    memory = [Stored(m, 0) for m in (post, base, new_base)]
    for mask in range(8):
        chosen = [zeros if mask >> k & 1 else m for k, m in enumerate((post, base, new_base))]
        planes = [Plane(0, "f32", 0) if mask >> k & 1 else m.plane for k, m in enumerate(memory)]
        want = reference_scaled.merge_scaled(chosen[2], [ScaledTerm(chosen[0], chosen[1], 0.5)], output)
        got = run(planes[2], [(planes[0], planes[1], 0.5)], (130, 300), output)
        scaled_check.equal(got, want, output)
