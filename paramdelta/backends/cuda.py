"""The CUDA backend: the extension ``paramdelta._cuda``, kernels on device memory in the order of a stream.

Nothing here allocates device memory, copies or waits: a call enqueues kernels and returns, so that a CUDA graph can
capture it. Results of a call are in memory that the caller gives.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from paramdelta.backends import Capabilities, Norms, Operand
from paramdelta.dtypes import MERGE_DTYPES, DType

BUILD = "PARAMDELTA_BUILD_CUDA=1 pip install -e ."


class TermTypes(NamedTuple):
    """The dtypes of one summand's operands, and its factor."""

    post: DType
    base: DType
    alpha: float


class Tensor(NamedTuple):
    """Addresses of one tensor's operands in device memory, 0 for zeros: ``pairs`` holds post and base of each term.

    ``counts`` are three 64-bit integers to which NaN, Inf and overflows are added.
    """

    new_base: int
    pairs: tuple[int, ...]
    out: int
    elements: int
    counts: int


class Rates(NamedTuple):
    """Bytes per second: to the device and back, measured while both go on; of operands merged there (bf16)."""

    up: float
    down: float
    merge: float


def why_not() -> str | None:
    """Return None where the extension loads and finds a device, else the reason and the way out."""
    try:
        extension = _extension()
    except ModuleNotFoundError:
        return f"the extension paramdelta._cuda is not built; where nvcc is found, build it with: {BUILD}"
    except ImportError as error:
        return f"the extension paramdelta._cuda does not load ({error}); build it again with: {BUILD}"
    reason, _ = _found(extension)
    return f"{reason}; tensors on the CPU, and files, are merged without one" if reason else None


def capabilities() -> Capabilities:
    """Return what this backend supports: CUDA memory, every dtype with arithmetic, the architectures present.

    An extension whose kernels were compiled for the host, which tests have, takes CPU memory.
    """
    _, variants = _found(_extension())
    return Capabilities(
        devices=(memory(),),
        inputs=MERGE_DTYPES,
        outputs=MERGE_DTYPES,
        variants=variants,
        operations=("merge", "foreach", "norms", "merge_scaled"),
    )


def merge(
    new_base: DType, terms: Sequence[TermTypes], out: DType, tensors: Sequence[Tensor], *, device: int, stream: int
) -> None:
    """Enqueue out = encode(new_base + Σ alpha · (post − base)) for tensors of one signature, in as few launches as fit.

    ``device`` is the ordinal of the device the memory is on, ``stream`` a cudaStream_t as a number. All memory must
    stay valid until the stream has passed the call.
    """
    _extension().merge(
        new_base=new_base.code,
        terms=[(t.post.code, t.base.code, t.alpha) for t in terms],
        out=out.code,
        tensors=[tuple(t) for t in tensors],
        device=device,
        stream=stream,
    )


def norms(
    post: Operand, base: Operand, new_base: Operand, count: int, totals: int, *, device: int, stream: int
) -> None:
    """Enqueue the norms of ``count`` elements, which are the whole tensor, as ``ops.norms`` defines them.

    ``totals`` is where they are added to: the address of ``norm_totals_bytes()`` bytes of device memory that hold
    zeros. ``read_norms`` makes numbers of a copy of them.
    """
    _extension().norms(
        post=(post.address, post.dtype.code),
        base=(base.address, base.dtype.code),
        new_base=(new_base.address, new_base.dtype.code),
        count=count,
        totals=totals,
        device=device,
        stream=stream,
    )


def norm_totals_bytes() -> int:
    """Return the size of what ``norms`` adds to: exact sums, which take leaves in any order."""
    size: int = _extension().NORM_TOTALS_BYTES
    return size


def read_norms(totals: bytes) -> Norms:
    """Return the norms of totals that were copied from a device: each sum is rounded once, here."""
    return Norms(*_extension().read_norms(totals))


def memory() -> str:
    """Return the torch device type whose memory the extension takes."""
    return "cpu" if _found(_extension())[1] == ("host",) else "cuda"


def read_tensor_merges(merges: Any, types: tuple[type, ...]) -> Any:
    """Return a list of (post, base, new_base[, alpha]) of plain tensors of one device, of ``types``, as the extension
    reads it, or None where one is out of the ordinary. It keeps the tensors alive."""
    return _extension().read_tensor_merges(merges, types)


def merge_tensors(read: Any, outs: list[Any], counts: Any, dtype: DType | None) -> bool:
    """Enqueue merges that were read on PyTorch's current stream, their counts being added to a tensor [n, 3] of int64.

    False, nothing being enqueued, where an output is out of the ordinary, not of ``dtype``, or not apart from the
    other tensors.
    """
    enqueued: bool = read.merge(outs, counts, dtype=-1 if dtype is None else dtype.code)
    return enqueued


def merge_scaled(**job: Any) -> None:
    """Enqueue a merge of matrices of codes and scales; keywords are those of ``_cuda.merge_scaled``."""
    _extension().merge_scaled(**job)


def totals_bytes() -> int:
    """Return the size of the totals that ``merge_scaled`` adds to: device memory that holds zeros before."""
    size: int = _extension().TOTALS_BYTES
    return size


def workspace_bytes(**job: Any) -> int:
    """Return how much device memory ``merge_scaled`` needs beside its operands, for the same keywords."""
    size: int = _extension().workspace_bytes(**job)
    return size


def stage(device: int) -> Any:
    """Return what the streaming engine is given to compute on a device (``EngineOptions.stage``). It keeps page-locked
    memory, and as much of the device's, from one run to the next, and serves one run at a time."""
    return _extension().stage(device)


def most_deltas() -> int:
    """Return how many deltas one launch adds up, whatever the operands."""
    extension = _extension()
    return min(int(extension.most_terms()), int(extension.most_scaled_terms()))


def rates(device: int) -> Rates:
    """Measure a device and the link to it, for some ten milliseconds."""
    return Rates(*_extension().rates(device))


@lru_cache
def _found(extension: ModuleType) -> tuple[str, tuple[str, ...]]:
    """Return why an extension cannot run, if so, and the architectures: asking devices takes milliseconds."""
    reason: str = extension.why_not()
    if reason:
        return reason, ()
    if extension.on_host():
        return "", ("host",)
    found = sorted({device["capability"] for device in extension.devices()})
    return "", tuple(f"sm_{major}{minor}" for major, minor in found)


def _extension() -> ModuleType:
    return importlib.import_module("paramdelta._cuda")
