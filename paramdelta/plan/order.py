"""Cheap looks at the data that headers cannot replace: a sample that shows operands in the wrong order, and integer
tensors that post changed. Both only ever warn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paramdelta.errors import shown
from paramdelta.plan.samples import Operands, of_region, of_span, read_bytes
from paramdelta.plan.work import Work

if TYPE_CHECKING:
    from paramdelta.plan import Plan

SAMPLED_TENSORS = 8
_MOST_COMPARED_BYTES = 16 << 20


def data_warnings(plan: Plan) -> tuple[str, ...]:
    """Read a few MB of the inputs and return what they suggest is wrong."""
    return (*order_warnings(plan), *integer_warnings(plan))


def order_warnings(plan: Plan) -> tuple[str, ...]:
    """Warn where post looks like a child of new_base, or where the delta is zero or as large as the weights."""
    post_base = post_new = base_square = 0.0
    for post, base, new_base in samples_of(plan.work):
        with np.errstate(all="ignore"):
            post_base += float(np.nansum((post - base) ** 2))
            post_new += float(np.nansum((post - new_base) ** 2))
            base_square += float(np.nansum(base**2))
    if base_square == post_base == post_new == 0.0:  # nothing to look at
        return ()
    warning = judge_order(post_base, post_new, base_square)
    return (warning,) if warning else ()


def judge_order(post_base: float, post_new: float, base: float) -> str | None:
    """Return a warning from sampled squared norms ‖post − base‖², ‖post − new_base‖² and ‖base‖², or None."""
    if post_base == 0.0:
        return "post and base are equal in a sample of the weights: the result may be new_base itself"
    if post_new < 0.6 * post_base:
        return (
            "post lies much nearer to new_base than to base "
            f"(‖post − new_base‖ is {100 * (post_new / post_base) ** 0.5:.0f} % of ‖post − base‖ in a sample): "
            "is the order of the operands right? post should have been trained from base"
        )
    if post_base > base:
        return (
            "post − base is larger than base itself in a sample of the weights: "
            "post does not look as if it was trained from base"
        )
    return None


def integer_warnings(plan: Plan) -> tuple[str, ...]:
    """Warn of integer and boolean tensors that post changed: the output has new_base's."""
    changed = []
    for name, post, base in plan.integer_pairs:
        p, b = (c.tensors.spec(c.tensors.names[row]) for c, row in ((plan.post, post), (plan.base, base)))
        if p.nbytes > _MOST_COMPARED_BYTES:
            continue
        same = (p.dtype, p.shape) == (b.dtype, b.shape) and read_bytes(
            plan.post.files[p.file].path, p.offset, p.nbytes
        ) == read_bytes(plan.base.files[b.file].path, b.offset, b.nbytes)
        if not same:
            changed.append(shown(name))
    if not changed:
        return ()
    listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return (f"integer tensors that post changed are taken from new_base: {listed}",)


def samples_of(work: Work) -> list[Operands]:
    """Return samples of some of the larger spans, and of some of the larger regions."""
    spans, regions = work.spans, work.regions
    plain = np.flatnonzero((spans["n_terms"] == 1) & (spans["new_file"] >= 0) & (spans["count"] > 1))
    samples = [of_span(work, spans[at]) for at in _some_of(plain, spans["count"][plain])]
    scaled = np.flatnonzero(regions["n_terms"] == 1)
    sizes = (regions["rows"] * regions["cols"])[scaled]
    samples += [of_region(work, regions[at]) for at in _some_of(scaled, sizes)]
    return [sample for sample in samples if sample is not None]


def _some_of(candidates: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most SAMPLED_TENSORS of the larger half."""
    if not len(candidates):
        return candidates
    largest = candidates[np.argsort(-sizes, kind="stable")]
    chosen = largest[np.linspace(0, len(largest) // 2, SAMPLED_TENSORS).astype(int)]
    return np.array(sorted(set(chosen.tolist())), np.int64)
