"""ops on arrays as people have them: kinds, strides, shapes, outputs, and what is said when something does not fit."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdelta import backends, ops, reference
from paramdelta.backends import threads
from paramdelta.dtypes import BF16, F32, MERGE_DTYPES, DType
from paramdelta.errors import BackendError, OperandError, OperandTypeError

KINDS = ["numpy", "torch"]


def make(kind: str, values, dtype: DType = BF16):
    codes, _ = reference.encode(np.asarray(values, np.float64).reshape(-1), dtype)
    array = codes.view(dtype.to_numpy()).reshape(np.shape(values))
    if kind == "numpy":
        return array
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors cannot be tested")
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    raw = np.ascontiguousarray(array).view("u1" if dtype.itemsize == 1 else f"i{dtype.itemsize}")
    return torch.from_numpy(raw.copy()).view(integers).view(getattr(torch, dtype.numpy))


def bits(x) -> np.ndarray:
    """The stored codes of an array of either kind, in row-major order."""
    if not isinstance(x, np.ndarray):
        import torch

        x = (
            x.contiguous()
            .view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
            .numpy()
        )
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def expected(post, base, new_base, dtype: DType = BF16, alpha: float = 1.0, out: DType | None = None) -> np.ndarray:
    p, b, n = (reference.Array(bits(x).reshape(-1), dtype) for x in (post, base, new_base))
    return reference.merge(n, [reference.Term(p, b, alpha)], out or dtype).codes.reshape(np.shape(bits(new_base)))


@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("kind", KINDS)
def test_merge(kind: str, dtype: DType) -> None:
    rng = np.random.default_rng(0)
    post, base, new_base = (make(kind, rng.normal(size=(7, 33)), dtype) for _ in range(3))
    got = ops.merge(post, base, new_base, alpha=0.7)
    assert type(got.out) is type(new_base)
    assert got.out.dtype == new_base.dtype
    assert np.array_equal(bits(got.out), expected(post, base, new_base, dtype, 0.7))
    assert got.counts.clean
    assert got.norms == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["f32", "F32", "numpy", "DType", "torch"])
def test_dtype_in_any_spelling(kind: str, name: str) -> None:
    x = make(kind, [1.0, 2.0])
    dtype = {"numpy": np.float32, "DType": F32}.get(name, name)
    if name == "torch":
        dtype = pytest.importorskip("torch").float32
    out = ops.merge(x, x, x, dtype=dtype).out
    assert str(out.dtype).removeprefix("torch.") == "float32"


def test_the_result_is_of_new_bases_kind() -> None:
    a, t = make("numpy", [1.0, 2.0]), make("torch", [1.0, 3.0])
    assert isinstance(ops.merge(t, a, a).out, np.ndarray)
    assert not isinstance(ops.merge(a, a, t).out, np.ndarray)
    out = np.empty(2, np.float64)
    assert ops.merge(t, a, t, out=out).out is out
    assert out.tolist() == [1.0, 4.0 - 2.0 + 1.0 + 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str) -> None:
    rng = np.random.default_rng(1)
    post, base, new_base = (make(kind, rng.normal(size=(6, 8, 10))) for _ in range(3))
    views = [
        lambda x: x[::2, :, 1:9:3],
        lambda x: x.swapaxes(0, 2),
        lambda x: x[:, 0],
        lambda x: x[0:0],
        lambda x: x[1, 2, 3],
    ]
    for view in views:
        p, b, n = view(post), view(base), view(new_base)
        if not isinstance(n, (np.ndarray,)) and kind == "numpy":
            p, b, n = (np.asarray(x) for x in (p, b, n))
        want = expected(p, b, n)
        assert np.array_equal(bits(ops.merge(p, b, n).out).reshape(want.shape), want)
        memory = make(kind, np.zeros((6, 8, 10)))
        out = view(memory)
        if isinstance(out, np.generic):
            continue
        got = ops.merge(p, b, n, out=out).out
        assert got is out
        assert np.array_equal(bits(out).reshape(want.shape), want)
        assert np.count_nonzero(bits(memory)) == np.count_nonzero(want)


def test_reversed_and_broadcast_views() -> None:
    x = make("numpy", np.arange(12.0))
    constant = np.broadcast_to(make("numpy", 1.0), (12,))
    assert ops.merge(x[::-1], constant, x).out.astype(float).tolist() == [10.0] * 12
    with pytest.raises(OperandError, match=r"out: expected (writable|distinct)"):
        ops.merge(x, x, x, out=constant)
    with pytest.raises(OperandError, match="share memory"):
        ops.merge(x, x, x, out=np.lib.stride_tricks.as_strided(x.copy(), (12,), (0,)))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_and_overlaps(kind: str) -> None:
    rng = np.random.default_rng(2)
    memory = make(kind, rng.normal(size=100))
    base, new_base = make(kind, rng.normal(size=99)), make(kind, rng.normal(size=99))
    post = memory[:99]
    with pytest.raises(OperandError, match="out: overlaps post in part; pass exactly"):
        ops.merge(post, base, new_base, out=memory[1:])
    want = expected(post, base, new_base)
    assert ops.merge(post, base, new_base, out=post).out is post
    assert np.array_equal(bits(memory[:99]), want)
    odd, even = memory[1::2], memory[0::2]
    want = expected(even, base[:50], new_base[:50])
    ops.merge(even, base[:50], new_base[:50], out=odd)  # interleaved, not overlapping
    assert np.array_equal(bits(odd), want)
    ops.merge(odd, odd, even, out=even)
    if kind == "numpy":
        with pytest.raises(OperandError, match="overlaps post in part"):
            ops.merge(memory.view(np.uint8).view(ml_dtypes.float8_e5m2)[:100], *[memory] * 2, out=memory)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_named(kind: str) -> None:
    x, short = make(kind, np.zeros((2, 3))), make(kind, np.zeros(5))
    with pytest.raises(OperandError, match=r"post: expected the shape of new_base, \(2, 3\), got \(5,\)"):
        ops.merge(short, x, x)
    with pytest.raises(OperandError, match=r"deltas\[1\]\.base: expected the shape"):
        ops.merge_deltas(x, [(x, x), (x, short, 0.5)])
    with pytest.raises(OperandError, match=r"deltas\[0\]: expected \(post, base\)"):
        ops.merge_deltas(x, [(x,)])
    with pytest.raises(OperandError, match=r"out: expected the shape of new_base"):
        ops.merge(x, x, x, out=short)
    with pytest.raises(OperandError, match="out: expected dtype f32, got bf16"):
        ops.merge(x, x, x, out=make(kind, np.zeros((2, 3))), dtype="f32")
    for alpha in (float("nan"), float("inf"), "much", None):
        with pytest.raises(OperandError, match="alpha: expected a finite number"):
            ops.merge(x, x, x, alpha=alpha)
    for count in (0, -1, 1.5, True):
        with pytest.raises(OperandError, match="threads: expected"):
            ops.merge(x, x, x, threads=count)
    with pytest.raises(OperandTypeError, match=r"base: expected a numpy.ndarray or a torch.Tensor, got builtins.list"):
        ops.merge(x, [1.0], x)
    with pytest.raises(OperandTypeError, match="dtype: expected one of bf16"):
        ops.merge(x, x, x, dtype="i8")
    with pytest.raises(OperandTypeError, match="dtype: expected one of bf16"):
        ops.merge(x, x, x, dtype=object())
    with pytest.raises(OperandError, match="decode gives f64 or f32"):
        ops.decode(x, dtype="bf16")


def test_numpy_arrays_that_do_not_fit() -> None:
    x = make("numpy", [1.0])
    for bad, message in (
        (np.array([1]), "new_base: expected one of bf16.* got dtype int64"),
        (np.array([1.0], ">f4" if sys.byteorder == "little" else "<f4"), "other byte order"),
        (np.ma.masked_array([1.0], [True], np.float32), "mask"),
        (np.array([1j]), "got dtype complex128"),
    ):
        with pytest.raises(OperandTypeError, match=message):
            ops.merge(x, x, bad)
    frozen = x.copy()
    frozen.flags.writeable = False
    ops.merge(frozen, frozen, frozen)
    with pytest.raises(OperandError, match="out: expected writable"):
        ops.merge(x, x, x, out=frozen)


def test_tensors_that_do_not_fit() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(3)
    with pytest.raises(OperandError, match=r"post: requires grad.*post\.detach\(\)"):
        ops.merge(torch.ones(3, requires_grad=True), x, x)
    with pytest.raises(OperandError, match="base: is on meta"):
        ops.merge(x, torch.ones(3, device="meta"), x)
    with pytest.raises(OperandTypeError, match=r"expected a dense .*new_base\.to_dense\(\)"):
        ops.merge(x, x, x.to_sparse())
    with pytest.raises(OperandTypeError, match=r"got dtype torch\.int32"):
        ops.merge(x, x, x.int())


def test_merge_deltas_adds_in_order() -> None:
    big, one, zero = (make("numpy", [v], F32) for v in (2.0**60, 1.0, 0.0))
    forth, back = (big, zero), (zero, big)
    assert ops.merge_deltas(zero, [(one, zero), forth, back]).out[0] == 0.0
    assert ops.merge_deltas(zero, [forth, back, (one, zero)]).out[0] == 1.0
    assert ops.merge_deltas(zero, [(one, zero, 0.25), (one, zero)]).out[0] == 1.25
    assert ops.merge_deltas(one, []).out[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=lambda d: d.name)
def test_decode_and_encode(kind: str, dtype: DType) -> None:
    x = make(kind, np.linspace(-3, 3, 50), dtype)
    values = ops.decode(x)
    assert np.array_equal(bits(values).view(np.float64), reference.decode(bits(x), dtype))
    assert str(ops.decode(x, dtype="f32").dtype).removeprefix("torch.") == "float32"
    again = ops.encode(values, dtype)
    assert np.array_equal(bits(again.out), bits(x))
    assert type(again.out) is type(x)


def test_encode_rounds_once() -> None:
    x = np.array([1 + 2.0**-8 + 2.0**-30, 1e39, np.nan, np.inf])
    got = ops.encode(x, "bf16")
    assert bits(got.out).tolist() == [0x3F81, 0x7F80, 0x7FC0, 0x7F80]
    assert got.counts == (1, 1, 1)
    assert not got.counts.clean


@pytest.mark.parametrize("kind", KINDS)
def test_norms(kind: str) -> None:
    rng = np.random.default_rng(3)
    post, base, new_base = (make(kind, rng.normal(size=(100, 90))) for _ in range(3))
    want = reference.norms(*(reference.Array(bits(x).reshape(-1), BF16) for x in (post, base, new_base)))
    assert ops.norms(post, base, new_base) == want
    assert ops.merge(post, base, new_base, out=post, norms=True).norms == (want,)
    two = ops.merge_deltas(new_base, [(base, base), (new_base, base)], norms=True).norms
    assert two[0][0] == 0.0
    assert two[1].delta_squared == two[1].drift_squared == two[1].inner == want.drift_squared
    # Row-major order, whatever the strides.
    across = [x.T for x in (post, base, new_base)]
    assert ops.norms(*across) == ops.norms(
        *(make(kind, np.ascontiguousarray(reference.decode(bits(x), BF16))) for x in across)
    )
    assert ops.norms(*(x[:0] for x in (post, base, new_base))) == (0.0, 0.0, 0.0, 0.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_laws(data: st.DataObject) -> None:
    """post == base gives new_base's bytes; alpha = 0 does too; negating alpha exchanges post and base."""
    dtype = data.draw(st.sampled_from(MERGE_DTYPES))
    size = data.draw(st.integers(0, 1300))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    post, base, new_base = (
        rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8).view(dtype.to_numpy()) for _ in range(3)
    )
    alpha = data.draw(st.floats(-4, 4))
    assert bits(ops.merge(post, post, new_base, alpha=alpha).out).tolist() == bits(new_base).tolist()
    assert bits(ops.merge(post, base, new_base, alpha=0.0).out).tolist() == bits(new_base).tolist()
    forth = ops.merge(post, base, new_base, alpha=alpha)
    back = ops.merge(base, post, new_base, alpha=-alpha)
    assert bits(forth.out).tolist() == bits(back.out).tolist()
    assert forth.counts == back.counts


