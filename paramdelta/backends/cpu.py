"""The CPU backend: the extension ``paramdelta._cpu``, built for several instruction sets, chosen when it first runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from paramdelta.backends import Capabilities, Counts, Norms, Operand, Term
from paramdelta.backends.threads import default_threads
from paramdelta.dtypes import MERGE_DTYPES, DType

# Outputs from this size on bypass the cache: with its three inputs, a merge of this size has left the
# last-level cache of a core's share long before it ends, and ordinary stores would first read every line that
# they replace.
STREAMED_FROM_BYTES = 8 << 20
# A thread takes so many elements at once (kPiece in csrc/cpu/parallel.hpp): fewer are not worth asking how many threads
# there may be.
ONE_THREAD_UP_TO = 32 * 4096


def why_not() -> str | None:
    """Return None where the extension loads, else the reason and the way out."""
    try:
        _extension()
    except ImportError as error:
        return f"the extension paramdelta._cpu does not load ({error}); build it with: pip install -e ."
    return None


def capabilities() -> Capabilities:
    """Return what this backend supports: CPU memory, every dtype with arithmetic, the instruction sets present."""
    return Capabilities(
        devices=("cpu",),
        inputs=MERGE_DTYPES,
        outputs=MERGE_DTYPES,
        variants=tuple(_extension().available_isas()),
        operations=("merge", "norms", "merge_scaled"),
    )


def merge(
    new_base: Operand,
    terms: Sequence[Term],
    out: Operand,
    count: int,
    *,
    threads: int,
    isa: str | None = None,
    streamed: bool | None = None,
) -> Counts:
    """Write encode(new_base + Σ alpha · (post − base)) to ``out``, for ``count`` elements.

    ``isa`` names one of ``capabilities().variants``; None takes the best, or what PARAMDELTA_ISA names.
    ``streamed`` says whether the output bypasses the cache; None decides by its size. Neither changes a bit
    of the result.
    """
    if streamed is None:
        streamed = count * out.dtype.itemsize >= STREAMED_FROM_BYTES
    return Counts(
        *_extension().merge(
            new_base=(new_base.address, new_base.dtype.code),
            terms=[(t.post.address, t.post.dtype.code, t.base.address, t.base.dtype.code, t.alpha) for t in terms],
            out=(out.address, out.dtype.code),
            count=count,
            streamed=streamed,
            threads=threads,
            isa=isa,
        )
    )


def read_tensor_merges(merges: Any, types: tuple[type, ...]) -> Any:
    """Return a list of (post, base, new_base[, alpha]) of plain CPU tensors, of ``types``, as the extension reads it,
    or None where one is out of the ordinary. It keeps the tensors alive."""
    return _extension().read_tensor_merges(merges, types)


def merge_tensors(read: Any, outs: list[Any], dtype: DType | None, *, threads: int | None) -> bytes | None:
    """Merge what was read into ``outs``; return the counts of each, three u64.

    None, nothing being written, where an output is out of the ordinary, not of ``dtype``, or not apart from the other
    tensors.
    """
    if threads is None:
        threads = 1 if read.elements <= ONE_THREAD_UP_TO else default_threads()
    code = -1 if dtype is None else dtype.code
    packed: bytes | None = read.merge(outs, dtype=code, streamed_from=STREAMED_FROM_BYTES, threads=threads)
    return packed


def norms(
    post: Operand, base: Operand, new_base: Operand, count: int, *, threads: int, isa: str | None = None
) -> Norms:
    """Return the norms of ``count`` elements, which are the whole tensor, as ``ops.norms`` defines them."""
    return Norms(
        *_extension().norms(
            post=(post.address, post.dtype.code),
            base=(base.address, base.dtype.code),
            new_base=(new_base.address, new_base.dtype.code),
            count=count,
            threads=threads,
            isa=isa,
        )
    )


def merge_scaled(**job: Any) -> tuple[int, int, int, bool, float, float, float]:
    """Merge matrices of codes and scales; keywords and result are those of ``_cpu.merge_scaled``."""
    result: tuple[int, int, int, bool, float, float, float] = _extension().merge_scaled(**job)
    return result


def _extension() -> ModuleType:
    return importlib.import_module("paramdelta._cpu")
