"""What each of two processes does in tests/test_torch_ops.py: merges DTensors, and compares with whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from paramdelta import ops, torch_ops
from paramdelta.errors import OperandError


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def refused(pattern: str, *operands: Any, **options: Any) -> None:
    with pytest.raises(OperandError, match=pattern):
        ops.merge(*operands, **options)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(7, 6).bfloat16() for _ in range(3)]  # 7 rows: uneven shards
    whole[0][0, 0], whole[0][6, 5] = float("nan"), float("inf")
    want = ops.merge(*whole, alpha=0.5)
    for place in (Shard(0), Shard(1), Replicate()):
        parts = [distribute_tensor(x, mesh, [place]) for x in whole]
        out, counts = torch_ops.merge(*parts, 0.5)
        assert isinstance(out, DTensor)
        assert out.placements == (place,)
        assert same(out.full_tensor(), want.out)
        assert counts.full_tensor().tolist() == list(want.counts), (place, counts)
        merged = ops.merge(*parts, alpha=0.5)
        assert same(merged.out.full_tensor(), want.out)
        assert merged.counts == want.counts
        target = distribute_tensor(torch.zeros(7, 6, dtype=torch.bfloat16), mesh, [place])
        assert ops.merge(*parts, alpha=0.5, out=target).counts == want.counts
        assert same(target.full_tensor(), want.out)
        wide, _ = torch_ops.encode(parts[1], torch.float64)
        assert same(wide.full_tensor(), ops.decode(whole[1]))
    rows, columns = (distribute_tensor(whole[0], mesh, [Shard(axis)]) for axis in (0, 1))
    refused("base: expected new_base's placements", rows, columns, rows)
    refused("base: expected a DTensor as the others are, got Tensor", rows, whole[0], rows)
    refused("norms: are defined by an order", rows, rows, rows, norms=True)

    # Parameters of FSDP2 are merged in place, in shards, without being gathered.
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(torch.nn.Linear(6, 5).to(torch.bfloat16))
    wanted = {
        name: ops.merge(*(dict(m.named_parameters())[name].detach() for m in models)).out
        for name, _ in models[0].named_parameters()
    }
    for model in models:
        fully_shard(model, mesh=mesh)
    for name, parameter in models[2].named_parameters():
        post, base = (dict(m.named_parameters())[name].detach() for m in models[:2])
        ops.merge(post, base, parameter.detach(), out=parameter.detach())
        assert same(parameter.full_tensor().detach(), wanted[name]), name
    print("all equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
