"""Merges of matrices of fp8 codes and scales, or plain ones: decode, add up, quantise by a recipe's rule, keep scales.

A matrix is codes at an address with a pitch, and a grid of scales: the element (r, c) uses the scale
((phase_r + r) // rows, (phase_c + c) // cols), 0 standing for the whole extent. A unit is what shares a scale of the
output. Where a unit fits a tile, `merge_units` does everything in one pass, a program to a unit. Where it does not,
`measure_units` finds each unit's amax and whether a delta touched it, and `encode_units` makes codes and scales of it.

Operands come as a tuple of `planes`, new_base first, then post and base of each term: (address of codes or None for
zeros, their pitch in elements, address of scales or None, their pitch, row phase, column phase). What is known when
compiling is in FORMS: (format, type of scale, rows, cols, whether its scales differ by row, by column, within a tile).
"""

import triton
import triton.language as tl

from paramdelta.kernels.codec import (
    MAGNITUDE_OF_F32,
    NAN_OF_F32,
    encode,
    item,
    of,
    pointer,
    power,
    raw,
    shorten,
    value,
)
from paramdelta.kernels.plain import alpha_of


@triton.jit
def scale_pointer(address, KIND: tl.constexpr):
    """Return a pointer to stored scales: f32, bf16 or f8_e8m0."""
    if KIND == "f32":
        typed = address.to(tl.pointer_type(tl.uint32))
    elif KIND == "bf16":
        typed = address.to(tl.pointer_type(tl.uint16))
    else:
        tl.static_assert(KIND == "f8_e8m0")
        typed = address.to(tl.pointer_type(tl.uint8))
    return typed


@triton.jit
def scale_value(stored, KIND: tl.constexpr):
    """Return stored scales in binary32, which holds them all. A byte of f8_e8m0 is 2^(byte − 127), 255 is NaN."""
    if KIND == "f32":
        bits = stored
    elif KIND == "bf16":
        bits = stored << 16
    else:
        bits = tl.where(stored == 0, 0x00400000, tl.where(stored == 255, NAN_OF_F32, stored << 23))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def scale_stored(scale, KIND: tl.constexpr):
    """Return the stored form, as uint32, of scales from 0 on, rounded once; for f8_e8m0 they are powers of two."""
    bits = scale.to(tl.uint32, bitcast=True)
    if KIND == "f32":
        stored = bits
    elif KIND == "bf16":
        stored = tl.minimum(shorten(bits, "bf16"), of("bf16", "beyond"))
    else:
        stored = bits >> 23
    return stored


@triton.jit
def unit_index(row, col, ROWS: tl.constexpr, COLS: tl.constexpr, pitch):
    """Return which scale elements (row, col) use: in the shape that row and col have together, or less."""
    if ROWS == 0:
        index = col // COLS if COLS > 0 else tl.zeros([1, 1], tl.int64)
    elif COLS == 0:
        index = row // ROWS * pitch
    else:
        index = row // ROWS * pitch + col // COLS
    return index


@triton.jit
def operand(plane, row, col, near, origin, within, FORM: tl.constexpr, ALIGN: tl.constexpr):
    """Return an operand's codes, its stored scales (0 where it has none), and its values in binary64.

    `row` [R, 1] and `col` [1, C] are where the tile's elements are; `near` those two within the matrix, whose scales
    exist; `origin` those of the tile's first element, [1, 1] each.
    """
    if plane[0] is None:
        codes = tl.zeros(within.shape, tl.uint32)
        stored = tl.zeros([1, 1], tl.uint32)
        values = tl.zeros(within.shape, tl.float64)
    else:
        codes = tl.load(pointer(plane[0], item(FORM, 0), ALIGN) + row * plane[1] + col, mask=within, other=0).to(
            tl.uint32
        )
        if plane[2] is None:
            stored = tl.zeros([1, 1], tl.uint32)
            values = value(codes, item(FORM, 0))
        else:
            one_row = near[0] if item(FORM, 4) else origin[0]
            one_col = near[1] if item(FORM, 5) else origin[1]
            at = unit_index(plane[4] + one_row, plane[5] + one_col, item(FORM, 2), item(FORM, 3), plane[3])
            stored = tl.load(scale_pointer(plane[2], item(FORM, 1)) + at).to(tl.uint32)
            # The product is exact: 4 bits and 24, and exponents far within those of binary64.
            factor = scale_value(stored, item(FORM, 1)).to(tl.float64) * power(of(item(FORM, 0), "rebias"))
            values = raw(codes, item(FORM, 0)).to(tl.float64) * factor
    return codes, stored, values


