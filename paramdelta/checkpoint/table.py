"""The tensors of a checkpoint as columns: a few arrays and lists instead of an object for each of 100,000 tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import DTYPES, DType


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor, made on demand: what it is and where its bytes lie (``offset`` from the start of file ``file``)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class TensorTable:
    """Tensors by row. ``dtype`` holds DType codes, ``file`` numbers into the checkpoint's files, ``offset`` absolute
    byte offsets in that file."""

    names: list[str]
    dtype: NDArray[np.uint8]
    shapes: list[tuple[int, ...]]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    nbytes: NDArray[np.int64]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row numbers by name."""
        return {name: row for row, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def row(self, name: str) -> int:
        """Return the row of ``name``; KeyError where there is none."""
        return self.rows[name]

    def dtype_of(self, row: int) -> DType:
        """Return the dtype of a row."""
        return DTYPES[int(self.dtype[row])]

    def spec(self, name: str) -> TensorSpec:
        """Return one tensor as an object."""
        row = self.row(name)
        return TensorSpec(
            name=name,
            dtype=self.dtype_of(row),
            shape=self.shapes[row],
            file=int(self.file[row]),
            offset=int(self.offset[row]),
            nbytes=int(self.nbytes[row]),
        )
