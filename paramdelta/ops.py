"""Delta arithmetic on arrays: merge, decode, encode and norms for NumPy arrays (ml_dtypes included) and torch tensors.

Every result is defined by binary64 arithmetic and one rounding (see ``paramdelta.reference``), so its bits
depend on the operands alone: not on the instruction set, the number of threads, or the process's
floating-point mode.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

from paramdelta import backends, device_norms, device_tensors, tensor_lists
from paramdelta.backends import Counts, Norms, cpu
from paramdelta.backends.threads import default_threads
from paramdelta.device_norms import PendingNorms
from paramdelta.device_tensors import PendingCounts
from paramdelta.dtypes import F32, F64
from paramdelta.errors import OperandError
from paramdelta.tensors import (
    Tensor,
    allocate,
    check_apart,
    is_distributed,
    parse_dtype,
    read_operand,
    read_out,
    same_shape,
)

__all__ = [
    "Counts",
    "Encoded",
    "Merged",
    "MergedTensors",
    "Norms",
    "PendingCounts",
    "PendingNorms",
    "decode",
    "encode",
    "merge",
    "merge_deltas",
    "merge_many",
    "norms",
]

# Why norms refuse DTensors.
ORDER_OF_ELEMENTS = "are defined by an order of elements that shards do not have; gather the tensors"


class Merged(NamedTuple):
    """A merge's output, what to know of it, and the norms of each delta in order (empty where not asked for)."""

    out: Any
    counts: Counts | PendingCounts
    norms: tuple[Norms | PendingNorms, ...]


class Encoded(NamedTuple):
    """Encoded elements, and how many are NaN, infinite, or overflowed."""

    out: Any
    counts: Counts | PendingCounts


class MergedTensors(Sequence[Merged]):
    """The results of :func:`merge_many`, in order, each a :class:`Merged` that is made when it is asked for.

    ``outs`` is the list of the outputs alone.
    """

    def __init__(self, outs: list[Any], counts: Sequence[Counts] | Any) -> None:
        self.outs = outs
        self._counts = counts

    def __len__(self) -> int:
        return len(self.outs)

    @overload
    def __getitem__(self, k: int) -> Merged: ...

    @overload
    def __getitem__(self, k: slice) -> list[Merged]: ...

    def __getitem__(self, k: int | slice) -> Merged | list[Merged]:
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        k = range(len(self))[k]
        counts = self._counts[k] if isinstance(self._counts, Sequence) else PendingCounts(self._counts, k)
        return Merged(self.outs[k], counts, ())

    def __repr__(self) -> str:
        return f"MergedTensors({len(self)} tensors)"

    def total(self) -> Counts:
        """Return the counts of all merges together, having waited for the device once."""
        counts = self._counts
        return Counts(
            *(map(sum, zip(*counts, strict=True)) if isinstance(counts, Sequence) else counts.sum(0).tolist())
        )


def merge(
    post: Any,
    base: Any,
    new_base: Any,
    *,
    alpha: float = 1.0,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
    norms: bool = False,
) -> Merged:
    """Compute ``out = new_base + alpha · (post − base)``, rounded once. For lists of tensors: :func:`merge_many`.

    The delta, its product with alpha and the sum are binary64 operations, each rounded to nearest even; the
    result is rounded once to the output's type. Where post and base are bit-equal the delta is zero, NaN and
    Inf included, and an element of new_base that no delta touches keeps its own bits.

    Parameters
    ----------
    post, base, new_base : numpy.ndarray or torch.Tensor
        Equal shapes; any strides. Dtypes bf16, f16, f32, f64, f8_e4m3 (``float8_e4m3fn``) and f8_e5m2, in any
        mix. Tensors must need no gradient, and be all on the CPU or all on one CUDA device: there the merge is enqueued
        on PyTorch's current stream, nothing waits for it, and ``counts`` are pending (``PendingCounts``). DTensors are
        merged shard by shard, all being placed alike, and so is the result; ``counts`` are then those of all shards,
        for which all ranks must call.
    alpha : float
        A finite factor. 0 means that there is no delta at all.
    out : numpy.ndarray or torch.Tensor, optional
        Where to write: writable, new_base's shape, any strides. May be exactly one of the operands, never a
        part.
    dtype : DType, str, numpy.dtype or torch.dtype, optional
        The output's type; ``out``'s, or else new_base's, by default.
    threads : int, optional
        By default as many as affinity, cgroup quota and ``LOCAL_WORLD_SIZE`` allow. Of no account on a CUDA device.
    norms : bool
        Whether to compute ``norms(post, base, new_base)`` too, of the operands as they are before the merge; on a CUDA
        device they are pending (``PendingNorms``).

    Returns
    -------
    Merged
        ``out`` (a new array of new_base's kind unless given), ``counts`` of NaN, infinite and overflowed
        elements, ``norms`` (of the one delta, where asked for).

    Raises
    ------
    OperandError
        Shapes differ, alpha is not finite, ``out`` is read-only or overlaps an operand in part.
    OperandTypeError
        An operand is no array, or its dtype has no arithmetic here.

    Notes
    -----
    Source: ParamΔ for Direct Weight Mixing, arXiv 2504.21023 (alpha = 1).
    """
    return _merge(new_base, (("post", post, "base", base, alpha),), out, dtype, threads, norms)


