"""Cheap looks at the data that headers cannot replace: a sample that shows operands in the wrong order, and integer
tensors that post changed. Both only ever warn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES, DType
from paramdelta.errors import shown

if TYPE_CHECKING:
    from paramdelta.plan import Plan

SAMPLED_TENSORS = 8
SAMPLED_ELEMENTS = 1 << 15
_MOST_COMPARED_BYTES = 16 << 20


def data_warnings(plan: Plan) -> tuple[str, ...]:
    """Read a few MB of the inputs and return what they suggest is wrong."""
    return (*order_warnings(plan), *integer_warnings(plan))


def order_warnings(plan: Plan) -> tuple[str, ...]:
    """Warn where post looks like a child of new_base, or where the delta is zero or as large as the weights."""
    work = plan.work
    candidates = np.flatnonzero(
        (work.spans["n_terms"] == 1) & (work.spans["new_file"] >= 0) & (work.spans["count"] > 1)
    )
    if not len(candidates):
        return ()
    largest = candidates[np.argsort(-work.spans["count"][candidates], kind="stable")]
    chosen = largest[np.linspace(0, len(largest) // 2, SAMPLED_TENSORS).astype(int)]
    post_base = post_new = base_square = 0.0
    for at in np.unique(chosen):
        span = work.spans[at]
        term = work.terms[span["first_term"]]
        if term["base_file"] < 0:
            continue
        count = min(int(span["count"]), SAMPLED_ELEMENTS)
        p = _read(work.inputs, term["post_file"], term["post_offset"], term["post_dtype"], count)
        b = _read(work.inputs, term["base_file"], term["base_offset"], term["base_dtype"], count)
        n = _read(work.inputs, span["new_file"], span["new_offset"], span["new_dtype"], count)
        with np.errstate(all="ignore"):
            post_base += float(np.nansum((p - b) ** 2))
            post_new += float(np.nansum((p - n) ** 2))
            base_square += float(np.nansum(b**2))
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
        same = (p.dtype, p.shape) == (b.dtype, b.shape) and _bytes(
            plan.post.files[p.file].path, p.offset, p.nbytes
        ) == _bytes(plan.base.files[b.file].path, b.offset, b.nbytes)
        if not same:
            changed.append(shown(name))
    if not changed:
        return ()
    listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return (f"integer tensors that post changed are taken from new_base: {listed}",)


def _read(inputs: Sequence[Path | bytearray], file: int, offset: int, code: int, count: int) -> NDArray[np.float64]:
    dtype = DTYPES[code]
    path = inputs[file]
    assert isinstance(path, Path)  # literals are no operands of spans
    return _decode(np.frombuffer(_bytes(path, int(offset), count * dtype.itemsize), np.uint8), dtype)


def _decode(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.float64]:
    if dtype.name == "bf16":  # the upper half of a binary32: no need for ml_dtypes here
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    values: NDArray[Any] = raw.view(dtype.to_numpy())
    return values.astype(np.float64)


def _bytes(path: Path, offset: int, count: int) -> bytes:
    """Read bytes for a warning; a file that cannot be read here will be an error of the merge itself."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, count, offset)
    finally:
        os.close(fd)
    return data + bytes(count - len(data))
