"""Lists of PyTorch tensors in one call: the bits of the general way, and whatever is not ordinary goes that way."""

from __future__ import annotations

import importlib.util
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paramdelta import backends, ops, tensor_lists
from paramdelta.backends import cpu, cuda
from paramdelta.errors import OperandError, OperandTypeError

torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)
if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip(f"torch {torch.__version__} has no C exchange of DLPack", allow_module_level=True)

_SPEC = importlib.util.spec_from_file_location(
    "cuda_on_host", Path(__file__).parent / "conformance" / "cuda_on_host.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
cuda_on_host = importlib.util.module_from_spec(_SPEC)
sys.modules["cuda_on_host"] = cuda_on_host
_SPEC.loader.exec_module(cuda_on_host)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["cpu", "device"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor, or the CUDA kernels compiled for the host."""
    if request.param == "device":
        reason = cuda_on_host.why_not()
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setattr(cuda, "_extension", cuda_on_host.module)
        monkeypatch.setenv(backends.VARIABLE, "cuda")
    name: str = request.param
    return name


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """merge_many without the extension's own reading."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(tensor_lists, "merge", lambda *_: None)
            return ops.merge_many(*args, **kwargs)

    return run


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def triple(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return tuple(weights(3 * seed + j, *shape, dtype=dtype) for j in range(3))


def bits(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(INTEGERS[x.element_size()]).flatten().tolist() if x.dim() else [x.double().item()]


def same(got: Any, want: Any) -> None:
    assert len(got) == len(want)
    for k, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.out.shape == other.out.shape, k
        assert one.out.dtype == other.out.dtype, k
        assert bits(one.out) == bits(other.out), k
        assert one.counts == other.counts, k


def mixture() -> list[tuple[Any, ...]]:
    """Dtypes, alphas and shapes of every kind, in one list."""
    rng = np.random.default_rng(5)
    shapes = [(), (1,), (0,), (3, 0, 2), (7,), (5, 6), (2, 1, 9), (4096,)]
    merges: list[tuple[Any, ...]] = []
    for k in range(300):
        shape = shapes[k % len(shapes)]
        dtypes = [DTYPES[i] for i in rng.integers(0, 6, 3)] if k % 3 else [DTYPES[k % 6]] * 3
        tensors = [weights(3 * k + j, *shape, dtype=d) for j, d in enumerate(dtypes)]
        merges.append((*tensors, [1.0, 0.3, 0, -2][k % 4]) if k % 5 else tuple(tensors))
    merges[4][0][2] = float("nan")
    merges[5][2][0] = 3e38 if merges[5][2].dtype == torch.float32 else float("inf")
    return merges


@pytest.mark.parametrize("dtype", [None, "f32", torch.float8_e4m3fn], ids=str)
def test_the_bits_of_the_general_way(way: str, general: Callable[..., Any], dtype: Any) -> None:
    merges = mixture()
    assert tensor_lists.merge(merges, None, None, None) is not None
    want = general(merges, dtype=dtype)
    got = ops.merge_many(merges, dtype=dtype)
    same(got, want)
    outs = [torch.full_like(each.out, 7) for each in want]
    given = ops.merge_many(merges, outs=outs, dtype=dtype)
    assert all(each.out is out for each, out in zip(given, outs, strict=True))
    same(given, want)
    assert (
        got.total()
        == want.total()
        == tuple(map(sum, zip(*(each.counts.wait() if way == "device" else each.counts for each in want), strict=True)))
    )
    assert not got.total().clean


def test_one_merge(way: str) -> None:
    post, base, new = triple(1, 6, 7)
    post[2, 2] = float("inf")
    want = ops.merge_deltas(new, [(post, base, 0.5), (post, base, 0.0)])
    got = ops.merge(post, base, new, alpha=0.5)
    assert bits(got.out) == bits(want.out)
    assert got.counts == want.counts
    place = new.clone()
    assert ops.merge(post, base, place, alpha=0.5, out=place).out is place
    assert bits(place) == bits(want.out)


def test_parameters_and_lists_for_tuples(way: str) -> None:
    merges = [[torch.nn.Parameter(x, requires_grad=False) for x in triple(k, 9)] for k in range(4)]
    found = tensor_lists.merge(tuple(merges), None, None, 1)
    assert found is not None
    assert type(found[0][0]) is torch.Tensor
    same(ops.merge_many(merges), ops.merge_many([tuple(x.data for x in each) for each in merges]))


def test_results_are_a_sequence(way: str) -> None:
    got = ops.merge_many([triple(k, 5) for k in range(4)])
    assert isinstance(got, ops.MergedTensors)
    assert isinstance(got[0], ops.Merged)
    assert got[-1].out is got.outs[3]
    assert [each.out for each in got[1:3]] == got.outs[1:3]
    assert [each.norms for each in got] == [()] * 4
    assert "4 tensors" in repr(got)
    with pytest.raises(IndexError):
        got[4]
    counts = tensor_lists.CountRows(np.arange(12, dtype=np.uint64).tobytes())
    assert (len(counts), counts[-1], counts[:1]) == (4, (9, 10, 11), [(0, 1, 2)])
    with pytest.raises(IndexError):
        counts[-5]


def test_threads_share_small_and_large_tensors(general: Callable[..., Any]) -> None:
    merges = [triple(k, n) for k, n in enumerate([5, 400_000, 0, 131_073, *[900] * 300, 262_144])]
    merges[1][0][390_000] = float("nan")
    want = general(merges)
    for threads in (1, 3):
        same(ops.merge_many(merges, threads=threads), want)


class Subclass(torch.Tensor):
    """What its memory means is for it to say."""


def freed() -> torch.Tensor:
    x = weights(1, 8)
    x.untyped_storage().resize_(0)
    return x


ODD: dict[str, tuple[Callable[[], Any], str | None]] = {
    "strided": (lambda: weights(1, 8, 2)[:, 0], None),
    "expanded": (lambda: weights(1, 1).expand(8), None),
    "subclass": (lambda: weights(1, 8).as_subclass(Subclass), None),
    "gradient": (lambda: weights(1, 8).requires_grad_(), "requires grad"),
    "negated": (lambda: torch._neg_view(weights(1, 8)), "lazily negated"),
    "sparse": (lambda: weights(1, 8).to_sparse(), "expected a dense"),
    "opaque": (lambda: weights(1, 8).float().to_mkldnn(), "expected a dense"),
    "integer": (lambda: torch.ones(8, dtype=torch.int32), "expected one of"),
    "complex": (lambda: torch.ones(8, dtype=torch.complex64), "expected one of"),
    "fnuz": (lambda: weights(1, 8).to(torch.float8_e4m3fnuz), "expected one of"),
    "freed": (freed, "holds no data"),
    "meta": (lambda: torch.empty(8, device="meta"), "is on meta"),
    "shape": (lambda: weights(1, 2, 4), "expected the shape"),
    "no tensor": (lambda: [1.0] * 8, "expected a numpy.ndarray"),
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["post", "base", "new_base"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_ordinary_goes_the_general_way(way: str, kind: str, place: int) -> None:
    merges = [list(triple(k, 8)) for k in range(3)]
    merges[1][place] = ODD[kind][0]()
    outs = [torch.full((8,), 7.0, dtype=torch.bfloat16) for _ in merges]
    assert tensor_lists.merge(merges, outs, None, None) is None
    text = ODD[kind][1]
    if text is None:
        plain = [tuple(torch.Tensor(x.float()).bfloat16() for x in each) for each in merges]
        same(ops.merge_many(merges, outs=outs), ops.merge_many(plain))
    else:
        with pytest.raises((OperandError, OperandTypeError), match=text):
            ops.merge_many(merges, outs=outs)
        assert all((out == 7).all() for out in outs)


def test_outputs_and_alphas_that_are_refused(way: str) -> None:
    a, b = triple(1, 8), triple(2, 8)
    other = torch.zeros(8, dtype=torch.float32)
    refused: list[tuple[list[Any], list[Any] | None, Any, str]] = [
        ([a, (*b, float("nan"))], None, None, "finite"),
        ([a, (*b, "much")], None, None, "finite"),
        ([a, (*b, 10**400)], None, None, "too large"),
        ([a, b[:2]], None, None, r"merges\[1\]: expected"),
        ([a, b], [torch.zeros_like(a[0])], None, "outs: expected one for each of 2"),
        ([a, b], [torch.zeros_like(a[0]), other], "bf16", r"outs\[1\]: expected dtype bf16, got f32"),
        ([a, b], [torch.zeros_like(a[0]), other[:4]], None, r"outs\[1\]: expected the shape"),
        ([a, b], [torch.zeros_like(a[0]), torch.zeros(1).expand(8)], None, "distinct elements"),
        ([a, b], [torch.zeros_like(a[0]), other.clone().requires_grad_()], None, r"outs\[1\]: requires grad"),
        ([a, b], [other, other], None, r"outs\[.\]: shares memory with outs\[.\]"),
        ([a, b], [b[2], other], None, r"outs\[0\]: shares memory with merges\[1\].new_base"),
        ([a, b], [other, a[0]], None, r"outs\[1\]: shares memory with merges\[0\].post"),
    ]
    for merges, outs, dtype, text in refused:
        before = [bits(x) for each in merges for x in each[:3]]
        with pytest.raises((OperandError, OverflowError), match=text):
            ops.merge_many(merges, outs=outs, dtype=dtype)
        assert [bits(x) for each in merges for x in each[:3]] == before, text
        assert not other.any(), text
    whole = weights(5, 24)
    with pytest.raises(OperandError, match=r"outs\[0\]: overlaps merges\[0\].post in part"):
        ops.merge_many([(whole[:8], *a[1:])], outs=[whole[4:12]])
    with pytest.raises(OperandError, match=r"shares memory with merges\[1\].base"):
        ops.merge_many([a, (b[0], whole[:8], b[2])], outs=[whole[7:15], b[2]])


def test_outputs_in_the_place_of_operands(way: str, general: Callable[..., Any]) -> None:
    merges = [triple(k, 8) for k in range(3)]
    want = general(merges)
    for place in range(3):
        again = [tuple(x.clone() for x in each) for each in merges]
        same(ops.merge_many(again, outs=[each[place] for each in again]), want)
    shared = [(merges[0][0], merges[0][1], each[2]) for each in merges]
    same(ops.merge_many(shared), general(shared))
    columns = torch.zeros(8, 3, dtype=torch.bfloat16)
    same(ops.merge_many(merges, outs=[columns[:, k] for k in range(3)]), want)
    with pytest.raises(OperandError, match="shares memory"):
        ops.merge_many(merges, outs=[columns[:, 0], columns[:, 1], columns[:, 1]])


def test_apart_is_what_sets_of_bytes_say(way: str) -> None:
    rng = np.random.default_rng(0)
    flat = torch.zeros(48, dtype=torch.float64)
    halves = flat.view(torch.float32)
    verdicts = []
    for _ in range(600):
        merges, outs, sets = [], [], []
        for _ in range(int(rng.integers(1, 4))):
            count = int(rng.integers(0, 4))
            views, ranges = [], []
            for _ in range(4):
                source = (flat, halves)[int(rng.random() < 0.3)]
                first = int(rng.integers(0, len(source) - count))
                views.append(source[first : first + count])
                size = source.element_size()
                ranges.append((first * size, (first + count) * size))
            if rng.random() < 0.4:
                views[3], ranges[3] = views[2], ranges[2]
            merges.append(tuple(views[:3]))
            outs.append(views[3])
            sets.append([set(range(*each)) for each in ranges])
        apart = all(
            not (mine[3] & theirs[j]) or (k == m and (j == 3 or mine[3] == theirs[j]))
            for k, mine in enumerate(sets)
            for m, theirs in enumerate(sets)
            for j in range(4)
        )
        assert (tensor_lists.merge(merges, outs, None, None) is not None) == apart
        verdicts.append(apart)
    assert 100 < sum(verdicts) < 500


def test_nothing_is_kept(way: str) -> None:
    merges = [triple(k, 8) for k in range(30)]  # CPython keeps tuples of 20 and fewer for later
    outs = [torch.empty_like(each[0]) for each in merges]
    odd = [*merges, (weights(1, 8, 2)[:, 0], *merges[0][1:])]
    tensors = [x for each in merges for x in each] + outs

    def run(times: int) -> None:
        for _ in range(times):
            assert tensor_lists.merge(merges, outs, None, 1) is not None
            assert tensor_lists.merge(odd, None, None, 1) is None
            assert tensor_lists.merge(merges, [*outs[1:], merges[0][0]], None, 1) is None

    run(20)
    before = [sys.getrefcount(x) for x in tensors]
    tracemalloc.start()
    run(20)
    first = tracemalloc.get_traced_memory()[0]
    run(1000)
    last = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert [sys.getrefcount(x) for x in tensors] == before
    assert last - first < 20_000


def test_types_without_the_exchange(way: str) -> None:
    extension = cuda_on_host.module() if way == "device" else cpu._extension()
    merges = [triple(1, 8)]
    assert extension.read_tensor_merges(merges, (torch.Tensor,)) is not None
    for types in ((), (int,), (torch.nn.Parameter,), (torch.Tensor, Subclass, int)):
        assert extension.read_tensor_merges(merges, types) is None, types