def merge_deltas(
    new_base: Any,
    deltas: Sequence[tuple[Any, ...]],
    *,
    out: Any = None,
    dtype: Any = None,
    threads: int | None = None,
    norms: bool = False,
) -> Merged:
    """Compute ``out = new_base + Σ_k alpha_k · (post_k − base_k)``, rounded once.

    ``deltas`` is a sequence of ``(post, base)`` or ``(post, base, alpha)``, added in this order in binary64;
    an empty one makes this a conversion of ``new_base``. All else is as for :func:`merge`. ``Merged.norms``
    has one entry per delta. Source: ParamΔ, arXiv 2504.21023, and its mixtures of several deltas.
    """
    named = []
    for k, delta in enumerate(deltas):
        if not isinstance(delta, (tuple, list)) or len(delta) not in (2, 3):
            raise OperandError(
                f"deltas[{k}]: expected (post, base) or (post, base, alpha), got {type(delta).__name__}"
                + (f" of {len(delta)}" if isinstance(delta, (tuple, list)) else "")
            )
        alpha = delta[2] if len(delta) == 3 else 1.0
        named.append((f"deltas[{k}].post", delta[0], f"deltas[{k}].base", delta[1], alpha))
    return _merge(new_base, named, out, dtype, threads, norms)


def merge_many(
    merges: Sequence[tuple[Any, ...]],
    *,
    outs: Sequence[Any] | None = None,
    dtype: Any = None,
    threads: int | None = None,
) -> MergedTensors:
    """Compute ``out = new_base + alpha · (post − base)`` for many tensors: on a CUDA device, in a launch for hundreds.

    ``merges`` is a list of ``(post, base, new_base)`` or ``(post, base, new_base, alpha)``; ``outs`` has an entry for
    each, apart from all tensors of the other merges, which have no order. All must be on one device, or be DTensors on
    one mesh, each merge's placed alike. All else is as for :func:`merge`; nothing is written unless all is in order.

    Returns
    -------
    MergedTensors
        A sequence of ``Merged``, in order.

    Notes
    -----
    Tensors that are dense, in row-major order, cost about a microsecond of the host's time each with PyTorch 2.10 or
    later; outputs that are given save what allocating them takes. One tensor of another kind sends the whole list the
    general way: some fifty microseconds for each.
    """
    return MergedTensors(*enqueue_many(merges, outs, dtype, threads))


