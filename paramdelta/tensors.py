"""Arrays at the edge: NumPy arrays and torch tensors as strided views of their stored bits, checked once.

A tensor's bits are seen through ``Tensor.numpy()``, which shares its memory, so that everything behind this
module knows NumPy alone. One in CUDA memory is seen as an array of its addresses and strides, which no one may read:
``source`` is what to work with. torch is imported here only by those who pass a tensor, and have imported it
themselves.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.backends import Operand
from paramdelta.dtypes import BY_NAME, BY_SAFETENSORS, MERGE_DTYPES, DType, from_numpy, from_torch
from paramdelta.errors import OperandError, OperandTypeError, shown

_SUPPORTED = ", ".join(d.name for d in MERGE_DTYPES)
# Deciding whether two strided views share an element can take exponentially long: beyond this, they count as
# sharing.
_OVERLAP_WORK = 100_000
# Views that interleave, such as a matrix's columns, are compared one by one: a second or two for so many pairs.
_PAIRS = 1 << 20
_TooHard: type[Exception] = getattr(np, "exceptions", np).TooHardError  # NumPy 1.24 has it at the top


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array seen as its stored codes: ``name`` for messages, ``kind`` is ``numpy``, ``torch`` or ``cuda``.

    ``source`` is the tensor of the other two kinds. SAFETY: of ``cuda``, ``codes`` has addresses of a device.
    """

    name: str
    codes: NDArray[Any]
    dtype: DType
    kind: str
    source: Any = None

    def operand(self) -> Operand:
        """Return the address of the first element. SAFETY: valid while this object, or the array it views, lives."""
        return Operand(self.codes.__array_interface__["data"][0], self.dtype)

    def contiguous(self) -> Tensor:
        """Return this tensor, or a copy of it in row-major order."""
        if self.codes.flags.c_contiguous:
            return self
        return Tensor(self.name, np.ascontiguousarray(self.codes), self.dtype, self.kind, self.source)

    def contiguous_target(self) -> Tensor:
        """Return this tensor, or new memory in row-major order for what will be copied to it."""
        if self.codes.flags.c_contiguous:
            return self
        return Tensor(self.name, np.empty(self.codes.shape, self.codes.dtype), self.dtype, self.kind, self.source)


def read_operand(name: str, x: Any) -> Tensor:
    """Return ``x`` as stored codes; raise OperandTypeError or OperandError, naming it, where it is none of ours.

    What has been read already is returned as it is.
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray):
        return _read_numpy(name, x)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _read_torch(name, x, torch)
    remedy = "paramdelta.ops.merge_many takes many tensors" if isinstance(x, (list, tuple)) else ""
    raise OperandTypeError(
        f"{name}: expected a numpy.ndarray or a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}; "
        + (remedy or "convert it with numpy.asarray first")
    )


def is_distributed(x: Any) -> bool:
    """Return whether ``x`` is a DTensor, of which this process holds a shard."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def read_out(out: Any, operands: Sequence[Tensor], dtype: DType | None, name: str = "out") -> Tensor:
    """Return ``out`` as stored codes, checked against the operands that are read while it is written."""
    target = read_operand(name, out)
    if not target.codes.flags.writeable:
        raise OperandError(f"{name}: expected writable memory, got a read-only array; pass a copy")
    first = operands[0]
    if target.codes.shape != first.codes.shape:
        raise OperandError(f"{name}: expected the shape of {first.name}, {first.codes.shape}, got {target.codes.shape}")
    if dtype is not None and target.dtype != dtype:
        raise OperandError(
            f"{name}: expected dtype {dtype}, got {target.dtype}; leave dtype out, or change one of the two"
        )
    if _overlaps_itself(target.codes):
        raise OperandError(f"{name}: expected distinct elements, got a view whose elements share memory; pass a copy")
    for operand in operands:
        if _overlap_in_part(target.codes, operand.codes):
            raise OperandError(
                f"{name}: overlaps {operand.name} in part; pass exactly the same elements, or memory apart from it"
            )
    return target


