"""Quantised matrices in memory: dequantise, quantise and merge NumPy arrays and torch tensors on the CPU.

    value = code · scale                  delta = post − base                  out = codes and scales of
                                                                               new_base + Σ alpha · delta

Results are bit for bit those of ``paramdelta.reference_scaled``, which says in NumPy what every step rounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.backends import Counts, cpu
from paramdelta.backends.threads import default_threads
from paramdelta.dtypes import BY_NAME, F32, DType, from_numpy
from paramdelta.errors import OperandError, OperandTypeError
from paramdelta.formats import CODEC_BITS, CODECS, RULES, Format, Recipe
from paramdelta.tensors import parse_dtype

__all__ = ["Grid", "Matrix", "Result", "dequantise", "merge_scaled", "quantise"]

_SCALES = ("f32", "bf16", "f16", "f8_e8m0", "f8_e4m3")
_QUANTISED = ("f8_e4m3", "f4", "i4")
_SECONDS = ("", "multiply", "divide")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which scale an element uses: the one in row r // rows and column c // cols, of the type ``scale``.

    0 stands for the whole extent: (0, 0) is per tensor, (1, 0) per row, (128, 128) blocks, (1, 32) groups.
    ``codec`` is one of ``formats.CODECS``; ``second`` is empty, "multiply" or "divide" (see ``formats``).
    """

    codec: str
    rows: int = 0
    cols: int = 0
    scale: str = "f32"
    second: str = ""

    def __post_init__(self) -> None:
        if self.codec not in CODECS or self.scale not in _SCALES or self.second not in _SECONDS:
            raise OperandError(
                f"grid: expected a codec of {', '.join(CODECS)}, a scale of {', '.join(_SCALES)} and a second of "
                f"'', multiply, divide; got {self.codec!r}, {self.scale!r}, {self.second!r}"
            )
        if not (0 <= self.rows < 1 << 32 and 0 <= self.cols < 1 << 32):
            raise OperandError(f"grid: expected rows and cols from 0 to 2^32 − 1, got {self.rows} and {self.cols}")

    @classmethod
    def of(cls, format: Format) -> Grid:
        """Return the grid of a format."""
        return cls(
            codec=format.codec, rows=format.rows, cols=format.cols, scale=format.scale.name, second=format.second
        )

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Return how many scales a matrix of rows × cols has in either direction."""
        return -(-rows // self.rows) if self.rows else 1, -(-cols // self.cols) if self.cols else 1


class Matrix(NamedTuple):
    """A matrix as stored: codes [R, C], for f4 and i4 bytes [R, ceil(C / 2)]; scales of the grid's shape, or None.

    ``cols`` is C where codes are nibbles and C is odd. ``second`` is the scale of the whole tensor. An array
    may hold bits as an unsigned integer of the same width (and nibbles in any 8-bit type).
    """

    codes: Any
    scales: Any = None
    grid: Grid | Format | None = None
    second: float | None = None
    cols: int | None = None


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


def dequantise(
    codes: Any,
    scales: Any,
    grid: Grid | Format,
    *,
    second: float | None = None,
    dtype: Any = F32,
    cols: int | None = None,
    threads: int | None = None,
) -> Any:
    """Return ``code · scale`` [R, C] rounded once to ``dtype``, any with arithmetic.

    The product is exact in binary64. ``codes``, ``scales``, ``second`` and ``cols`` are as in :class:`Matrix`;
    the result is of codes' kind, an array or a tensor. Raises OperandError and OperandTypeError.
    """
    matrix = Matrix(codes, scales, grid, second, cols)
    return merge_scaled(matrix, (), dtype=parse_dtype("dtype", dtype), threads=threads).codes


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
    threads: int | None = None,
    isa: str | None = None,
) -> Result:
    """Compute ``out = new_base + Σ alpha · (post − base)`` and store it plainly or quantised.

    Parameters
    ----------
    new_base : Matrix
        Also says by its kind what the results are, NumPy arrays or torch tensors.
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

    Raises
    ------
    OperandError
        Shapes that do not fit, an alpha that is not finite, a recipe that cannot make such scales.
    OperandTypeError
        An operand is neither array nor CPU tensor, or its dtype is not what its grid says.
    """
    if (recipe is None) == (dtype is None):
        raise OperandError("output: pass either dtype (plain) or recipe and grid (quantised)")
    threads = default_threads() if threads is None else threads
    first = _Plane("new_base", new_base)
    rows, cols = first.shape
    terms = []
    for k, delta in enumerate(deltas):
        post, base, alpha = (*delta, 1.0) if len(delta) == 2 else delta
        if not math.isfinite(alpha):
            raise OperandError(f"deltas[{k}]: expected a finite alpha, got {alpha}")
        terms.append((_Plane(f"deltas[{k}].post", post), _Plane(f"deltas[{k}].base", base), float(alpha)))
        for plane in terms[-1][:2]:
            if plane.shape != first.shape:
                raise OperandError(f"{plane.name}: expected new_base's shape {first.shape}, got {plane.shape}")
    options: dict[str, Any] = {}
    scales = None
    if recipe is None:
        plain = parse_dtype("dtype", dtype)
        options["out_dtype"] = plain.code
        codes: NDArray[Any] = np.empty((rows, cols), plain.to_numpy())
    else:
        form = _grid_of(grid)
        if form is None or form.codec != recipe.codec or recipe.codec not in _QUANTISED:
            raise OperandError(f"grid: expected one with the codec of the recipe, {recipe.codec}, got {grid}")
        if form.scale == "f8_e8m0" and recipe.rule not in ("ceil2", "near2"):
            raise OperandError(f"grid: scales of f8_e8m0 are powers of two, which the rule {recipe.rule} does not make")
        if recipe.rule.startswith("nv_") and second is None:
            raise OperandError(f"second: the rule {recipe.rule} needs the scale of the whole tensor")
        width = -(-cols * CODEC_BITS[recipe.codec] // 8)
        codes = np.empty((rows, width), BY_NAME["f8_e4m3"].to_numpy() if recipe.codec == "f8_e4m3" else np.uint8)
        options |= {"recipe": _recipe(recipe, form.scale), "grid": (form.rows, form.cols), "keep": keep}
        options |= {"given": given, "second": 1.0 if second is None else second}
        if given is None:
            kind = np.dtype(np.uint8) if form.scale == "f8_e8m0" else BY_NAME[form.scale].to_numpy()
            scales = np.empty(form.shape(rows, cols), kind)
            options["out_scales"] = (_address(scales), scales.shape[1])
        if keep:
            _check_keep(first, form, second)
    nan, inf, overflow, touched, amax, error, value = cpu.merge_scaled(
        new_base=first.tuple,
        terms=[(post.tuple, base.tuple, alpha) for post, base, alpha in terms],
        rows=rows,
        cols=cols,
        out=(_address(codes), codes.strides[0]),
        isa=isa,
        threads=threads,
        **options,
    )
    lost = math.sqrt(error / value) if value > 0 else 0.0
    return Result(_like(codes, first.kind), _like(scales, first.kind), Counts(nan, inf, overflow), touched, amax, lost)


class _Plane:
    """A Matrix checked, as the kernels take it. SAFETY: keeps what it points to alive."""

    def __init__(self, name: str, matrix: Any) -> None:
        if not isinstance(matrix, Matrix):
            matrix = Matrix(matrix)
        self.name = name
        self.grid = _grid_of(matrix.grid)
        self.second = matrix.second
        self.codes, self.kind, dtype = _bits(f"{name}.codes", matrix.codes)
        if self.codes.ndim != 2:
            raise OperandError(f"{name}: expected two dimensions, got the shape {self.codes.shape}")
        codec = dtype.name if self.grid is None and dtype is not None else self.grid.codec if self.grid else ""
        if codec not in CODECS:
            raise OperandTypeError(f"{name}: expected a dtype of {', '.join(CODECS)}, got {dtype}; or pass a grid")
        bits = CODEC_BITS[codec]
        if bits == 4:  # in whatever words they come: a low byte comes first
            self.codes, dtype = self.codes.view(np.uint8), None
        if self.codes.itemsize != max(1, bits // 8) or (dtype is not None and dtype.merges and dtype.name != codec):
            raise OperandTypeError(f"{name}: expected codes of {codec}, got dtype {matrix.codes.dtype}")
        rows, width = self.codes.shape
        cols = width if bits >= 8 else 2 * width if matrix.cols is None else matrix.cols
        if -(-cols * bits // 8) != width * self.codes.itemsize:
            raise OperandError(f"{name}: {cols} columns of {codec} do not fit rows of {width} bytes")
        self.shape = (rows, cols)
        scales = None
        if matrix.scales is not None:
            if self.grid is None:
                raise OperandError(f"{name}: has scales, but no grid that says which element uses which")
            scales = self._scales(matrix.scales, self.grid)
        elif self.grid is not None and codec in ("f4", "i4"):
            raise OperandError(f"{name}: expected scales with codes of {codec}")
        self.tuple = (_address(self.codes), CODECS.index(codec), self.codes.strides[0], scales)

    def _scales(self, given: Any, grid: Grid) -> tuple[Any, ...]:
        rows, cols = self.shape
        bits, _, dtype = _bits(f"{self.name}.scales", given)
        wanted = BY_NAME[grid.scale]
        if bits.itemsize * 8 != wanted.bits or (dtype is not None and dtype.merges and dtype != wanted):
            raise OperandTypeError(f"{self.name}: expected scales of {grid.scale}, got dtype {given.dtype}")
        shape = grid.shape(rows, cols)
        if bits.size != shape[0] * shape[1] or (bits.ndim == 2 and 1 not in shape and bits.shape != shape):
            raise OperandError(
                f"{self.name}: a matrix of {rows} × {cols} in units of {grid.rows or rows} × {grid.cols or cols} has "
                f"scales of the shape {shape}, got {bits.shape}"
            )
        if grid.second and self.second is None:
            raise OperandError(f"{self.name}: expected a second scale, to {grid.second}")
        self.scales = bits.reshape(shape)
        second = 1.0 if self.second is None else self.second
        kind = _SECONDS.index(grid.second)
        return (_address(self.scales), wanted.code, shape[1], grid.rows, grid.cols, 0, 0, kind, second, 0, 0)


def _grid_of(grid: Grid | Format | None) -> Grid | None:
    return Grid.of(grid) if isinstance(grid, Format) else grid


def _check_keep(new_base: _Plane, grid: Grid, second: float | None) -> None:
    if new_base.grid != grid or (grid.second and np.float32(new_base.second) != np.float32(second)):
        raise OperandError(f"keep: expected new_base in the output's format, {grid}, got {new_base.grid}")


def _recipe(recipe: Recipe, scale: str) -> tuple[Any, ...]:
    codec, rule = CODECS.index(recipe.codec), RULES.index(recipe.rule)
    bf16 = recipe.values == "bf16"
    return codec, BY_NAME[scale].code, rule, recipe.reciprocal, bf16, recipe.largest, recipe.floor, recipe.zero


def _bits(name: str, x: Any) -> tuple[NDArray[Any], str, DType | None]:
    """Return x as contiguous unsigned integers, its kind, and its dtype, None where it is an integer's."""
    kind = "numpy"
    torch = sys.modules.get("torch")
    found: DType | None
    if torch is not None and isinstance(x, torch.Tensor):
        if x.device.type != "cpu":
            raise OperandError(f"{name}: is on {x.device}, but only CPU tensors are supported; pass {name}.cpu()")
        kind = "torch"
        found = next((d for d in BY_NAME.values() if f"torch.{d.numpy}" == str(x.dtype)), None)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.detach().contiguous().view(integers[x.element_size()]).numpy()
    elif isinstance(x, np.ndarray):
        found = from_numpy(x.dtype)
    else:
        raise OperandTypeError(f"{name}: expected a numpy.ndarray or a torch.Tensor, got {type(x).__qualname__}")
    if x.dtype.itemsize not in (1, 2, 4, 8):
        raise OperandTypeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got dtype {x.dtype}")
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}"), kind, found


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _like(array: NDArray[Any] | None, kind: str) -> Any:
    if array is None or kind == "numpy":
        return array
    torch = sys.modules["torch"]
    found = from_numpy(array.dtype)
    name = str(found.numpy) if found is not None else str(array.dtype)
    integers = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
    return torch.from_numpy(array.view(integers[array.itemsize])).view(getattr(torch, name))