@triton.jit
def add_up(planes, alphas, row, col, limits, TERMS: tl.constexpr, FORMS: tl.constexpr, ALIGN: tl.constexpr):
    """Return acc, which elements a delta touched, new_base's codes, and which elements there are.

    `limits` are the ends of what the tile covers, in rows and columns.
    """
    within = (row < limits[0]) & (col < limits[1])
    origin = (tl.min(row, 0, keep_dims=True), tl.min(col, 1, keep_dims=True))
    near = (tl.minimum(row, limits[0] - 1), tl.minimum(col, limits[1] - 1))
    own, _, acc = operand(planes[0], row, col, near, origin, within, item(FORMS, 0), ALIGN)
    touched = within & False
    for k in tl.static_range(TERMS):
        post, post_scale, p = operand(planes[1 + 2 * k], row, col, near, origin, within, item(FORMS, 1 + 2 * k), ALIGN)
        base, base_scale, b = operand(planes[2 + 2 * k], row, col, near, origin, within, item(FORMS, 2 + 2 * k), ALIGN)
        delta = p - b
        adds = within & (delta != 0.0)
        # Bit-equal operands are no delta, NaN and Inf included: of one format, with scales of one type, or without.
        if item(item(FORMS, 1 + 2 * k), 0) == item(item(FORMS, 2 + 2 * k), 0) and item(
            item(FORMS, 1 + 2 * k), 1
        ) == item(item(FORMS, 2 + 2 * k), 1):
            adds &= (post != base) | (post_scale != base_scale)
        acc = tl.where(adds, acc + alpha_of(alphas[k]) * delta, acc)
        touched |= adds
    return tl.where(within, acc, 0.0), touched, own, within


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
def anywhere(mask):
    """Return whether a mask is True somewhere."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0


@triton.jit
def count(report, acc, over):
    """Add up elements that are NaN, those that are infinite, and those that overflowed.

    Where these are called for, acc is computed again: kept that long, it would not fit the registers.
    """
    infinite = (tl.abs(acc) == float("inf")) & (over == 0)
    tl.atomic_add(report, tl.sum(tl.sum((acc != acc).to(tl.int64), 1), 0))
    tl.atomic_add(report + 1, tl.sum(tl.sum(infinite.to(tl.int64), 1), 0))
    tl.atomic_add(report + 2, tl.sum(tl.sum(over.to(tl.int64), 1), 0))


@triton.jit
def count_rounded(report, planes, alphas, row, col, limits, x, RECIPE: tl.constexpr, TERMS: tl.constexpr,
                  FORMS: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Count for a tile whose values are rounded to x: what overflows is finite until then."""
    if anywhere((tl.abs(x) < float("inf")) == 0):
        acc, _, _, _ = add_up(planes, alphas, row, col, limits, TERMS, FORMS, ALIGN)
        again = round_values(acc, item(RECIPE, 5))
        count(report, acc, (tl.abs(acc) < float("inf")) & (tl.abs(again) == float("inf")))


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
def code_of(x, factor, RECIPE: tl.constexpr):
    """Return the e4m3 codes of x · factor, or x / factor: to nearest even, within ±448, NaN being 0x7F."""
    if item(RECIPE, 4) or item(RECIPE, 0) == "inverse":
        ratio = x * factor
    else:
        ratio = tl.div_rn(x, factor + tl.zeros(x.shape, tl.float32))
    # Neither 0 / 0 nor Inf / Inf, where a scale under- or overflowed, is NaN.
    ratio = tl.where((x == 0.0) | (tl.abs(x) == float("inf")), x, ratio)
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
        factor = tl.where(held, divisor_of(stored, KIND, item(RECIPE, 4) or item(RECIPE, 0) == "inverse"), factor)
    return scale, factor, same


