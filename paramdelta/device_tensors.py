"""Tensors in CUDA memory: merged there, in the order of PyTorch's current stream, without waiting for the device.

Which backend merges is the registry's choice, by the types of a merge.

A tensor's geometry (address, shape, strides) is seen through NumPy, as that of arrays is, so that the same checks hold
for both; its memory is never read from here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from paramdelta import backends
from paramdelta.backends import Counts, cuda
from paramdelta.dtypes import DType
from paramdelta.errors import OperandError
from paramdelta.tensors import Tensor, allocate, read_out, same_shape


class PendingCounts:
    """The counts of merges on a device: reading one waits for the device, and all are then as in ``Counts``.

    ``rows`` [n, 3] is where those of n merges are, int64 on the device, and ``row`` which are these.
    """

    def __init__(self, rows: Any, row: int = 0) -> None:
        self._rows, self._row = rows, row

    @property
    def tensor(self) -> Any:
        """Three int64 on the device: NaN, Inf and overflow."""
        return self._rows[self._row]

    def wait(self) -> Counts:
        """Wait for what has been enqueued, and return the counts."""
        nan, inf, overflow = self.tensor.tolist()
        return Counts(nan, inf, overflow)

    @property
    def nan(self) -> int:
        """Outputs that are NaN."""
        return self.wait().nan

    @property
    def inf(self) -> int:
        """Outputs for which the binary64 result is infinite."""
        return self.wait().inf

    @property
    def overflow(self) -> int:
        """Finite results beyond the largest finite value of the output type."""
        return self.wait().overflow

    @property
    def clean(self) -> bool:
        """Whether all counts are zero."""
        return self.wait().clean

    def __eq__(self, other: object) -> bool:
        return self.wait() == (other.wait() if isinstance(other, PendingCounts) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PendingCounts(tensor={self.tensor!r})"


def is_on_device(x: Any) -> bool:
    """Return whether ``x`` is a tensor in CUDA memory."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor) and x.device.type == "cuda"


def merge(
    new_base: Tensor, terms: Sequence[tuple[Tensor, Tensor, float]], out: Any, dtype: DType | None
) -> tuple[Any, PendingCounts]:
    """Enqueue one merge of tensors that ``tensors.read_operand`` has read; return the output and its counts."""
    outs, counts = merge_many([(new_base, terms)], None if out is None else [out], dtype)
    return outs[0], PendingCounts(counts)


def merge_many(
    merges: Sequence[tuple[Tensor, Sequence[tuple[Tensor, Tensor, float]]]],
    outs: Sequence[Any] | None,
    dtype: DType | None,
) -> tuple[list[Any], Any]:
    """Enqueue many merges, those of one signature in as few launches as fit.

    Returns the outputs, and a tensor [n, 3] of int64 with the counts of each on the device.
    """
    torch = sys.modules["torch"]
    every = [t for new_base, terms in merges for t in (new_base, *(x for post, base, _ in terms for x in (post, base)))]
    first = next((t.source for t in every if t.source is not None), None)
    if first is None:
        raise OperandError(
            f"{every[0].name}: expected a torch.Tensor, got a NumPy array, which no backend but cpu takes; pass "
            f"torch.from_numpy of it, or unset {backends.VARIABLE}"
        )
    counts = torch.zeros((len(merges), 3), dtype=torch.int64, device=first.device)
    batches: dict[Any, tuple[Any, list[cuda.Tensor]]] = {}  # by signature: a backend, and what it is to merge
    alive: list[Any] = []  # until all is enqueued; from then on the order of the stream keeps memory from being reused
    results, copies = [], []
    for k, (new_base, terms) in enumerate(merges):
        operands = [new_base, *(t for post, base, _ in terms for t in (post, base))]
        same_shape(operands)
        same_device(operands, merges[0][0].name, first.device)
        if outs is None:
            target, result = allocate(new_base, dtype or new_base.dtype)
        else:
            target, result = read_out(outs[k], operands, dtype), outs[k]
            if _device(target) != first.device:
                raise OperandError(f"out: is on {_device(target)}, but {merges[0][0].name} is on {first.device}")
        results.append(result)
        sources = [t.source.contiguous() for t in operands]
        dense = result if result.is_contiguous() else torch.empty_like(result, memory_format=torch.contiguous_format)
        if dense is not result:
            copies.append((result, dense))
        alive += [*sources, dense]
        types = tuple(cuda.TermTypes(post.dtype, base.dtype, alpha) for post, base, alpha in terms)
        signature = (new_base.dtype, types, target.dtype)
        if signature not in batches:
            batches[signature] = (_backend(first.device.type, operands, target), [])
        if dense.numel():
            batches[signature][1].append(
                cuda.Tensor(
                    sources[0].data_ptr(),
                    tuple(s.data_ptr() for s in sources[1:]),
                    dense.data_ptr(),
                    dense.numel(),
                    counts.data_ptr() + 24 * k,
                )
            )
    device, stream = place_of(first)
    for (new_dtype, types, out_dtype), (backend, tensors) in batches.items():
        backend.merge(new_dtype, types, out_dtype, tensors, device=device, stream=stream)
    for result, dense in copies:
        result.copy_(dense)
    return results, counts


def _backend(device: str, operands: Sequence[Tensor], out: Tensor) -> Any:
    """Return the backend for merges of a signature. ``foreach`` is what those have that enqueue: the CPU's does not."""
    inputs = [operand.dtype for operand in operands]
    return backends.get(backends.choose("foreach", device=device, inputs=inputs, output=out.dtype))


def place_of(tensor: Any) -> tuple[int, int]:
    """Return the ordinal of a tensor's device, and PyTorch's current stream there as a number."""
    if tensor.device.type != "cuda":
        return 0, 0
    torch = sys.modules["torch"]
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def same_device(operands: Sequence[Tensor], name: str, device: Any) -> None:
    """Raise OperandError unless all operands are on the device that ``name`` is on."""
    for operand in operands:
        if _device(operand) != device:
            raise OperandError(
                f"{operand.name}: is on {_device(operand)}, but {name} is on {device}; "
                "move one to the other's device first"
            )


def _device(tensor: Tensor) -> Any:
    """Return a tensor's device, or what an array is."""
    return "the CPU (a NumPy array)" if tensor.source is None else tensor.source.device
