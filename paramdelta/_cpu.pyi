from collections.abc import Sequence

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
