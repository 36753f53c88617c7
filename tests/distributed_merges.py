"""What each of two processes does in tests/test_torch_ops.py: merges DTensors, and compares with whole tensors."""

from __future__ import annotations

import os
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


def lists(mesh: Any, whole: list[Any]) -> None:
    """Several deltas, and lists of tensors with placements of their own."""
    other = [torch.randn(1, 4) for _ in range(3)]  # one rank has no row of it
    other[2][0, 1] = float("inf")
    mixed = [
        (whole, Shard(0), torch.bfloat16),
        (other, Shard(0), torch.float32),
        (whole, Replicate(), torch.bfloat16),
        (other, Shard(1), torch.float32),
    ]
    spread = [[distribute_tensor(x, mesh, [place]) for x in triple] for triple, place, _ in mixed]
    want = [ops.merge(*triple, alpha=0.5) for triple, _, _ in mixed]
    posts, bases, news = (list(side) for side in zip(*spread, strict=True))
    outs, counts = torch_ops.merge_many(posts, bases, news, 0.5)
    targets = [torch.zeros_like(x) for x in news]
    written = torch_ops.merge_many_into(posts, bases, news, targets, 0.5)
    merged = ops.merge_many([(*triple, 0.5) for triple in spread])
    again = [torch.zeros_like(x) for x in news]
    kept = ops.merge_many([(*triple, 0.5) for triple in spread], outs=again)
    for k, (_, place, dtype) in enumerate(mixed):
        for got in (outs[k], targets[k], merged[k].out, again[k], kept[k].out):
            assert (got.placements, got.dtype) == ((place,), dtype)
            assert same(got.full_tensor(), want[k].out), k
        assert merged[k].counts == kept[k].counts == want[k].counts
    for each in (counts, written):
        assert each.full_tensor().tolist() == [list(x.counts) for x in want]

    deltas = [(whole[0], whole[1], 0.5), (whole[1], whole[2], 1.0)]
    wanted = ops.merge_deltas(whole[2], deltas)
    for place in (Shard(0), Shard(1), Replicate()):
        a, b, c = (distribute_tensor(x, mesh, [place]) for x in whole)
        out, counts = torch_ops.merge_deltas(c, [a, b], [b, c], [0.5, 1.0])
        assert out.placements == (place,)
        assert same(out.full_tensor(), wanted.out)
        assert counts.full_tensor().tolist() == list(wanted.counts)
        merged_deltas = ops.merge_deltas(c, [(a, b, 0.5), (b, c)])
        assert same(merged_deltas.out.full_tensor(), wanted.out)
        assert merged_deltas.counts == wanted.counts
        assert same(ops.encode(a, "f16").out.full_tensor(), ops.encode(whole[0], "f16").out)
    with pytest.raises(OperandError, match=r"posts\[0\]: expected new_bases\[0\]'s placements"):
        torch_ops.merge_many([spread[2][0]], [spread[0][1]], [spread[0][2]])
    with pytest.raises(OperandError, match=r"merges\[1\].base: expected a DTensor"):
        ops.merge_many([spread[0], (spread[0][0], whole[1], spread[0][2])])


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
    lists(mesh, whole)
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
    dist.barrier()
    # Taking gloo's threads down ends a process by SIGABRT now and then, after all is done.
    os._exit(0)


if __name__ == "__main__":
    main()
