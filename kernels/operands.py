"""Operands of a merge of matrices: elements and the scales that they use, decoded and added up in binary64.

A matrix is codes at an address with a pitch, and a grid of scales: the element (r, c) uses the scale
((phase_r + r) // rows, (phase_c + c) // cols), 0 standing for the whole extent.

Operands come as a tuple of `planes`, new_base first, then post and base of each term: (address of codes or None for
zeros, their pitch in elements, address of scales or None, their pitch, row phase, column phase). What is known when
compiling is in FORMS: (format, type of scale, rows, cols, whether its scales differ by row, by column, within a tile).
"""

import triton
import triton.language as tl

from paramdelta.kernels.codec import NAN_OF_F32, item, of, pointer, power, raw, shorten, value
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
def scaled_delta(delta, alpha):
    """Return alpha · delta; no alpha stands for 1."""
    if alpha is None:
        product = delta
    else:
        product = alpha_of(alpha) * delta
    return product


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
        acc = tl.where(adds, acc + scaled_delta(delta, alphas[k]), acc)
        touched |= adds
    return tl.where(within, acc, 0.0), touched, own, within
