from collections.abc import Sequence
from typing import Any

_Scales = tuple[int, int, int, int, int, int, int, int, float, int, int]
_Matrix = tuple[int, int, int, _Scales | None]
_Recipe = tuple[int, int, int, bool, bool, float, float, float]

TOTALS_BYTES: int
NORM_TOTALS_BYTES: int

class DeviceError(RuntimeError): ...

def why_not() -> str: ...
def devices() -> list[dict[str, Any]]: ...
def targets() -> list[int]: ...
def on_host() -> bool: ...
def most_terms() -> int: ...
def merge(
    *,
    new_base: int,
    terms: Sequence[tuple[int, int, float]],
    out: int,
    tensors: Sequence[tuple[int, Sequence[int], int, int, int]],
    device: int,
    stream: int,
) -> None: ...
def norms(
    *,
    post: tuple[int, int],
    base: tuple[int, int],
    new_base: tuple[int, int],
    count: int,
    totals: int,
    device: int,
    stream: int,
) -> None: ...
def read_norms(totals: bytes) -> tuple[float, float, float, float]: ...
def most_scaled_terms() -> int: ...
def workspace_bytes(
    *,
    new_base: _Matrix,
    terms: Sequence[tuple[_Matrix, _Matrix, float]],
    rows: int,
    cols: int,
    out_dtype: int | None = None,
    recipe: _Recipe | None = None,
    grid: tuple[int, int] = (0, 0),
    second: float = 1.0,
    given: float | None = None,
    keep: bool = False,
    measure: bool = False,
) -> int: ...
def merge_scaled(
    *,
    new_base: _Matrix,
    terms: Sequence[tuple[_Matrix, _Matrix, float]],
    rows: int,
    cols: int,
    out_dtype: int | None = None,
    recipe: _Recipe | None = None,
    grid: tuple[int, int] = (0, 0),
    second: float = 1.0,
    given: float | None = None,
    keep: bool = False,
    measure: bool = False,
    out: tuple[int, int] = (0, 0),
    out_scales: tuple[int, int] = (0, 0),
    totals: int,
    workspace: int = 0,
    device: int,
    stream: int,
) -> None: ...
def stage(device: int) -> Any: ...
def rates(device: int) -> tuple[float, float, float]: ...
