"""Starts the kernels for matrices of fp8 codes and scales: picks tiles, and the passes that a grid of units needs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from paramdelta.kernels import blocks
from paramdelta.kernels.codec import FORMATS
from paramdelta.kernels.launch import alpha_bits, interpreted

# 16 elements to a thread are a load of 16 bytes of codes; with more, what is known of them does not fit its registers.
TILE = (32, 128)
PER_THREAD = 16
# A unit of 128 × 128 is held in the registers of 256 threads, as 64 numbers each, and two programs share a processor:
# its 65536 registers are 128 for each thread. The assembler spills least where it is told of a few less. More than one
# delta does not fit: then it is 512 threads, and one program.
UNIT_WARPS, SEVERAL_WARPS = 8, 16
UNIT_REGISTERS = 124
LARGEST_TILE = 128 * 128
# A program to a smaller unit would have too little to load: those units are measured and encoded in tiles of many.
LEAST_TILE = 1024
# Offsets within a unit of 128 rows have 32 bits.
WIDEST = 1 << 22
CLEARED = 1024  # int32 that one program sets to 0


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
    tile: tuple[int, int] = TILE,
    held: dict[str, int] | None = None,
) -> None:
    """Launch a merge of matrices of ``rows`` × ``cols`` elements on the current device and stream.

    ``out`` has the address and pitch of the codes and, with a ``quantiser``, the output's scales (their ``rows`` and
    ``cols`` are the quantiser's). ``report`` is the address of the totals (kernels/totals.py), six words of 64 bits
    that are added to. ``units`` is memory for two int32 per unit where not ``in_one_pass``. ``tile`` is what a program
    merges, both powers of two, ``held`` the PARTS and STRIP that `shape` chooses. Terms with alpha = 0 must have
    been left out.
    """
    if rows == 0 or cols == 0:
        return
    # alpha · (post − base) is −alpha · (base − post), bit for bit; kernels/words.py takes alphas above 0.
    terms = [(post, base, alpha) if alpha > 0 else (base, post, -alpha) for post, base, alpha in terms]
    planes = [new_base, *(plane for post, base, _ in terms for plane in (post, base))]
    fused = quantiser is not None and in_one_pass(quantiser)
    if quantiser is not None and fused:
        tile = (_power_of_two(quantiser.rows), _power_of_two(quantiser.cols))
        steps = (quantiser.rows, quantiser.cols)
    else:
        steps = tile
    forms = tuple(_form(plane, steps) for plane in planes)
    common: dict[str, Any] = {"TERMS": len(terms), "FORMS": forms, "ALIGN": _alignment([*planes, out])}
    common |= {
        "TILE_ROWS": tile[0],
        "TILE_COLS": tile[1],
        "num_warps": max(1, tile[0] * tile[1] // (32 * PER_THREAD)),
        "enable_fp_fusion": False,
    }
    alphas = tuple(None if alpha == 1.0 else alpha_bits(alpha) for _, _, alpha in terms)
    operands = (tuple(_plane(plane) for plane in planes), alphas)
    grid = (-(-cols // steps[1]), -(-rows // steps[0]))

    def start(kernel: Any, *arguments: Any, **options: Any) -> None:
        kernel[grid](*operands, *arguments, **(common | options))

    if quantiser is None:
        own = new_base.scales is None and new_base.format == out.format and new_base.address != 0
        start(blocks.merge_plain, out.address, out.pitch, report, rows, cols, FORMAT=out.format, OWN=own)
    else:
        fit: dict[str, Any] = {}
        if fused:
            fit = {"WORDS": in_words(quantiser, [*planes, out], forms, common["ALIGN"])} | shape(tile, len(terms))
            fit |= held or ({"PARTS": 1, "STRIP": tile[0]} if interpreted() else {})
        _quantise(start, quantiser, fit, rows, cols, out, report, units)


def shape(unit: tuple[int, int], terms: int) -> dict[str, int]:
    """Return how a program merges a unit: in how many warps, parts (of words) and rows at once (else)."""
    area = unit[0] * unit[1]
    most = UNIT_WARPS if terms <= 1 else SEVERAL_WARPS
    warps = max(1, min(most, area // (32 * PER_THREAD)))
    parts = max(1, min(area // LARGEST_TILE * 4, unit[0]))
    strip = max(1, min(unit[0], warps * 32 * 4 // unit[1]))
    registers = {"maxnreg": UNIT_REGISTERS} if warps == UNIT_WARPS == most else {}
    return {"num_warps": warps, "PARTS": parts, "STRIP": strip} | registers


def in_words(quantiser: Quantiser, planes: Sequence[Plane], forms: Sequence[tuple[Any, ...]], align: int) -> bool:
    """Return whether whole units can go the quick way of kernels/words.py."""
    return (
        align == 16
        and all(plane.pitch < WIDEST for plane in planes)
        and quantiser.values == "f32"
        and all(n == _power_of_two(n) and n >= 16 for n in (quantiser.rows, quantiser.cols))
        and all(FORMATS[plane.format].bits == 16 or plane.format == "f8_e4m3" for plane in planes if plane.address)
        and all(FORMATS[plane.format].bits == 8 or plane.scales is None for plane in planes)
        and not any(by_row or by_col for *_, by_row, by_col in forms)
    )


def _quantise(
    start: Callable[..., None], q: Quantiser, fit: dict[str, Any], rows: int, cols: int, out: Plane, report: int,
    units: int,
) -> None:  # fmt: skip
    recipe = (q.rule, q.largest, q.floor, q.zero, q.reciprocal, q.values)
    scales = out.scales or Scales(0, q.kind, 1, q.rows, q.cols)
    size = {"RECIPE": recipe, "ROWS": q.rows, "COLS": q.cols}
    policy = {"KIND": q.kind, "KEEP": q.keep and q.given is None}
    if fit:
        start(
            blocks.merge_units, out.address, out.pitch, scales.address, scales.pitch, report, rows, cols,
            **size, **policy, **fit,
        )  # fmt: skip
        return
    down, across = unit_count(q, rows, cols)
    blocks.clear[(-(-2 * down * across // CLEARED),)](units, 2 * down * across, BLOCK=CLEARED)
    start(blocks.measure_units, units, across, down * across, report, rows, cols, **size)
    given = 0 if q.given is None else struct.unpack("<I", struct.pack("<f", q.given))[0]
    start(
        blocks.encode_units, units, across, down * across, given, out.address, out.pitch, scales.address, scales.pitch,
        report, rows, cols, GIVEN=q.given is not None, **size, **policy,
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
