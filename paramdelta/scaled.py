"""Quantised matrices in memory: dequantise, quantise and merge NumPy arrays and torch tensors where they are.

    value = code · scale                  delta = post − base                  out = codes and scales of
                                                                               new_base + Σ alpha · delta

Results are bit for bit those of ``paramdelta.reference_scaled``, which says in NumPy what every step rounds.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paramdelta import backends
from paramdelta.backends import Counts, cpu
from paramdelta.backends.threads import default_threads
from paramdelta.device_tensors import PendingCounts, place_of
from paramdelta.dtypes import BY_NAME, F8_E4M3, F32
from paramdelta.errors import OperandError
from paramdelta.formats import CODEC_BITS, CODECS, RULES, Format, Recipe
from paramdelta.planes import Grid, Matrix, Part, Plane, address, allocate, check_nibbles, grid_of
from paramdelta.tensors import is_distributed, parse_dtype

__all__ = ["Grid", "Matrix", "Part", "PendingResult", "Result", "dequantise", "merge_scaled", "quantise"]

_QUANTISED = ("f8_e4m3", "f4", "i4")


class Result(NamedTuple):
    """A merge's codes and scales (None where there are none), and what to know of them.

    ``amax`` is the largest finite |x| of quantised output, ``touched`` whether some delta is not zero,
    ``relative_error`` the square root of Σ (code · scale − acc)² / Σ acc², what quantising lost.
    """

    codes: Any
    scales: Any
    counts: Counts
    touched: bool
    amax: float
    relative_error: float


class PendingResult:
    """A merge on a device: what a Result has. ``codes`` and ``scales`` are there for what follows on the stream;
    reading what is to be known of them waits for the device.

    ``totals`` is where that is: 48 bytes on the device, which hold NaN, Inf and overflow (u64), touched (u32), the bits
    of amax, and the two sums (f64).
    """

    def __init__(self, codes: Any, scales: Any, totals: Any) -> None:
        self.codes, self.scales, self.totals = codes, scales, totals
        self.counts = PendingCounts(totals[None, :3])

    def wait(self) -> Result:
        """Wait for what has been enqueued, and return all of it."""
        words = self.totals.cpu().numpy()
        nan, inf, overflow = words[:3].tolist()
        touched, amax = words[3:4].view(np.uint32)
        error, value = words[4:].view(np.float64).tolist()
        known = bool(touched), float(amax.view(np.float32)), _lost(error, value)
        return Result(self.codes, self.scales, Counts(nan, inf, overflow), *known)

    @property
    def touched(self) -> bool:
        """Whether some delta is not zero."""
        return self.wait().touched

    @property
    def amax(self) -> float:
        """The largest finite |x| of quantised output."""
        return self.wait().amax

    @property
    def relative_error(self) -> float:
        """What quantising lost."""
        return self.wait().relative_error


def dequantise(
    codes: Any,
    scales: Any,
    grid: Grid | Format,
    *,
    second: float | None = None,
    dtype: Any = F32,
    cols: int | None = None,
    part: Part | None = None,
    threads: int | None = None,
) -> Any:
    """Return ``code · scale`` [R, C] rounded once to ``dtype``, any with arithmetic.

    The product is exact in binary64. ``codes``, ``scales``, ``second`` and ``cols`` are as in :class:`Matrix`, ``part``
    as for :func:`merge_scaled`; the result is of codes' kind, an array or a tensor. Raises OperandError and
    OperandTypeError.
    """
    matrix = Matrix(codes, scales, grid, second, cols)
    return merge_scaled(matrix, (), dtype=parse_dtype("dtype", dtype), part=part, threads=threads).codes


def quantise(
    values: Any,
    recipe: Recipe,
    rows: int,
    cols: int,
    scale: str = "f32",
    *,
    second: float | None = None,
    given: float | None = None,
    threads: int | None = None,
) -> tuple[Any, Any]:
    """Return codes and scales of ``values`` [R, C] by a recipe, in units of rows × cols elements (0: all).

    Two codes of four bits lie in a byte, the even column in the low half. ``scale`` is the type of the scales
    (f8_e8m0 comes out as bytes); ``second`` the tensor's scale for the rules nv_*; ``given`` a scale for every
    unit in place of the rule's, and then scales are None. Raises OperandError and OperandTypeError.
    """
    second_kind = recipe.rule.removeprefix("nv_") if recipe.rule.startswith("nv_") else ""
    grid = Grid(codec=recipe.codec, rows=rows, cols=cols, scale=scale, second=second_kind)
    result = merge_scaled(Matrix(values), (), recipe=recipe, grid=grid, second=second, given=given, threads=threads)
    return result.codes, result.scales


def merge_scaled(
    new_base: Matrix,
    deltas: Sequence[tuple[Any, ...]],
    *,
    recipe: Recipe | None = None,
    grid: Grid | Format | None = None,
    dtype: Any = None,
    second: float | None = None,
    given: float | None = None,
    keep: bool = False,
    part: Part | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> Result | PendingResult:
    """Compute ``out = new_base + Σ alpha · (post − base)`` and store it plainly or quantised.

    Parameters
    ----------
    new_base : Matrix
        Also says by its kind what the results are, NumPy arrays or torch tensors, and where. All must be on one device.
        On a CUDA device the merge is enqueued on PyTorch's current stream, nothing waits for it, and the result is a
        PendingResult. DTensors are merged shard by shard (see docs/gpu.md).
    deltas : sequence of (post, base) or (post, base, alpha)
        Each a Matrix of new_base's R and C, in any format.
    recipe, grid
        Quantised output: how, and in which units. Either these or ``dtype``.
    dtype : DType, str, numpy.dtype or torch.dtype
        Plain output.
    second, given
        The output's second scale for the rules nv_*; a scale for every unit in place of the rule's.
    keep : bool
        new_base's grid and scale type are the output's: its codes and scales stay where no delta touches a
        unit, and its power-of-two scales, and those of i4, where the unit has not outgrown them.
    part : Part
        The operands are a shard of matrices, and this says which: an element's scale is the one it has in the whole.
        Quantised output must hold whole units of its grid, unless their scale is given.
    threads, isa
        How the CPU computes; of no account on a device.

    Raises
    ------
    OperandError
        Shapes that do not fit, an alpha that is not finite, a recipe that cannot make such scales.
    OperandTypeError
        An operand is neither array nor tensor, or its dtype is not what its grid says.
    BackendError
        No backend has quantised matrices in this memory.
    """
    every = [new_base, *(m for delta in deltas for m in delta[:2])]
    if any(is_distributed(x) for m in every for x in (m[:2] if isinstance(m, Matrix) else (m,))):
        shards = importlib.import_module("paramdelta.sharded_matrices")  # above this module: it brings torch
        options = {"recipe": recipe, "grid": grid, "dtype": dtype, "second": second, "given": given, "keep": keep}
        result: Result | PendingResult = shards.merge_scaled(
            new_base, deltas, part, threads=threads, isa=isa, **options
        )
        return result
    if (recipe is None) == (dtype is None):
        raise OperandError("output: pass either dtype (plain) or recipe and grid (quantised)")
    threads = default_threads() if threads is None else threads
    first = Plane("new_base", new_base, part)
    rows, cols = first.shape
    terms = []
    for k, delta in enumerate(deltas):
        post, base, alpha = (*delta, 1.0) if len(delta) == 2 else delta
        if not math.isfinite(alpha):
            raise OperandError(f"deltas[{k}]: expected a finite alpha, got {alpha}")
        pair = Plane(f"deltas[{k}].post", post, part), Plane(f"deltas[{k}].base", base, part)
        terms.append((*pair, float(alpha)))
        for plane in pair:
            if plane.shape != first.shape:
                raise OperandError(f"{plane.name}: expected new_base's shape {first.shape}, got {plane.shape}")
            if str(plane.device) != str(first.device):
                raise OperandError(
                    f"{plane.name}: is on {plane.device}, but new_base is on {first.device}; move one to the other's "
                    "device first"
                )
    job: dict[str, Any] = {"new_base": first.tuple, "rows": rows, "cols": cols}
    job["terms"] = [(post.tuple, base.tuple, alpha) for post, base, alpha in terms]
    places: dict[str, Any] = {}  # of the outputs
    scales, form = None, None
    if recipe is None:
        plain = parse_dtype("dtype", dtype)
        job["out_dtype"] = plain.code
        bits, codes = allocate(first, (rows, cols), plain)
    else:
        form = grid_of(grid)
        if form is None or form.codec != recipe.codec or recipe.codec not in _QUANTISED:
            raise OperandError(f"grid: expected one with the codec of the recipe, {recipe.codec}, got {grid}")
        if form.scale == "f8_e8m0" and recipe.rule not in ("ceil2", "near2"):
            raise OperandError(f"grid: scales of f8_e8m0 are powers of two, which the rule {recipe.rule} does not make")
        if recipe.rule.startswith("nv_") and second is None:
            raise OperandError(f"second: the rule {recipe.rule} needs the scale of the whole tensor")
        if keep:
            _check_keep(first, form, second)
        if given is None or keep:
            first.part.check_whole_units(form, first.shape)
        if CODEC_BITS[recipe.codec] == 4:
            check_nibbles("out", first.part, cols)
        width = -(-cols * CODEC_BITS[recipe.codec] // 8)
        bits, codes = allocate(first, (rows, width), F8_E4M3 if recipe.codec == "f8_e4m3" else BY_NAME["u8"])
        job |= {"recipe": _recipe(recipe, form.scale), "grid": (form.rows, form.cols), "keep": keep}
        job |= {"given": given, "second": 1.0 if second is None else second}
        if given is None:
            kind = BY_NAME["u8" if form.scale == "f8_e8m0" else form.scale]
            scale_bits, scales = allocate(first, form.shape(rows, cols), kind)
            places["out_scales"] = (address(scale_bits), scale_bits.shape[1])
    places["out"] = (address(bits), bits.strides[0])
    operands = [first, *(plane for post, base, _ in terms for plane in (post, base))]
    wanted = _matrices(operands, recipe, form, dtype)
    backend = backends.choose("merge_scaled", device=first.device_type, matrices=wanted)
    if backend != "cpu":
        return PendingResult(codes, scales, _enqueue(backends.get(backend), first, job, places))
    nan, inf, overflow, touched, amax, error, value = cpu.merge_scaled(**job, **places, isa=isa, threads=threads)
    return Result(codes, scales, Counts(nan, inf, overflow), touched, amax, _lost(error, value))


def _matrices(operands: Sequence[Plane], recipe: Recipe | None, form: Grid | None, dtype: Any) -> backends.Matrices:
    """Return what a merge is made of, for the registry's choice."""
    grids = [plane.grid for plane in operands if plane.grid is not None and plane.tuple[3] is not None]
    outputs = recipe.codec if recipe is not None else parse_dtype("dtype", dtype).name
    return backends.Matrices(
        codes=frozenset(CODECS[plane.tuple[1]] for plane in operands),
        scales=frozenset(grid.scale for grid in grids),
        outputs=frozenset((outputs,)),
        output_scales=frozenset(() if form is None else (form.scale,)),
        rules=frozenset(() if recipe is None else (recipe.rule,)),
        seconds=any(grid.second for grid in grids),
    )


