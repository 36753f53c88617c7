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
dimension or replicated, those of a list each in its own way. ``counts`` of shards are partial sums. Errors are those
of `paramdelta.ops`; under a tracer, where there is no memory, shapes alone are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paramdelta import ops
from paramdelta.backends import Counts
from paramdelta.errors import OperandError
from paramdelta.tensors import is_distributed

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
    merges = [(p, b, n, alpha) for p, b, n in zip(posts, bases, new_bases, strict=True)]
    outs, counts = ops.enqueue_many(merges, None, None)
    return outs, _stacked(counts)


def _merge_many_to(
    posts: Sequence[Tensor],
    bases: Sequence[Tensor],
    new_bases: Sequence[Tensor],
    outs: Sequence[Tensor],
    alpha: float = 1.0,
) -> Tensor:
    _same_lengths(posts, bases, new_bases, "new_bases")
    merges = [(p, b, n, alpha) for p, b, n in zip(posts, bases, new_bases, strict=True)]
    return _stacked(ops.enqueue_many(merges, outs, None)[1])


def _stacked(counts: Sequence[Counts] | Tensor) -> Tensor:
    """Return counts [n, 3]: as a device holds them, or made of numbers."""
    if isinstance(counts, Tensor):
        return counts
    return torch.tensor([tuple(each) for each in counts], dtype=torch.int64).reshape(len(counts), 3)


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


def on_shards(named: dict[str, Any], out: Any, run: Callable[..., tuple[Any, Any]], norms: bool) -> tuple[Any, Counts]:
    """Merge DTensors, new_base first among them: ``run(locals, out's)`` gives an output and counts of what is here.

    Returns the output, placed as the operands are, and the counts of all shards, for which all ranks must call.
    """
    first = _placed_alike(named | ({} if out is None else {"out": out}))
    if norms:
        raise OperandError(f"norms: {ops.ORDER_OF_ELEMENTS}")
    result, counts = run([_here(x) for x in named.values()], None if out is None else _here(out))
    total = _summed(_counts(counts, result)[None], [first]).full_tensor()[0]
    return (_spread(result, first) if out is None else out), Counts(*total.tolist())


def many_on_shards(
    merges: Sequence[tuple[Any, ...]], outs: Sequence[Any] | None, run: Callable[..., tuple[Any, Any]]
) -> tuple[list[Any], list[Counts]]:
    """Merge lists of DTensors: ``run(local merges, local outs)`` gives the outputs and counts of what is here."""
    news = []
    for k, each in enumerate(merges):
        named = {
            f"merges[{k}].{name}": x for name, x in zip(("new_base", "post", "base"), (each[2], *each), strict=False)
        }
        news.append(_placed_alike(named | ({} if outs is None else {f"outs[{k}]": outs[k]})))
    here = [(*(_here(x) for x in each[:3]), *each[3:]) for each in merges]
    results, counts = run(here, None if outs is None else [_here(x) for x in outs])
    total = _summed(_stacked(counts), news).full_tensor()
    placed = list(outs) if outs is not None else [_spread(r, n) for r, n in zip(results, news, strict=True)]
    return placed, [Counts(*row) for row in total.tolist()]


def _placed_alike(named: dict[str, Any]) -> Any:
    """Return the first of DTensors, on whose shards all elements of the others lie; raise OperandError otherwise."""
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if not is_distributed(x):
            raise OperandError(
                f"{name}: expected a DTensor as the others are, got {type(x).__qualname__}; distribute it first with "
                "torch.distributed.tensor.distribute_tensor"
            )
        if x.requires_grad:
            raise OperandError(f"{name}: requires grad, and no gradient passes here; pass {name}.detach()")
        if any(placement.is_partial() for placement in x.placements):
            raise OperandError(f"{name}: holds partial sums, of which no element is known; redistribute it first")
        if x.placements != first.placements or x.device_mesh != first.device_mesh:
            raise OperandError(
                f"{name}: expected {first_name}'s placements, {first.placements}, got {x.placements}; redistribute it "
                "first: that is communication, which no merge does unasked"
            )
        if x.shape != first.shape:
            raise OperandError(f"{name}: expected {first_name}'s shape, {tuple(first.shape)}, got {tuple(x.shape)}")
    return first


def _here(x: Any) -> Tensor:
    """Return the shard of a DTensor that is on this rank."""
    local: Tensor = x._local_tensor  # to_local() would add a node to autograd's graph
    return local


def _spread(local: Tensor, like: Any) -> Any:
    """Return shards as a DTensor, of another's shape and placements."""
    from torch.distributed.tensor import DTensor

    strides = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=strides
    )


def _summed(counts: Tensor, tensors: Sequence[Any]) -> Any:
    """Return the counts [n, 3] of n DTensors' shards as partial sums, those of replicated ones added once."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = tensors[0].device_mesh
    for k, x in enumerate(tensors):
        if x.device_mesh != mesh:
            raise OperandError(f"tensors 0 and {k}: expected one device mesh, got {mesh} and {x.device_mesh}")
    split = [any(not x.placements[d].is_replicate() for x in tensors) for d in range(mesh.ndim)]
    place = mesh.get_coordinate()
    again = [
        d for d in range(mesh.ndim) if split[d] and place and place[d] > 0
    ]  # where replicas have been counted elsewhere
    once = [not any(x.placements[d].is_replicate() for d in again) for x in tensors]
    counts = counts * torch.tensor(once, dtype=torch.int64, device=counts.device)[:, None]
    return DTensor.from_local(counts, mesh, [Partial() if s else Replicate() for s in split], run_check=False)


def _register_shardings() -> None:
    """Tell DTensor how operators run on shards: all tensors placed alike, counts as partial sums."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
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

    @register_sharding(merge_deltas)
    def _(new_base: Any, posts: Any, bases: Any, alphas: Any, dtype: Any = None) -> list[Any]:
        return strategies(len(new_base.shape), 1 + len(posts) + len(bases), 1 + len(alphas), 2, 1)

    @register_sharding(encode)
    def _(x: Any, dtype: Any) -> list[Any]:
        return strategies(len(x.shape), 1, 1, 2, 1)

    # Each tensor of a list has placements of its own, which strategies for an operator cannot say.
    def listed(cls: Any, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        posts, bases, news, *rest = args
        _same_lengths(posts, bases, news, "new_bases")
        outs = rest[0] if operator is merge_many_into else [None] * len(news)
        _same_lengths(posts, bases, outs, "outs")
        for k, (post, base, new, out) in enumerate(zip(posts, bases, news, outs, strict=True)):
            named = {f"new_bases[{k}]": new, f"posts[{k}]": post, f"bases[{k}]": base}
            _placed_alike(named | ({} if out is None else {f"outs[{k}]": out}))
        here = [[_here(x) for x in each] if isinstance(each, (list, tuple)) else each for each in args]
        done = operator(*here, **(kwargs or {}))
        if operator is merge_many_into:
            return _summed(done, news)
        return [_spread(result, new) for result, new in zip(done[0], news, strict=True)], _summed(done[1], news)

    for name in ("merge_many", "merge_many_into"):
        torch.library.register_torch_dispatch(f"paramdelta::{name}", DTensor, listed, lib=_LIBRARY)


if torch.distributed.is_available():
    _register_shardings()
