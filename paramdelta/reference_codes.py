"""The stored form of quantised matrices in NumPy: codes, scales, grids of units, and what they decode to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta import reference
from paramdelta.dtypes import BY_NAME
from paramdelta.formats import CODEC_BITS
from paramdelta.reference import Codes, Values

Singles = NDArray[np.float32]

# Mantissa bits and bias of the codes that ``reference`` does not know, each as wide as the number after them.
_SHORT = {"f4": (1, 1, 4), "f8_e4m3fnuz": (3, 8, 8), "f8_e5m2fnuz": (2, 16, 8)}


class Scaled(NamedTuple):
    """A stored matrix: codes [R, C], one to an element, and codes of scales [gr, gc], None for a plain matrix.

    ``codec`` and ``scale_dtype`` are names. Element (r, c) uses the scale (r // rows, c // cols), 0 being the whole
    extent. ``zero_points`` (i4 only) are nibbles, one for each scale; None is 8 throughout.
    """

    codes: Codes
    codec: str
    scales: Codes | None = None
    scale_dtype: str | None = None
    rows: int = 0
    cols: int = 0
    second: float | None = None
    second_kind: str = ""
    zero_points: Codes | None = None


def pack(codes: Codes, codec: str) -> NDArray[np.uint8]:
    """Return the bytes [R, ceil(C · bits / 8)] of codes [R, C]: little endian, even columns in the low nibbles."""
    if CODEC_BITS[codec] == 4:
        even = codes.astype(np.uint8)
        odd = np.zeros((len(even), (even.shape[1] + 1) // 2), np.uint8)
        odd[:, : even.shape[1] // 2] = even[:, 1::2]
        packed: NDArray[np.uint8] = even[:, ::2] | (odd << np.uint8(4))
        return packed
    typed = np.ascontiguousarray(codes, f"<u{CODEC_BITS[codec] // 8}")
    return typed.view(np.uint8).reshape(len(typed), typed.shape[1] * typed.itemsize)


def unpack(raw: NDArray[np.uint8], codec: str, cols: int) -> Codes:
    """Return the codes [R, ``cols``] that lie in the bytes [R, ceil(cols · bits / 8)]: what :func:`pack` undoes."""
    if CODEC_BITS[codec] == 4:
        return np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), 2 * raw.shape[1])[:, :cols]
    width = CODEC_BITS[codec] // 8
    return np.ascontiguousarray(raw).view(f"<u{width}").reshape(len(raw), cols)


def unpack_zero_points(words: NDArray[np.uint32], rows: int) -> Codes:
    """Return nibbles [rows, gc] of words [ceil(rows / 8), gc]: row r is nibble r % 8 of word r // 8, low bits first."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles: Codes = (words[:, None, :] >> shifts[None, :, None]) & np.uint32(15)
    return nibbles.reshape(8 * len(words), words.shape[1])[:rows].astype(np.uint8)


def code_values(codes: Codes, codec: str) -> Values:
    """Return the values of codes, before any scale. A nibble of ``i4`` is worth itself: zero points are decode's."""
    if codec == "i4":
        return codes.astype(np.float64)
    if codec not in _SHORT:
        return reference.decode(codes, BY_NAME[codec])
    mantissa, bias, bits = _SHORT[codec]
    magnitude = codes.astype(np.int64) & ((1 << (bits - 1)) - 1)
    negative = codes.astype(np.int64) >> (bits - 1) != 0
    field, fraction = magnitude >> mantissa, magnitude & ((1 << mantissa) - 1)
    significand = np.where(field > 0, fraction + (1 << mantissa), fraction)
    value: Values = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - bias - mantissa)
    if bits == 8:  # fnuz: where −0 would be lies the only NaN
        value = np.where(negative & (magnitude == 0), np.nan, value)
    return np.where(negative, -value, value)


def scale_values(codes: Codes, dtype: str) -> Values:
    """Return the values of stored scales (f32, bf16, f16, f8_e4m3, or f8_e8m0: 2^(b − 127), 255 being NaN)."""
    if dtype != "f8_e8m0":
        return reference.decode(codes, BY_NAME[dtype])
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127))


def scale_codes(values: Values | Singles, dtype: str) -> Codes:
    """Return scales as stored, each rounded once. For f8_e8m0 they must be powers of two."""
    if dtype != "f8_e8m0":
        return reference.encode(values.astype(np.float64), BY_NAME[dtype])[0]
    fraction, exponent = np.frexp(values.astype(np.float64))
    if not (fraction == 0.5).all() or (exponent < -126).any() or (exponent > 128).any():
        raise ValueError("f8_e8m0 holds powers of two from 2^-127 to 2^127: this recipe makes other scales")
    return (exponent + 126).astype(np.uint8)


def grid_shape(shape: tuple[int, ...], rows: int, cols: int) -> tuple[int, int]:
    """Return how many units a matrix has in either direction; the last ones may be smaller."""
    return -(-shape[0] // rows) if rows else 1, -(-shape[1] // cols) if cols else 1


def spread(grid: NDArray[Any], shape: tuple[int, ...], rows: int, cols: int) -> NDArray[Any]:
    """Return for each element of a matrix of this shape what the grid holds for its unit."""
    if grid.shape != grid_shape(shape, rows, cols):
        raise ValueError(f"a grid of {grid.shape}, but {shape} in units of {rows} × {cols} needs another")
    row, col = (np.arange(n) // (unit or max(n, 1)) for n, unit in zip(shape, (rows, cols), strict=True))
    return grid[row][:, col]


def unit_max(values: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """Return the maximum of each unit, of values that are not negative: 0 or False for an empty unit."""
    out = np.zeros(grid_shape(values.shape, rows, cols), values.dtype)
    if values.size:
        for axis, unit in enumerate((rows, cols)):
            values = np.maximum.reduceat(values, np.arange(0, values.shape[axis], unit or values.shape[axis]), axis)
        out[...] = values
    return out


def decode(matrix: Scaled) -> Values:
    """Return the values of a stored matrix. Nothing is rounded but s / t, to binary32."""
    values = code_values(matrix.codes, matrix.codec)
    shape = values.shape
    if matrix.codec == "i4":
        zero = np.full_like(values, 8.0)
        if matrix.zero_points is not None:
            zero = spread(matrix.zero_points, shape, matrix.rows, matrix.cols).astype(np.float64)
        values = values - zero
    if matrix.scales is None:
        return values
    assert matrix.scale_dtype is not None
    scales = scale_values(matrix.scales, matrix.scale_dtype)
    with np.errstate(all="ignore"):
        if matrix.second_kind == "multiply":
            scales = scales * np.float64(np.float32(matrix.second))
        elif matrix.second_kind == "divide":
            scales = (scales.astype(np.float32) / np.float32(matrix.second)).astype(np.float64)
        product: Values = values * spread(scales, shape, matrix.rows, matrix.cols)
    return product