@triton.jit
def merge_units(
    planes, alphas, out, out_pitch: tl.int64, out_scales: tl.int64, out_scale_pitch: tl.int64, report: tl.int64,
    rows: tl.int64, cols: tl.int64,
    TERMS: tl.constexpr, FORMS: tl.constexpr, RECIPE: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Merge and quantise one unit of ROWS × COLS elements to a program. ROWS and COLS are at most the tile's.

    `report` are five int64: NaN, Inf and overflow are added; the largest amax's bits, and 1 where a delta touched.
    """
    unit_row, unit_col = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = unit_row * ROWS + tl.arange(0, TILE_ROWS)[:, None]
    col = unit_col * COLS + tl.arange(0, TILE_COLS)[None, :]
    limits = (tl.minimum(rows, (unit_row + 1) * ROWS), tl.minimum(cols, (unit_col + 1) * COLS))
    acc, touched, own, within = add_up(planes, alphas, row, col, limits, TERMS, FORMS, ALIGN)
    x = round_values(acc, item(RECIPE, 5))
    numbers = report.to(tl.pointer_type(tl.int64))
    count_rounded(numbers, planes, alphas, row, col, limits, x, RECIPE, TERMS, FORMS, ALIGN)
    amax = tl.max(tl.max(finite_magnitude(x), 1, keep_dims=True), 0, keep_dims=True)
    some = tl.max(tl.max(touched.to(tl.int32), 1, keep_dims=True), 0, keep_dims=True)
    stored = tl.zeros([1, 1], tl.uint32)
    if KEEP:
        at = tl.zeros([1, 1], tl.int64) + unit_row * planes[0][3] + unit_col
        stored = tl.load(scale_pointer(planes[0][2], KIND) + at).to(tl.uint32)
    scale, factor, same = chosen_scale(amax, some, stored, RECIPE, KIND, KEEP)
    code = tl.where(same, own, code_of(x, factor, RECIPE))
    tl.store(pointer(out, "f8_e4m3", ALIGN) + row * out_pitch + col, code.to(tl.uint8), mask=within)
    to = scale_pointer(out_scales, KIND) + (tl.zeros([1, 1], tl.int64) + unit_row * out_scale_pitch + unit_col)
    tl.store(to, scale.to(to.dtype.element_ty))
    tl.atomic_max(numbers + 3 + tl.zeros([1, 1], tl.int32), amax.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.atomic_max(numbers + 4 + tl.zeros([1, 1], tl.int32), some.to(tl.int64))


@triton.jit
def measure_units(
    planes, alphas, units: tl.int64, unit_pitch: tl.int64, unit_count: tl.int64, report: tl.int64,
    rows: tl.int64, cols: tl.int64,
    TERMS: tl.constexpr, FORMS: tl.constexpr, RECIPE: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Find the amax of every unit, as bits, and behind all of those whether a delta touched it: int32 at `units`."""
    row = tl.program_id(1).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    col = tl.program_id(0).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)[None, :]
    acc, touched, _, within = add_up(planes, alphas, row, col, (rows, cols), TERMS, FORMS, ALIGN)
    x = round_values(acc, item(RECIPE, 5))
    amax = finite_magnitude(x).to(tl.int32, bitcast=True)
    some = touched.to(tl.int32)
    numbers = report.to(tl.pointer_type(tl.int64))
    count_rounded(numbers, planes, alphas, row, col, (rows, cols), x, RECIPE, TERMS, FORMS, ALIGN)
    tl.atomic_max(numbers + 3, tl.max(tl.max(amax, 1), 0).to(tl.int64))
    tl.atomic_max(numbers + 4, tl.max(tl.max(some, 1), 0).to(tl.int64))
    if COLS == 0:
        amax, some = tl.max(amax, 1, keep_dims=True), tl.max(some, 1, keep_dims=True)
        within = row < rows
    if ROWS == 0:
        amax, some = tl.max(amax, 0, keep_dims=True), tl.max(some, 0, keep_dims=True)
        within = col < cols
    if ROWS == 0 and COLS == 0:
        within = tl.zeros([1, 1], tl.int32) == 0
    to = units.to(tl.pointer_type(tl.int32)) + unit_index(row, col, ROWS, COLS, unit_pitch)
    tl.atomic_max(to, amax, mask=within)
    tl.atomic_max(to + unit_count, some, mask=within)


