"""Calls of the kernels for devices, for the conformance suite: ``cuda`` and ``triton`` on a device; ``cuda-host`` the
bodies of the former compiled for the host; ``cuda-ptx`` and ``triton-ptx`` what nvcc and Triton's compiler make, on an
emulated device (tests/emulation). In Triton's interpreter (TRITON_INTERPRET=1) ``triton`` takes the host's memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_on_host
import numpy as np
import triton_calls

from paramdelta import backends, reference
from paramdelta.backends import triton
from paramdelta.dtypes import DType

sys.path.append(str(Path(__file__).parents[1] / "emulation"))
import emulated_cuda
import emulated_triton

KERNELS = ("cuda-host", "cuda-ptx", "cuda", "triton-ptx", "triton")
BUILDS: dict[str, Any] = {"cuda-host": cuda_on_host, "cuda-ptx": emulated_cuda, "triton-ptx": emulated_triton}
NORM_KERNELS = ("cuda-host", "cuda-ptx", "cuda")


def why_not(kernels: str) -> str | None:
    """Return why these kernels cannot run here, or None."""
    return BUILDS[kernels].why_not() if kernels in BUILDS else backends.why_not(kernels)


def extension(kernels: str) -> ModuleType:
    """Return the module of these kernels."""
    if kernels in BUILDS:
        return BUILDS[kernels].module()
    from paramdelta import _cuda

    return _cuda  # type: ignore[no-any-return]


class TorchCopy:
    """Bytes in the memory of a device, `behind` bytes behind a 64-byte boundary."""

    def __init__(self, data: bytes, behind: int) -> None:
        import torch

        self._room = torch.empty(len(data) + 128, dtype=torch.uint8, device="cuda")
        start = -self._room.data_ptr() % 64 + behind
        self._copy = self._room[start : start + len(data)]
        self._copy.copy_(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
        self.address = int(self._copy.data_ptr())

    def fetch(self) -> bytes:
        return bytes(self._copy.cpu().numpy().tobytes())


class Memory:
    """Arrays where the kernels see them. On a device each has a copy, as far behind a 64-byte boundary as itself."""

    def __init__(self, kernels: str) -> None:
        self.on_host = kernels == "cuda-host" or (kernels == "triton" and triton.interpreted())
        self._make = emulated_cuda.Copy if kernels.endswith("-ptx") else TorchCopy
        self._copies: dict[int, tuple[np.ndarray[Any, Any], Any]] = {}

    def address(self, array: np.ndarray[Any, Any] | None) -> int:
        """Return the address of an array's first element, 0 for None. Arrays at one address share their copy."""
        if array is None:
            return 0
        here = int(array.__array_interface__["data"][0])
        if self.on_host:
            return here
        if here not in self._copies:
            self._copies[here] = (array, self._make(array.tobytes(), here % 64))
        return int(self._copies[here][1].address)

    def fetch(self, array: np.ndarray[Any, Any]) -> None:
        """Bring back what the kernels wrote to an array."""
        if not self.on_host:
            copy = self._copies[int(array.__array_interface__["data"][0])][1]
            array.reshape(-1).view(np.uint8)[...] = np.frombuffer(copy.fetch(), np.uint8)


def _triton(kernels: str) -> contextlib.AbstractContextManager[None]:
    return emulated_triton.active() if kernels == "triton-ptx" else contextlib.nullcontext()


def merge(
    kernels: str,
    new_base: reference.Array,
    terms: Sequence[reference.Term],
    dtype: DType,
    out: np.ndarray[Any, Any],
    count: int,
) -> tuple[int, int, int]:
    """Merge one tensor to ``out`` and return the counts."""
    memory = Memory(kernels)
    counts = np.zeros(3, np.uint64)
    pairs = [memory.address(a.codes) for t in terms for a in (t.post, t.base)]
    tensor = (memory.address(new_base.codes), pairs, memory.address(out), count, memory.address(counts))
    if kernels.startswith("triton"):
        with _triton(kernels):
            triton_calls.merge(new_base.dtype, terms, dtype, tensor)
    else:
        extension(kernels).merge(
            new_base=new_base.dtype.code,
            terms=[(t.post.dtype.code, t.base.dtype.code, t.alpha) for t in terms],
            out=dtype.code,
            tensors=[tensor],
            device=0,
            stream=0,
        )
    memory.fetch(out)
    memory.fetch(counts)
    nan, inf, overflow = (int(n) for n in counts)
    return nan, inf, overflow


def norms(kernels: str, operands: Sequence[reference.Array], count: int) -> tuple[float, float, float, float]:
    """Return the norms of ``count`` elements of post, base and new_base."""
    memory, module = Memory(kernels), extension(kernels)
    totals = np.zeros(module.NORM_TOTALS_BYTES // 8, np.uint64)
    names = ("post", "base", "new_base")
    where = {n: (memory.address(a.codes), a.dtype.code) for n, a in zip(names, operands, strict=True)}
    module.norms(**where, count=count, totals=memory.address(totals), device=0, stream=0)
    memory.fetch(totals)
    found: tuple[float, float, float, float] = module.read_norms(totals.tobytes())
    return found


def merge_scaled(
    kernels: str, arrays: Sequence[np.ndarray[Any, Any]], written: Sequence[np.ndarray[Any, Any]], **job: Any
) -> tuple[int, int, int, bool, float, float, float]:
    """Merge matrices and return what ``_cpu.merge_scaled`` does. ``arrays`` are all memory that addresses lie in."""
    memory = Memory(kernels)

    def moved(address: int) -> int:
        for array in arrays:
            start = int(array.__array_interface__["data"][0])
            if start <= address < start + array.nbytes:
                return memory.address(array) + address - start
        assert address == 0 or memory.on_host
        return address

    def matrix(m: Any) -> Any:
        scales = m[3] and (moved(m[3][0]), *m[3][1:9], moved(m[3][9]), m[3][10])
        return (moved(m[0]), *m[1:3], scales)

    job["new_base"] = matrix(job["new_base"])
    job["terms"] = [(matrix(post), matrix(base), alpha) for post, base, alpha in job["terms"]]
    places = {name: (moved(job[name][0]), job[name][1]) for name in ("out", "out_scales") if name in job}
    rest = {name: value for name, value in job.items() if name not in places}
    if kernels.startswith("triton"):
        with _triton(kernels):
            found = triton_calls.merge_scaled(memory, **rest, **places)
        for array in written:
            memory.fetch(array)
        return found
    module = extension(kernels)
    workspace = np.full(module.workspace_bytes(**rest) // 8 + 1, 0xA5A5A5A5, np.uint64)
    totals = np.zeros(module.TOTALS_BYTES // 8, np.uint64)
    module.merge_scaled(
        **rest, **places, totals=memory.address(totals), workspace=memory.address(workspace), device=0, stream=0
    )
    for array in (*written, totals):
        memory.fetch(array)
    touched, amax = totals[3:4].view(np.uint32)
    error, value = (float(x) for x in totals[4:].view(np.float64))
    nan, inf, overflow = (int(n) for n in totals[:3])
    return nan, inf, overflow, bool(touched), float(amax.view(np.float32)), error, value
