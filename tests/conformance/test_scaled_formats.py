"""Quantised matrices in every format and grid, against the reference: codes, scales, counts, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import triton_calls
from remembered import remembered
from scaled_check import KINDS, Kind, Memory, check, equal, output_id, outputs, run, stored, weights

from paramdelta import _cpu, formats, reference_scaled
from paramdelta.formats import RECIPES
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm


def test_names_agree() -> None:
    assert _cpu.codecs() == [(name, formats.CODEC_BITS[name]) for name in formats.CODECS]
    assert tuple(_cpu.scale_rules()) == formats.RULES


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_codec_to_every_output(kernels: str, kind: Kind) -> None:
    for number, output in enumerate(outputs()):
        if kernels == "triton" and not triton_calls.makes(output):
            continue
        rng = np.random.default_rng([KINDS.index(kind), number])
        shape = (int(rng.integers(1, 140)), int(rng.integers(1, 600)))
        post, base, new_base = weights(rng, shape, (kind, kind, kind), 0.5)
        try:
            check(new_base, [ScaledTerm(post, base)], output, kernels=kernels)
        except AssertionError as error:
            raise AssertionError(f"{output_id(output)}, {shape}: {error}") from error


@pytest.mark.parametrize("output", outputs(), ids=output_id)
def test_mixed_operands_several_terms_any_alpha(kernels: str, output: Output) -> None:
    rng = np.random.default_rng(11)
    for _ in range(4):
        kinds = [KINDS[int(k)] for k in rng.integers(0, len(KINDS), 5)]
        shape = (int(rng.integers(1, 70)), int(rng.integers(1, 1300)))
        first = weights(rng, shape, kinds[:3])
        second = weights(rng, shape, (kinds[3], kinds[4], kinds[4]))
        terms = [
            ScaledTerm(first[0], first[1], 0.7),
            ScaledTerm(second[0], second[1], float(rng.choice([-1.0, 0.0, 3.0]))),
        ]
        check(first[2], terms, output, kernels=kernels)
        check(first[2], [], output, kernels=kernels)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.scale_dtype], ids=str)
def test_regions_of_a_matrix(kernels: str, kind: Kind) -> None:
    """A region that starts inside units of its operands: by phases, as if each element had a scale of its own."""
    rng = np.random.default_rng(KINDS.index(kind))
    shape = (150, 700)
    whole = weights(rng, shape, (kind, kind, kind), 0.3)
    memories = [Memory(matrix) for matrix in whole]
    for row, col, rows, cols in (
        (0, 0, 150, 700),
        (5, 6, 100, 513),
        (129, 144, 9, 300),
        (1, 16, 140, 64),
        (9, 2, 3, 1),
    ):
        parts = []
        for matrix in whole:
            assert matrix.scales is not None
            window = (slice(row, row + rows), slice(col, col + cols))
            grids = [
                None if grid is None else reference_scaled.spread(grid, shape, matrix.rows, matrix.cols)[window]
                for grid in (matrix.scales, matrix.zero_points)
            ]
            parts.append(
                matrix._replace(codes=matrix.codes[window], scales=grids[0], zero_points=grids[1], rows=1, cols=1)
            )
        post, base, new_base = (memory.region(row, col) for memory in memories)
        for output in (
            Output("f8_e4m3", RECIPES["deepgemm"], 32, 128, "f32"),
            Output("bf16"),
            Output("f4", RECIPES["mxfp4-openai"], 1, 32, "f8_e8m0"),
        ):
            want = remembered(reference_scaled.merge_scaled, parts[2], [ScaledTerm(parts[0], parts[1], 0.5)], output)
            for threads in (1, 3):
                got = run(new_base, [(post, base, 0.5)], (rows, cols), output, kernels=kernels, threads=threads)
                equal(got, want, output)


@pytest.mark.parametrize(
    "grid", [(0, 0), (1, 0), (0, 1), (128, 128), (2, 3), (7, 24), (1, 1), (1, 600), (40, 513), (3, 1000)]
)
@pytest.mark.parametrize("codec", ["f8_e4m3", "f4", "i4"])
def test_any_grid(kernels: str, grid: tuple[int, int], codec: str) -> None:
    rng = np.random.default_rng(5)
    recipe = RECIPES[{"f8_e4m3": "compressed-tensors-f32", "f4": "mxfp4-openai", "i4": "int4-f32"}[codec]]
    output = Output(codec, recipe, *grid, "f32")
    for shape in ((90, 1300), (1, 1), (200, 2), (3, 517)):
        kind = Kind(codec, *grid, "f32")
        post, base, new_base = weights(rng, shape, (kind, kind, Kind("bf16")), 0.5)
        check(new_base, [ScaledTerm(post, base)], output, kernels=kernels)
        check(post, [ScaledTerm(post, base, 0.25)], output, kernels=kernels, keep=True)


def test_units_larger_than_scratch_memory(kernels: str) -> None:
    rng = np.random.default_rng(6)
    kind = Kind("f8_e4m3", 0, 0, "f32")
    for shape in ((300, 700), (2, 70000), (1100, 70)):
        for recipe, grid in (
            (RECIPES["fp8-tensor"], (0, 0)),
            (RECIPES["fbgemm"], (1, 0)),
            (RECIPES["int4-f32"], (0, 0)),
        ):
            post, base, new_base = weights(rng, shape, (kind, kind, kind), 0.5)
            output = Output(recipe.codec, recipe, *grid, "f32")
            check(new_base, [ScaledTerm(post, base)], output, kernels=kernels)
            if recipe.codec == "i4":
                new_base = stored(rng, Kind("i4", 0, 0, "f32"), reference_scaled.decode(new_base))
                check(new_base, [ScaledTerm(post, base, 0.01)], output, kernels=kernels, keep=True)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("grid", [(128, 128), (1, 0), (1, 32), (0, 0), (0, 1)])
def test_threads(kernels: str, threads: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    kind = Kind("f8_e4m3", *grid, "f32")
    shape = (515, 1100)
    post, base, new_base = weights(rng, shape, (kind, kind, kind), 0.9)
    output = Output("f8_e4m3", RECIPES["deepgemm"], *grid, "f32")
    check(new_base, [ScaledTerm(post, base)], output, kernels=kernels, threads=threads, keep=True)
    check(new_base, [ScaledTerm(post, base)], Output("bf16"), kernels=kernels, threads=threads)


@pytest.mark.parametrize("codec", ["f8_e4m3", "f4", "i4"])
def test_given_scale(kernels: str, codec: str) -> None:
    rng = np.random.default_rng(8)
    recipe = RECIPES[{"f8_e4m3": "fp8-tensor", "f4": "mxfp4-compressed-tensors", "i4": "int4-f32"}[codec]]
    post, base, new_base = weights(rng, (130, 700), (Kind("bf16"),) * 3)
    for given in (0.001, 1.0, 2.0**-60):
        output = Output(codec, recipe, 0, 0, "f32", given=float(np.float32(given)))
        check(new_base, [ScaledTerm(post, base)], output, kernels=kernels)


def test_operands_of_zeros(kernels: str) -> None:
    rng = np.random.default_rng(9)
    kind = Kind("f8_e4m3", 128, 128, "f32")
    post, base, new_base = weights(rng, (70, 300), (kind, kind, kind))
    zeros = Scaled(np.zeros((70, 300), np.uint32), "f32")
    output = Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "f32")
    for mask in range(8):
        chosen = [zeros if mask >> k & 1 else matrix for k, matrix in enumerate((post, base, new_base))]
        memories = [Memory(None if mask >> k & 1 else m) for k, m in enumerate(chosen)]
        want = remembered(reference_scaled.merge_scaled, chosen[2], [ScaledTerm(chosen[0], chosen[1], 0.5)], output)
        got = run(memories[2].tuple, [(memories[0].tuple, memories[1].tuple, 0.5)], (70, 300), output, kernels=kernels)
        equal(got, want, output)


def test_sums_of_errors(kernels: str) -> None:
    """Within a part in a thousand of what binary64 gives: they are for a report."""
    rng = np.random.default_rng(10)
    for output in (o for o in outputs() if o.recipe is not None and o.recipe.values == "f32"):
        if kernels == "triton" and not triton_calls.makes(output):
            continue
        post, base, new_base = weights(rng, (130, 600), (Kind("bf16"),) * 3)
        acc, _ = reference_scaled.accumulate(new_base, [ScaledTerm(post, base)])
        got = check(new_base, [ScaledTerm(post, base)], output, kernels=kernels)
        kind = {"nv_multiply": "multiply", "nv_divide": "divide"}.get(output.recipe.rule, "")
        assert got.scales is not None
        back = reference_scaled.decode(
            Scaled(
                got.codes, output.codec, got.scales, output.scale_dtype, output.rows, output.cols, output.second, kind
            )
        )
        np.testing.assert_allclose(got.value, np.sum(acc**2), rtol=1e-3)
        np.testing.assert_allclose(got.error, np.sum((back - acc) ** 2), rtol=1e-3)
