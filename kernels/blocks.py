"""Merges of matrices of fp8 codes and scales, or plain ones: decode, add up, quantise by a recipe's rule, keep scales.

A unit is what shares a scale of the output. Where a unit fits a tile, `merge_units` does everything in one pass, a
program to a unit. Where it does not, `measure_units` finds each unit's amax and whether a delta touched it, and
`encode_units` makes codes and scales of it. Operands, planes and FORMS are those of `operands`, RECIPE and KIND those
of `quantise`, `report` the address of the totals of `totals`.
"""

import triton
import triton.language as tl

from paramdelta.kernels.codec import encode, item, pointer
from paramdelta.kernels.operands import add_up, scale_pointer, scale_value, unit_index
from paramdelta.kernels.quantise import (
    chosen_scale,
    code_of,
    divisor_of,
    finite_magnitude,
    multiplies,
    ratio_of,
    round_values,
)
from paramdelta.kernels.totals import add_lost, anywhere, count, count_rounded, tell
from paramdelta.kernels.words import merge_words


@triton.jit
def clear(words: tl.int64, count: tl.int64, BLOCK: tl.constexpr):
    """Set `count` int32 to 0."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.int32)
    tl.store(words.to(tl.pointer_type(tl.int32)) + index, zeros, mask=index < count)


@triton.jit
def merge_units(
    planes, alphas, out, out_pitch, out_scales: tl.int64, out_scale_pitch: tl.int64, report: tl.int64,
    rows: tl.int64, cols: tl.int64,
    TERMS: tl.constexpr, FORMS: tl.constexpr, RECIPE: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
    STRIP: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge and quantise one unit of ROWS × COLS elements to a program. ROWS and COLS are at most the tile's.

    WORDS: a unit that is whole, and holds but numbers, goes the quick way of `words`. Any other is merged in strips of
    STRIP rows, twice, since what it needs would not fit the registers: first for its amax, then for its codes.
    """
    unit_row, unit_col = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    limits = (tl.minimum(rows, (unit_row + 1) * ROWS), tl.minimum(cols, (unit_col + 1) * COLS))
    to = scale_pointer(out_scales, KIND) + (tl.zeros([1, 1], tl.int64) + unit_row * out_scale_pitch + unit_col)
    stored = tl.zeros([1, 1], tl.uint32)
    if KEEP:
        at = tl.zeros([1, 1], tl.int64) + unit_row * planes[0][3] + unit_col
        stored = tl.load(scale_pointer(planes[0][2], KIND) + at).to(tl.uint32)
    left = unit_row >= 0
    if WORDS:  # noqa: SIM102, known while compiling
        if ((unit_row + 1) * ROWS <= rows) & ((unit_col + 1) * COLS <= cols):
            left = merge_words(planes, alphas, unit_row * ROWS, unit_col * COLS, out, out_pitch, to, stored, report,
                               TERMS, FORMS, RECIPE, KIND, KEEP, ROWS, COLS, PARTS)  # fmt: skip
    if left:
        col = unit_col * COLS + tl.arange(0, TILE_COLS)[None, :]
        amax, some = tl.zeros([1, 1], tl.float32), tl.zeros([1, 1], tl.int32)
        for start in range(0, TILE_ROWS, STRIP):
            row = unit_row * ROWS + start + tl.arange(0, STRIP)[:, None]
            acc, touched, _, _ = add_up(planes, alphas, row, col, limits, TERMS, FORMS, ALIGN)
            x = round_values(acc, item(RECIPE, 5))
            count_rounded(report, planes, alphas, row, col, limits, x, RECIPE, TERMS, FORMS, ALIGN)
            largest = tl.max(tl.max(finite_magnitude(x), 1, keep_dims=True), 0, keep_dims=True)
            amax = tl.maximum(amax, largest)
            some = tl.maximum(some, tl.max(tl.max(touched.to(tl.int32), 1, keep_dims=True), 0, keep_dims=True))
        scale, factor, same = chosen_scale(amax, some, stored, RECIPE, KIND, KEEP)
        for start in range(0, TILE_ROWS, STRIP):
            row = unit_row * ROWS + start + tl.arange(0, STRIP)[:, None]
            acc, _, own, within = add_up(planes, alphas, row, col, limits, TERMS, FORMS, ALIGN)
            ratio = ratio_of(round_values(acc, item(RECIPE, 5)), factor, RECIPE)
            code = tl.where(same, own, code_of(ratio))
            tl.store(pointer(out, "f8_e4m3", ALIGN) + row * out_pitch + col, code.to(tl.uint8), mask=within)
            add_lost(report, ratio, code, scale_value(scale, KIND), same, within)
        tl.store(to, scale.to(to.dtype.element_ty))
        tell(report, tl.max(tl.max(some, 1), 0), tl.max(tl.max(amax.to(tl.int32, bitcast=True), 1), 0))


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
    count_rounded(report, planes, alphas, row, col, (rows, cols), x, RECIPE, TERMS, FORMS, ALIGN)
    tell(report, tl.max(tl.max(some, 1), 0), tl.max(tl.max(amax, 1), 0))
    if COLS == 0:
        amax, some = tl.max(amax, 1, keep_dims=True), tl.max(some, 1, keep_dims=True)
        within = row < rows
    if ROWS == 0:
        amax, some = tl.max(amax, 0, keep_dims=True), tl.max(some, 0, keep_dims=True)
        within = col < cols
    if ROWS == 0 and COLS == 0:
        within = tl.zeros([1, 1], tl.int32) == 0
    to = units.to(tl.pointer_type(tl.int32)) + unit_index(row, col, ROWS, COLS, unit_pitch)
    tl.atomic_max(to, amax, mask=within, sem="relaxed")
    tl.atomic_max(to + unit_count, some, mask=within, sem="relaxed")


@triton.jit
def encode_units(
    planes, alphas, units: tl.int64, unit_pitch: tl.int64, unit_count: tl.int64, given: tl.int64,
    out, out_pitch, out_scales: tl.int64, out_scale_pitch: tl.int64, report: tl.int64, rows: tl.int64, cols: tl.int64,
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
        ratio = ratio_of(x, divisor_of(bits, "f32", multiplies(RECIPE)), RECIPE)
        code = code_of(ratio)
        add_lost(report, ratio, code, scale_value(bits, "f32"), bits != bits, within)
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
        ratio = ratio_of(x, factor, RECIPE)
        code = tl.where(same, own, code_of(ratio))
        add_lost(report, ratio, code, scale_value(scale, KIND), same, within)
        # Every tile that reaches into a unit writes its scale, the same one.
        to = scale_pointer(out_scales, KIND) + place
        tl.store(to, scale.to(to.dtype.element_ty))
    tl.store(pointer(out, "f8_e4m3", ALIGN) + row * out_pitch + col, code.to(tl.uint8), mask=within)


@triton.jit
def merge_plain(
    planes, alphas, out, out_pitch, report: tl.int64, rows: tl.int64, cols: tl.int64,
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
    tell(report, tl.max(tl.max(touched.to(tl.int32), 1), 0), 0)
    if anywhere(((tl.abs(acc) < float("inf")) == 0) | over):
        again, _, _, _ = add_up(planes, alphas, row, col, (rows, cols), TERMS, FORMS, ALIGN)
        _, beyond = encode(again, FORMAT)
        count(report, again, beyond)
    target = pointer(out, FORMAT, ALIGN) + row * out_pitch + col
    tl.store(target, code.to(target.dtype.element_ty), mask=within)
