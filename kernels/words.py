"""The quick way of a whole unit from short operands to e4m3: four elements to a word of 32 bits, or of 64.

All that the general way of `blocks` handles besides is left to it: a code that is NaN, a value that is not finite, a
scale that has no finite factor. What remains are numbers, and for numbers there are shorter ways to the same bits:

- e4m3 read as binary16, its magnitude a bit lower, is value · 2^-8, subnormals included.
- code · scale is exact in binary64 (4 bits and 24), and so may be fused with a sum: one rounding, that of the sum.
- A delta is taken as base − post, with −0 never among base's values; so a zero delta is +0, and subtracting +0, times
  an alpha above 0, changes nothing, −0 included. No comparison is needed. (For an alpha below 0 the two are exchanged.)
- y + 2^(e+20), where 2^e ≤ y < 2^(e+1), e at least -6, is y rounded to multiples of e4m3's quantum 2^(e-3), to nearest
  even; the sum's bits count them.
"""

# ruff: noqa: RUF005, Triton 3.6 compiles sums of tuples, not what is unpacked into one
import triton
import triton.language as tl

from paramdelta.kernels.codec import MAGNITUDE_OF_F32, item, of
from paramdelta.kernels.operands import scale_pointer, scale_value, scaled_delta, unit_index
from paramdelta.kernels.quantise import chosen_scale, in_units
from paramdelta.kernels.totals import add_sums, tell, weighted_sum

LEAST_NORMAL = tl.constexpr(0x3C800000)  # 2^-6 in binary32, below which e4m3 is subnormal
SIGN_OF_F32 = tl.constexpr(0x80000000)
# What the bits of y + 2^(e+20), and e's own, exceed a code by.
EXCESS = tl.constexpr(968 + (20 << 23))


@triton.jit
def word_pointer(address, FORMAT: tl.constexpr):
    """Return a pointer to groups of four codes at an address, a multiple of 16."""
    if of(FORMAT, "bits") == 8:
        typed = address.to(tl.pointer_type(tl.uint32))
    else:
        tl.static_assert(of(FORMAT, "bits") == 16)
        typed = address.to(tl.pointer_type(tl.uint64))
    return tl.multiple_of(typed, 16)


