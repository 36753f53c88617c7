"""How conformance is checked: a call of the kernels on stored codes, a comparison that shows the first bad one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cuda_calls
import numpy as np
from remembered import remembered

from paramdelta import backends, reference
from paramdelta.backends import cpu
from paramdelta.dtypes import F64, DType

Codes = np.ndarray[Any, Any]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


def operand(array: reference.Array) -> backends.Operand:
    """Return the memory of an array of the reference's. It must outlive the call."""
    if array.codes is None:
        return backends.Operand(0, array.dtype)
    assert array.codes.flags.c_contiguous
    assert array.codes.itemsize == array.dtype.itemsize
    return backends.Operand(array.codes.__array_interface__["data"][0], array.dtype)


def run(
    new_base: reference.Array,
    terms: Sequence[reference.Term],
    dtype: DType,
    *,
    kernels: str,
    threads: int = 1,
    streamed: bool = False,
    out: Codes | None = None,
    count: int | None = None,
) -> reference.Merged:
    """Merge with ``kernels``: an instruction set of the CPU, or one of ``cuda_calls.KERNELS``, which know neither
    threads nor ways to store. ``out`` may be given to choose its place in memory."""
    if count is None:
        assert new_base.codes is not None
        count = new_base.codes.size
    if out is None:
        out = np.full(count, 0x55, reference.code_type(dtype))
    if kernels in cuda_calls.KERNELS:
        return reference.Merged(out, *cuda_calls.merge(kernels, new_base, terms, dtype, out, count))
    counts = cpu.merge(
        operand(new_base),
        [backends.Term(operand(t.post), operand(t.base), t.alpha) for t in terms],
        backends.Operand(out.__array_interface__["data"][0], dtype),
        count,
        threads=threads,
        isa=kernels,
        streamed=streamed,
    )
    return reference.Merged(out, *counts)


def equal(
    got: reference.Merged,
    want: reference.Merged,
    new_base: reference.Array,
    terms: Sequence[reference.Term],
) -> None:
    """Fail, showing the first element that differs, unless codes and counts are equal."""
    bad = np.flatnonzero(got.codes != want.codes)
    if bad.size:
        i = int(bad[0])
        operands = [("new_base", new_base)]
        for k, term in enumerate(terms):
            operands += [(f"post[{k}]", term.post), (f"base[{k}]", term.base)]
        shown = ", ".join(
            f"{name} {'zeros' if a.codes is None else hex(int(a.codes[i]))} ({a.dtype})" for name, a in operands
        )
        alphas = [t.alpha for t in terms]
        raise AssertionError(
            f"{bad.size} of {got.codes.size} elements differ, first [{i}]: expected {int(want.codes[i]):#x}, "
            f"got {int(got.codes[i]):#x} from {shown}, alpha {alphas}"
        )
    assert got[1:] == want[1:], f"counts (nan, inf, overflow): expected {want[1:]}, got {got[1:]}"


def check(
    new_base: reference.Array,
    terms: Sequence[reference.Term],
    dtype: DType,
    *,
    kernels: str,
    want: reference.Merged | None = None,
    **options: Any,
) -> None:
    """Merge with the kernels and compare with the reference."""
    if want is None:
        want = remembered(reference.merge, new_base, terms, dtype, options.get("count"))
    equal(run(new_base, terms, dtype, kernels=kernels, **options), want, new_base, terms)


def special(new_base: reference.Array, terms: Sequence[reference.Term], want: reference.Merged, dtype: DType) -> Mask:
    """Return which elements send their tile to the literal path: NaN or Inf in an operand, overflow or nearly so."""
    mask = np.abs(reference.decode(want.codes, dtype)) < reference.decode(largest_code(dtype), dtype)
    for array in (new_base, *(a for t in terms for a in (t.post, t.base))):
        assert array.codes is not None
        mask &= np.isfinite(reference.decode(array.codes, array.dtype))
    return ~mask


def largest_code(dtype: DType) -> Codes:
    """Return the code of the largest finite value."""
    return np.array([reference.FORMATS[dtype.name].largest], reference.code_type(dtype))


def pick(
    new_base: reference.Array, terms: Sequence[reference.Term], want: reference.Merged, order: Codes
) -> tuple[reference.Array, list[reference.Term], reference.Merged]:
    """Return the elements of a merge and its result in another order, or some of them."""

    def at(array: reference.Array) -> reference.Array:
        return reference.Array(None if array.codes is None else array.codes[order], array.dtype)

    picked = [reference.Term(at(t.post), at(t.base), t.alpha) for t in terms]
    return at(new_base), picked, reference.Merged(want.codes[order], *want[1:])


def apart(
    new_base: reference.Array, terms: Sequence[reference.Term], want: reference.Merged, mask: Mask
) -> tuple[reference.Array, list[reference.Term], reference.Merged]:
    """Return a merge with the elements under ``mask`` last: one of them among others would hide a fault of its tile."""
    return pick(new_base, terms, want, np.argsort(mask, kind="stable"))


def same_norms(got: tuple[float, ...], want: tuple[float, ...]) -> None:
    """Fail, naming the first that differs, unless norms are equal; NaN is one NaN."""
    for name, g, w in zip(reference.Norms._fields, got, want, strict=True):
        assert g == w or (math.isnan(g) and math.isnan(w)), f"{name}: expected {w!r}, got {g!r}"


def check_norms(
    post: Codes | None,
    base: Codes | None,
    new_base: Codes | None,
    kinds: Sequence[DType],
    kernels: str,
    threads: tuple[int, ...] = (1, 3),
) -> None:
    """Hold what kernels give to the reference; None among the operands stands for zeros."""
    arrays = [reference.Array(a, k) for a, k in zip((post, base, new_base), kinds, strict=True)]
    size = next(a.size for a in (post, base, new_base) if a is not None)
    filled = [a if a.codes is not None else reference.Array(np.zeros(size, np.uint64), F64) for a in arrays]
    want = reference.norms(*filled)
    if kernels in cuda_calls.KERNELS:
        same_norms(cuda_calls.norms(kernels, arrays, size), want)
        return
    for n in threads:
        same_norms(cpu.norms(*(operand(a) for a in arrays), size, threads=n, isa=kernels), want)
