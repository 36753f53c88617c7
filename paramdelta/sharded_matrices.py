"""Quantised matrices that are DTensors: merged shard by shard, without communication.

Codes of all operands are placed alike, on shards of either dimension or replicated. Scales are replicated, or on shards
that hold what the rank's codes use: with codes [R, C] and scales [R / 128, C / 128] both on Shard(0), that is where
shards of the codes begin at multiples of 128 rows. Imported where there are DTensors, since it brings torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_extent

from paramdelta import scaled
from paramdelta.errors import OperandError
from paramdelta.formats import CODEC_BITS
from paramdelta.planes import Along, Grid, Matrix, Part, grid_of


def merge_scaled(
    new_base: Any, deltas: Sequence[tuple[Any, ...]], part: Part | None, **options: Any
) -> scaled.Result | scaled.PendingResult:
    """Do what ``scaled.merge_scaled`` does. Codes and scales of the result are DTensors placed as new_base's codes are;
    all else that it says is of this rank's shard."""
    if part is not None:
        raise OperandError("part: DTensors say themselves where their shards lie; leave it out")
    first = _Shard("new_base", new_base)
    terms = []
    for k, delta in enumerate(deltas):
        pair = (_Shard(f"deltas[{k}].{name}", m) for name, m in zip(("post", "base"), delta, strict=False))
        terms.append((*(each.beside(first) for each in pair), *delta[2:]))
    result = scaled.merge_scaled(first.matrix, terms, part=first.part, **options)
    whole = (first.part.rows, first.part.cols)
    recipe, grid = options["recipe"], grid_of(options["grid"])
    width = whole[1] if recipe is None else -(-whole[1] * CODEC_BITS[recipe.codec] // 8)
    codes = _spread("codes", result.codes, first.codes, (whole[0], width))
    scales = None
    if result.scales is not None and grid is not None:
        scales = _spread("scales", result.scales, first.codes, grid.shape(*whole))
    if isinstance(result, scaled.Result):
        return result._replace(codes=codes, scales=scales)
    result.codes, result.scales = codes, scales
    return result


class _Shard:
    """What this rank has of a Matrix of DTensors: ``matrix``, and ``part``, where it lies."""

    def __init__(self, name: str, given: Any) -> None:
        m = given if isinstance(given, Matrix) else Matrix(given)
        self.name, self.codes = name, m.codes
        _check_placed(f"{name}.codes", m.codes)
        if m.codes.ndim != 2:
            raise OperandError(f"{name}: expected two dimensions, got the shape {tuple(m.codes.shape)}")
        grid = grid_of(m.grid)
        # Codes of four bits come several to an element.
        each = m.codes.element_size() * 2 if grid is not None and CODEC_BITS[grid.codec] == 4 else 1
        shape, (row, col) = local_extent(m.codes.shape, m.codes.device_mesh, m.codes.placements)
        cols = m.codes.shape[1] * each if m.cols is None else m.cols
        self.shape = shape[0], max(0, min(shape[1] * each, cols - col * each))
        at = (row if self.shape[0] else 0), (col * each if self.shape[1] else 0)  # what is empty lies beyond the end
        self.part = Part(row=at[0], col=at[1], rows=m.codes.shape[0], cols=cols)
        scales = m.scales if grid is None or m.scales is None else self._scales(m.scales, grid)
        self.matrix = m._replace(codes=m.codes._local_tensor, scales=scales, cols=None)

    def beside(self, first: _Shard) -> Matrix:
        """Return the matrix, of which this rank has what it has of the first."""
        if self.codes.device_mesh != first.codes.device_mesh or self.codes.placements != first.codes.placements:
            raise OperandError(
                f"{self.name}.codes: expected the placements of {first.name}'s, {first.codes.placements}, got "
                f"{self.codes.placements}; redistribute them first: that is communication, which no merge does unasked"
            )
        if (self.part, self.shape) != (first.part, first.shape):
            raise OperandError(
                f"{self.name}: this rank has {_words(self)}, but {_words(first)} of {first.name}; four-bit codes are "
                "cut between bytes: replicate both, or shard their rows"
            )
        return self.matrix

    def _scales(self, scales: Any, grid: Grid) -> Any:
        """Return the scales of the units that this rank's codes use."""
        if not isinstance(scales, DTensor):
            return scales  # of the whole matrix, or of the shard: their shape says so
        name = f"{self.name}.scales"
        _check_placed(name, scales)
        if all(place.is_replicate() for place in scales.placements):
            return scales._local_tensor
        if scales.ndim != 2:
            raise OperandError(
                f"{name}: expected the grid's two dimensions where they are sharded, got the shape "
                f"{tuple(scales.shape)}; view them so, or replicate them"
            )
        shape, start = local_extent(scales.shape, scales.device_mesh, scales.placements)
        local = scales._local_tensor
        for axis, (at, count, whole, unit) in enumerate(
            (
                (self.part.row, self.shape[0], self.part.rows, grid.rows),
                (self.part.col, self.shape[1], self.part.cols, grid.cols),
            )
        ):
            units = Along.of(at, count, whole, unit)
            first, last = units.first, units.first + units.touched
            if count == 0:
                first = last = start[axis]
            if not start[axis] <= first <= last <= start[axis] + shape[axis]:
                raise OperandError(
                    f"{name}: this rank's codes use {('rows', 'columns')[axis]} {first} to {last} of the scales, but "
                    f"it has {start[axis]} to {start[axis] + shape[axis]}; redistribute the scales to Replicate()"
                )
            local = local.narrow(axis, first - start[axis], last - first)
        return local


def _words(shard: _Shard) -> str:
    (rows, cols), part = shard.shape, shard.part
    return f"rows {part.row} to {part.row + rows} and columns {part.col} to {part.col + cols}"


def _check_placed(name: str, x: Any) -> None:
    if not isinstance(x, DTensor):
        raise OperandError(
            f"{name}: expected a DTensor as the others are, got {type(x).__qualname__}; distribute it first with "
            "torch.distributed.tensor.distribute_tensor"
        )
    odd = [place for place in x.placements if type(place) not in (Shard, Replicate)]
    if odd:
        raise OperandError(f"{name}: expected placements Shard and Replicate, got {odd[0]}; redistribute it first")


def _spread(name: str, local: torch.Tensor, like: DTensor, shape: tuple[int, int]) -> DTensor:
    """Return shards as a DTensor, placed as another is, whose cuts must be those that DTensor makes of the shape."""
    expected, _ = local_extent(shape, like.device_mesh, like.placements)
    if tuple(local.shape) != tuple(expected):
        raise OperandError(
            f"{name}: this rank's output has the shape {tuple(local.shape)}, but a DTensor of the shape {shape} has "
            f"{tuple(expected)} there; replicate the operands, or shard their rows"
        )
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