@triton.jit
def places_of(address, pitch, first_row, first_col, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return pointers to the groups of a unit, offsets within which have 32 bits."""
    corner = address + (first_row * pitch + first_col) * (of(FORMAT, "bits") // 8)
    step = tl.multiple_of((pitch // 4).to(tl.int32), 32 // of(FORMAT, "bits"))
    offset = tl.arange(0, ROWS)[:, None] * step + tl.arange(0, COLS // 4)[None, :]
    return word_pointer(corner, FORMAT) + offset


@triton.jit
def words_of(plane, first_row, first_col, FORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return words of four codes each, which mean nothing where an operand is zeros."""
    if plane[0] is None:
        words = tl.zeros([ROWS, COLS // 4], tl.uint32)
    else:
        words = tl.load(places_of(plane[0], plane[1], first_row, first_col, item(FORM, 0), ROWS, COLS))
    return words


@triton.jit
def has_nan(words, FORM: tl.constexpr):
    """Return words that are not 0 where a code is a NaN that `number` takes for a number: e4m3's."""
    if item(FORM, 0) == "f8_e4m3":
        found = ((words & 0x7F7F7F7F) + 0x01010101) & 0x80808080
    else:
        found = tl.zeros(words.shape, tl.uint32)
    return found


@triton.jit
def number(words, K: tl.constexpr, FORM: tl.constexpr):
    """Return element K of each word in binary64, for e4m3 as value · 2^-8."""
    if item(FORM, 0) == "f8_e4m3":
        # Bytes 1 and 3, or 0 and 2, as a pair of binary16.
        high = words if K % 2 == 1 else words << 8
        pair = (high & 0x80008000) | ((high >> 1) & 0x3F803F80)
        half = (pair >> (16 * (K // 2))).to(tl.uint16).to(tl.float16, bitcast=True)
        single = half.to(tl.float32)
    else:
        word = (words >> (32 * (K // 2))).to(tl.uint32)
        if item(FORM, 0) == "bf16":
            single = (word << 16 if K % 2 == 0 else word & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            tl.static_assert(item(FORM, 0) == "f16")
            single = (word >> (16 * (K % 2))).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return single.to(tl.float64)


@triton.jit
def factor_of(plane, row, col, FORM: tl.constexpr):
    """Return what `number` is multiplied with, [1, 1] in binary64; (row, col) is an element of the tile."""
    if plane[2] is None or plane[0] is None:
        factor = tl.full([1, 1], 256.0 if item(FORM, 0) == "f8_e4m3" else 1.0, tl.float64)
    else:
        at = unit_index(plane[4] + row, plane[5] + col, item(FORM, 2), item(FORM, 3), plane[3])
        stored = tl.load(scale_pointer(plane[2], item(FORM, 1)) + at).to(tl.uint32)
        factor = scale_value(stored, item(FORM, 1)).to(tl.float64) * 256.0
    return factor


@triton.jit
def plus(plane, words, factor, addend, K: tl.constexpr, FORM: tl.constexpr):
    """Return element K of an operand plus an addend, rounded once."""
    if plane[0] is None:
        total = addend
    elif item(FORM, 0) == "f8_e4m3":
        total = tl.fma(number(words, K, FORM), factor, addend)
    else:
        total = number(words, K, FORM) + addend
    return total


@triton.jit
def minus(total, plane, words, factor, K: tl.constexpr, FORM: tl.constexpr):
    """Return a total minus element K of an operand, rounded once."""
    if plane[0] is None:
        rest = total
    elif item(FORM, 0) == "f8_e4m3":
        rest = tl.fma(number(words, K, FORM), factor * -1.0, total)
    else:
        rest = total - number(words, K, FORM)
    return rest


@triton.jit
def merged(planes, words, factors, alphas, zeros, K: tl.constexpr, TERMS: tl.constexpr, FORMS: tl.constexpr):
    """Return acc of element K of each word, and integers that are not 0 where a delta is not."""
    touched = tl.zeros(zeros.shape, tl.uint32)
    step = zeros * -1.0  # a minus sign is 0 − x in Triton 3.6, which makes +0 of 0
    for k in tl.static_range(TERMS):
        base = plus(planes[2 + 2 * k], words[2 + 2 * k], factors[2 + 2 * k], zeros, K, item(FORMS, 2 + 2 * k))
        delta = minus(base, planes[1 + 2 * k], words[1 + 2 * k], factors[1 + 2 * k], K, item(FORMS, 1 + 2 * k))
        bits = delta.to(tl.uint64, bitcast=True)
        touched |= bits.to(tl.uint32) | (bits >> 32).to(tl.uint32)
        product = scaled_delta(delta, alphas[k])
        if k == 0:
            step = product * -1.0
            acc = plus(planes[0], words[0], factors[0], step, K, item(FORMS, 0))
        else:
            acc = acc - product
    if TERMS == 0:
        acc = plus(planes[0], words[0], factors[0], step, K, item(FORMS, 0))
    return acc, touched


@triton.jit
def code_parts(x, factor, RECIPE: tl.constexpr):
    """Return magnitudes of codes + EXCESS, signs in bit 31, (code − y)², and y², for y = x in units of its scale."""
    y = in_units(x, factor, RECIPE)
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & MAGNITUDE_OF_F32
    power_of_two = tl.maximum(magnitude, LEAST_NORMAL) & 0x7F800000
    there = magnitude.to(tl.float32, bitcast=True)
    unit = power_of_two.to(tl.float32, bitcast=True)
    total = tl.fma(unit, tl.full(unit.shape, 1048576.0, tl.float32), there)  # 2^20: an exact product
    error = tl.fma(unit, tl.full(unit.shape, -1048576.0, tl.float32), total) - there
    code = total.to(tl.uint32, bitcast=True) - (power_of_two >> 20) * 0xFFFFF
    return code, bits & SIGN_OF_F32, error, there


@triton.jit
def word_of(codes, signs):
    """Return words of four codes."""
    word = codes[0] + (codes[1] << 8) + (codes[2] << 16) + (codes[3] << 24)
    word -= (EXCESS + (EXCESS << 8) + (EXCESS << 16) + (EXCESS << 24)) & 0xFFFFFFFF
    return word | (signs[0] >> 24) | (signs[1] >> 16) | (signs[2] >> 8) | signs[3]


@triton.jit
def merge_part(planes, alphas, factors, first_row, first_col, TERMS: tl.constexpr, FORMS: tl.constexpr,
               KEEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Return four tensors of values in binary32, one for each place in a word; their largest, and what was touched.

    Where a value is not finite, or a code is NaN, the largest is no number's.
    """
    zeros = tl.zeros([ROWS, COLS // 4], tl.float64)
    touched = tl.zeros([ROWS, COLS // 4], tl.uint32)
    nan = tl.zeros([ROWS, COLS // 4], tl.uint32)
    largest = tl.zeros([ROWS, COLS // 4], tl.float32)
    words, values = (), ()
    for k in tl.static_range(1 + 2 * TERMS):
        words = words + (words_of(planes[k], first_row, first_col, item(FORMS, k), ROWS, COLS),)
        nan |= has_nan(words[k], item(FORMS, k))
    for k in tl.static_range(4):
        acc, some = merged(planes, words, factors, alphas, zeros, k, TERMS, FORMS)
        values = values + (acc.to(tl.float32),)
        touched |= some
        largest = tl.maximum(largest, tl.abs(values[k]), propagate_nan=tl.PropagateNan.ALL)
    bits = tl.where(nan == 0, largest.to(tl.int32, bitcast=True), MAGNITUDE_OF_F32)
    return values, tl.max(bits, 1, keep_dims=True), tl.max((touched != 0).to(tl.int32), 1, keep_dims=True)


@triton.jit
def merge_words(
    planes, alphas, first_row, first_col, out, out_pitch, to, stored, report,
    TERMS: tl.constexpr, FORMS: tl.constexpr, RECIPE: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge and quantise a whole unit, and return False; or write nothing, and return True, where it is not for words.

    Its first element is at (first_row, first_col); `to` is where its scale goes, `stored` new_base's. ROWS and COLS are
    powers of two, all addresses and pitches multiples of 16 bytes, RECIPE has values in binary32, alphas are above 0,
    and no operand's scale differs within the unit.
    """
    PART: tl.constexpr = ROWS // PARTS
    corner = (first_row + tl.zeros([1, 1], tl.int64), first_col + tl.zeros([1, 1], tl.int64))
    factors = ()
    for k in tl.static_range(1 + 2 * TERMS):
        factors = factors + (factor_of(planes[k], corner[0], corner[1], item(FORMS, k)),)
    values = ()
    largest, some = tl.zeros([PART, 1], tl.int32), tl.zeros([PART, 1], tl.int32)
    for part in tl.static_range(PARTS):
        if part > 0:
            # Keeps loads of this part behind the work on the last: all at once would not fit the registers.
            tl.debug_barrier()
        own, top, touch = merge_part(
            planes, alphas, factors, first_row + part * PART, first_col, TERMS, FORMS, KEEP, PART, COLS
        )
        values, largest, some = values + own, tl.maximum(largest, top), tl.maximum(some, touch)
    amax = tl.max(largest, 0, keep_dims=True)
    some = tl.max(some, 0, keep_dims=True)
    scale, factor, same = chosen_scale(amax.to(tl.float32, bitcast=True), some, stored, RECIPE, KIND, KEEP)
    odd = (amax >= 0x7F800000) | ((tl.abs(factor) < float("inf")) == 0)
    left = tl.max(tl.max(odd.to(tl.int32), 1), 0) > 0
    if not left:
        lost, whole = tl.zeros([PART, COLS // 4], tl.float32), tl.zeros([PART, COLS // 4], tl.float32)
        for part in tl.static_range(PARTS):
            row = first_row + part * PART
            codes, signs = (), ()
            for k in tl.static_range(4):
                code, sign, error, y = code_parts(values[4 * part + k], factor, RECIPE)
                codes, signs = codes + (code,), signs + (sign,)
                lost, whole = tl.fma(error, error, lost), tl.fma(y, y, whole)
            word = word_of(codes, signs)
            if KEEP:
                word = tl.where(same, words_of(planes[0], row, first_col, item(FORMS, 0), PART, COLS), word)
            tl.store(places_of(out, out_pitch, row, first_col, "f8_e4m3", PART, COLS), word)
        if KEEP:
            lost = tl.where(same, 0.0, lost)
        weight = scale_value(scale, KIND).to(tl.float64)
        weight = weight * weight
        tl.store(to, scale.to(to.dtype.element_ty))
        add_sums(report, weighted_sum(lost, weight), weighted_sum(whole, weight))
        tell(report, tl.max(tl.max(some, 1), 0), tl.max(tl.max(amax, 1), 0))
    return left
