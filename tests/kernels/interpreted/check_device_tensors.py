"""Tensors merged where they are by Triton in its interpreter: what the registry chooses, and the same bits."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from paramdelta import backends, device_tensors, ops
from paramdelta.backends import cuda, triton
from paramdelta.errors import BackendError
from paramdelta.tensors import read_operand


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramdelta._cuda", None)  # as where it is not built


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def triples() -> list[list[torch.Tensor]]:
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    return [[weights(3 * k + j, 4 * k, 3, dtype=kinds[k % 3]) for j in range(3)] for k in range(8)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def enqueue(merges: list[list[torch.Tensor]], dtype: Any = None) -> tuple[list[Any], Any]:
    read = []
    for post, base, new_base in merges:
        p, b, n = (read_operand(name, x) for name, x in (("post", post), ("base", base), ("new_base", new_base)))
        read.append((n, [(p, b, 0.5)]))
    return device_tensors.merge_many(read, None, dtype)


def test_triton_merges_what_it_has_where_cuda_is_not_built() -> None:
    assert backends.choose("foreach", device="cpu") == "triton"
    merges = triples()
    merges[4][0][0] = float("nan")
    merges[5] = [x.t() for x in merges[5]]
    outs, counts = enqueue(merges)
    for triple, out, found in zip(merges, outs, counts.tolist(), strict=True):
        want = ops.merge(*triple, alpha=0.5)
        assert same(out, want.out)
        assert found == list(want.counts)


def test_a_signature_without_a_backend_is_named() -> None:
    merges = [[weights(j, 5) for j in range(3)]]
    merges[0][0] = merges[0][0].float()
    with pytest.raises(
        BackendError,
        match=r"no backend has foreach on cpu memory of bf16 and f32: cpu: has merge.*cuda: the extension "
        r"paramdelta._cuda is not built.*triton: has merge, foreach, merge_scaled on cpu memory, of one type of bf16, "
        r"f16, f32",
    ):
        enqueue(merges)


def test_each_signature_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda comes first; what the variable names is taken instead, or refused."""
    called: list[str] = []
    extension = ModuleType("_cuda")
    vars(extension).update(why_not=lambda: "", on_host=lambda: True, merge=lambda **job: called.append("cuda"))
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    real = triton.merge
    monkeypatch.setattr(triton, "merge", lambda *job, **place: (called.append("triton"), real(*job, **place)))
    enqueue([[weights(j, 5) for j in range(3)]])
    assert called == ["cuda"]
    monkeypatch.setenv(backends.VARIABLE, "triton")
    enqueue([[weights(j, 5) for j in range(3)]])
    assert called == ["cuda", "triton"]
    with pytest.raises(BackendError, match="PARAMDELTA_BACKEND=triton has no foreach on cpu memory of bf16 and f64"):
        ops.merge(*(weights(j, 5) for j in range(3)), dtype=torch.float64)
    merged = ops.merge_many([(*triple, 0.5) for triple in triples()])
    monkeypatch.delenv(backends.VARIABLE)
    for triple, each in zip(triples(), merged, strict=True):
        assert same(each.out, ops.merge(*triple, alpha=0.5).out)