def _enqueue(backend: Any, first: Plane, job: dict[str, Any], places: dict[str, Any]) -> Any:
    """Enqueue a merge on the current stream, and return the totals it will add up.

    What is allocated here and in what calls this returns to PyTorch's allocator, which hands it out again in the order
    of the same stream.
    """
    if first.source is None:
        raise OperandError(
            "new_base: expected a torch.Tensor, got a NumPy array, which no backend but cpu takes; pass "
            f"torch.from_numpy of it, or unset {backends.VARIABLE}"
        )
    torch = sys.modules["torch"]
    at = first.source.device
    totals = torch.zeros(backend.totals_bytes() // 8, dtype=torch.int64, device=at)
    workspace = torch.empty(-(-backend.workspace_bytes(**job) // 8), dtype=torch.int64, device=at)
    device, stream = place_of(first.source)
    where = {"totals": totals.data_ptr(), "workspace": workspace.data_ptr(), "device": device, "stream": stream}
    backend.merge_scaled(**job, **places, **where)
    return totals


def _lost(error_squared: float, value_squared: float) -> float:
    return math.sqrt(error_squared / value_squared) if value_squared > 0 else 0.0


def _check_keep(new_base: Plane, grid: Grid, second: float | None) -> None:
    if new_base.grid != grid or (grid.second and np.float32(new_base.second) != np.float32(second)):
        raise OperandError(f"keep: expected new_base in the output's format, {grid}, got {new_base.grid}")


def _recipe(recipe: Recipe, scale: str) -> tuple[Any, ...]:
    codec, rule = CODECS.index(recipe.codec), RULES.index(recipe.rule)
    bf16 = recipe.values == "bf16"
    return codec, BY_NAME[scale].code, rule, recipe.reciprocal, bf16, recipe.largest, recipe.floor, recipe.zero
