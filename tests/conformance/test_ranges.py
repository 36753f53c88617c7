"""What may not matter: addresses, lengths, cuts, threads, stores, writing in place, the floating-point mode."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import subprocess
import sys

import cuda_calls
import numpy as np
import pytest
from kernel_check import check, equal, operand, run
from kernel_values import adversarial, shifted, uniform, weights

from paramdelta import reference
from paramdelta.backends import cpu
from paramdelta.dtypes import BF16, F8_E4M3, F16, F32, F64, MERGE_DTYPES, DType


def ids(value: object) -> str:
    return value.name if isinstance(value, DType) else str(value)


def triple(dtype: DType, size: int, odd: float = 0.0005):
    """Weights with a few odd codes among them, so that some tiles take each path."""
    rng = np.random.default_rng(size)
    post, base, new_base = weights(rng, dtype, size)
    for array in (post, base, new_base):
        where = rng.random(size) < odd
        array[where] = rng.choice(adversarial(dtype), int(where.sum()))
    return post, base, new_base


@pytest.mark.parametrize("streamed", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize(
    ("dtype", "alpha"), [(BF16, 1.0), (F16, 1.0), (F32, 1.0), (BF16, 0.7), (F8_E4M3, 1.0)], ids=ids
)
def test_every_tail(kernels: str, dtype: DType, alpha: float, streamed: bool) -> None:
    post, base, new_base = triple(dtype, 1200)
    terms = [reference.Term(reference.Array(post, dtype), reference.Array(base, dtype), alpha)]
    want = reference.merge(reference.Array(new_base, dtype), terms, dtype)
    for size in range(1101):
        # The bytes behind the output must stay as they are.
        memory = np.full(1200, 0x2A, post.dtype)
        got = run(
            reference.Array(new_base, dtype), terms, dtype, kernels=kernels, streamed=streamed, out=memory, count=size
        )
        assert np.array_equal(got.codes[:size], want.codes[:size]), size
        assert (memory[size:] == 0x2A).all(), size


@pytest.mark.parametrize("streamed", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_unaligned_addresses(kernels: str, dtype: DType, streamed: bool) -> None:
    post, base, new_base = triple(dtype, 1777)
    for k, alpha in enumerate((1.0, 0.7, 1.0, 0.7)):
        p, b, n = (shifted(x, offset) for x, offset in zip((post, base, new_base), (1, 2 + k, 7 * k), strict=True))
        for offset in (0, 1, 2, 24, 33, 62):
            out = shifted(np.zeros_like(post), offset)
            terms = [reference.Term(reference.Array(p, dtype), reference.Array(b, dtype), alpha)]
            check(reference.Array(n, dtype), terms, dtype, kernels=kernels, out=out, streamed=streamed)


def before_forbidden_memory(codes: np.ndarray) -> np.ndarray:
    """Return a copy that ends where a page begins that nobody may touch."""
    page = mmap.PAGESIZE
    size = -(-codes.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    view = np.frombuffer(memory, np.uint8)[size - codes.nbytes : size].view(codes.dtype)
    view[...] = codes
    return view


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@pytest.mark.parametrize("streamed", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_nothing_beyond_the_end_is_touched(kernels: str, dtype: DType, streamed: bool) -> None:
    post, base, new_base = (before_forbidden_memory(x) for x in triple(dtype, 700))
    out = before_forbidden_memory(np.zeros_like(post))
    for size in (*range(1, 70), 95, 96, 97, 511, 512, 513, 544, 575, 576, 577, 700):
        p, b, n = (reference.Array(x[700 - size :], dtype) for x in (post, base, new_base))
        for alpha in (1.0, 0.7):
            run(n, [reference.Term(p, b, alpha)], dtype, kernels=kernels, streamed=streamed, out=out[700 - size :])
        if kernels in cpu.capabilities().variants:
            cpu.norms(operand(p), operand(b), operand(n), size, threads=1, isa=kernels)
        elif kernels in cuda_calls.NORM_KERNELS:
            cuda_calls.norms(kernels, (p, b, n), size)


@pytest.mark.parametrize("place", ["post", "base", "new_base"])
@pytest.mark.parametrize("streamed", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize(("dtype", "alpha"), [(BF16, 1.0), (F16, 1.0), (F32, 1.0), (F16, 0.7), (F64, 1.0)], ids=ids)
def test_in_place(kernels: str, dtype: DType, alpha: float, place: str, streamed: bool) -> None:
    arrays = dict(zip(("post", "base", "new_base"), triple(dtype, 5003), strict=True))
    terms = [reference.Term(reference.Array(arrays["post"], dtype), reference.Array(arrays["base"], dtype), alpha)]
    new_base = reference.Array(arrays["new_base"], dtype)
    want = reference.merge(new_base, terms, dtype)
    got = run(new_base, terms, dtype, kernels=kernels, out=arrays[place], streamed=streamed)
    assert np.array_equal(got.codes, want.codes)
    assert got[1:] == want[1:]


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_cuts_change_nothing(kernels: str, alpha: float) -> None:
    post, base, new_base = triple(BF16, 20_000)
    whole = run(
        reference.Array(new_base, BF16),
        [reference.Term(reference.Array(post, BF16), reference.Array(base, BF16), alpha)],
        BF16,
        kernels=kernels,
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
        cuts = [0, *sorted(rng.integers(0, 20_000, 9).tolist()), 20_000]
        parts = []
        for first, last in itertools.pairwise(cuts):
            terms = [
                reference.Term(reference.Array(post[first:last], BF16), reference.Array(base[first:last], BF16), alpha)
            ]
            parts.append(run(reference.Array(new_base[first:last], BF16), terms, BF16, kernels=kernels))
        assert np.array_equal(np.concatenate([p.codes for p in parts]), whole.codes)
        assert tuple(np.sum([p[1:] for p in parts], axis=0)) == whole[1:]


@pytest.mark.parametrize("threads", [2, 3, 7, 64])
@pytest.mark.parametrize(("dtype", "alpha"), [(BF16, 1.0), (F16, 0.7)], ids=ids)
def test_threads_change_nothing(kernels: str, dtype: DType, alpha: float, threads: int) -> None:
    post, base, new_base = triple(dtype, 700_001, 1e-5)
    terms = [reference.Term(reference.Array(post, dtype), reference.Array(base, dtype), alpha)]
    new = reference.Array(new_base, dtype)
    one = run(new, terms, dtype, kernels=kernels)
    for streamed in (False, True):
        equal(run(new, terms, dtype, kernels=kernels, threads=threads, streamed=streamed), one, new, terms)


@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_post_equal_to_base_gives_new_base(kernels: str, dtype: DType) -> None:
    rng = np.random.default_rng(1)
    post, new_base = uniform(rng, dtype, 40_000), uniform(rng, dtype, 40_000)
    for alpha in (1.0, 0.7):
        term = reference.Term(reference.Array(post, dtype), reference.Array(post.copy(), dtype), alpha)
        got = run(reference.Array(new_base, dtype), [term, term], dtype, kernels=kernels)
        assert np.array_equal(got.codes, new_base)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=ids)
def test_base_equal_to_new_base_gives_post(kernels: str, dtype: DType) -> None:
    """The mirror law, where both binary64 operations are exact."""
    form = reference.FORMATS[dtype.name]
    rng = np.random.default_rng(2)
    lowest, reach = {"bf16": (110, 44), "f16": (1, 29), "f32": (110, 28)}[dtype.name]
    kind = reference.code_type(dtype)
    fields = rng.integers(lowest, lowest + reach, (2, 200_000)).astype(kind)
    mantissas = rng.integers(0, 1 << form.mantissa, (2, 200_000)).astype(kind)
    signs = rng.integers(0, 2, (2, 200_000)).astype(kind) << kind.type(dtype.bits - 1)
    post, base = signs | (fields << kind.type(form.mantissa)) | mantissas
    post, base = np.ascontiguousarray(post), np.ascontiguousarray(base)
    got = run(
        reference.Array(base, dtype),
        [reference.Term(reference.Array(post, dtype), reference.Array(base, dtype))],
        dtype,
        kernels=kernels,
    )
    assert np.array_equal(got.codes, post)


FLUSHED = """
import ctypes, mmap, sys
import numpy as np

