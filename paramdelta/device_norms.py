"""Norms of tensors in CUDA memory: enqueued on PyTorch's current stream, read when somebody asks for a number."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from paramdelta import backends
from paramdelta.backends import Norms, Operand, cuda
from paramdelta.device_tensors import place_of, same_device
from paramdelta.errors import OperandError
from paramdelta.tensors import Tensor


class PendingNorms:
    """Norms on a device: reading one waits for the device, and all are then as in ``Norms``.

    ``totals`` is where they are: exact sums of all leaves, int64 on the device, which are rounded when they are read.
    """

    def __init__(self, totals: Any) -> None:
        self.totals = totals

    def wait(self) -> Norms:
        """Wait for what has been enqueued, and return the norms."""
        return cuda.read_norms(self.totals.cpu().numpy().tobytes())

    @property
    def delta_squared(self) -> float:
        """‖post − base‖²."""
        return self.wait().delta_squared

    @property
    def drift_squared(self) -> float:
        """‖new_base − base‖²."""
        return self.wait().drift_squared

    @property
    def inner(self) -> float:
        """⟨post − base, new_base − base⟩."""
        return self.wait().inner

    @property
    def largest_delta(self) -> float:
        """Max |post − base|."""
        return self.wait().largest_delta

    def __eq__(self, other: object) -> bool:
        return self.wait() == (other.wait() if isinstance(other, PendingNorms) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PendingNorms(on {self.totals.device})"


def norms(operands: Sequence[Tensor]) -> PendingNorms:
    """Enqueue the norms of post, base and new_base, which ``tensors.read_operand`` has read and whose shapes agree."""
    torch = sys.modules.get("torch")
    first = next((t for t in operands if t.source is not None), None)
    if torch is None or first is None:
        raise OperandError(
            f"{operands[0].name}: expected a torch.Tensor, got a NumPy array, whose norms only cpu takes; pass "
            f"torch.from_numpy of it, or unset {backends.VARIABLE}"
        )
    place = first.source.device
    same_device(operands, first.name, place)
    totals = torch.zeros(cuda.norm_totals_bytes() // 8, dtype=torch.int64, device=place)
    # Copies in row-major order live until all is enqueued; the order of the stream keeps their memory from then on.
    sources = [t.source.contiguous() for t in operands]
    device, stream = place_of(first.source)
    post, base, new_base = (Operand(s.data_ptr(), t.dtype) for s, t in zip(sources, operands, strict=True))
    cuda.norms(post, base, new_base, sources[0].numel(), totals.data_ptr(), device=device, stream=stream)
    return PendingNorms(totals)
