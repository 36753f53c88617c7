"""Merges of elements of one type: out = new_base + Σ alpha · (post − base), each rounded once from binary64.

Addresses come as integers, None for an operand of zeros; an alpha as the bits of its binary64, with those of Inf
exchanged (`launch.alpha_bits`). Arithmetic is plain binary64: on GPUs whose binary64 runs at half the speed of binary32
it hides behind memory. Kernels must be launched without fusion of products and sums.
"""

import triton
import triton.language as tl

from paramdelta.kernels.codec import encode, of, pointer, value

INF_OF_F64 = tl.constexpr(0x7FF0000000000000)


@triton.jit
def place(index, shape, strides, WHICH: tl.constexpr, RANK: tl.constexpr):
    """Return where element `index`, in row-major order, of operand WHICH lies, in elements. RANK 0: one by one."""
    if RANK == 0:
        return index
    rest = index
    offset = index * 0
    for k in tl.static_range(RANK):
        AXIS: tl.constexpr = RANK - 1 - k
        if AXIS > 0:
            offset += (rest % shape[AXIS]) * strides[WHICH * RANK + AXIS]
            rest = rest // shape[AXIS]
        else:
            offset += rest * strides[WHICH * RANK]
    return offset


@triton.jit
def load(address, offset, mask, FORMAT: tl.constexpr):
    """Return codes; those of zeros where there is no memory, and where the mask is False."""
    if address is None:
        return tl.zeros(offset.shape, pointer(offset, FORMAT).dtype.element_ty)
    return tl.load(pointer(address, FORMAT) + offset, mask=mask, other=0)


@triton.jit
def add_term(acc, touched, post, base, alpha, FORMAT: tl.constexpr):
    """Return acc + alpha · (post − base), each operation rounded, where post and base differ; and where they do."""
    delta = value(post, FORMAT) - value(base, FORMAT)
    adds = (post != base) & (delta != 0.0)
    return tl.where(adds, acc + alpha * delta, acc), touched | adds


@triton.jit
def alpha_of(bits):
    """Return the binary64 that `launch.alpha_bits` made an integer of."""
    return (bits.to(tl.int64) ^ INF_OF_F64).to(tl.float64, bitcast=True)


@triton.jit
def store(out, offset, mask, new_base, acc, touched, counts, FORMAT: tl.constexpr):
    """Write acc encoded, or new_base's own bits where no term touched it, and add up NaN, Inf and overflow."""
    code, over = encode(acc, FORMAT)
    code = tl.where(touched, code, new_base.to(tl.uint32))
    tl.store(pointer(out, FORMAT) + offset, code.to(new_base.dtype), mask=mask)
    # Whatever is counted has no finite code.
    special = (code & ((1 << (of(FORMAT, "bits") - 1)) - 1)) > of(FORMAT, "largest")
    if tl.max(special.to(tl.int32), 0) > 0:
        to = counts.to(tl.pointer_type(tl.int64))
        tl.atomic_add(to, tl.sum((acc != acc).to(tl.int64), 0))
        tl.atomic_add(to + 1, tl.sum((tl.abs(acc) == float("inf")).to(tl.int64), 0))
        tl.atomic_add(to + 2, tl.sum(over.to(tl.int64), 0))


@triton.jit
def merge(
    new_base,
    posts,
    bases,
    alphas,
    out,
    counts: "i64",
    count: "i64",
    shape,
    strides,
    TERMS: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge `count` elements: operands and strides in the order new_base, out, then post and base of each term."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    own = load(new_base, place(index, shape, strides, 0, RANK), mask, FORMAT)
    acc = value(own, FORMAT)
    touched = mask & False
    for k in tl.static_range(TERMS):
        post = load(posts[k], place(index, shape, strides, 2 + 2 * k, RANK), mask, FORMAT)
        base = load(bases[k], place(index, shape, strides, 3 + 2 * k, RANK), mask, FORMAT)
        acc, touched = add_term(acc, touched, post, base, alpha_of(alphas[k]), FORMAT)
    store(out, place(index, shape, strides, 1, RANK), mask, own, acc, touched, counts, FORMAT)


@triton.jit
def merge_each(
    table,
    chunks,
    alphas,
    counts: "i64",
    TERMS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge many tensors in one launch.

    A row of `table` (int64) has a tensor's number of elements, the number of its first chunk of BLOCK elements, and the
    addresses of new_base, out, then post and base of each term; `chunks` (int32) has for every program its row.
    """
    WIDTH: tl.constexpr = 4 + 2 * TERMS
    program = tl.program_id(0).to(tl.int64)
    row = table.to(tl.pointer_type(tl.int64)) + tl.load(chunks.to(tl.pointer_type(tl.int32)) + program).to(tl.int64) * WIDTH
    index = (program - tl.load(row + 1)) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tl.load(row)
    own = load(tl.load(row + 2), index, mask, FORMAT)
    acc = value(own, FORMAT)
    touched = mask & False
    for k in tl.static_range(TERMS):
        post = load(tl.load(row + 4 + 2 * k), index, mask, FORMAT)
        base = load(tl.load(row + 5 + 2 * k), index, mask, FORMAT)
        acc, touched = add_term(acc, touched, post, base, alpha_of(alphas[k]), FORMAT)
    store(tl.load(row + 3), index, mask, own, acc, touched, counts, FORMAT)
