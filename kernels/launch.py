"""Starts the kernels on addresses: what a caller knows, operands in memory, turned into what a kernel takes."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paramdelta.kernels import plain
from paramdelta.kernels.codec import FORMATS

# 128 threads with 8 elements each: a load of 16 bytes of bf16 per thread and operand.
BLOCK = 1024
WARPS = 4
_INF = 0x7FF0000000000000
# Words of a table in the arguments of one launch: 1 KiB of the 4 that there may be.
WRITTEN = 128


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU memory."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def alpha_bits(alpha: float) -> int:
    """Return a finite alpha as an integer that Triton takes for what it is.

    A float would be rounded to binary32. Integers are specialised: 1 becomes a constant without a type. Exchanging the
    bits of the exponent leaves no finite number near it: positive ones are 2^52 at least, negative ones negative.
    """
    bits: int = struct.unpack("<q", struct.pack("<d", alpha))[0]
    return bits ^ _INF


def merge(
    new_base: int,
    terms: Sequence[tuple[int, int, float]],
    out: int,
    counts: int,
    count: int,
    format: str,
    *,
    shape: Sequence[int] = (),
    strides: Sequence[Sequence[int]] = (),
    block: int = BLOCK,
) -> None:
    """Launch a merge of ``count`` elements of one format on the current device and stream.

    Addresses are of the device's memory, 0 for zeros, multiples of an element's size; ``counts`` is that of three int64
    that NaN, Inf and overflow are added to. ``shape`` and ``strides`` (in elements, for new_base, out, then post and
    base of each term) are given where operands are not in row-major order. Terms with alpha = 0 must have been left
    out.
    """
    if count == 0:
        return
    operands = (new_base, out, *(address for post, base, _ in terms for address in (post, base)))
    plain.merge[(-(-count // block),)](
        tuple(address or None for address in operands),
        tuple(alpha_bits(alpha) for _, _, alpha in terms),
        counts,
        count,
        tuple(shape),
        tuple(step for operand in strides for step in operand),
        TERMS=len(terms),
        FORMAT=format,
        RANK=len(shape),
        ALIGN=alignment(format, *operands),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def table_of(counts: NDArray[np.int64], *columns: NDArray[np.int64], block: int = BLOCK) -> NDArray[np.int64]:
    """Return the table and the chunks that `plain.merge_each` reads, one after the other, as int64.

    ``columns`` are the elements of each tensor, then the addresses of its counts, new_base, out, and post and base of
    each term. What follows the table's rows are the chunks, two to a word.
    """
    pieces = -(-counts // block)
    starts = np.cumsum(pieces) - pieces
    rows = np.stack([counts, starts, *columns], axis=1).reshape(-1)
    chunks = np.repeat(np.arange(counts.size, dtype=np.int32), pieces)
    return np.concatenate([rows, np.pad(chunks, (0, chunks.size % 2)).view(np.int64)])


def merge_each(
    table: int, tensors: int, programs: int, alphas: Sequence[float], format: str, *, align: int, block: int = BLOCK
) -> None:
    """Launch a merge of many tensors, described by what `table_of` made, on the current device and stream."""
    if programs == 0:
        return
    plain.merge_each[(programs,)](
        table,
        table + tensors * (5 + 2 * len(alphas)) * 8,
        tuple(alpha_bits(alpha) for alpha in alphas),
        TERMS=len(alphas),
        FORMAT=format,
        ALIGN=align,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def alignment(format: str, *addresses: int) -> int:
    """Return what all addresses are multiples of: 16 bytes, or else an element. Each is compiled apart."""
    return 16 if not any(address % 16 for address in addresses) else FORMATS[format].bits // 8


def word(value: int) -> int:
    """Return a number from 0 to 2^61 − 1 as an argument of `plain.write`.

    Triton compiles a kernel anew for arguments that are 1, are multiples of 16, or fit 32 bits: these never are.
    """
    return value << 1 | 1 | 1 << 62


def write(table: int, words: NDArray[np.int64]) -> None:
    """Launch what writes a table, whose size is a multiple of WRITTEN, to an address in the device's memory.

    The table is in the arguments of launches, which a CUDA graph keeps; host memory it would read again.
    """
    for first in range(0, words.size, WRITTEN):
        values = tuple(word(value) for value in words[first : first + WRITTEN].tolist())
        plain.write[(1,)](table, first, values, COUNT=WRITTEN, num_warps=1)
