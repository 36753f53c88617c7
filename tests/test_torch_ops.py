"""The operators of PyTorch: the same bits as paramdelta.ops; under torch.compile, fake tensors and DTensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from paramdelta import ops, torch_ops  # noqa: E402
from paramdelta.errors import OperandError  # noqa: E402

WORKER = Path(__file__).parent / "distributed_merges.py"


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def three(*shape: int, dtype: Any = torch.bfloat16, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, y, out = three(5, 7), three(3, seed=1), torch.empty(5, 7, dtype=torch.bfloat16)
    strided = [t.t() for t in three(4, 6)]
    return {
        "merge": (torch_ops.merge, (*x, 0.5)),
        "merge-strided": (torch_ops.merge, (*strided, 1.0, torch.float32)),
        "merge_into": (torch_ops.merge_into, (*x, out, 0.5)),
        "merge_deltas": (torch_ops.merge_deltas, (x[0], [x[1], x[2]], [x[2], x[0]], [0.5, 1.0])),
        "merge_many": (torch_ops.merge_many, ([x[0], y[0]], [x[1], y[1]], [x[2], y[2]], 0.5)),
        "merge_many_into": (torch_ops.merge_many_into, ([x[0]], [x[1]], [x[2]], [out])),
        "encode": (torch_ops.encode, (x[0], torch.float8_e4m3fn)),
        "decode": (torch_ops.encode, (x[0], torch.float64)),
    }


@pytest.mark.parametrize("name", cases())
def test_what_pytorch_asks_of_an_operator(name: str) -> None:
    operator, arguments = cases()[name]
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_the_bits_and_counts_are_those_of_ops() -> None:
    post, base, new_base = three(40, 50)
    post[0, :3] = torch.tensor([float("inf"), float("nan"), 3e38])
    new_base[0, 2] = 3e38
    want = ops.merge(post, base, new_base, alpha=0.7)
    out, counts = torch_ops.merge(post, base, new_base, 0.7)
    assert same(out, want.out)
    assert counts.tolist() == list(want.counts) == [1, 1, 1]
    assert torch_ops.merge_into(post, base, new_base, post, 0.7).tolist() == [1, 1, 1]
    assert same(post, want.out)
    deltas = ops.merge_deltas(new_base, [(base, want.out, 0.5), (new_base, base, 1.0)])
    assert same(torch_ops.merge_deltas(new_base, [base, new_base], [want.out, base], [0.5, 1.0])[0], deltas.out)
    assert same(torch_ops.encode(new_base, torch.float64)[0], ops.decode(new_base))


def test_many_tensors() -> None:
    many = [three(size + 1, seed=size) for size in range(9)]
    posts, bases, new_bases = (list(side) for side in zip(*many, strict=True))
    outs, counts = torch_ops.merge_many(posts, bases, new_bases, 0.3)
    again = [torch.empty_like(x) for x in posts]
    torch_ops.merge_many_into(posts, bases, new_bases, again, 0.3)
    for each, out, other in zip(many, outs, again, strict=True):
        assert same(out, ops.merge(*each, alpha=0.3).out)
        assert same(out, other)
    assert counts.shape == (9, 3)
    listed = ops.merge_many([(*each, 0.3) for each in many])
    assert all(same(merged.out, out) for merged, out in zip(listed, outs, strict=True))
    with pytest.raises(OperandError, match="expected as many of each, got 9, 8, 9"):
        torch_ops.merge_many(posts, bases[1:], new_bases)


def test_compiled_without_a_break() -> None:
    """With the backend that traces and partitions as inductor does, but compiles no C++, which takes long."""

    def carry(post: Any, base: Any, new_base: Any, out: Any) -> Any:
        merged, counts = torch_ops.merge(post * 1.0, base, new_base, 0.5)
        torch_ops.merge_into(merged, base, new_base, out)
        return merged + 1.0, counts.sum()

    torch.compiler.reset()
    x = three(32, 48)
    outs = [torch.zeros(32, 48, dtype=torch.bfloat16) for _ in range(2)]
    want = carry(*x, outs[0])
    got = torch.compile(carry, fullgraph=True, backend="aot_eager")(*x, outs[1])
    assert same(got[0], want[0])
    assert same(outs[1], outs[0])
    assert int(got[1]) == int(want[1]) == 0


def test_fake_tensors_have_shapes_and_no_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = [torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16) for _ in range(3)]
        out, counts = torch_ops.merge(*x, 1.0, torch.float32)
        assert out.shape == (1 << 20, 1 << 20)
        assert out.dtype == torch.float32
        assert counts.shape == (3,)
        with pytest.raises(OperandError, match="operands of one shape"):
            torch_ops.merge(x[0], x[1][1:], x[2])


def test_shards_of_two_processes() -> None:
    """DTensors over gloo: each rank merges what it holds, and the whole is as one process has it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("all equal") == 2
