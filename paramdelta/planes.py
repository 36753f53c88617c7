"""Quantised matrices at the edge: grids, planes of codes and scales, and parts of larger matrices, checked once.

NumPy arrays and torch tensors become what kernels take: addresses, pitches and phases. A tensor in CUDA memory is seen
as an array of its addresses, as in ``paramdelta.tensors``; its memory is never read from here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import BY_NAME, DType, from_numpy, from_torch
from paramdelta.errors import OperandError, OperandTypeError
from paramdelta.formats import CODEC_BITS, CODECS, Format
from paramdelta.tensors import geometry

_SCALES = ("f32", "bf16", "f16", "f8_e8m0", "f8_e4m3")
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a shard lies in its matrix of ``rows`` × ``cols`` elements: its first element is (``row``, ``col``) there.

    A grid of scales counts from the first element of the whole matrix. ``scales`` of a Matrix that is a shard are those
    of the units it has elements of, or those of the whole matrix, along either axis.
    """

    row: int = 0
    col: int = 0
    rows: int
    cols: int

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise OperandError where a shard of this shape does not lie in the matrix."""
        for what, first, count, whole in (
            ("rows", self.row, shape[0], self.rows),
            ("cols", self.col, shape[1], self.cols),
        ):
            if not 0 <= first <= first + count <= whole < 1 << 32:
                raise OperandError(
                    f"part: {name} has {what} {first} to {first + count} of a matrix of {whole}; expected row and col "
                    "where the shard begins in its matrix, and the matrix's rows and cols"
                )

    def check_whole_units(self, grid: Grid, shape: tuple[int, int]) -> None:
        """Raise OperandError where a shard of this shape has a unit of the grid in part."""
        for what, first, count, whole, unit in (
            ("rows", self.row, shape[0], self.rows, grid.rows),
            ("columns", self.col, shape[1], self.cols, grid.cols),
        ):
            unit = unit or whole
            if count and any(cut % unit and cut != whole for cut in (first, first + count)):
                raise OperandError(
                    f"part: {what} {first} to {first + count} of {whole} cut an output unit of {unit} {what}, whose "
                    f"scale depends on all of its elements; cut the matrix at multiples of {unit} {what}, pass the "
                    "unit's scale as given, or merge to a plain dtype"
                )


class Along(NamedTuple):
    """Along one axis: the first unit a shard touches, how many, how many there are, and the phase in the first."""

    first: int
    touched: int
    whole: int
    phase: int

    @classmethod
    def of(cls, first: int, count: int, whole: int, unit: int) -> Along:
        """Return what elements first to first + count of ``whole`` touch in units of ``unit``, 0 for all."""
        if unit == 0:
            return cls(0, 1, 1, 0)
        start = first // unit
        return cls(start, -(-(first + count) // unit) - start if count else 0, -(-whole // unit), first % unit)


class Plane:
    """A Matrix checked, as the kernels take it. SAFETY: keeps what it points to alive."""

    def __init__(self, name: str, matrix: Any, part: Part | None = None) -> None:
        if not isinstance(matrix, Matrix):
            matrix = Matrix(matrix)
        self.name = name
        self.grid = grid_of(matrix.grid)
        self.second = matrix.second
        self.codes, self.source, dtype = _bits(f"{name}.codes", matrix.codes)
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
        if part is not None and bits == 4 and matrix.cols is None and cols == part.cols - part.col + 1:
            cols -= 1  # the last nibble of a row is padding
        if -(-cols * bits // 8) != width * self.codes.itemsize:
            raise OperandError(f"{name}: {cols} columns of {codec} do not fit rows of {width} bytes")
        self.shape = (rows, cols)
        self.part = Part(rows=rows, cols=cols) if part is None else part
        self.part.check(name, self.shape)
        if bits == 4:
            check_nibbles(name, self.part, cols)
        scales = None
        if matrix.scales is not None:
            if self.grid is None:
                raise OperandError(f"{name}: has scales, but no grid that says which element uses which")
            scales = self._scales(matrix.scales, self.grid)
        elif self.grid is not None and codec in ("f4", "i4"):
            raise OperandError(f"{name}: expected scales with codes of {codec}")
        self.tuple = (address(self.codes), CODECS.index(codec), self.codes.strides[0], scales)

    @property
    def device(self) -> Any:
        """A torch device, or "cpu" for an array."""
        return "cpu" if self.source is None else self.source.device

    @property
    def device_type(self) -> str:
        """The torch device type of its memory."""
        return "cpu" if self.source is None else str(self.source.device.type)

    def _scales(self, given: Any, grid: Grid) -> tuple[Any, ...]:
        bits, source, dtype = _bits(f"{self.name}.scales", given)
        if str("cpu" if source is None else source.device) != str(self.device):
            raise OperandError(f"{self.name}.scales: are on {given.device}, but the codes are on {self.device}")
        wanted = BY_NAME[grid.scale]
        if bits.itemsize * 8 != wanted.bits or (dtype is not None and dtype.merges and dtype != wanted):
            raise OperandTypeError(f"{self.name}: expected scales of {grid.scale}, got dtype {given.dtype}")
        (rows, cols), part = self.shape, self.part
        up, across = Along.of(part.row, rows, part.rows, grid.rows), Along.of(part.col, cols, part.cols, grid.cols)
        touched, whole = (up.touched, across.touched), (up.whole, across.whole)
        shape = next((s for s in (touched, whole) if _fits(bits, s)), None)
        if shape is None and bits.ndim == 2 and all(n in ns for n, ns in zip(bits.shape, (up, across), strict=True)):
            shape = bits.shape if bits.shape in ((up.touched, across.whole), (up.whole, across.touched)) else None
        if shape is None:
            of_whole = "" if touched == whole else f", or {whole} for the whole matrix of {part.rows} × {part.cols}"
            raise OperandError(
                f"{self.name}: a matrix of {rows} × {cols} in units of {grid.rows or part.rows} × "
                f"{grid.cols or part.cols} has scales of the shape {touched}{of_whole}, got {bits.shape}"
            )
        if grid.second and self.second is None:
            raise OperandError(f"{self.name}: expected a second scale, to {grid.second}")
        scales = bits.reshape(shape)
        scales = scales[up.first :] if shape[0] != up.touched else scales
        self.scales = scales[:, across.first :] if shape[1] != across.touched else scales
        second = 1.0 if self.second is None else self.second
        kind = _SECONDS.index(grid.second)
        phases = (up.phase, across.phase)
        return (address(self.scales), wanted.code, shape[1], grid.rows, grid.cols, *phases, kind, second, 0, 0)


def check_nibbles(name: str, part: Part, cols: int) -> None:
    """Raise OperandError where a shard of ``cols`` columns would begin or end amid a byte of two codes."""
    if part.col % 2 or (cols % 2 and part.col + cols != part.cols):
        raise OperandError(
            f"part: {name} has columns {part.col} to {part.col + cols} of {part.cols}, and two codes of four bits "
            "share a byte; cut the matrix at even columns"
        )


def _fits(bits: NDArray[Any], shape: tuple[int, int]) -> bool:
    return bits.size == shape[0] * shape[1] and not (bits.ndim == 2 and 1 not in shape and bits.shape != shape)


def grid_of(grid: Grid | Format | None) -> Grid | None:
    """Return a grid, that of a format where it is one."""
    return Grid.of(grid) if isinstance(grid, Format) else grid


def address(array: NDArray[Any]) -> int:
    """Return where an array's first element lies."""
    return int(array.__array_interface__["data"][0])


