"""How a unit, all that shares a scale of the output, chooses it, and how values become codes of e4m3.

RECIPE is (rule, largest, floor, zero, reciprocal, values), as in `formats.Recipe`; KIND the type of the scales.
"""

import triton
import triton.language as tl

from paramdelta.kernels.codec import MAGNITUDE_OF_F32, encode, item, shorten
from paramdelta.kernels.operands import scale_stored, scale_value


@triton.constexpr_function
def multiplies(recipe):
    """Return whether values are multiplied with a factor, not divided by a scale, while compiling."""
    return recipe[4] or recipe[0] == "inverse"


@triton.jit
def round_values(acc, VALUES: tl.constexpr):
    """Return acc rounded once to what is quantised, f32 or bf16, in binary32."""
    if VALUES == "bf16":
        code, _ = encode(acc, "bf16")
        x = (code << 16).to(tl.float32, bitcast=True)
    else:
        x = acc.to(tl.float32)
    return x


@triton.jit
def scale_of(amax, RECIPE: tl.constexpr, KIND: tl.constexpr):
    """Return the stored scale of units with these amax, and what values are multiplied with, or divided by.

    As reference_scaled.unit_scales and codes_of: every operation in binary32. RECIPE is (rule, largest, floor, zero,
    reciprocal, values).
    """
    amax = tl.maximum(amax, item(RECIPE, 2))
    ones = tl.zeros_like(amax) + 1.0
    factor = ones
    if item(RECIPE, 0) == "inverse":
        factor = tl.minimum(tl.div_rn(ones * 448.0, amax), 448.0 * 512.0)
        stored = scale_stored(tl.div_rn(ones, factor), KIND)
    elif item(RECIPE, 0) == "ratio":
        stored = scale_stored(tl.div_rn(amax, ones * item(RECIPE, 1)), KIND)
    else:
        tl.static_assert(item(RECIPE, 0) == "ceil2")
        field = (tl.div_rn(amax, ones * item(RECIPE, 1)).to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23
        field = tl.minimum(field, 254)
        if KIND == "f8_e8m0":
            stored = field
        else:
            stored = scale_stored((tl.maximum(field, 1) << 23).to(tl.float32, bitcast=True), KIND)
    zero = amax == 0.0
    if KIND != "f8_e8m0":
        zero |= stored == 0  # a scale that underflows would divide by zero
    stored = tl.where(zero, scale_stored(ones * item(RECIPE, 3), KIND), stored)
    if item(RECIPE, 0) == "inverse":
        factor = tl.where(zero, divisor_of(stored, KIND, True), factor)
    else:
        factor = divisor_of(stored, KIND, item(RECIPE, 4))
    return stored, factor


@triton.jit
def divisor_of(stored, KIND: tl.constexpr, RECIPROCAL: tl.constexpr):
    """Return what values are multiplied with (RECIPROCAL), or else divided by, for scales as stored."""
    scale = scale_value(stored, KIND)
    if RECIPROCAL:
        scale = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    return scale


@triton.jit
def holds(stored, amax, RECIPE: tl.constexpr, KIND: tl.constexpr):
    """Return which stored scales can stay in units that a delta touched: powers of two that amax has not outgrown."""
    scale = scale_value(stored, KIND)
    fits = (scale > 0.0) & (scale < float("inf")) & (amax.to(tl.float64) <= scale.to(tl.float64) * 448.0)
    if KIND != "f8_e8m0":
        bits = scale.to(tl.uint32, bitcast=True)
        fits &= (bits >= 0x00800000) & ((bits & 0x7FFFFF) == 0)
        if item(RECIPE, 0) != "ceil2":
            fits &= False
    return fits


@triton.jit
def in_units(x, factor, RECIPE: tl.constexpr):
    """Return x in units of its scale: x · factor, or x / factor, in binary32."""
    if multiplies(RECIPE):
        ratio = x * factor
    else:
        ratio = tl.div_rn(x, factor + tl.zeros(x.shape, tl.float32))
    return ratio


@triton.jit
def ratio_of(x, factor, RECIPE: tl.constexpr):
    """Return `in_units`, but for 0 / 0 and Inf / Inf, where a scale under- or overflowed: those are no NaN."""
    return tl.where((x == 0.0) | (tl.abs(x) == float("inf")), x, in_units(x, factor, RECIPE))


@triton.jit
def code_of(ratio):
    """Return the e4m3 codes of numbers: to nearest even, within ±448, NaN being 0x7F."""
    bits = ratio.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(shorten(bits & MAGNITUDE_OF_F32, "f8_e4m3"), 0x7E)
    return tl.where(ratio == ratio, magnitude | ((bits >> 24) & 0x80), 0x7F)


@triton.jit
def finite_magnitude(x):
    """Return |x| where that is finite, else 0: what an amax is the largest of."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0)


@triton.jit
def chosen_scale(amax, touched, stored, RECIPE: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr):
    """Return units' stored scales, the factor of their codes, and which keep new_base's bytes.

    `stored` are new_base's scales, read only with KEEP.
    """
    scale, factor = scale_of(amax, RECIPE, KIND)
    same = amax < 0.0
    if KEEP:
        same = touched == 0
        held = holds(stored, amax, RECIPE, KIND)
        scale = tl.where(same | held, stored, scale)
        factor = tl.where(same | held, divisor_of(stored, KIND, multiplies(RECIPE)), factor)
    return scale, factor, same
