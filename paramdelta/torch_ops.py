"""Delta arithmetic as PyTorch operators, `torch.ops.paramdelta.*`: for torch.compile, FakeTensor, DTensor and FSDP2.

    merge(post, base, new_base, alpha=1.0, dtype=None) -> (out, counts)
    merge_into(post, base, new_base, out, alpha=1.0) -> counts              writes to out
    merge_deltas(new_base, posts, bases, alphas, dtype=None) -> (out, counts)
    merge_many(posts, bases, new_bases, alpha=1.0) -> (outs, counts)        one launch for many tensors on a GPU
    merge_many_into(posts, bases, new_bases, outs, alpha=1.0) -> counts
    encode(x, dtype) -> (out, counts)                                       to f64 or f32 this decodes

Each is the function of `paramdelta.ops` of that name, bit for bit; ``counts`` are three int64 on the operands' device,
NaN, Inf and overflow, [n, 3] for many tensors, so that nothing waits for the device. Importing this module registers
the operators; it imports torch.

Those that write are not called ``merge_``: of a name that ends so DTensor expects that the first operand is written.
An operator takes DTensors where all of an element's operands are on one rank: tensors placed alike, on shards of any
dimension or replicated. ``counts`` of shards are partial sums. Errors are those of `paramdelta.ops`; under a tracer,
where there is no memory, shapes alone are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paramdelta import ops
from paramdelta.backends import Counts
from paramdelta.errors import OperandError
from paramdelta.tensors import is_distributed, parse_dtype

__all__ = ["encode", "merge", "merge_deltas", "merge_into", "merge_many", "merge_many_into"]

_LIBRARY = torch.library.Library("paramdelta", "DEF")
_SCHEMAS = {
    "merge": "(Tensor post, Tensor base, Tensor new_base, float alpha=1., ScalarType? dtype=None) -> (Tensor, Tensor)",
    "merge_into": "(Tensor post, Tensor base, Tensor new_base, Tensor(a!) out, float alpha=1.) -> Tensor",
    "merge_deltas": "(Tensor new_base, Tensor[] posts, Tensor[] bases, float[] alphas, ScalarType? dtype=None)"
    " -> (Tensor, Tensor)",
    "merge_many": "(Tensor[] posts, Tensor[] bases, Tensor[] new_bases, float alpha=1.) -> (Tensor[], Tensor)",
    "merge_many_into": "(Tensor[] posts, Tensor[] bases, Tensor[] new_bases, Tensor(a!)[] outs, float alpha=1.)"
    " -> Tensor",
    "encode": "(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
}


def _operator(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator, its function on CPU and CUDA memory and what a tracer is to know of it; return it."""
    _LIBRARY.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, real, device)
    torch.library.register_fake(f"paramdelta::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.paramdelta, name).default


def _counts(counts: Any, like: Tensor) -> Tensor:
    """Return counts as a tensor: as the device holds them, or made of numbers."""
    found = getattr(counts, "tensor", None)
    return torch.tensor(tuple(counts), dtype=torch.int64, device=like.device) if found is None else found


def _same_lengths(posts: Sequence[Tensor], bases: Sequence[Tensor], others: Sequence[Any], name: str) -> None:
    if not len(posts) == len(bases) == len(others):
        raise OperandError(
            f"posts, bases, {name}: expected as many of each, got {len(posts)}, {len(bases)}, {len(others)}"
        )


def _merge(
    post: Tensor, base: Tensor, new_base: Tensor, alpha: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    merged = ops.merge(post, base, new_base, alpha=alpha, dtype=dtype)
    return merged.out, _counts(merged.counts, new_base)


def _merge_to(post: Tensor, base: Tensor, new_base: Tensor, out: Tensor, alpha: float = 1.0) -> Tensor:
    return _counts(ops.merge(post, base, new_base, alpha=alpha, out=out).counts, new_base)


def _merge_deltas(
    new_base: Tensor,
    posts: Sequence[Tensor],
    bases: Sequence[Tensor],
    alphas: Sequence[float],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    _same_lengths(posts, bases, alphas, "alphas")
    merged = ops.merge_deltas(new_base, list(zip(posts, bases, alphas, strict=True)), dtype=dtype)
    return merged.out, _counts(merged.counts, new_base)


def _merge_many(
    posts: Sequence[Tensor], bases: Sequence[Tensor], new_bases: Sequence[Tensor], alpha: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    _same_lengths(posts, bases, new_bases, "new_bases")
    many = ops.merge_many([(p, b, n, alpha) for p, b, n in zip(posts, bases, new_bases, strict=True)])
    return [each.out for each in many], _stacked([each.counts for each in many], new_bases)


def _merge_many_to(
    posts: Sequence[Tensor],
    bases: Sequence[Tensor],
    new_bases: Sequence[Tensor],
    outs: Sequence[Tensor],
    alpha: float = 1.0,
) -> Tensor:
    _same_lengths(posts, bases, new_bases, "new_bases")
    many = ops.merge_many([(p, b, n, alpha) for p, b, n in zip(posts, bases, new_bases, strict=True)], outs=outs)
    return _stacked([each.counts for each in many], new_bases)


def _stacked(counts: Sequence[Any], like: Sequence[Tensor]) -> Tensor:
    if not counts:
        return torch.zeros((0, 3), dtype=torch.int64)
    return torch.stack([_counts(each, tensor) for each, tensor in zip(counts, like, strict=True)])


def _encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    encoded = ops.encode(x, dtype)
    return encoded.out, _counts(encoded.counts, x)


def _like(x: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return what the output is where there is no memory: row-major, of x's shape."""
    for other in others:
        if other.shape != x.shape:
            raise OperandError(f"expected operands of one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _three(x: Tensor) -> Tensor:
    return torch.empty(3, dtype=torch.int64, device=x.device)


def _many(posts: Sequence[Tensor], bases: Sequence[Tensor], new_bases: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    outs = [_like(n, p, b) for p, b, n in zip(posts, bases, new_bases, strict=True)]
    device = new_bases[0].device if new_bases else torch.device("cpu")
    return outs, torch.empty((len(outs), 3), dtype=torch.int64, device=device)


merge = _operator(
    "merge", _merge, lambda post, base, new, alpha=1.0, dtype=None: (_like(new, post, base, dtype=dtype), _three(new))
)
merge_into = _operator(
    "merge_into", _merge_to, lambda post, base, new, out, alpha=1.0: (_like(new, post, base, out), _three(new))[1]
)
merge_deltas = _operator(
    "merge_deltas",
    _merge_deltas,
    lambda new, posts, bases, alphas, dtype=None: (_like(new, *posts, *bases, dtype=dtype), _three(new)),
)
merge_many = _operator("merge_many", _merge_many, lambda posts, bases, new, alpha=1.0: _many(posts, bases, new))
merge_many_into = _operator(
    "merge_many_into", _merge_many_to, lambda posts, bases, new, outs, alpha=1.0: _many(posts, bases, new)[1]
)
encode = _operator("encode", _encode, lambda x, dtype: (_like(x, dtype=dtype), _three(x)))


def merge_distributed(
    post: Any, base: Any, new_base: Any, out: Any, alpha: float, dtype: Any, norms: bool
) -> tuple[Any, Counts]:
    """Merge DTensors as `ops.merge` does tensors; return the output and the counts of all shards."""
    operands = {"post": post, "base": base, "new_base": new_base} | ({} if out is None else {"out": out})
    for name, x in operands.items():
        if not is_distributed(x):
            raise OperandError(
                f"{name}: expected a DTensor as the others are, got {type(x).__qualname__}; distribute it first with "
                "torch.distributed.tensor.distribute_tensor"
            )
        if any(placement.is_partial() for placement in x.placements):
            raise OperandError(f"{name}: holds partial sums, of which no element is known; redistribute it first")
        if x.placements != new_base.placements or x.device_mesh != new_base.device_mesh:
            raise OperandError(
                f"{name}: expected new_base's placements, {new_base.placements}, got {x.placements}; redistribute it "
                "first: that is communication, which no merge does unasked"
            )
    if norms:
        raise OperandError("norms: are defined by an order of elements that shards do not have; gather the tensors")
    wanted = None if dtype is None else getattr(torch, str(parse_dtype("dtype", dtype).numpy))
    if out is None:
        result, counts = merge(post, base, new_base, alpha, wanted)
    elif wanted not in (None, out.dtype):
        raise OperandError(f"out: expected dtype {wanted}, got {out.dtype}; leave dtype out, or change one of the two")
    else:
        result, counts = out, merge_into(post, base, new_base, out, alpha)
    return result, Counts(*counts.full_tensor().tolist())


def _register_shardings() -> None:
    """Tell DTensor how operators run on shards: all tensors placed alike, counts as partial sums."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def strategies(rank: int, tensors: int, others: int, outputs: int, dense: int) -> list[Any]:
        found = []
        for place in (Replicate(), *(Shard(axis) for axis in range(rank))):
            counts = Replicate() if isinstance(place, Replicate) else Partial()
            outs = [place] * dense + [counts] * (outputs - dense)
            found.append((outs, [place] * tensors + [None] * others))
        return found

    @register_sharding(merge)
    def _(post: Any, base: Any, new_base: Any, alpha: float = 1.0, dtype: Any = None) -> list[Any]:
        return strategies(len(post.shape), 3, 2, 2, 1)

    @register_sharding(merge_into)
    def _(post: Any, base: Any, new_base: Any, out: Any, alpha: float = 1.0) -> list[Any]:
        return strategies(len(post.shape), 4, 1, 1, 0)

    @register_sharding(encode)
    def _(x: Any, dtype: Any) -> list[Any]:
        return strategies(len(x.shape), 1, 1, 2, 1)


if torch.distributed.is_available():
    _register_shardings()
