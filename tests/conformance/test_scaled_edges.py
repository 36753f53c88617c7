"""Quantised matrices where a fast loop could go wrong: values on boundaries, tiny and huge units, NaN, kept scales."""

from __future__ import annotations

import numpy as np
import pytest
from remembered import remembered
from scaled_check import Kind, Memory, call, check, output_id, outputs, recipe_tuple, run, stored, weights

from paramdelta import reference, reference_scaled
from paramdelta.dtypes import F32
from paramdelta.formats import RECIPES
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm

QUANTISED = [o for o in outputs() if o.recipe is not None]


def plain(values: np.ndarray) -> Scaled:
    return Scaled(values.astype(np.float32).view(np.uint32), "f32")


@pytest.mark.parametrize("output", QUANTISED, ids=output_id)
def test_maxima_at_every_magnitude(kernels: str, output: Output) -> None:
    """Units whose largest value is on, or next to, a power of two, a multiple of the largest code, a rounding edge."""
    rng = np.random.default_rng(1)
    tops = np.exp2(np.arange(-149, 128).astype(np.float64))
    tops = np.concatenate([tops, tops * 1.75, tops * 1.5, tops * 6 / 4, tops * 448 / 256, [0.0, 3.4028234663852886e38]])
    tops = tops[np.isfinite(tops.astype(np.float32))].astype(np.float32)
    with np.errstate(over="ignore"):
        tops = np.concatenate([tops, np.nextafter(tops, np.float32(np.inf)), np.nextafter(tops, np.float32(0))])
    tops = tops[np.isfinite(tops)]
    values = tops[:, None] * rng.uniform(-1, 1, (tops.size, 64)).astype(np.float32)
    values[np.arange(tops.size), rng.integers(0, 64, tops.size)] = tops
    check(plain(values), [], output, kernels=kernels)


@pytest.mark.parametrize(
    ("codec", "recipe"), [("f8_e4m3", "fp8-tensor"), ("f4", "mxfp4-compressed-tensors"), ("i4", "int4-f32")]
)
def test_codes_near_every_boundary(kernels: str, codec: str, recipe: str) -> None:
    """The middle of every two codes, and its neighbours; signed zeros; beyond the largest code."""
    every = {"f8_e4m3": np.arange(0x7F), "f4": np.arange(8), "i4": np.arange(16)}[codec].astype(np.uint8)
    low = np.sort(np.unique(reference_scaled.code_values(every, codec) - (8 if codec == "i4" else 0)))
    middle = np.concatenate([(low[1:] + low[:-1]) / 2, low, [0.0, 1e-45, 1e-30, 460.0, 464.0, 480.0, 1e30]])
    near = [middle.astype(np.float32)]
    near += [np.nextafter(near[0], np.float32(s)) for s in (np.inf, -np.inf)]
    values = np.concatenate([*near, *(-v for v in near)])
    values = np.resize(values, (5, values.size + 3))
    for given in (1.0, 2.0**-20, 3.0):
        scaled = (values * np.float32(given)).astype(np.float32)
        for reciprocal in (False, True):
            way = RECIPES[recipe].__class__(**{**RECIPES[recipe].__dict__, "reciprocal": reciprocal})
            check(plain(scaled), [], Output(codec, way, 0, 0, "f32", given=given), kernels=kernels)


@pytest.mark.parametrize("output", outputs(), ids=output_id)
def test_nan_inf_and_overflow(kernels: str, output: Output) -> None:
    """One value that is not finite among many: the literal path for its unit, and the same bits for all others."""
    rng = np.random.default_rng(2)
    for bad in (np.nan, np.inf, -np.inf, 3.5e38, -3.40282356e38, 3.395e38):
        values = rng.normal(0, 1, (140, 300))
        values[rng.integers(0, 140, 3), rng.integers(0, 300, 3)] = bad
        other = rng.normal(0, 1, (140, 300))
        new_base = Scaled(values.view(np.uint64), "f64")
        post, base = plain(other), plain(other * rng.integers(0, 2, other.shape))
        check(new_base, [ScaledTerm(post, base)], output, kernels=kernels)
        with np.errstate(over="ignore"):
            small = plain(values)
        check(small, [ScaledTerm(post, base)], output, kernels=kernels)
        check(plain(other), [ScaledTerm(small, base)], output, kernels=kernels)
        check(plain(other), [ScaledTerm(small, small)], output, kernels=kernels)


@pytest.mark.parametrize(
    "kind", [Kind("f8_e4m3", 32, 32, "f32"), Kind("f4", 1, 32, "f8_e8m0"), Kind("i4", 1, 32, "bf16")], ids=str
)
def test_scales_that_are_odd(kernels: str, kind: Kind) -> None:
    """NaN, Inf, zero and subnormal scales in operands."""
    rng = np.random.default_rng(3)
    post, base, new_base = weights(rng, (64, 256), (kind, kind, kind), 0.5)
    odd = {
        "f32": [0x7FC00000, 0x7F800000, 0, 1, 0x7F7FFFFF],
        "f8_e8m0": [255, 0, 254, 1],
        "bf16": [0x7FC0, 0x7F80, 0, 1],
    }
    for bits in odd[kind.scale_dtype]:
        changed = []
        for matrix in (post, base, new_base):
            assert matrix.scales is not None
            scales = matrix.scales.copy()
            scales[rng.integers(0, scales.shape[0], 2), rng.integers(0, scales.shape[1], 2)] = bits
            changed.append(matrix._replace(scales=scales))
        for output in (Output("f8_e4m3", RECIPES["deepgemm"], 32, 128, "f32"), Output("bf16")):
            check(new_base, [ScaledTerm(changed[0], changed[1])], output, kernels=kernels)
            check(changed[2], [ScaledTerm(post, base, 0.5)], output, kernels=kernels)
            check(new_base, [ScaledTerm(changed[0], changed[0])], output, kernels=kernels)