@triton.jit
def encode_units(
    planes, alphas, units: tl.int64, unit_pitch: tl.int64, unit_count: tl.int64, given: tl.int64,
    out, out_pitch: tl.int64, out_scales: tl.int64, out_scale_pitch: tl.int64, rows: tl.int64, cols: tl.int64,
    TERMS: tl.constexpr, FORMS: tl.constexpr, RECIPE: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    GIVEN: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Merge and quantise a tile by what `measure_units` found; or, with GIVEN, against one scale, a binary32's bits."""
    row = tl.program_id(1).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    col = tl.program_id(0).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)[None, :]
    acc, _, own, within = add_up(planes, alphas, row, col, (rows, cols), TERMS, FORMS, ALIGN)
    x = round_values(acc, item(RECIPE, 5))
    if GIVEN:
        bits = (tl.zeros([1, 1], tl.int64) + given).to(tl.uint32)
        code = code_of(x, divisor_of(bits, "f32", item(RECIPE, 4) or item(RECIPE, 0) == "inverse"), RECIPE)
    else:
        near_row, near_col = tl.minimum(row, rows - 1), tl.minimum(col, cols - 1)
        at = unit_index(near_row, near_col, ROWS, COLS, unit_pitch)
        found = units.to(tl.pointer_type(tl.int32)) + at
        amax = tl.load(found).to(tl.float32, bitcast=True)
        place = unit_index(near_row, near_col, ROWS, COLS, out_scale_pitch)
        stored = tl.zeros([1, 1], tl.uint32)
        if KEEP:
            own_place = unit_index(near_row, near_col, ROWS, COLS, planes[0][3])
            stored = tl.load(scale_pointer(planes[0][2], KIND) + own_place).to(tl.uint32)
        scale, factor, same = chosen_scale(amax, tl.load(found + unit_count), stored, RECIPE, KIND, KEEP)
        code = tl.where(same, own, code_of(x, factor, RECIPE))
        # Every tile that reaches into a unit writes its scale, the same one.
        to = scale_pointer(out_scales, KIND) + place
        tl.store(to, scale.to(to.dtype.element_ty))
    tl.store(pointer(out, "f8_e4m3", ALIGN) + row * out_pitch + col, code.to(tl.uint8), mask=within)


@triton.jit
def merge_plain(
    planes, alphas, out, out_pitch: tl.int64, report: tl.int64, rows: tl.int64, cols: tl.int64,
    TERMS: tl.constexpr, FORMS: tl.constexpr, FORMAT: tl.constexpr, OWN: tl.constexpr, ALIGN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Merge a tile and store it plainly. OWN: new_base is stored so too, and keeps its bits where no delta is."""
    row = tl.program_id(1).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    col = tl.program_id(0).to(tl.int64) * TILE_COLS + tl.arange(0, TILE_COLS)[None, :]
    acc, touched, own, within = add_up(planes, alphas, row, col, (rows, cols), TERMS, FORMS, ALIGN)
    code, over = encode(acc, FORMAT)
    if OWN:
        code = tl.where(touched, code, own)
    numbers = report.to(tl.pointer_type(tl.int64))
    tl.atomic_max(numbers + 4, tl.max(tl.max(touched.to(tl.int32), 1), 0).to(tl.int64))
    if anywhere(((tl.abs(acc) < float("inf")) == 0) | over):
        again, _, _, _ = add_up(planes, alphas, row, col, (rows, cols), TERMS, FORMS, ALIGN)
        _, beyond = encode(again, FORMAT)
        count(numbers, again, beyond)
    target = pointer(out, FORMAT, ALIGN) + row * out_pitch + col
    tl.store(target, code.to(target.dtype.element_ty), mask=within)
