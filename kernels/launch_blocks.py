"""Starts the kernels for matrices of fp8 codes and scales: picks tiles, and the passes that a grid of units needs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from paramdelta.kernels import blocks
from paramdelta.kernels.codec import FORMATS
from paramdelta.kernels.launch import alpha_bits

# A unit of 128 × 128 in the registers of 512 threads, 32 elements each: with half as many threads registers spill.
TILE = 128
WARPS = 16
LARGEST_TILE = TILE * TILE
# A program to a smaller unit would have too little to load: those units are measured and encoded in tiles of many.
LEAST_TILE = 1024


class Scales(NamedTuple):
    """A grid of scales: address, type (f32, bf16, f8_e8m0), pitch in scales, elements per scale, where it begins."""

    address: int
    kind: str
    pitch: int
    rows: int
    cols: int
    row_phase: int = 0
    col_phase: int = 0


class Plane(NamedTuple):
    """A matrix in memory: the address of its codes (0: zeros), their format, their pitch in elements, its scales."""

    address: int
    format: str
    pitch: int
    scales: Scales | None = None


class Quantiser(NamedTuple):
    """How the output is quantised: a recipe's rule and constants, the grid of units, the scales' type, the policy."""

    rule: str
    largest: float
    floor: float
    zero: float
    reciprocal: bool
    values: str
    rows: int
    cols: int
    kind: str
    keep: bool = False
    given: float | None = None


def unit_count(quantiser: Quantiser, rows: int, cols: int) -> tuple[int, int]:
    """Return how many units a matrix has in either direction."""
    return (-(-rows // quantiser.rows) if quantiser.rows else 1, -(-cols // quantiser.cols) if quantiser.cols else 1)


def in_one_pass(quantiser: Quantiser) -> bool:
    """Return whether each unit fits a tile, so that no memory for `units` is needed."""
    area = _power_of_two(quantiser.rows) * _power_of_two(quantiser.cols)
    return quantiser.given is None and quantiser.rows * quantiser.cols >= LEAST_TILE and area <= LARGEST_TILE


def merge(
    new_base: Plane,
    terms: Sequence[tuple[Plane, Plane, float]],
    rows: int,
    cols: int,
    out: Plane,
    report: int,
    *,
    quantiser: Quantiser | None = None,
    units: int = 0,
    tile: tuple[int, int] = (TILE, TILE),
) -> None:
    """Launch a merge of matrices of ``rows`` × ``cols`` elements on the current device and stream.

    ``out`` has the address and pitch of the codes and, with a ``quantiser``, the output's scales (their ``rows`` and
    ``cols`` are the quantiser's). ``report`` is the address of five int64: NaN, Inf and overflow are added to the
    first three; the fourth becomes the largest finite |x|, as binary32's bits, the fifth 1 where a delta is not zero.
    ``units`` is memory, zeroed, for two int32 per unit where not ``in_one_pass``. Terms with alpha = 0 must have been
    left out.
    """
    if rows == 0 or cols == 0:
        return
    planes = [new_base, *(plane for post, base, _ in terms for plane in (post, base))]
    fused = quantiser is not None and in_one_pass(quantiser)
    if quantiser is not None and fused:
        tile = (_power_of_two(quantiser.rows), _power_of_two(quantiser.cols))
        steps = (quantiser.rows, quantiser.cols)
    else:
        steps = tile
    forms = tuple(_form(plane, steps) for plane in planes)
    common: dict[str, Any] = {"TERMS": len(terms), "FORMS": forms, "ALIGN": _alignment([*planes, out])}
    common |= {"TILE_ROWS": tile[0], "TILE_COLS": tile[1], "num_warps": WARPS, "enable_fp_fusion": False}
    operands = (tuple(_plane(plane) for plane in planes), tuple(alpha_bits(alpha) for _, _, alpha in terms))
    grid = (-(-cols // steps[1]), -(-rows // steps[0]))

    def start(kernel: Any, *arguments: Any, **options: Any) -> None:
        kernel[grid](*operands, *arguments, **common, **options)

    if quantiser is None:
        own = new_base.scales is None and new_base.format == out.format and new_base.address != 0
        start(blocks.merge_plain, out.address, out.pitch, report, rows, cols, FORMAT=out.format, OWN=own)
    else:
        _quantise(start, quantiser, fused, rows, cols, out, report, units)


def _quantise(
    start: Callable[..., None], q: Quantiser, fused: bool, rows: int, cols: int, out: Plane, report: int, units: int
) -> None:
    recipe = (q.rule, q.largest, q.floor, q.zero, q.reciprocal, q.values)
    scales = out.scales or Scales(0, q.kind, 1, q.rows, q.cols)
    size = {"RECIPE": recipe, "ROWS": q.rows, "COLS": q.cols}
    policy = {"KIND": q.kind, "KEEP": q.keep and q.given is None}
    if fused:
        start(
            blocks.merge_units, out.address, out.pitch, scales.address, scales.pitch, report, rows, cols,
            **size, **policy,
        )  # fmt: skip
        return
    down, across = unit_count(q, rows, cols)
    start(blocks.measure_units, units, across, down * across, report, rows, cols, **size)
    given = 0 if q.given is None else struct.unpack("<I", struct.pack("<f", q.given))[0]
    start(
        blocks.encode_units, units, across, down * across, given, out.address, out.pitch, scales.address, scales.pitch,
        rows, cols, GIVEN=q.given is not None, **size, **policy,
    )  # fmt: skip


def _plane(plane: Plane) -> tuple[int | None, ...]:
    if plane.scales is None:
        return plane.address or None, plane.pitch, None, 0, 0, 0
    scales = plane.scales
    return plane.address or None, plane.pitch, scales.address, scales.pitch, scales.row_phase, scales.col_phase


def _form(plane: Plane, steps: tuple[int, int]) -> tuple[str, str, int, int, bool, bool]:
    if plane.scales is None:
        return plane.format, "", 0, 0, False, False
    s = plane.scales
    by_row, by_col = (
        unit > 0 and (unit % step > 0 or phase % step > 0)
        for unit, step, phase in ((s.rows, steps[0], s.row_phase), (s.cols, steps[1], s.col_phase))
    )
    return plane.format, s.kind, s.rows, s.cols, by_row, by_col


def _alignment(planes: Sequence[Plane]) -> int:
    found = [(p.address, p.pitch * FORMATS[p.format].bits // 8) for p in planes if p.address]
    if not any(address % 16 or pitch % 16 for address, pitch in found):
        return 16
    return min(FORMATS[plane.format].bits // 8 for plane in planes)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length() if n else 0