# stmxcsr/ldmxcsr in eight bytes of machine code: rdi points to the word to load.
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes([0x0F, 0xAE, 0x17, 0xC3]))
load = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
from paramdelta import backends
from paramdelta.backends import cpu
from paramdelta.dtypes import BY_NAME

data = np.load(sys.argv[1])
backends.get("cpu").capabilities()
mode = ctypes.c_uint32(0xFFC0)  # flush to zero, subnormals as zero, round towards zero
results = {}
for key in [k[:-5] for k in data.files if k.endswith("/post")]:
    dtype, alpha = key.split("/")
    post, base, new = (data[f"{key}/{name}"] for name in ("post", "base", "new_base"))
    out = np.zeros_like(post)
    ops = [backends.Operand(a.__array_interface__["data"][0], BY_NAME[dtype]) for a in (new, post, base, out)]
    for isa in cpu.capabilities().variants:
        terms = [backends.Term(ops[1], ops[2], float(alpha))]
        call = lambda: cpu.merge(ops[0], terms, ops[3], post.size, threads=2, isa=isa)
        load(ctypes.addressof(mode))
        call()
        load(ctypes.addressof(ctypes.c_uint32(0x1F80)))
        results[f"{key}/{isa}"] = out.copy()
np.savez(sys.argv[2], **results)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(sys, "getrefcount"), reason="sets the mode by machine code")
def test_floating_point_mode_changes_nothing(tmp_path) -> None:
    """Flush-to-zero and another rounding, set in a process of its own, must not reach the kernels."""
    import platform

    if platform.machine() != "x86_64":
        pytest.skip(f"the machine code that sets the mode is x86-64's, this is {platform.machine()}")
    rng = np.random.default_rng(4)
    inputs, wants = {}, {}
    for dtype in (BF16, F16, F32):
        for alpha in (1.0, 0.7):
            arrays = [rng.choice(adversarial(dtype), 300_000) for _ in range(3)]
            key = f"{dtype.name}/{alpha}"
            inputs.update({f"{key}/{n}": a for n, a in zip(("post", "base", "new_base"), arrays, strict=True)})
            post, base, new_base = (reference.Array(a, dtype) for a in arrays)
            wants[key] = reference.merge(new_base, [reference.Term(post, base, alpha)], dtype).codes
    np.savez(tmp_path / "in.npz", **inputs)
    subprocess.run([sys.executable, "-c", FLUSHED, tmp_path / "in.npz", tmp_path / "out.npz"], check=True)
    results = np.load(tmp_path / "out.npz")
    assert len(results.files) >= len(wants)
    for name in results.files:
        assert np.array_equal(results[name], wants[name.rsplit("/", 1)[0]]), name