def allocate(like: Plane, shape: tuple[int, int], dtype: DType) -> tuple[NDArray[Any], Any]:
    """Return new memory where ``like`` is, seen as bits, and as the array or tensor that the user gets."""
    if like.source is None:
        made: Any = np.empty(shape, dtype.to_numpy())
    else:
        torch = sys.modules["torch"]
        made = torch.empty(shape, dtype=getattr(torch, str(dtype.torch)), device=like.source.device)
    return _bits("out", made)[0], made


def _bits(name: str, x: Any) -> tuple[NDArray[Any], Any, DType | None]:
    """Return x as contiguous unsigned integers, the tensor if it is one, and its dtype, None where that is not ours."""
    torch = sys.modules.get("torch")
    found: DType | None
    source = None
    if torch is not None and isinstance(x, torch.Tensor):
        if x.device.type not in ("cpu", "cuda"):
            raise OperandError(f"{name}: is on {x.device}, but only CPU and CUDA tensors are supported")
        source = x
        found = from_torch(x.dtype)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        if x.element_size() not in integers:
            raise OperandTypeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got dtype {x.dtype}")
        x = x.detach().contiguous().view(integers[x.element_size()])
        x = x.numpy() if x.device.type == "cpu" else geometry(x)
    elif isinstance(x, np.ndarray):
        found = from_numpy(x.dtype)
    else:
        raise OperandTypeError(f"{name}: expected a numpy.ndarray or a torch.Tensor, got {type(x).__qualname__}")
    if x.dtype.itemsize not in (1, 2, 4, 8):
        raise OperandTypeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got dtype {x.dtype}")
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}"), source, found
