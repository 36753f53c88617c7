from collections.abc import Sequence
from typing import Any

def dtypes() -> list[tuple[str, int, bool]]: ...
def available_isas() -> list[str]: ...
def best_isa() -> str: ...
def merge(
    *,
    new_base: tuple[int, int],
    terms: Sequence[tuple[int, int, int, int, float]],
    out: tuple[int, int],
    count: int,
    streamed: bool,
    threads: int,
    isa: str | None,
) -> tuple[int, int, int]: ...
def norms(
    *,
    post: tuple[int, int],
    base: tuple[int, int],
    new_base: tuple[int, int],
    count: int,
    threads: int,
    isa: str | None,
) -> tuple[float, float, float, float]: ...

class TensorMerges:
    @property
    def elements(self) -> int: ...
    def merge(
        self, outs: list[Any] | tuple[Any, ...], *, dtype: int, streamed_from: int, threads: int, isa: str | None = None
    ) -> bytes | None: ...

def read_tensor_merges(merges: object, types: tuple[type, ...]) -> TensorMerges | None: ...
def codecs() -> list[tuple[str, int]]: ...
def scale_rules() -> list[str]: ...

_Scales = tuple[int, int, int, int, int, int, int, int, float, int, int]
_Matrix = tuple[int, int, int, _Scales | None]
_Recipe = tuple[int, int, int, bool, bool, float, float, float]

def merge_scaled(
    *,
    new_base: _Matrix,
    terms: Sequence[tuple[_Matrix, _Matrix, float]],
    rows: int,
    cols: int,
    out: tuple[int, int],
    out_dtype: int | None = None,
    recipe: _Recipe | None = None,
    grid: tuple[int, int] = (0, 0),
    out_scales: tuple[int, int] = (0, 0),
    second: float = 1.0,
    given: float | None = None,
    keep: bool = False,
    isa: str | None = None,
    threads: int = 1,
) -> tuple[int, int, int, bool, float, float, float]: ...
def measure_scaled(
    *,
    new_base: _Matrix,
    terms: Sequence[tuple[_Matrix, _Matrix, float]],
    rows: int,
    cols: int,
    out_dtype: int | None = None,
    recipe: _Recipe | None = None,
    isa: str | None = None,
    threads: int = 1,
) -> tuple[int, int, int, bool, float, float, float]: ...

ROW_BYTES: dict[str, int]

class Engine:
    def __init__(
        self,
        *,
        columns: dict[str, Any],
        tensors: int,
        units: int,
        variants: int = 1,
        own_input: int = -1,
        inputs: list[Any],
        outputs: list[Any],
        threads: int,
        slot_bytes: int,
        isa: str | None,
        stage: Any = None,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def wait_for(self, seconds: float) -> bool: ...
    def progress(self) -> tuple[int, int]: ...
    def finish(
        self,
    ) -> tuple[
        list[tuple[int, int, int, int]],
        list[tuple[int, float, float]],
        list[tuple[float, bool]],
        list[tuple[int, int]],
    ]: ...

def crc32_raw(data: Any, *, isa: str | None = None) -> int: ...
def crc32_shifted(raw: int, bytes_behind: int) -> int: ...
def crc32_multiplied(a: int, b: int, *, isa: str | None = None) -> int: ...
def crc32_of_raw(raw: int, message_bytes: int) -> int: ...
def direct_alignment(path: bytes) -> int: ...
def in_memory(path: bytes) -> bool: ...
def cached_bytes(path: bytes, how: str = "") -> int: ...
def reserve(path: bytes, bytes: int) -> bool: ...

class GramSums:
    def __init__(
        self, *, operands: int, differences: Sequence[tuple[int, int]], products: Sequence[tuple[int, int]]
    ) -> None: ...
    def add(self, operands: Sequence[tuple[int, int]], *, count: int, first: int, isa: str | None) -> None: ...
    def merge(self, other: GramSums) -> None: ...
    def products(self) -> list[float]: ...
    def facts(self) -> list[tuple[float, int | None, int, int]]: ...