def test_no_torch_without_tensors() -> None:
    code = (
        "import sys, numpy as np; from paramdelta import ops;"
        "x = np.ones(3, np.float32); ops.merge(x, x, x, norms=True);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backends_say_what_they_are() -> None:
    assert "cpu" in backends.available()
    assert backends.why_not("cpu") is None
    assert "there is no backend 'abacus'" in (backends.why_not("abacus") or "")
    with pytest.raises(BackendError, match="abacus"):
        backends.get("abacus")
    found = backends.get("cpu").capabilities()
    assert found.variants[0] == "scalar"
    assert found.inputs == found.outputs == MERGE_DTYPES


@pytest.mark.parametrize("isa", backends.get("cpu").capabilities().variants)
def test_the_instruction_set_can_be_chosen(isa: str) -> None:
    code = "from paramdelta import _cpu; print(_cpu.best_isa())"
    done = subprocess.run([sys.executable, "-c", code], env={"PARAMDELTA_ISA": isa}, capture_output=True, text=True)
    assert done.stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error_that_lists_the_others() -> None:
    code = "import numpy as np; from paramdelta import ops; x = np.ones(3, np.float32); ops.merge(x, x, x)"
    done = subprocess.run([sys.executable, "-c", code], env={"PARAMDELTA_ISA": "mmx"}, capture_output=True, text=True)
    assert "BackendError: PARAMDELTA_ISA is 'mmx', but this machine runs: scalar" in done.stderr


def test_quota_of_cgroups(tmp_path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert threads.read_quota(["0::/a/b"], tmp_path) == 2.5
    assert threads.read_quota(["0::/"], tmp_path) is None
    one = tmp_path / "cpu,cpuacct" / "job"
    one.mkdir(parents=True)
    (one / "cpu.cfs_quota_us").write_text("150000")
    (one / "cpu.cfs_period_us").write_text("100000")
    assert threads.read_quota(["5:cpu,cpuacct:/job", "3:memory:/job"], tmp_path) == 1.5


def test_threads_are_shared_among_the_processes_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cgroup_quota", lambda: None)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads.default_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert threads.default_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert threads.default_threads() == 1
    monkeypatch.setattr(threads, "cgroup_quota", lambda: 2.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert threads.default_threads() == 2
