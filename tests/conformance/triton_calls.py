"""Calls of the Triton kernels for the conformance suite. What they are not made for is skipped, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from paramdelta import reference
from paramdelta.backends import triton, triton_scaled
from paramdelta.dtypes import DType
from paramdelta.errors import BackendError


def _skip(what: str) -> NoReturn:
    import pytest  # here alone: these calls serve without a test, too

    pytest.skip(f"the Triton kernels do not take {what}")


def makes(output: Any) -> bool:
    """Return whether the kernels make a ``reference_scaled.Output``."""
    has = triton_scaled.SUPPORTED
    if output.codec not in has.outputs or output.second is not None:
        return False
    return output.recipe is None or (output.recipe.rule in has.rules and output.scale_dtype in has.output_scales)


def merge(new_base: DType, terms: Sequence[reference.Term], out: DType, tensor: tuple[Any, ...]) -> None:
    """Merge one tensor, its addresses as ``backends.triton.merge`` takes them."""
    types = {new_base, out, *(a.dtype for t in terms for a in (t.post, t.base))}
    if len(types) > 1 or new_base not in triton.DTYPES:
        _skip(f"{', '.join(sorted(t.name for t in types))} in one merge of elements")
    address, size = tensor[0] | tensor[2], new_base.itemsize
    if any(a % size for a in (address, *tensor[1])):
        _skip("addresses within an element")
    triton.merge(new_base, [(t.post.dtype, t.base.dtype, t.alpha) for t in terms], out, [tensor])


def merge_scaled(memory: Any, **job: Any) -> tuple[int, int, int, bool, float, float, float]:
    """Merge matrices with the keywords of ``_cuda.merge_scaled``; addresses are of the kernels' memory already."""
    if job.pop("measure", False):
        _skip("passes that only measure")
    second = job.pop("second", 1.0)
    if second != 1.0:
        _skip("second scales")
    totals = np.zeros(6, np.uint64)
    workspace = np.full(triton.workspace_bytes(**job) // 8 + 1, 0xA5A5A5A5, np.uint64)
    try:
        triton.merge_scaled(**job, totals=memory.address(totals), workspace=memory.address(workspace))
    except BackendError as error:
        _skip(str(error))
    memory.fetch(totals)
    touched, amax = totals[3:4].view(np.uint32)
    error, value = (float(x) for x in totals[4:].view(np.float64))
    nan, inf, overflow = (int(n) for n in totals[:3])
    return nan, inf, overflow, bool(touched), float(amax.view(np.float32)), error, value
