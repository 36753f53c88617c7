"""Merges of tensors where they are: what device_tensors enqueues, run by the CUDA kernels' bodies on the host."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paramdelta import backends, device_tensors, ops, torch_ops
from paramdelta.backends import cuda
from paramdelta.dtypes import BF16, F8_E4M3, F64
from paramdelta.errors import BackendError, OperandError, OperandTypeError
from paramdelta.tensors import read_operand

torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)

_SPEC = importlib.util.spec_from_file_location(
    "cuda_on_host", Path(__file__).parent / "conformance" / "cuda_on_host.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
cuda_on_host = importlib.util.module_from_spec(_SPEC)
sys.modules["cuda_on_host"] = cuda_on_host
_SPEC.loader.exec_module(cuda_on_host)


@pytest.fixture(autouse=True)
def _kernels_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda_on_host.why_not()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "_extension", cuda_on_host.module)


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(x: torch.Tensor) -> np.ndarray:
    return (
        x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()
    )


def enqueue(post, base, new_base, alpha=1.0, out=None, dtype=None):
    new, *pair = (read_operand(n, x) for n, x in (("new_base", new_base), ("post", post), ("base", base)))
    return device_tensors.merge(new, [(*pair, alpha)], out, dtype)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_same_bits_as_on_the_cpu(alpha: float) -> None:
    post, base, new_base = (weights(k, 37, 129) for k in range(3))
    post[3, 4] = float("nan")
    out, counts = enqueue(post, base, new_base, alpha)
    want = ops.merge(post, base, new_base, alpha=alpha)
    assert (bits(out) == bits(want.out)).all()
    assert counts == want.counts
    assert (counts.nan, counts.inf, counts.overflow, counts.clean) == (1, 0, 0, False)


def test_strides_and_outputs() -> None:
    post, base, new_base = (weights(k, 64, 66).t()[::2, 1:] for k in range(3))
    want = ops.merge(post, base, new_base).out
    out = torch.zeros(66, 66, dtype=torch.bfloat16)[::2, :63]
    assert enqueue(post, base, new_base, out=out)[0] is out
    assert (bits(out) == bits(want)).all()
    place = new_base.contiguous()
    enqueue(post, base, place, out=place)
    assert (bits(place) == bits(want)).all()


def test_many_of_several_signatures() -> None:
    rng = np.random.default_rng(0)
    merges = []
    for k in range(700):
        dtype = (torch.bfloat16, torch.float32)[k % 2]
        triple = [weights(3 * k + j, int(rng.integers(0, 40)), dtype=dtype) for j in range(1)]
        triple += [weights(10_000 + 3 * k + j, triple[0].numel(), dtype=dtype) for j in range(2)]
        post, base, new = (read_operand(n, x) for n, x in zip(("post", "base", "new_base"), triple, strict=True))
        merges.append((new, [(post, base, 1.0 if k % 3 else 0.5)]))
    merges[5][0].source[:1] = float("inf")
    outs, counts = device_tensors.merge_many(merges, None, None)
    assert counts.shape == (700, 3)
    for k, (new, [(post, base, alpha)]) in enumerate(merges):
        want = ops.merge(post.source, base.source, new.source, alpha=alpha)
        assert (bits(outs[k]) == bits(want.out)).all(), k
        assert tuple(counts[k].tolist()) == want.counts


def test_refusals() -> None:
    post, base, new_base = (weights(k, 8) for k in range(3))
    with pytest.raises(OperandError, match=r"base: expected the shape"):
        enqueue(post, base[:4], new_base)
    with pytest.raises(OperandError, match="a NumPy array"):
        enqueue(post, np.zeros(8, np.float32), new_base)
    with pytest.raises(OperandError, match="overlaps new_base in part"):
        enqueue(post[:4], base[:4], new_base[:4], out=new_base[2:6])
    with pytest.raises(ValueError, match="at most 373 deltas"):
        cuda.merge(
            read_operand("x", post).dtype,
            [cuda.TermTypes(read_operand("x", post).dtype, read_operand("x", base).dtype, 1.0)] * 374,
            read_operand("x", post).dtype,
            [
                cuda.Tensor(
                    post.data_ptr(), (post.data_ptr(), base.data_ptr()) * 374, new_base.data_ptr(), 8, post.data_ptr()
                )
            ],
            device=0,
            stream=0,
        )


def test_choice_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.names() == ("cpu", "cuda", "triton")
    assert backends.choose("merge", device="cpu") == "cpu"
    assert backends.choose("foreach", device="cpu", inputs=(BF16, F8_E4M3), output=F64) == "cuda"
    assert backends.get("cuda").capabilities().variants == ("host",)
    with pytest.raises(BackendError, match="backend 'cpu' has no merge on cuda memory"):
        backends.choose("merge", device="cuda", name="cpu")
    monkeypatch.setenv(backends.VARIABLE, "abacus")
    with pytest.raises(BackendError, match="no backend 'abacus'"):
        ops.merge(*(np.zeros(3, np.float32) for _ in range(3)))
    monkeypatch.setenv(backends.VARIABLE, "cpu")
    with pytest.raises(BackendError, match=r"PARAMDELTA_BACKEND=cpu has no merge on cuda memory"):
        backends.choose("merge", device="cuda")
    capabilities = backends.get("cpu").capabilities()
    assert capabilities.supports("norms", device="cpu")
    assert not capabilities.supports("foreach")
    assert not capabilities.supports("merge", device="cuda")
    alike = replace(capabilities, one_type=True)
    assert alike.supports("merge", inputs=(BF16, BF16), output=BF16)
    assert not alike.supports("merge", inputs=(BF16, BF16), output=F64)
    assert not alike.supports("merge", inputs=(BF16, F64))


def test_public_functions_take_the_backend_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triples = [tuple(weights(3 * k + j, 20 * k) for j in range(3)) for k in range(5)]
    triples.append(tuple(weights(90 + j, 7, dtype=torch.float32) for j in range(3)))
    triples[1][0][2] = float("nan")
    want = ops.merge_many([(*t, 0.5) for t in triples])
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    got = ops.merge_many([(*t, 0.5) for t in triples])
    assert all(isinstance(each.counts, ops.PendingCounts) for each in got)
    for each, wanted, triple in zip(got, want, triples, strict=True):
        assert (bits(each.out) == bits(wanted.out)).all()
        assert each.counts == wanted.counts
        assert each.counts.tensor.tolist() == list(wanted.counts)
        single = ops.merge(*triple, alpha=0.5)
        assert isinstance(single.counts, ops.PendingCounts)
        assert (bits(single.out) == bits(wanted.out)).all()
    posts, bases, new_bases = (list(side) for side in zip(*triples, strict=True))
    outs, counts = torch_ops.merge_many(posts, bases, new_bases, 0.5)
    assert counts.tolist() == [list(each.counts) for each in want]
    assert all((bits(out) == bits(each.out)).all() for out, each in zip(outs, want, strict=True))
    assert list(ops.merge_many([])) == []
    with pytest.raises(OperandError, match="no backend but cpu takes"):
        ops.merge(*(np.zeros(3, np.float32) for _ in range(3)))
    with pytest.raises(OperandTypeError, match="merge_many takes many tensors"):
        ops.merge(posts, bases, new_bases)


@pytest.mark.parametrize("kinds", [("bfloat16",) * 3, ("float32", "float8_e4m3fn", "float64")], ids=["one", "mixed"])
def test_norms_are_pending_and_of_the_same_bits(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]) -> None:
    """Strides too, and with a merge that writes over an operand: they are those of the operands before it."""
    post, base, new_base = (weights(k, 130, 66, dtype=getattr(torch, kind)).t()[1:] for k, kind in enumerate(kinds))
    want = ops.norms(post, base, new_base)
    merged = ops.merge(post, base, new_base, alpha=0.5)
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    found = ops.norms(post, base, new_base)
    assert isinstance(found, ops.PendingNorms)
    assert found.wait() == want
    assert tuple(getattr(found, name) for name in want._fields) == want
    place = new_base.clone()
    again = ops.merge_deltas(place, [(post, base, 0.5), (base, post, 0.0)], out=place, norms=True)
    assert (bits(place) == bits(merged.out)).all()
    assert again.norms == (want, ops.norms(base, post, new_base))
    assert ops.merge(post, base, new_base).norms == ()
    with pytest.raises(OperandError, match=r"new_base: is on the CPU \(a NumPy array\), but post is on cpu"):
        ops.norms(post, base, np.zeros(tuple(new_base.shape), np.float32))
    with pytest.raises(OperandError, match="whose norms only cpu takes"):
        ops.norms(*(np.zeros(3, np.float32) for _ in range(3)))


def test_norms_of_nothing_and_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, values = torch.zeros(0), torch.zeros(5000)
    values[4999] = float("nan")
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    assert ops.norms(empty, empty, empty) == (0.0, 0.0, 0.0, 0.0)
    found = ops.norms(values, torch.zeros(5000), torch.ones(5000)).wait()
    assert found.drift_squared == 5000.0
    assert all(x != x for x in (found.delta_squared, found.inner, found.largest_delta))
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(BackendError, match="triton"):
        ops.norms(empty, empty, empty)


def test_many_on_the_cpu() -> None:
    triples = [tuple(weights(3 * k + j, 20 + k) for j in range(3)) for k in range(5)]
    got = ops.merge_many([(*t, 0.5) for t in triples])
    for each, triple in zip(got, triples, strict=True):
        assert (bits(each.out) == bits(ops.merge(*triple, alpha=0.5).out)).all()
    with pytest.raises(OperandError, match="outs: expected one for each of 5"):
        ops.merge_many(triples, outs=[])