def enqueue_many(
    merges: Sequence[tuple[Any, ...]], outs: Sequence[Any] | None, dtype: Any, threads: int | None = None
) -> tuple[list[Any], Sequence[Counts] | Any]:
    """Do what :func:`merge_many` does; return the outputs, and their counts: on a device a tensor [n, 3]."""
    wanted = None if dtype is None else parse_dtype("dtype", dtype)
    found = tensor_lists.merge(merges, outs, wanted, threads)
    if found is not None:
        return found
    if outs is not None and len(outs) != len(merges):
        raise OperandError(f"outs: expected one for each of {len(merges)} merges, got {len(outs)}")
    for k, each in enumerate(merges):
        if not isinstance(each, (tuple, list)) or len(each) not in (3, 4):
            raise OperandError(f"merges[{k}]: expected (post, base, new_base) or (post, base, new_base, alpha)")
    if any(is_distributed(x) for each in merges for x in each[:3]) or any(is_distributed(x) for x in outs or ()):
        run = functools.partial(enqueue_many, dtype=dtype, threads=threads)
        results, totals = _shards().many_on_shards(merges, outs, run)
        return results, totals
    read, targets = [], []
    for k, each in enumerate(merges):
        post, base, new = (
            read_operand(f"merges[{k}].{name}", x) for name, x in zip(("post", "base", "new_base"), each, strict=False)
        )
        same_shape([new, post, base])
        read.append((new, [(post, base, _finite(each[3]) if len(each) == 4 else 1.0)]))
        if outs is not None:
            targets.append(read_out(outs[k], [new, post, base], wanted, f"outs[{k}]"))
    operands = [(new, *pair[:2]) for new, (pair,) in read]
    check_apart(targets, operands)
    if read and (any(t.kind == "cuda" for each in operands for t in each) or _enqueued_from_host()):
        return device_tensors.merge_many(read, outs, wanted)
    done = [
        _merge(new, (("post", post, "base", base, alpha),), targets[k] if outs else None, dtype, threads, False)
        for k, (new, ((post, base, alpha),)) in enumerate(read)
    ]
    return list(outs) if outs else [each.out for each in done], [each.counts for each in done]


def decode(x: Any, *, out: Any = None, dtype: Any = F64, threads: int | None = None) -> Any:
    """Return ``out = value of x`` in f64 or f32.

    ``x`` has any dtype with arithmetic; ``dtype`` is f64 (always exact) or f32 (exact except for f64
    operands, which are rounded once). Shapes, ``out``, ``threads`` and errors are as for :func:`merge`. NaNs
    come out canonical.
    """
    wanted = parse_dtype("dtype", dtype)
    if wanted not in (F64, F32):
        raise OperandError(f"dtype: decode gives f64 or f32, not {wanted}; use encode for other types")
    return _merge(x, (), out, wanted, threads, False, "x").out


def encode(x: Any, dtype: Any, *, out: Any = None, threads: int | None = None) -> Encoded:
    """Return ``out = x rounded once to dtype``, to nearest even, and the counts.

    ``x`` has any dtype with arithmetic, and so has the result. Overflow gives Inf, or ±448 in f8_e4m3, which
    has none; NaN comes out canonical, unless ``x`` has ``dtype`` already and is copied. Shapes, ``out``,
    ``threads`` and errors are as for :func:`merge`. (Casts of torch and ml_dtypes round f64 twice: 1 + 2^-8 +
    2^-30 is 1 there in bf16, and 1.0078125 here.)
    """
    merged = _merge(x, (), out, parse_dtype("dtype", dtype), threads, False, "x")
    return Encoded(merged.out, merged.counts)


def norms(post: Any, base: Any, new_base: Any, *, threads: int | None = None) -> Norms | PendingNorms:
    """Return ``‖post − base‖²``, ``‖new_base − base‖²``, ``⟨post − base, new_base − base⟩`` and ``max |post − base|``.

    The sums are defined by a fixed order, so that their bits depend on the operands alone. Operands are
    rounded to binary32 (exact except for f64) and subtracted in binary32. A leaf is 4096 consecutive
    elements, in row-major order from the tensor's start, zero-padded. Within it, lane l of 256 adds the
    products of elements l, l + 256, … in order, product and sum each rounded to binary32. Lanes are converted
    to binary64 and added in halves, 128 + 128 down to one. The result is the correctly rounded sum of all
    leaves. A NaN difference makes the sums it enters NaN, and the maximum. Operands, ``threads`` and errors
    are as for :func:`merge`. Of CUDA tensors the norms are enqueued on PyTorch's current stream and pending
    (``PendingNorms``), the same bits; DTensors are refused: their shards do not have the order of elements.
    """
    named = (("post", post), ("base", base), ("new_base", new_base))
    for name, x in named:
        if is_distributed(x):
            raise OperandError(f"{name}: norms {ORDER_OF_ELEMENTS}")
    operands = [read_operand(name, x) for name, x in named]
    same_shape(operands)
    return _norms(operands, _threads(threads))


