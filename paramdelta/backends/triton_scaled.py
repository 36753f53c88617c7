"""Merges of matrices of codes and scales by the Triton backend: the keywords of ``_cuda.merge_scaled`` as its kernels
take them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from paramdelta.backends import Matrices
from paramdelta.dtypes import DTYPES
from paramdelta.errors import BackendError
from paramdelta.formats import CODEC_BITS, CODECS, RULES

_PLAIN = ("bf16", "f16", "f32", "f8_e5m2")
_SCALES = frozenset(("f32", "bf16", "f8_e8m0"))
SUPPORTED = Matrices(
    codes=frozenset((*_PLAIN, "f8_e4m3")),
    scales=_SCALES,
    outputs=frozenset((*_PLAIN, "f8_e4m3")),
    output_scales=_SCALES,
    rules=frozenset(("ratio", "ceil2", "inverse")),
)
TOTALS_BYTES = 48


def workspace_bytes(*, rows: int, cols: int, recipe: Any = None, **job: Any) -> int:
    """Return how much device memory a merge needs beside its operands."""
    if recipe is None:
        return 0
    launch = _launch()
    quantiser = _quantiser(launch, recipe, **job)
    down, across = launch.unit_count(quantiser, rows, cols)
    return 0 if launch.in_one_pass(quantiser) else 8 * int(down) * int(across)


def enqueue(
    *,
    new_base: tuple[Any, ...],
    terms: Sequence[tuple[Any, Any, float]],
    rows: int,
    cols: int,
    out: tuple[int, int],
    totals: int,
    out_dtype: int | None = None,
    out_scales: tuple[int, int] | None = None,
    recipe: Any = None,
    workspace: int = 0,
    second: float = 1.0,
    **job: Any,
) -> None:
    """Enqueue a merge on the current stream. Raises BackendError for what the kernels do not take."""
    kept = [(post, base, alpha) for post, base, alpha in terms if alpha != 0.0]
    _check(new_base, kept, recipe, out_dtype)
    launch = _launch()
    pairs = [(_plane(launch, post), _plane(launch, base), alpha) for post, base, alpha in kept]
    address, pitch = out
    quantiser = None
    if recipe is None:
        name = DTYPES[out_dtype or 0].name
        plane = launch.Plane(address, name, _elements("out", address, pitch, name))
    else:
        quantiser = _quantiser(launch, recipe, **job)
        plane = launch.Plane(address, "f8_e4m3", pitch)
        if out_scales is not None:
            plane = plane._replace(
                scales=launch.Scales(out_scales[0], quantiser.kind, out_scales[1], quantiser.rows, quantiser.cols)
            )
    launch.merge(
        _plane(launch, new_base), pairs, rows, cols, plane, totals, quantiser=quantiser, units=workspace
    )  # fmt: skip


def _check(new_base: Any, terms: Sequence[Any], recipe: Any, out_dtype: int | None) -> None:
    operands = [new_base, *(m for post, base, _ in terms for m in (post, base))]
    grids = [m[3] for m in operands if m[3] is not None]
    wanted = Matrices(
        codes=frozenset(CODECS[m[1]] for m in operands),
        scales=frozenset(DTYPES[grid[1]].name for grid in grids),
        outputs=frozenset((DTYPES[out_dtype or 0].name if recipe is None else CODECS[recipe[0]],)),
        output_scales=frozenset(() if recipe is None else (DTYPES[recipe[1]].name,)),
        rules=frozenset(() if recipe is None else (RULES[recipe[2]],)),
        seconds=any(grid[7] for grid in grids),
    )
    missing = SUPPORTED.missing(wanted) + ["zero points"] * any(grid[9] for grid in grids)
    if missing:
        raise BackendError(
            f"backend triton: merges no matrices with {', '.join(missing)}; build the backend cuda, which does, or "
            "merge them in CPU memory"
        )


def _quantiser(
    launch: Any,
    recipe: Any,
    *,
    grid: tuple[int, int],
    keep: bool = False,
    given: float | None = None,
    **_: Any,
) -> Any:
    _, scale, rule, reciprocal, in_bf16, largest, floor, zero = recipe
    values = "bf16" if in_bf16 else "f32"
    return launch.Quantiser(
        RULES[rule], largest, floor, zero, bool(reciprocal), values, *grid, DTYPES[scale].name, keep, given
    )  # fmt: skip


def _plane(launch: Any, matrix: tuple[Any, ...]) -> Any:
    address, codec, pitch, scales = matrix
    name = CODECS[codec]
    grid = None
    if scales is not None:
        to, kind, steps, rows, cols, row_phase, col_phase, *_ = scales
        grid = launch.Scales(to, DTYPES[kind].name, steps, rows, cols, row_phase, col_phase)
    return launch.Plane(address, name, _elements("an operand", address, pitch, name), grid)


def _elements(what: str, address: int, pitch: int, codec: str) -> int:
    size = CODEC_BITS[codec] // 8
    if address % size or pitch % size:
        raise BackendError(
            f"backend triton: {what} of {codec} is at {address:#x}, with {pitch} bytes from row to row; expected "
            f"multiples of {size} bytes; copy it, or use the backend cuda"
        )
    return pitch // size


def _launch() -> Any:
    return importlib.import_module("paramdelta.kernels.launch_blocks")
