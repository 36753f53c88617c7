"""Merges of elements of one type in Triton's interpreter, against the reference: codes and counts, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import kernel_check
import kernel_values as values
import numpy as np
import pytest

from paramdelta import backends, reference
from paramdelta.backends import triton
from paramdelta.dtypes import BY_NAME, DType
from paramdelta.errors import BackendError
from paramdelta.kernels import launch
from paramdelta.reference import Array, Term

# The interpreter takes as long for a program of 64 Ki elements as for one of a thousand.
BLOCK = 1 << 16
TYPES = [BY_NAME[name] for name in ("bf16", "f16", "f32")]


def address(codes: np.ndarray | None) -> int:
    return 0 if codes is None else int(codes.__array_interface__["data"][0])


def entry(new_base: Array, terms: Sequence[Term], out: np.ndarray, counts: np.ndarray) -> tuple:
    pairs = [address(a.codes) for t in terms for a in (t.post, t.base)]
    return address(new_base.codes), pairs, address(out), out.size, address(counts)


def check(new_base: Array, terms: Sequence[Term], size: int = 0, block: int = BLOCK) -> None:
    dtype = new_base.dtype
    want = reference.merge(new_base, terms, dtype, size)
    out = np.full(want.codes.size + 3, 0x55, want.codes.dtype)  # three more, which must stay
    counts = np.zeros(3, np.int64)
    types = [(t.post.dtype, t.base.dtype, t.alpha) for t in terms]
    triton.merge(dtype, types, dtype, [entry(new_base, terms, out[:-3], counts)], block=block)
    kernel_check.equal(reference.Merged(out[:-3], *counts.tolist()), want, new_base, terms)
    assert (out[-3:] == 0x55).all(), "elements beyond the last were written"


def arrays(dtype: DType, *codes: np.ndarray | None) -> list[Array]:
    return [Array(c, dtype) for c in codes]


def test_it_is_the_interpreter_and_says_so() -> None:
    assert backends.why_not("triton") is None
    assert backends.get("triton").capabilities().variants == ("interpreter",)
    assert backends.get("triton").capabilities().devices == ("cpu",)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
def test_adversarial_values(dtype: DType) -> None:
    codes = values.adversarial(dtype)
    rng = np.random.default_rng(1)
    for alpha in (1.0, -1.0, 0.3, 3.0, 2.0**-30, 5e-324, -5e-324, 1.7e308):
        post, base, new_base = arrays(dtype, *(rng.choice(codes, 300_000) for _ in range(3)))
        check(new_base, [Term(post, base, alpha)])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("make", [values.clustered, values.weights], ids=lambda f: f.__name__)
def test_ties_and_weights(dtype: DType, make) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(2)
    for alpha in (1.0, -0.7):
        post, base, new_base = arrays(dtype, *make(rng, dtype, 300_000))
        check(new_base, [Term(post, base, alpha)])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
def test_any_bits_and_several_deltas(dtype: DType) -> None:
    rng = np.random.default_rng(3)
    for alphas in ((), (0.0,), (1.0, 0.0, -0.25), (0.5, 1.0, 1e-3, -1.0)):
        terms = [Term(*arrays(dtype, *(values.uniform(rng, dtype, 200_000) for _ in "pb")), a) for a in alphas]
        check(Array(values.uniform(rng, dtype, 200_000), dtype), terms)


def test_each_16_bit_code_alone() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype in TYPES[:2]:
        zero, one, codes = arrays(dtype, np.zeros_like(every), np.ones_like(every), every)
        check(codes, [Term(one, zero, 1.0)])
        check(zero, [Term(codes, zero, 1.0)])
        check(zero, [Term(codes, one, 0.7)])


def test_binary64_is_rounded_once() -> None:
    """A sum that a detour over binary32 would round to a tie, and then down."""
    bf16 = TYPES[0]
    codes = [reference.encode(np.array([x]), bf16)[0] for x in (2.0**-8, 1.0, 2.0**-31)]
    first, second = (Term(Array(c, bf16), Array(None, bf16)) for c in (codes[0], codes[2]))
    out, counts = np.zeros(1, np.uint16), np.zeros(3, np.int64)
    types = [(bf16, bf16, 1.0)] * 2
    triton.merge(bf16, types, bf16, [entry(Array(codes[1], bf16), [first, second], out, counts)], block=16)
    assert reference.decode(out, bf16)[0] == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
def test_lengths_and_places_in_memory(dtype: DType) -> None:
    rng = np.random.default_rng(4)
    room = [values.uniform(rng, dtype, 4000) for _ in range(3)]
    for size in (0, 1, 2, 15, 16, 17, 1023, 1024, 1025, 3000):
        for shifts in ((0, 0, 0), (1, 2, 3), (8, 1, 0)):
            post, base, new_base = (Array(r[s : s + size], dtype) for r, s in zip(room, shifts, strict=True))
            check(new_base, [Term(post, base, 0.5)], block=1024)


def test_operands_of_zeros() -> None:
    rng = np.random.default_rng(5)
    for dtype in TYPES:
        codes = [values.weights(rng, dtype, 1000)[0] for _ in range(3)]
        for mask in range(8):
            post, base, new_base = (Array(None if mask >> k & 1 else c, dtype) for k, c in enumerate(codes))
            check(new_base, [Term(post, base, 0.5)], size=1000)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("alphas", [(1.0,), (0.5, 0.0, -1.0)], ids=["one-delta", "three-deltas"])
@pytest.mark.parametrize("captured", [False, True], ids=["copied", "captured"])
def test_many_tensors_in_one_launch(
    dtype: DType, alphas: tuple[float, ...], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph the table is written by launches."""
    monkeypatch.setattr(triton, "_capturing", lambda: captured)
    rng = np.random.default_rng(6)
    tensors, wanted, kept = [], [], []
    for size in (*rng.integers(1, 300, 25), 0, 5000, 1, 4096):
        new_base = Array(values.uniform(rng, dtype, int(size)), dtype)
        terms = [Term(*(Array(values.uniform(rng, dtype, int(size)), dtype) for _ in "pb"), a) for a in alphas]
        out, counts = np.zeros(int(size), new_base.codes.dtype), np.zeros(3, np.int64)  # type: ignore[union-attr]
        tensors.append(entry(new_base, terms, out, counts))
        wanted.append((new_base, terms, reference.merge(new_base, terms, dtype)))
        kept.append((out, counts))
    triton.merge(dtype, [(dtype, dtype, a) for a in alphas], dtype, tensors, block=1024)
    for (new_base, terms, want), (out, counts) in zip(wanted, kept, strict=True):
        kernel_check.equal(reference.Merged(out, *counts.tolist()), want, new_base, terms)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
