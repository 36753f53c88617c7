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
        offset = index
    else:
        rest = index
        offset = index * 0
        for axis in tl.static_range(RANK - 1, 0, -1):
            offset += (rest % shape[axis]) * strides[WHICH * RANK + axis]
            rest = rest // shape[axis]
        offset += rest * strides[WHICH * RANK]
    return offset


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
def store(out, offset, mask, new_base, acc, touched, counts, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """Write acc encoded, or new_base's own bits where no term touched it, and add up NaN, Inf and overflow."""
    code, _ = encode(acc, FORMAT)
    code = tl.where(touched, code, new_base)
    target = pointer(out, FORMAT, ALIGN) + offset
    tl.store(target, code.to(target.dtype.element_ty), mask=mask)
    # Whatever is counted has no finite code, and what of that has a finite acc has overflowed.
    special = (code & ((1 << (of(FORMAT, "bits") - 1)) - 1)) > of(FORMAT, "largest")
    if tl.max(special.to(tl.int32), 0) > 0:
        to = counts.to(tl.pointer_type(tl.int64))
        tl.atomic_add(to, tl.sum((acc != acc).to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(to + 1, tl.sum((tl.abs(acc) == float("inf")).to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(to + 2, tl.sum((special & (tl.abs(acc) < float("inf"))).to(tl.int64), 0), sem="relaxed")


@triton.jit
def load(operands, k, offset, mask, FORMAT: tl.constexpr, ALIGN: tl.constexpr, TABLE: tl.constexpr):
    """Return codes of operand k of a tuple of addresses, or of a table that `operands` points into, as uint32.

    They are 0 where the tuple has no address, and where the mask is False.
    """
    if TABLE:
        at = pointer(tl.load(operands + k), FORMAT, ALIGN) + offset
        codes = tl.load(at, mask=mask, other=0).to(tl.uint32)
    elif operands[k] is None:
        codes = tl.zeros(offset.shape, tl.uint32)
    else:
        at = pointer(operands[k], FORMAT, ALIGN) + offset
        codes = tl.load(at, mask=mask, other=0).to(tl.uint32)
    return codes


@triton.jit
def merge_chunk(operands, alphas, counts, index, mask, shape, strides, TERMS: tl.constexpr, FORMAT: tl.constexpr,
                RANK: tl.constexpr, ALIGN: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    """Merge the elements `index`. Operands, and their strides, are new_base, out, then post and base of each term."""
    own = load(operands, 0, place(index, shape, strides, 0, RANK), mask, FORMAT, ALIGN, TABLE)
    acc = value(own, FORMAT)
    touched = mask & False
    for k in tl.static_range(TERMS):
        to_post, to_base = place(index, shape, strides, 2 + 2 * k, RANK), place(index, shape, strides, 3 + 2 * k, RANK)
        post = load(operands, 2 + 2 * k, to_post, mask, FORMAT, ALIGN, TABLE)
        base = load(operands, 3 + 2 * k, to_base, mask, FORMAT, ALIGN, TABLE)
        acc, touched = add_term(acc, touched, post, base, alpha_of(alphas[k]), FORMAT)
    if TABLE:
        out = tl.load(operands + 1)
    else:
        out = operands[1]
    store(out, place(index, shape, strides, 1, RANK), mask, own, acc, touched, counts, FORMAT, ALIGN)


@triton.jit
def merge_chunks(operands, alphas, counts, start, count, shape, strides, TERMS: tl.constexpr, FORMAT: tl.constexpr,
                 RANK: tl.constexpr, ALIGN: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Merge BLOCK elements from `start` on, or what there are; a full chunk without a mask, which narrows loads."""
    index = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        every = tl.full([BLOCK], 1, tl.int1)
        merge_chunk(operands, alphas, counts, index, every, shape, strides, TERMS, FORMAT, RANK, ALIGN, TABLE)
    else:
        merge_chunk(operands, alphas, counts, index, index < count, shape, strides, TERMS, FORMAT, RANK, ALIGN, TABLE)


@triton.jit
def merge(operands, alphas, counts: tl.int64, count: tl.int64, shape, strides, TERMS: tl.constexpr,
          FORMAT: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Merge `count` elements of one tensor."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    merge_chunks(operands, alphas, counts, start, count, shape, strides, TERMS, FORMAT, RANK, ALIGN, False, BLOCK)


@triton.jit
def merge_each(table: tl.int64, chunks: tl.int64, alphas, TERMS: tl.constexpr, FORMAT: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Merge many tensors in one launch.

    A row of `table` (int64) has a tensor's number of elements, the number of its first chunk of BLOCK elements, and the
    addresses of its counts, new_base and out, then of post and base of each term, none of them 0. `chunks` (int32) has
    the row for every program.
    """
    WIDTH: tl.constexpr = 5 + 2 * TERMS
    program = tl.program_id(0).to(tl.int64)
    mine = tl.load(chunks.to(tl.pointer_type(tl.int32)) + program).to(tl.int64)
    row = table.to(tl.pointer_type(tl.int64)) + mine * WIDTH
    start = (program - tl.load(row + 1)) * BLOCK
    count, counts = tl.load(row), tl.load(row + 2)
    merge_chunks(row + 3, alphas, counts, start, count, (), (), TERMS, FORMAT, 0, ALIGN, True, BLOCK)


@triton.jit
def write(to: tl.int64, first: tl.int64, words, COUNT: tl.constexpr):
    """Write COUNT words of 64 bits, which are arguments as `launch.word` makes them, to `to` from word `first` on."""
    at = to.to(tl.pointer_type(tl.int64)) + first
    for k in tl.static_range(COUNT):
        tl.store(at + k, (words[k] & 0x3FFFFFFFFFFFFFFF) >> 1)
