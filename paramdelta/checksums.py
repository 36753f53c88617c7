"""The CRC-32 of every tensor of a merged folder: put together from what runs of the engine contribute, written into the
record, and computed again from the files.

A contribution is what some bytes of a tensor add to its checksum, given where they lie in it (csrc/io/checksums.hpp).
Contributions of disjoint bytes are joined by exclusive or, in any order: threads, segments and ranks need none. The
result is ``zlib.crc32`` of the tensor's bytes as they are stored.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paramdelta import engine
from paramdelta.dtypes import BY_NAME
from paramdelta.engine import EngineOptions
from paramdelta.errors import StorageError
from paramdelta.plan.work import EXTENT, SPAN, TERM, Rows, Work, no_rows

if TYPE_CHECKING:
    from paramdelta.plan import Plan

ALGORITHM = "crc32"
_CHUNK = 1 << 20


def combined(parts: Iterable[Mapping[int, int] | None]) -> dict[int, int] | None:
    """Return the contributions, by tensor, of several parts of a merge; None where one of them kept none."""
    total: dict[int, int] = {}
    for part in parts:
        if part is None:
            return None
        for tensor, contribution in part.items():
            total[tensor] = total.get(tensor, 0) ^ contribution
    return total


def spelled(contributions: Mapping[int, int], nbytes: Sequence[int]) -> list[str]:
    """Return the checksum of each tensor, of ``nbytes[i]`` bytes, in 8 hexadecimal digits."""
    from paramdelta import _cpu

    return [f"{_cpu.crc32_of_raw(contributions.get(i, 0), size):08x}" for i, size in enumerate(nbytes)]


def read(
    files: Sequence[Path],
    extents: Rows,
    *,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, int]:
    """Return the contributions of tensors that lie at ``extents`` (rows of EXTENT, in order) of ``files``, by reading
    them. ``on_progress`` is called with (bytes read, 0). Raises StorageError."""
    u8 = BY_NAME["u8"].code
    filled = extents[extents["end"] > extents["begin"]]
    spans = np.zeros(len(filled), SPAN)
    spans["out_file"] = spans["new_file"] = filled["file"]
    spans["out_offset"] = spans["new_offset"] = filled["begin"]
    spans["count"] = filled["end"] - filled["begin"]
    spans["tensor"] = filled["tensor"]
    spans["out_dtype"] = spans["new_dtype"] = u8
    sizes = [_size(path) for path in files]
    for file, size in enumerate(sizes):
        if (filled["end"][filled["file"] == file] > size).any():
            raise StorageError(f"{files[file]}: has become shorter than its header says: {size:,} bytes")
    work = Work(
        inputs=tuple(files),
        outputs=tuple((path.name, size) for path, size in zip(files, sizes, strict=True)),
        headers=(),
        spans=spans,
        terms=no_rows(TERM),
        extents=filled,
    )
    tensors = int(extents["tensor"].max()) + 1 if len(extents) else 0

    def report(done: int, _: int) -> None:
        if on_progress is not None:
            on_progress(done, 0)

    result = engine.run(work, sizes, tensors=tensors, options=options, on_progress=report)
    return dict(result.checksums or {})


def of_file(path: Path) -> int:
    """Return the CRC-32 of a whole file. Raises StorageError."""
    value = 0
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                value = zlib.crc32(chunk, value)
    except OSError as error:
        raise StorageError(error.errno, f"{path}: cannot be read: {error.strerror}") from error
    return value


def document(plan: Plan, folder: Path, side_files: Iterable[str], contributions: Mapping[int, int]) -> dict[str, Any]:
    """Return what the record of a merge says about the bytes of ``folder``: of files with weights the size and the
    digest of the header, of the others size and checksum, and the checksum of each tensor."""
    weights = {
        name: {"bytes": size, "header_sha256": hashlib.sha256(header[8:]).hexdigest()}
        for (name, size), header in zip(plan.work.outputs, plan.work.headers, strict=True)
    }
    others = {
        name: {"bytes": _size(folder / name), ALGORITHM: f"{of_file(folder / name):08x}"} for name in sorted(side_files)
    }
    sums = spelled(contributions, plan.layout.nbytes.tolist())
    return {
        "algorithm": ALGORITHM,
        "files": {**weights, **others},
        "tensors": dict(zip(plan.names, sums, strict=True)),
    }


def extents_of(rows: Sequence[tuple[int, int, int]]) -> Rows:
    """Return (file, begin, end) of tensors, numbered as they come, as rows of EXTENT in order."""
    extents = np.zeros(len(rows), EXTENT)
    if rows:
        extents["file"], extents["begin"], extents["end"] = np.array(rows, np.int64).T
    extents["tensor"] = np.arange(len(rows))
    return extents[np.lexsort((extents["end"], extents["begin"], extents["file"]))]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(error.errno, f"{path}: cannot be read: {error.strerror}") from error
