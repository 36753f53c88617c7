"""PyTorch tensors, one merge or a list, merged by a call of an extension that reads them itself: no Python for each.

The extensions read tensors through DLPack's C exchange, which PyTorch has since 2.10: plain dense tensors in row-major
order, on one device, without gradients, whose outputs are apart from all other memory. For anything else ``merge``
returns None, having written and enqueued nothing; the caller then goes the general way (``tensors``,
``device_tensors``), which takes more kinds of tensors, or says what is wrong with these.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, overload

from paramdelta import backends
from paramdelta.backends import Counts, cpu, cuda
from paramdelta.dtypes import DType


class CountRows(Sequence[Counts]):
    """The counts of many merges, made of the extension's integers when they are asked for."""

    def __init__(self, packed: bytes) -> None:
        self._rows = memoryview(packed).cast("Q")

    def __len__(self) -> int:
        return len(self._rows) // 3

    @overload
    def __getitem__(self, k: int) -> Counts: ...

    @overload
    def __getitem__(self, k: slice) -> list[Counts]: ...

    def __getitem__(self, k: int | slice) -> Counts | list[Counts]:
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        at = 3 * range(len(self))[k]
        return Counts(*self._rows[at : at + 3])


def merge(
    merges: Sequence[tuple[Any, ...]], outs: Sequence[Any] | None, dtype: DType | None, threads: int | None
) -> tuple[list[Any], CountRows | Any] | None:
    """Merge tensors as ``ops.merge_many`` does; return outputs and counts, which on a device are a tensor [n, 3].

    Returns None, nothing having been done, where not all of the arguments are ordinary.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(merges, (list, tuple)) or not merges:
        return None
    row = merges[0]
    first: Any = row[2] if isinstance(row, (list, tuple)) and len(row) > 2 else None
    types = (torch.Tensor, torch.nn.Parameter)
    if type(first) not in types or not (threads is None or (type(threads) is int and threads > 0)):
        return None
    backend = _backend(first.device.type)
    read = None if backend is None else backend.read_tensor_merges(merges, types)
    if backend is None or read is None:
        return None
    if outs is None:
        wanted = None if dtype is None else getattr(torch, str(dtype.torch))
        dense = torch.contiguous_format
        results = [torch.empty_like(each[2], dtype=wanted, memory_format=dense) for each in merges]
    else:
        results = list(outs)
    if backend is cpu:
        packed = cpu.merge_tensors(read, results, dtype, threads=threads)
        return None if packed is None else (results, CountRows(packed))
    counts = torch.zeros((len(merges), 3), dtype=torch.int64, device=first.device)
    return (results, counts) if cuda.merge_tensors(read, results, counts, dtype) else None


def _backend(device: str) -> Any:
    """Return the backend that the registry would choose for this memory where that reads tensors itself, or None."""
    name = os.environ.get(backends.VARIABLE) or ("cpu" if device == "cpu" else "cuda")
    if name == "cpu":
        return cpu if device == "cpu" and cpu.why_not() is None else None
    return cuda if name == "cuda" and cuda.why_not() is None and cuda.memory() == device else None
