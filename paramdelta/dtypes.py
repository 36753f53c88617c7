"""The one list of dtypes in Python. Its order is the numbering that the C++ list in ``csrc/core/dtypes.hpp`` shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type.

    ``name`` is its spelling in Python (``bf16``), ``safetensors`` the one at the file's edge (``BF16``), ``code`` its
    number in the extension, ``bits`` its width, ``numpy`` the NumPy or ml_dtypes name where one exists, and
    ``merges`` whether the merge has arithmetic for it (every other type is carried over unchanged).
    """

    name: str
    safetensors: str
    code: int
    bits: int
    numpy: str | None
    merges: bool

    @property
    def itemsize(self) -> int:
        """Bytes of one element; raises for types narrower than a byte."""
        if self.bits % 8:
            raise ValueError(f"{self.name} elements are {self.bits} bits: they have no whole number of bytes")
        return self.bits // 8

    @property
    def torch(self) -> str | None:
        """The attribute of the torch module that is this dtype, or None where torch has none."""
        if self.name == "bool":
            return "bool"
        return self.numpy

    def to_numpy(self) -> np.dtype[Any]:
        """Return the NumPy dtype (from ml_dtypes where NumPy has none)."""
        import numpy as np

        if self.numpy is None:
            raise ValueError(f"{self.name} has no NumPy dtype")
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(np if hasattr(np, self.numpy) else ml_dtypes, self.numpy))
        return dtype

    def __str__(self) -> str:
        return self.name


_LIST = (
    # name, safetensors, bits, numpy, merges
    ("bf16", "BF16", 16, "bfloat16", True),
    ("f16", "F16", 16, "float16", True),
    ("f32", "F32", 32, "float32", True),
    ("f64", "F64", 64, "float64", True),
    ("f8_e4m3", "F8_E4M3", 8, "float8_e4m3fn", True),
    ("f8_e5m2", "F8_E5M2", 8, "float8_e5m2", True),
    ("f8_e8m0", "F8_E8M0", 8, "float8_e8m0fnu", False),
    ("f8_e4m3fnuz", "F8_E4M3FNUZ", 8, "float8_e4m3fnuz", False),
    ("f8_e5m2fnuz", "F8_E5M2FNUZ", 8, "float8_e5m2fnuz", False),
    ("f6_e2m3", "F6_E2M3", 6, None, False),
    ("f6_e3m2", "F6_E3M2", 6, None, False),
    ("f4", "F4", 4, None, False),
    ("bool", "BOOL", 8, "bool_", False),
    ("u8", "U8", 8, "uint8", False),
    ("i8", "I8", 8, "int8", False),
    ("u16", "U16", 16, "uint16", False),
    ("i16", "I16", 16, "int16", False),
    ("u32", "U32", 32, "uint32", False),
    ("i32", "I32", 32, "int32", False),
    ("u64", "U64", 64, "uint64", False),
    ("i64", "I64", 64, "int64", False),
    ("c64", "C64", 64, "complex64", False),
)

DTYPES: tuple[DType, ...] = tuple(
    DType(name=n, safetensors=s, code=i, bits=b, numpy=np_name, merges=m)
    for i, (n, s, b, np_name, m) in enumerate(_LIST)
)
MERGE_DTYPES: tuple[DType, ...] = tuple(d for d in DTYPES if d.merges)
BY_NAME: dict[str, DType] = {d.name: d for d in DTYPES}
BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in DTYPES}

BF16, F16, F32, F64, F8_E4M3, F8_E5M2 = MERGE_DTYPES


def from_numpy(dtype: Any) -> DType | None:
    """Return the DType of a NumPy dtype (ml_dtypes included), or None where there is none."""
    import numpy as np

    name = np.dtype(dtype).name
    return next((d for d in DTYPES if d.numpy == ("bool_" if name == "bool" else name)), None)


@lru_cache
def from_torch(dtype: Any) -> DType | None:
    """Return the DType of a torch dtype, or None where there is none."""
    return next((d for d in DTYPES if d.torch is not None and f"torch.{d.torch}" == str(dtype)), None)