def check_apart(outs: Sequence[Tensor], operands: Sequence[Sequence[Tensor]]) -> None:
    """Raise OperandError where an output of a list shares an element with a tensor of another of its merges.

    ``operands[k]`` are those of the merge into ``outs[k]``. Merges of a list have no order among themselves.
    """
    listed = [(*_extent(out.codes), k, True, out) for k, out in enumerate(outs) if out.codes.size]
    if not listed:
        return
    listed += [(*_extent(x.codes), k, False, x) for k, each in enumerate(operands) for x in each if x.codes.size]
    if _spans_are_apart(np.array([each[:4] for each in listed], np.int64)):
        return
    # By address; an output is compared with all that begins before it and ends beyond its beginning, an operand with
    # outputs alone.
    open_outs: list[tuple[int, int, int, Tensor]] = []
    open_operands: list[tuple[int, int, int, Tensor]] = []
    pairs = 0
    for serial, (first, end, k, is_out, tensor) in enumerate(sorted(listed, key=lambda each: each[:2])):
        for queue in (open_outs, open_operands):
            while queue and queue[0][0] <= first:
                heapq.heappop(queue)
        for _, _, other_k, other in (*open_outs, *(open_operands if is_out else ())):
            pairs += 1
            if k != other_k and (pairs > _PAIRS or _share_elements(tensor.codes, other.codes)):
                out, against = (tensor, other) if is_out else (other, tensor)
                raise OperandError(
                    f"{out.name}: shares memory with {against.name}; merges of a list have no order: pass outputs that "
                    "are apart from all tensors of the other merges, or call merge for each"
                )
        heapq.heappush(open_outs if is_out else open_operands, (end, serial, k, tensor))


def allocate(like: Tensor, dtype: DType) -> tuple[Tensor, Any]:
    """Return new memory of ``like``'s shape and kind as stored codes, and as the array that the user gets."""
    if like.source is not None:
        torch = sys.modules["torch"]
        result = torch.empty(like.codes.shape, dtype=getattr(torch, str(dtype.numpy)), device=like.source.device)
    else:
        result = np.empty(like.codes.shape, dtype.to_numpy())
    return read_operand("out", result), result


def same_shape(operands: Sequence[Tensor]) -> None:
    """Raise OperandError unless all shapes are equal."""
    first = operands[0]
    for other in operands[1:]:
        if other.codes.shape != first.codes.shape:
            shapes = ", ".join(f"{t.name} {t.codes.shape}" for t in operands)
            raise OperandError(
                f"{other.name}: expected the shape of {first.name}, {first.codes.shape}, got {other.codes.shape} "
                f"(all: {shapes}); nothing is broadcast, slice or pad the operands first"
            )


def parse_dtype(name: str, dtype: Any) -> DType:
    """Return the DType that ``dtype`` (a DType, its name, a NumPy or torch dtype) means; ``name`` is for messages."""
    found: DType | None = None
    torch = sys.modules.get("torch")
    if isinstance(dtype, DType):
        found = dtype
    elif isinstance(dtype, str) and (dtype in BY_NAME or dtype in BY_SAFETENSORS):
        found = BY_NAME.get(dtype) or BY_SAFETENSORS[dtype]
    elif torch is not None and isinstance(dtype, torch.dtype):
        found = from_torch(dtype)
    else:
        try:
            found = from_numpy(dtype)
        except TypeError:
            found = None
    if found is None or not found.merges:
        raise OperandTypeError(f"{name}: expected one of {_SUPPORTED}, got {shown(found or dtype)}")
    return found


def _read_numpy(name: str, x: NDArray[Any]) -> Tensor:
    if isinstance(x, np.ma.MaskedArray):
        raise OperandTypeError(f"{name}: is a masked array, whose mask would be lost; pass x.filled(...)")
    dtype = from_numpy(x.dtype)
    if dtype is None or not dtype.merges:
        raise OperandTypeError(f"{name}: expected one of {_SUPPORTED}, got dtype {x.dtype}")
    if not x.dtype.isnative:
        raise OperandTypeError(f"{name}: has the other byte order; pass x.astype(x.dtype.newbyteorder('='))")
    return Tensor(name, np.asarray(x).view(f"u{dtype.itemsize}"), dtype, "numpy")