def test_strides(dtype: DType) -> None:
    rng = np.random.default_rng(7)
    shape = (7, 5, 33)
    post, base, new_base = (values.weights(rng, dtype, 9 * 5 * 99)[k].reshape(9, 5, 99) for k in range(3))
    views = [new_base[2:, :, ::3], post[:7, ::-1][:, ::-1, :33], np.moveaxis(base.reshape(5, 9, 99), 1, 0)[:7, :, 5:38]]
    room = np.full((33, 7, 6), 0x55, post.dtype)
    out = room.transpose(1, 2, 0)[:, :5]
    steps = [[s // v.itemsize for s in v.strides] for v in (views[0], out, views[1], views[2])]
    counts = np.zeros(3, np.int64)
    launch.merge(
        address(views[0]), [(address(views[1]), address(views[2]), 0.3)], address(out), address(counts), out.size,
        dtype.name, shape=shape, strides=steps, block=512,
    )  # fmt: skip
    flat = [Array(np.ascontiguousarray(v).reshape(-1), dtype) for v in views]
    terms = [Term(flat[1], flat[2], 0.3)]
    want = reference.merge(flat[0], terms, dtype)
    got = reference.Merged(np.ascontiguousarray(out).reshape(-1), *counts.tolist())
    kernel_check.equal(got, want, flat[0], terms)
    assert (room.transpose(1, 2, 0)[:, 5] == 0x55).all(), "elements between rows were written"


def test_what_it_does_not_do_is_said() -> None:
    bf16, f16, f64 = BY_NAME["bf16"], BY_NAME["f16"], BY_NAME["f64"]
    with pytest.raises(BackendError, match="operands and output of one type of bf16, f16, f32, got bf16, f16"):
        triton.merge(bf16, [(bf16, bf16, 1.0)], f16, [])
    with pytest.raises(BackendError, match="got f64; use the backend cuda"):
        triton.merge(f64, [], f64, [])
    codes, counts = np.zeros(32, np.uint16), np.zeros(3, np.int64)
    with pytest.raises(BackendError, match="memory at multiples of 2 bytes for bf16"):
        triton.merge(bf16, [], bf16, [(address(codes) + 1, [], address(codes), 4, address(counts))])
