"""Cheap looks at the data that headers cannot replace: a sample that shows operands in the wrong order, and integer
tensors that post changed. Both only ever warn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paramdelta.errors import shown
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.samples import Operands, of_region, of_span, read_bytes
from paramdelta.plan.work import Rows, Work

if TYPE_CHECKING:
    from paramdelta.checkpoint import Checkpoint
    from paramdelta.plan import Plan

SAMPLED_TENSORS = 8
CLOSER = 0.6  # ‖post − new_base‖² / ‖post − base‖², below which post looks like a child of new_base
_MOST_COMPARED_BYTES = 16 << 20


def data_warnings(plan: Plan) -> tuple[str, ...]:
    """Read a few MB of the inputs and return what they suggest is wrong."""
    return (*order_warnings(plan), *integer_warnings(plan))


def order_warnings(plan: Plan) -> tuple[str, ...]:
    """Warn where post looks like a child of new_base, or where the delta is zero or as large as the weights."""
    found = []
    for number in range(len(plan.request.sources)):
        first = list(plan.checkpoints).index(roles_of(number)[0])
        counts = [len(c.sources) for c in plan.checkpoints.values()]
        warning = _order_warning(plan.work, range(sum(counts[:first]), sum(counts[: first + 1])))
        if warning:
            found.append(f"delta {number + 1}: {warning}" if plan.request.more else warning)
    return tuple(found)


def _order_warning(work: Work, posts: range) -> str | None:
    """Look at the delta whose post has the input files ``posts``."""
    post_base = post_new = base_square = 0.0
    for post, base, new_base in samples_of(work, posts):
        with np.errstate(all="ignore"):
            post_base += float(np.nansum((post - base) ** 2))
            post_new += float(np.nansum((post - new_base) ** 2))
            base_square += float(np.nansum(base**2))
    if base_square == post_base == post_new == 0.0:  # nothing to look at
        return None
    extracted = bool((work.spans["new_file"] < 0).all() and (work.views["file"][work.regions["new_view"]] < 0).all())
    return judge_order(post_base, math.inf if extracted else post_new, base_square)


def judge_order(
    post_base: float, post_new: float, base: float, where: str = "in a sample of the weights"
) -> str | None:
    """Return a warning from squared norms ‖post − base‖², ‖post − new_base‖² and ‖base‖², summed up ``where`` it says,
    or None."""
    if post_base == 0.0:
        return f"post and base are equal {where}: the result may be new_base itself"
    if post_new < CLOSER * post_base:
        return (
            "post lies much nearer to new_base than to base "
            f"(‖post − new_base‖ is {100 * (post_new / post_base) ** 0.5:.0f} % of ‖post − base‖ {where}): "
            "is the order of the operands right? post should have been trained from base"
        )
    if post_base > base:
        return f"post − base is larger than base itself {where}: post does not look as if it was trained from base"
    return None


def integer_warnings(plan: Plan) -> tuple[str, ...]:
    """Warn of integer and boolean tensors that post changed: the output has new_base's."""
    changed: dict[str, None] = {}
    for number, pairs in enumerate([plan.integer_pairs, *(further.integers for further in plan.pairing.more)]):
        in_post, in_base = (plan.checkpoints[role] for role in roles_of(number))
        changed |= dict.fromkeys(_changed_integers(in_post, in_base, pairs))
    if not changed:
        return ()
    names = list(changed)
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (f"integer tensors that post changed are taken from new_base: {listed}",)


def _changed_integers(in_post: Checkpoint, in_base: Checkpoint, pairs: list[tuple[str, int, int]]) -> Iterator[str]:
    if in_base.zeros:  # post is a delta, whose integers are zeros
        return
    for name, post, base in pairs:
        p, b = (c.tensors.spec(c.tensors.names[row]) for c, row in ((in_post, post), (in_base, base)))
        if p.nbytes > _MOST_COMPARED_BYTES:
            continue
        same = (p.dtype, p.shape) == (b.dtype, b.shape) and read_bytes(
            in_post.sources[p.file], p.offset, p.nbytes
        ) == read_bytes(in_base.sources[b.file], b.offset, b.nbytes)
        if not same:
            yield shown(name)


def samples_of(work: Work, posts: range | None = None) -> list[Operands]:
    """Return samples of some of the larger spans, and of some of the larger regions: of the delta whose post has the
    input files ``posts``, by default of the first that each adds."""
    spans, regions = work.spans, work.regions
    terms = _terms_of(spans, work.terms["post_file"], posts)
    known = (spans["new_file"] >= 0) | (spans["new_file"] < 0).all()  # all: a delta is extracted
    plain = np.flatnonzero((terms >= 0) & known & (spans["count"] > 1))
    samples = [of_span(work, spans[at], work.terms[terms[at]]) for at in _some_of(plain, spans["count"][plain])]
    terms = _terms_of(regions, work.views["file"][work.region_terms["post_view"]], posts)
    scaled = np.flatnonzero(terms >= 0)
    sizes = (regions["rows"] * regions["cols"])[scaled]
    samples += [of_region(work, regions[at], work.region_terms[terms[at]]) for at in _some_of(scaled, sizes)]
    return [sample for sample in samples if sample is not None]


def _terms_of(rows: Rows, files: NDArray[np.int32], posts: range | None) -> NDArray[np.int64]:
    """Return the first term of each span or region whose post lies in ``posts``, −1 for none."""
    owner = np.repeat(np.arange(len(rows)), rows["n_terms"])
    within = np.arange(len(owner)) - np.repeat(np.cumsum(rows["n_terms"]) - rows["n_terms"], rows["n_terms"])
    term = rows["first_term"][owner] + within
    here = np.ones(len(term), bool) if posts is None else np.isin(files[term], np.array(posts, np.int64))
    found = np.full(len(rows), -1, np.int64)
    found[owner[here][::-1]] = term[here][::-1]  # the first one is written last
    return found


def _some_of(candidates: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most SAMPLED_TENSORS of the larger half."""
    if not len(candidates):
        return candidates
    largest = candidates[np.argsort(-sizes, kind="stable")]
    chosen = largest[np.linspace(0, len(largest) // 2, SAMPLED_TENSORS).astype(int)]
    return np.array(sorted(set(chosen.tolist())), np.int64)
