"""What each of two processes does in tests/test_sharded_matrices.py: merges quantised matrices that are DTensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from paramdelta import formats, scaled
from paramdelta.errors import OperandError
from paramdelta.scaled import Grid, Matrix, Part

BLOCKS = Grid(codec="f8_e4m3", rows=128, cols=128)
GROUPS = Grid(codec="f4", rows=1, cols=32, scale="f8_e8m0")


def spread(x: torch.Tensor, mesh: DeviceMesh, place: Any) -> DTensor:
    """Distribute a tensor of any type: gloo has no fp8."""
    raw = distribute_tensor(x.view(torch.uint8) if x.element_size() == 1 else x, mesh, [place])
    local = raw.to_local().view(x.dtype)
    return DTensor.from_local(local, mesh, [place], run_check=False, shape=x.shape, stride=x.stride())


def same(got: Any, want: torch.Tensor, mesh: DeviceMesh, place: Any) -> bool:
    here = spread(want, mesh, place).to_local()
    local = got.to_local()
    return (
        got.shape == want.shape
        and got.placements == (place,)
        and local.dtype == here.dtype
        and torch.equal(local.contiguous().view(torch.uint8), here.contiguous().view(torch.uint8))
    )


def matrix(grid: Grid | None, seed: int, shape: tuple[int, int]) -> Matrix:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    if grid is None:
        return Matrix(x)
    recipe = formats.DEEPGEMM if grid is BLOCKS else formats.MXFP4_OPENAI
    return Matrix(*scaled.quantise(x, recipe, grid.rows, grid.cols, grid.scale), grid)


def placed(m: Matrix, mesh: DeviceMesh, place: Any, scales: Any) -> Matrix:
    """``scales``: a placement, or None for a tensor that every rank has whole."""
    if m.scales is None:
        return m._replace(codes=spread(m.codes, mesh, place))
    where = m.scales if scales is None else spread(m.scales, mesh, scales)
    return m._replace(codes=spread(m.codes, mesh, place), scales=where)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    # Plain output may be cut anywhere, here between the 128 rows of a block; quantised output may not.
    three = [matrix(BLOCKS, seed, (500, 450)) for seed in range(3)]
    whole = scaled.merge_scaled(three[2], [(three[0], three[1])], dtype="bf16")
    for place, how in ((Shard(0), Replicate()), (Shard(0), None), (Shard(1), Replicate()), (Replicate(), Replicate())):
        parts = [placed(m, mesh, place, how) for m in three]
        got = scaled.merge_scaled(parts[2], [(parts[0], parts[1])], dtype="bf16")
        assert same(got.codes, whole.codes, mesh, place)
        if not isinstance(place, Replicate):
            with pytest.raises(OperandError, match="cut an output unit of 128"):
                scaled.merge_scaled(parts[2], [(parts[0], parts[1])], recipe=formats.DEEPGEMM, grid=BLOCKS)
    cut = placed(three[0], mesh, Shard(0), Shard(0))
    if dist.get_rank() == 1:
        with pytest.raises(OperandError, match=r"codes use rows 1 to 4 of the scales, but it has 2 to 4; redistribute"):
            scaled.dequantise(cut.codes, cut.scales, BLOCKS)

    # Whole units to a rank.
    three = [matrix(BLOCKS, seed, (512, 512)) for seed in range(3)]
    whole = scaled.merge_scaled(three[2], [(three[0], three[1], 0.5)], recipe=formats.DEEPGEMM, grid=BLOCKS, keep=True)
    for place in (Shard(0), Shard(1)):
        for how in (place, Replicate()):
            parts = [placed(m, mesh, place, how) for m in three]
            got = scaled.merge_scaled(
                parts[2], [(parts[0], parts[1], 0.5)], recipe=formats.DEEPGEMM, grid=BLOCKS, keep=True
            )
            assert same(got.codes, whole.codes, mesh, place)
            assert same(got.scales, whole.scales, mesh, place)
            assert 0 < got.relative_error < 0.1

    # Four-bit codes beside plain ones; one rank without any row.
    for shape, place in (((7, 192), Shard(0)), ((1, 96), Shard(0)), ((3, 128), Shard(1))):
        mixed = [matrix(None, 0, shape), matrix(GROUPS, 1, shape), matrix(GROUPS, 2, shape)]
        whole = scaled.merge_scaled(
            mixed[2], [(mixed[0], mixed[1])], recipe=formats.MXFP4_OPENAI, grid=GROUPS, keep=True
        )
        for how in (place, Replicate()):
            parts = [placed(m, mesh, place, how) for m in mixed]
            got = scaled.merge_scaled(
                parts[2], [(parts[0], parts[1])], recipe=formats.MXFP4_OPENAI, grid=GROUPS, keep=True
            )
            assert same(got.codes, whole.codes, mesh, place)
            assert same(got.scales, whole.scales, mesh, place)

    a, b = (placed(three[0], mesh, place, Replicate()) for place in (Shard(0), Shard(1)))
    with pytest.raises(OperandError, match=r"deltas\[0\].base.codes: expected the placements of new_base's"):
        scaled.merge_scaled(a, [(a, b)], dtype="bf16")
    with pytest.raises(OperandError, match=r"new_base.codes: expected a DTensor"):
        scaled.merge_scaled(three[0], [(a, a)], dtype="bf16")
    with pytest.raises(OperandError, match="part: DTensors say themselves"):
        scaled.merge_scaled(a, [], dtype="bf16", part=Part(rows=512, cols=512))
    sums = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    with pytest.raises(OperandError, match="expected placements Shard and Replicate"):
        scaled.merge_scaled(Matrix(sums), [], dtype="bf16")
    print("all equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
