"""The Triton backend: kernels compiled when they first run, on CUDA memory, for GPUs without the built extension.

A call enqueues kernels on a stream and returns: it waits for nothing, and what it reports goes to memory that the
caller gives. With TRITON_INTERPRET=1 in the environment Triton interprets kernels on the CPU, and so this backend takes
CPU memory: for tests.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from paramdelta.backends import Capabilities, triton_scaled
from paramdelta.dtypes import BF16, F16, F32, DType
from paramdelta.errors import BackendError

DTYPES = (BF16, F16, F32)
_EXTRA = "install it with: pip install 'paramdelta[triton]'"
_OLDEST = (8, 0)
_OLDEST_TRITON = (3, 6)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU memory."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Return None where kernels can be compiled for a device that is here, else the reason and the way out."""
    for module in ("torch", "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; {_EXTRA}"
    found = importlib.metadata.version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton {found} is too old for its kernels: it must be 3.6 or later; {_EXTRA}"
    try:
        importlib.import_module("paramdelta.kernels.launch")
    except ImportError as error:
        return f"its kernels do not load ({error}); {_EXTRA}"
    if interpreted():
        return None
    if os.environ.get("CC") is None and not any(shutil.which(name) for name in ("gcc", "clang")):
        return "triton finds no C compiler, which it starts kernels with; install gcc, or name one in the variable CC"
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: it needs an NVIDIA GPU, its driver, and a torch built for CUDA"
    if not _capabilities():
        return "no CUDA device of compute capability 8.0 or later is here, which its kernels are for"
    return None


def capabilities() -> Capabilities:
    """Return what this backend supports: operands and output of one type of bf16, f16, f32, and the architectures."""
    return Capabilities(
        devices=("cpu",) if interpreted() else ("cuda",),
        inputs=DTYPES,
        outputs=DTYPES,
        variants=("interpreter",) if interpreted() else tuple(f"sm_{a}{b}" for a, b in _capabilities()),
        operations=("merge", "foreach", "merge_scaled"),
        one_type=True,
        matrices=triton_scaled.SUPPORTED,
    )


def merge(
    new_base: DType,
    terms: Sequence[tuple[DType, DType, float]],
    out: DType,
    tensors: Sequence[tuple[int, Sequence[int], int, int, int]],
    *,
    device: int = 0,
    stream: int = 0,
    block: int | None = None,
) -> None:
    """Enqueue out = encode(new_base + Σ alpha · (post − base)) for tensors of one signature.

    ``terms`` are (dtype of post, dtype of base, alpha); ``tensors`` (address of new_base, addresses of post and base of
    each term in turn, address of out, number of elements, address of counts), of the device with the ordinal
    ``device``. Address 0 stands for zeros; ``counts`` are three int64 that NaN, Inf and overflow are added to.
    ``stream`` is a cudaStream_t as a number. All dtypes must be the same, one of bf16, f16 and f32. Many tensors take
    one launch, and a table on the device; a CUDA graph can capture either. ``block`` is the number of elements of a
    program. Raises BackendError.
    """
    dtypes = {new_base, out, *(d for post, base, _ in terms for d in (post, base))}
    if len(dtypes) > 1 or new_base not in DTYPES:
        raise BackendError(
            f"backend triton: expected operands and output of one type of {', '.join(d.name for d in DTYPES)}, got "
            f"{', '.join(sorted(d.name for d in dtypes))}; use the backend cuda"
        )
    kept = [k for k, term in enumerate(terms) if term[2] != 0.0]
    alphas = [terms[k][2] for k in kept]
    launch = _launch()
    options = {} if block is None else {"block": block}
    with _on(device, stream):
        if len(tensors) <= 1 or any(0 in (first, *pairs) for first, pairs, *_ in tensors):
            for first, pairs, to, count, counts in tensors:
                picked = [(pairs[2 * k], pairs[2 * k + 1], alpha) for k, alpha in zip(kept, alphas, strict=True)]
                _check_aligned(new_base, [first, to, *(a for p, b, _ in picked for a in (p, b))])
                launch.merge(first, picked, to, counts, count, new_base.name, **options)
            return
        columns = np.array(
            [(count, counts, first, to, *pairs) for first, pairs, to, count, counts in tensors], np.int64
        ).T
        operands = [2, 3, *(4 + 2 * k + side for k in kept for side in (0, 1))]
        enqueue_each(columns[0], [columns[1], *(columns[c] for c in operands)], alphas, new_base, device, **options)


def merge_scaled(*, device: int = 0, stream: int = 0, **job: Any) -> None:
    """Enqueue a merge of matrices of codes and scales; keywords are those of ``_cuda.merge_scaled``, as for ``cuda``.

    What it takes is in ``capabilities().matrices``. Raises BackendError.
    """
    with _on(device, stream):
        triton_scaled.enqueue(**job)


def totals_bytes() -> int:
    """Return the size of the totals that ``merge_scaled`` adds to: device memory that holds zeros before."""
    return triton_scaled.TOTALS_BYTES


def workspace_bytes(**job: Any) -> int:
    """Return how much device memory ``merge_scaled`` needs beside its operands, for the same keywords."""
    return triton_scaled.workspace_bytes(**job)


def enqueue_each(
    counts: Any, columns: Sequence[Any], alphas: Sequence[float], dtype: DType, device: int, block: int | None = None
) -> None:
    """Enqueue one launch for many tensors on the current stream, from columns as `kernels.launch.table_of` takes them.

    ``alphas`` must hold no 0, and no address may be 0.
    """
    launch = _launch()
    size = launch.BLOCK if block is None else block
    addresses = np.bitwise_or.reduce(np.concatenate(columns[1:])) if counts.size else 0
    _check_aligned(dtype, [int(addresses)])
    table = launch.table_of(counts, *columns, block=size)
    programs = int((-(-counts // size)).sum())
    where = _in_memory(launch, table, device)
    align = launch.alignment(dtype.name, int(addresses))
    launch.merge_each(where.data_ptr(), counts.size, programs, alphas, dtype.name, align=align, block=size)


def _capturing() -> bool:
    return not interpreted() and bool(importlib.import_module("torch").cuda.is_current_stream_capturing())


def _in_memory(launch: Any, table: Any, device: int) -> Any:
    """Return a table as a tensor on the device, written in the order of the current stream.

    It is copied from page-locked memory. A CUDA graph would read that again when it is replayed, and finds the table in
    the arguments of launches instead; its memory there is the graph's.
    """
    torch = importlib.import_module("torch")
    if not _capturing():
        host = torch.from_numpy(table)
        return host if interpreted() else host.pin_memory().to(f"cuda:{device}", non_blocking=True)
    table = np.pad(table, (0, -table.size % launch.WRITTEN))
    where = torch.empty(table.size, dtype=torch.int64, device="cpu" if interpreted() else f"cuda:{device}")
    launch.write(where.data_ptr(), table)
    return where


def _check_aligned(dtype: DType, addresses: Sequence[int]) -> None:
    for address in addresses:
        if address % dtype.itemsize:
            raise BackendError(
                f"backend triton: expected memory at multiples of {dtype.itemsize} bytes for {dtype.name}, got the "
                f"address {address:#x}; copy the operand, or use the backend cuda"
            )


@contextlib.contextmanager
def _on(device: int, stream: int) -> Iterator[None]:
    if interpreted():
        yield
        return
    torch = importlib.import_module("torch")
    with torch.cuda.device(device):
        if stream == torch.cuda.current_stream(device).cuda_stream:
            yield
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device)):
            yield


@lru_cache(maxsize=1)
def _capabilities() -> tuple[tuple[int, int], ...]:
    torch = importlib.import_module("torch")
    found = {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
    return tuple(sorted(c for c in found if c >= _OLDEST))


def _launch() -> Any:
    return importlib.import_module("paramdelta.kernels.launch")