@pytest.mark.parametrize("second", ["multiply", "divide"])
def test_second_scales_that_are_odd(kernels: str, second: str) -> None:
    """Second scales that make unlike scales the same Inf, NaN or zero: only the same stored bits are no delta."""
    rng = np.random.default_rng(6)
    kind = Kind("f4", 1, 16, "f8_e4m3", second)
    post, base, new_base = weights(rng, (64, 256), (kind, kind, kind), 0.5)
    assert base.scales is not None
    scales = base.scales.copy()
    scales[::4] = rng.choice([0, 1, 0x7E, 0x7F, 0x80, 0xFE, 0xFF], scales[::4].shape)
    post, base = base._replace(scales=scales), base._replace(scales=np.roll(scales, 1, 0))
    values = [0.0, -0.0, 1e-40, -1e-40, 1.0, 3.4e38, -3.4e38, np.inf, np.nan]
    for ours in values:
        for theirs in (values[0], values[3], ours):
            term = ScaledTerm(post._replace(second=ours), base._replace(second=theirs))
            check(new_base, [term], Output("f4", RECIPES["nvfp4-modelopt"], 1, 16, "f8_e4m3", 0.5), kernels=kernels)
            check(new_base, [term, ScaledTerm(term.base, term.base)], Output("bf16"), kernels=kernels)


@pytest.mark.parametrize("output", QUANTISED, ids=output_id)
@pytest.mark.parametrize("alpha", [1.0, 0.01, 8.0])
def test_keep(kernels: str, output: Output, alpha: float) -> None:
    """Untouched units stay, scales that hold stay, all else is made afresh."""
    assert output.recipe is not None
    rng = np.random.default_rng(4)
    second = {"nv_multiply": "multiply", "nv_divide": "divide"}.get(output.recipe.rule, "")
    kind = Kind(output.codec, output.rows, output.cols, output.scale_dtype, second)
    post, base, new_base = weights(rng, (140, 600), (kind, kind, kind))
    codes = post.codes.copy()
    where = np.repeat(np.repeat(rng.random((9, 19)) < 0.6, 16, 0), 32, 1)[:140, :600]
    codes[where] = base.codes[where]
    post = base._replace(codes=codes)
    if second:
        output = output._replace(second=new_base.second)
    check(new_base, [ScaledTerm(post, base, alpha)], output, kernels=kernels, keep=True)
    check(new_base, [ScaledTerm(base, base, alpha)], output, kernels=kernels, keep=True)
    check(new_base, [], output, kernels=kernels, keep=True)


@pytest.mark.parametrize("output", [o for o in QUANTISED if o.rows == 128], ids=output_id)
def test_powers_of_two_are_kept(kernels: str, output: Output) -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0, 1, (260, 500)) * np.exp2(rng.integers(-4, 5, (260, 1)))
    kind = Kind("f8_e4m3", 128, 128, output.scale_dtype)
    new_base = stored(rng, kind, values)
    powers = 2.0 ** np.floor(np.log2(reference_scaled.scale_values(new_base.scales, output.scale_dtype)))
    powers[0, 0] *= 1 if output.scale_dtype == "f8_e8m0" else 1.5
    new_base = new_base._replace(scales=reference_scaled.scale_codes(powers, output.scale_dtype))
    for size in (0.001, 1.0, 30.0):
        delta = plain(rng.normal(0, size, values.shape))
        nothing = plain(np.zeros(values.shape))
        check(new_base, [ScaledTerm(delta, nothing)], output, kernels=kernels, keep=True)


@pytest.mark.parametrize("output", QUANTISED, ids=output_id)
def test_measure(kernels: str, output: Output) -> None:
    """What is measured is what a merge with its own scales reports, whatever the number of threads."""
    assert output.recipe is not None
    rng = np.random.default_rng(6)
    post, base, new_base = weights(rng, (300, 700), (Kind("bf16"), Kind("bf16"), Kind("f8_e4m3", 32, 32, "f8_e8m0")))
    values = reference.decode(post.codes, reference_scaled.BY_NAME["bf16"])
    values[7, 9], values[290, 600] = np.nan, np.inf
    odd = Scaled(reference.encode(values, F32)[0], "f32")
    for first in (post, odd):
        memories = [Memory(m) for m in (first, base, new_base)]
        want = remembered(reference_scaled.merge_scaled, new_base, [ScaledTerm(first, base, 0.5)], output)
        for threads in (1, 2):
            got = call(
                kernels,
                [],
                threads,
                measure=True,
                new_base=memories[2].tuple,
                terms=[(memories[0].tuple, memories[1].tuple, 0.5)],
                rows=300,
                cols=700,
                recipe=recipe_tuple(output.recipe, output.scale_dtype),
            )
            assert got[:5] == (want.nan, want.inf, want.overflow, want.touched, want.amax)


def test_what_binding_refuses() -> None:
    memory = Memory(plain(np.zeros((2, 2))))
    with pytest.raises(ValueError, match="powers of two"):
        run(memory.tuple, [], (2, 2), Output("f8_e4m3", RECIPES["fp8-tensor"], 0, 0, "f8_e8m0"), kernels="scalar")
    with pytest.raises(ValueError, match="no scale is of dtype"):
        run(memory.tuple, [], (2, 2), Output("f8_e4m3", RECIPES["fp8-tensor"], 0, 0, "f8_e5m2"), kernels="scalar")