def _merge(
    new_base: Any,
    deltas: Sequence[tuple[str, Any, str, Any, Any]],
    out: Any,
    dtype: Any,
    threads: int | None,
    norms: bool,
    new_name: str = "new_base",
) -> Merged:
    if len(deltas) == 1 and not norms:
        ((_, post, _, base, alpha),) = deltas
        wanted = None if dtype is None else parse_dtype("dtype", dtype)
        lean = tensor_lists.merge(((post, base, new_base, alpha),), None if out is None else (out,), wanted, threads)
        if lean is not None:
            (result,), counts = lean
            return Merged(result, counts[0] if isinstance(counts, Sequence) else PendingCounts(counts), ())
    named = {new_name: new_base}
    for post_name, post, base_name, base, _ in deltas:
        named |= {post_name: post, base_name: base}
    if any(is_distributed(x) for x in (*named.values(), out)):

        def run(local: list[Any], local_out: Any) -> tuple[Any, Any]:
            pairs = zip(deltas, local[1::2], local[2::2], strict=True)
            parts = [(p_name, p, b_name, b, alpha) for (p_name, _, b_name, _, alpha), p, b in pairs]
            part = _merge(local[0], parts, local_out, dtype, threads, False, new_name)
            return part.out, part.counts

        whole, counts = _shards().on_shards(named, out, run, norms)
        return Merged(whole, counts, ())
    new = read_operand(new_name, new_base)
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for post_name, post, base_name, base, alpha in deltas:
        pairs.append((read_operand(post_name, post), read_operand(base_name, base), _finite(alpha)))
    operands = [new, *(t for post, base, _ in pairs for t in (post, base))]
    same_shape(operands)
    wanted = None if dtype is None else parse_dtype("dtype", dtype)
    count = _threads(threads)
    # Norms come before the merge, whose output may take the place of an operand.
    found: list[Norms | PendingNorms] = []
    if any(t.kind == "cuda" for t in operands) or _enqueued_from_host():
        if norms:
            found = [_norms([post, base, new], count) for post, base, _ in pairs]
        return Merged(*device_tensors.merge(new, pairs, out, wanted), tuple(found))
    if out is None:
        target, result = allocate(new, wanted or new.dtype)
    else:
        target, result = read_out(out, operands, wanted), out

    # SAFETY: operands and target hold references to the arrays until this function returns; none is resized
    # meanwhile.
    sources = {id(t): t.contiguous() for t in operands}
    if norms:
        found = [_norms([sources[id(t)] for t in (post, base, new)], count) for post, base, _ in pairs]
    dense = target.contiguous_target()
    counts = cpu.merge(
        sources[id(new)].operand(),
        [backends.Term(sources[id(p)].operand(), sources[id(b)].operand(), alpha) for p, b, alpha in pairs],
        dense.operand(),
        dense.codes.size,
        threads=count,
    )
    if dense is not target:
        target.codes[...] = dense.codes
    return Merged(result, counts, tuple(found))


def _norms(operands: Sequence[Tensor], threads: int) -> Norms | PendingNorms:
    device = "cuda" if any(operand.kind == "cuda" for operand in operands) else "cpu"
    if backends.choose("norms", device=device, inputs=[operand.dtype for operand in operands]) != "cpu":
        return device_norms.norms(operands)
    post, base, new = (t.contiguous() for t in operands)
    return cpu.norms(post.operand(), base.operand(), new.operand(), post.codes.size, threads=threads)


def _shards() -> Any:
    """Return the module that takes DTensors apart: it is above this one, for it brings torch."""
    return importlib.import_module("paramdelta.torch_ops")


def _enqueued_from_host() -> bool:
    """Return whether CPU memory goes the way of a device's, by PARAMDELTA_BACKEND: kernels compiled for the host, or
    interpreted, take it."""
    return backends.choose("merge", device="cpu") != "cpu"


def _finite(alpha: Any) -> float:
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise OperandError(f"alpha: expected a finite number, got {alpha!r}") from None
    if not math.isfinite(value):
        raise OperandError(f"alpha: expected a finite number, got {value}")
    return value


def _threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise OperandError(f"threads: expected a whole number from 1 on, or None for all, got {threads!r}")
    return threads
