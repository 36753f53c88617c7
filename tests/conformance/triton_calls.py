"""Calls of the Triton kernels for the conformance suite. What they are not made for is skipped, with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from paramdelta import reference
from paramdelta.backends import triton
from paramdelta.dtypes import BY_NAME, DTYPES, DType
from paramdelta.formats import CODECS, RULES

CODECS_READ = ("bf16", "f16", "f32", "f8_e4m3")
SCALES_READ = ("f32", "bf16", "f8_e8m0")
RULES_MADE = ("ratio", "ceil2", "inverse")


def _skip(what: str) -> NoReturn:
    import pytest  # here alone: these calls serve without a test, too

    pytest.skip(f"the Triton kernels do not take {what}")


def makes(output: Any) -> bool:
    """Return whether the kernels make a ``reference_scaled.Output``."""
    if output.recipe is None:
        return output.codec in CODECS_READ
    fits = output.recipe.rule in RULES_MADE and output.scale_dtype in SCALES_READ
    return output.codec == "f8_e4m3" and fits and output.second is None


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
    launch = importlib.import_module("paramdelta.kernels.launch_blocks")
    if job.get("measure") or job.get("second", 1.0) != 1.0:
        _skip("passes that only measure" if job.get("measure") else "second scales")
    rows, cols, recipe = job["rows"], job["cols"], job.get("recipe")
    out, quantiser, units = _output(launch, job, recipe)
    terms = [(_plane(launch, post), _plane(launch, base), alpha) for post, base, alpha in job["terms"] if alpha != 0.0]
    report = np.zeros(5, np.int64)
    launch.merge(
        _plane(launch, job["new_base"]), terms, rows, cols, out, memory.address(report), quantiser=quantiser,
        units=memory.address(units),
    )  # fmt: skip
    memory.fetch(report)
    amax = float(report[3:4].astype(np.uint32).view(np.float32)[0])
    nan, inf, overflow = (int(n) for n in report[:3])
    return nan, inf, overflow, bool(report[4]), amax if recipe is not None else 0.0, 0.0, 0.0


def _output(launch: Any, job: dict[str, Any], recipe: Any) -> tuple[Any, Any, np.ndarray[Any, Any]]:
    address, pitch = job["out"]
    if recipe is None:
        dtype = DTYPES[job["out_dtype"]]
        if dtype.name not in CODECS_READ:
            _skip(f"{dtype.name} as output")
        if pitch % dtype.itemsize:
            _skip("rows that begin within an element")
        return launch.Plane(address, dtype.name, pitch // dtype.itemsize), None, np.zeros(1, np.int32)
    codec, scale, rule, reciprocal, in_bf16, largest, floor, zero = recipe
    kind, name = DTYPES[scale].name, RULES[rule]
    if CODECS[codec] != "f8_e4m3" or kind not in SCALES_READ or name not in RULES_MADE:
        _skip(f"output of {CODECS[codec]} with scales in {kind} by the rule {name}")
    down, across = job["grid"]
    quantiser = launch.Quantiser(
        name, largest, floor, zero, reciprocal, "bf16" if in_bf16 else "f32", down, across, kind,
        job.get("keep", False), job.get("given"),
    )  # fmt: skip
    plane = launch.Plane(address, "f8_e4m3", pitch)
    if job.get("given") is None:
        to, steps = job["out_scales"]
        plane = plane._replace(scales=launch.Scales(to, kind, steps, down, across))
    grid = launch.unit_count(quantiser, job["rows"], job["cols"])
    return plane, quantiser, np.zeros(2 * max(1, grid[0] * grid[1]), np.int32)


def _plane(launch: Any, matrix: tuple[Any, ...]) -> Any:
    address, codec, pitch, scales = matrix
    name = CODECS[codec]
    if name not in CODECS_READ:
        _skip(f"codes of {name}")
    size = BY_NAME[name].itemsize
    if pitch % size or address % size:
        _skip("rows that begin within an element")
    if scales is None:
        return launch.Plane(address, name, pitch // size)
    to, kind, steps, rows, cols, row_phase, col_phase, second, _, zero_points, _ = scales
    if DTYPES[kind].name not in SCALES_READ or second or zero_points:
        _skip(f"scales in {DTYPES[kind].name}{', second scales' * bool(second)}{', zero points' * bool(zero_points)}")
    grid = launch.Scales(to, DTYPES[kind].name, steps, rows, cols, row_phase, col_phase)
    return launch.Plane(address, name, pitch // size, grid)
