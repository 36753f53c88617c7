"""Scale grids: which grid the shape of a scale can be, given the shape of its weight.

A grid is (rows, cols): elements per scale, 0 for the whole extent. The scale of a weight [..., N, K] has the shape
[..., ceil(N / rows), ceil(K / cols)], with 1 for a whole extent.
"""

from __future__ import annotations

from collections.abc import Iterable

Grid = tuple[int, int]
Shape = tuple[int, ...]

TENSOR: Grid = (0, 0)
ROW: Grid = (1, 0)
COLUMN: Grid = (0, 1)  # of stacks that are stored transposed
BLOCKS: tuple[Grid, ...] = ((128, 128), (32, 32), (64, 64), (256, 256), (1, 128), (1, 64), (1, 32), (1, 16))

# What a format's grid can be where no config says it, the likeliest first.
USUAL: dict[str, tuple[Grid, ...]] = {
    "fp8-block": BLOCKS,
    "fp8-channel": (ROW, COLUMN),
    "fp8-tensor": (TENSOR,),
    "mxfp8": ((1, 32),),
    "mxfp4": ((1, 32),),
    "nvfp4": ((1, 16),),
    "int4": ((1, 32), (1, 128), (1, 64), (1, 256), (1, 16), ROW),
}


def matrix(shape: Shape) -> tuple[Shape, int, int]:
    """Return a weight's shape as (what it is a stack of, rows, columns)."""
    if len(shape) < 2:
        return (), 1, shape[0] if shape else 1
    return shape[:-2], shape[-2], shape[-1]


def grid_shape(shape: Shape, grid: Grid) -> Shape:
    """Return the shape of the scale of a weight of ``shape`` in ``grid``."""
    stack, n, k = matrix(shape)
    return (*stack, *(-(-extent // per) if per else 1 for extent, per in zip((n, k), grid, strict=True)))


def fit(shape: Shape, scale: Shape, grid: Grid) -> str | None:
    """Return how a scale of this shape is a grid (a word of Format.scale_shape), or None where it is not."""
    stack = matrix(shape)[0]
    if grid == COLUMN and not stack:
        return None
    full = grid_shape(shape, grid)
    if grid == TENSOR and scale in (stack, (*stack, 1)):
        return "scalar" if scale == stack else "one"
    if scale == full:
        return "grid"
    if grid == ROW and scale == full[:-1]:
        return "row"
    rows, cols = full[-2:]
    return "spread" if not stack and scale == (rows, 1, cols, 1) else None


def fitting(shape: Shape, scale: Shape, grids: Iterable[Grid]) -> tuple[Grid, str] | None:
    """Return the first grid that a scale fits, and how; None where it fits none."""
    for grid in grids:
        how = fit(shape, scale, grid)
        if how is not None:
            return grid, how
    return None


def grid_words(grid: Grid) -> str:
    """Return a grid in words."""
    named = {TENSOR: "one scale per tensor", ROW: "one scale per row", COLUMN: "one scale per column"}
    if grid in named:
        return named[grid]
    return f"groups of {grid[1]}" if grid[0] == 1 else f"blocks of {grid[0]}×{grid[1]}"


def misfit(shape: Shape, scale: Shape, expected: Iterable[Grid]) -> str:
    """Say that a scale does not fit a weight, what would have, and what it would fit."""
    expected = [grid for grid in expected if grid != COLUMN or matrix(shape)[0]]
    wanted = " or ".join(f"{list(grid_shape(shape, grid))} ({grid_words(grid)})" for grid in expected)
    text = f"has a scale of shape {list(scale)}, which does not fit the weight's {list(shape)}; expected {wanted}"
    usual = (TENSOR, ROW, COLUMN, *BLOCKS)
    other = fitting(shape, scale, usual)
    if other is not None:
        return f"{text}. It would fit {grid_words(other[0])}"
    for grid in expected:
        parts = _parts(shape, scale, grid)
        if parts:
            rows = matrix(shape)[1] // parts
            return f"{text}. {parts} parts of {rows} rows, joined after each was quantised alone, would have this shape"
    return text


def _parts(shape: Shape, scale: Shape, grid: Grid) -> int:
    """Return how many equal parts of a fused weight give this scale, 0 where none do."""
    stack, n, k = matrix(shape)
    rows, cols = grid
    if not rows or not cols or len(scale) != len(stack) + 2 or scale[:-2] != stack or scale[-1] != -(-k // cols):
        return 0
    return next((p for p in range(2, 65) if n % p == 0 and p * -(-(n // p) // rows) == scale[-2]), 0)