def _read_torch(name: str, x: Any, torch: Any) -> Tensor:
    if x.device.type == "meta":
        raise OperandError(f"{name}: is on meta and holds no data; load it first")
    if x.device.type not in ("cpu", "cuda"):
        raise OperandError(f"{name}: is on {x.device}, but only CPU and CUDA tensors are supported; pass {name}.cpu()")
    if x.layout != torch.strided:
        raise OperandTypeError(f"{name}: expected a dense (strided) tensor, got {x.layout}; pass {name}.to_dense()")
    if x.requires_grad:
        raise OperandError(f"{name}: requires grad, and no gradient passes here; pass {name}.detach()")
    dtype = from_torch(x.dtype)
    if dtype is None or not dtype.merges:
        raise OperandTypeError(f"{name}: expected one of {_SUPPORTED}, got dtype {x.dtype}")
    if x.is_neg():
        raise OperandError(f"{name}: is a lazily negated view; pass {name}.resolve_neg()")
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if x.device.type == "cuda":
        _has_memory(name, x)
        return Tensor(name, geometry(x), dtype, "cuda", x)
    try:
        codes = x.view(integers[dtype.itemsize]).numpy()
    except (RuntimeError, TypeError) as error:
        raise OperandTypeError(
            f"{name}: its memory cannot be read ({type(x).__qualname__}: {shown(error)}); pass a plain dense tensor"
        ) from error
    _has_memory(name, x)
    return Tensor(name, codes.view(f"u{dtype.itemsize}"), dtype, "torch", x)


def _has_memory(name: str, x: Any) -> None:
    """Raise OperandError where a tensor has elements but no memory: an address of 0 would stand for zeros."""
    if x.numel() and not x.data_ptr():
        raise OperandError(
            f"{name}: holds no data: its storage is empty, as FSDP leaves that of parameters between uses; "
            "gather it first"
        )


class _Geometry:
    """What NumPy asks of an array's memory, without the memory. Arrays made of it keep it, and so the tensor, alive."""

    def __init__(self, tensor: Any, interface: dict[str, Any]) -> None:
        self.tensor = tensor
        self.__array_interface__ = interface


def geometry(x: Any) -> NDArray[Any]:
    """Return a dense tensor's address, shape and strides as an array of unsigned integers, which keeps it alive.

    SAFETY: of a tensor on a device, it must never be read or written.
    """
    shape, size = tuple(x.shape), x.element_size()
    if x.numel() == 0:
        return np.empty(shape, f"u{size}")
    strides = tuple(s * size for s in x.stride())
    return np.asarray(
        _Geometry(
            x,
            {
                "version": 3,
                "typestr": f"<u{size}",
                "shape": shape,
                "strides": strides,
                "data": (x.data_ptr(), False),
            },
        )
    )


def _same_elements(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.itemsize == b.itemsize
        and a.shape == b.shape
        and all(s == t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1)
    )


def _spans_are_apart(spans: NDArray[np.int64]) -> bool:
    """Return whether no span of an output meets one of another merge: rows of first, end, merge, whether an output."""
    outs = spans[spans[:, 3] == 1]
    outs = outs[np.argsort(outs[:, 0])]
    if (outs[1:, 0] < outs[:-1, 1]).any():
        return False
    operands = spans[spans[:, 3] == 0]
    after = np.searchsorted(outs[:, 1], operands[:, 0], side="right")  # the first output that ends beyond its beginning
    operands, after = operands[after < len(outs)], after[after < len(outs)]
    meets = (outs[after, 0] < operands[:, 1]) & (outs[after, 2] != operands[:, 2])
    # An operand may reach beyond its own output, into the next.
    beyond = np.minimum(after + 1, len(outs) - 1)
    meets |= (beyond > after) & (outs[beyond, 0] < operands[:, 1])
    return not meets.any()


def _extent(a: NDArray[Any]) -> tuple[int, int]:
    """Return the addresses of an array's first byte and of the one after its last."""
    if a.flags.c_contiguous:
        return (at := a.__array_interface__["data"][0]), at + a.nbytes
    steps = [stride * (n - 1) for stride, n in zip(a.strides, a.shape, strict=True)]
    first: int = a.__array_interface__["data"][0]
    return first + sum(s for s in steps if s < 0), first + sum(s for s in steps if s > 0) + a.itemsize


def _overlap_in_part(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return not _same_elements(a, b) and _share_elements(a, b)


def _share_elements(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, _OVERLAP_WORK))  # type: ignore[arg-type, unused-ignore]
    except _TooHard:
        return True


def _overlaps_itself(a: NDArray[Any]) -> bool:
    # Sorted by stride, each axis must step over all that the shorter steps cover. (Stricter than need be, for
    # views that interleave; nobody has those.)
    reach = a.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return a.size > 0
        reach += stride * (n - 1)
    return False
