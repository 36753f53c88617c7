"""How much each part measures: on a GPU, and where every line is only tried."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Elements, bytes and rounds of every part.

    ``law_elements`` are compared in each lane, ``law_piece`` at a time. A matrix of blocks has ``side`` × ``side``
    elements, in the laws ``law_side`` × ``law_side``. A sample of a kernel is ``calls`` calls. ``model`` is the size of
    a checkpoint, which is halved until three of them, two outputs and some air fit.
    """

    law_elements: int
    law_piece: int
    law_side: int
    copies: tuple[int, ...]
    elements: int
    side: int
    rounds: int
    calls: int
    tensors: int
    tensor_bytes: int
    foreach_rounds: int
    model: str
    model_rounds: int
    link_bytes: int


FULL = Sizes(
    law_elements=1_000_000_000,
    law_piece=1 << 26,
    law_side=8192,
    copies=(256 << 20, 1 << 30, 4 << 30),
    elements=1 << 28,
    side=16384,
    rounds=30,
    calls=3,
    tensors=10_000,
    tensor_bytes=4096,
    foreach_rounds=7,
    model="6.4GB",
    model_rounds=3,
    link_bytes=256 << 20,
)
TINY = Sizes(
    law_elements=1500,
    law_piece=512,
    law_side=128,
    copies=(1 << 12, 1 << 16),
    elements=512,
    side=128,
    rounds=3,
    calls=1,
    tensors=5,
    tensor_bytes=256,
    foreach_rounds=1,
    model="1MB",
    model_rounds=1,
    link_bytes=1 << 16,
)
BY_PLACE = {
    "cuda": FULL,
    "host": TINY,
    "ptx": replace(TINY, law_elements=1_000_000_000, law_piece=1 << 22, law_side=2048),
}
