"""Starts the kernels on addresses: what a caller knows, operands in memory, turned into what a kernel takes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from paramdelta.kernels import plain

# 128 threads with 8 elements each: a load of 16 bytes of bf16 per thread and operand.
BLOCK = 1024
WARPS = 4
_INF = 0x7FF0000000000000
# A launch is refused beyond 2^31 − 1 programs; memory for so many elements does not exist.


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
) -> None:
    """Launch a merge of ``count`` elements of one format on the current device and stream.

    Addresses are of the device's memory, 0 for zeros; ``counts`` is that of three int64 that NaN, Inf and overflow are
    added to. ``shape`` and ``strides`` (in elements, for new_base, out, then post and base of each term) are given
    where operands are not in row-major order. Terms with alpha = 0 must have been left out.
    """
    if count == 0:
        return
    plain.merge[(-(-count // BLOCK),)](
        new_base or None,
        tuple(post or None for post, _, _ in terms),
        tuple(base or None for _, base, _ in terms),
        tuple(alpha_bits(alpha) for _, _, alpha in terms),
        out,
        counts,
        count,
        tuple(shape),
        tuple(step for operand in strides for step in operand),
        TERMS=len(terms),
        FORMAT=format,
        RANK=len(shape),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def merge_each(table: int, chunks: int, programs: int, alphas: Sequence[float], counts: int, format: str) -> None:
    """Launch a merge of many tensors, described as `plain.merge_each` says, on the current device and stream."""
    if programs == 0:
        return
    plain.merge_each[(programs,)](
        table,
        chunks,
        tuple(alpha_bits(alpha) for alpha in alphas),
        counts,
        TERMS=len(alphas),
        FORMAT=format,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
