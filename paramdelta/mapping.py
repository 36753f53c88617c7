"""Merged tensors by name, each computed when it is asked for: for loaders that choose the order themselves. As
``paramdelta.stream`` gives them one after the other, this gives lazy slices like those of the safetensors library."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paramdelta import engine
from paramdelta.errors import OperandError
from paramdelta.merging import prepare
from paramdelta.streaming import Batch

if TYPE_CHECKING:
    from paramdelta.plan import Plan
    from paramdelta.plan.deltas import Folders
    from paramdelta.plan.work import Work

AHEAD_BYTES = 16 << 20  # small tensors come in batches: a run of the engine takes a fraction of a millisecond
KEPT_BYTES = 64 << 20  # of what was computed along and not asked for yet


class MergedTensor:
    """One tensor of a merge, not computed yet. ``self[...]`` computes it, any other index a part of the result; it is
    computed again each time. ``get_shape`` and ``get_dtype`` are those of a slice in the safetensors library."""

    def __init__(self, owner: MergedTensors, tensor: int) -> None:
        self._owner, self._tensor = owner, tensor

    def __getitem__(self, index: Any) -> Any:
        value = self._owner.compute(self._tensor)
        return value if index is Ellipsis else value[index]

    def get_shape(self) -> list[int]:
        """Return the sizes."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors spells it, such as ``BF16``."""
        return self._owner.plan.dtype_of(self._tensor).safetensors

    def is_floating_point(self) -> bool:
        """Return what torch says of its dtype."""
        return bool(self.dtype.is_floating_point)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes."""
        return self._owner.plan.shape_of(self._tensor)

    @property
    def dtype(self) -> Any:
        """The dtype as torch has it, or as NumPy where the mapping makes arrays."""
        dtype = self._owner.plan.dtype_of(self._tensor)
        if self._owner.framework == "np":
            return dtype.to_numpy()
        import torch

        return getattr(torch, str(dtype.torch))


class MergedTensors(Mapping[str, MergedTensor]):
    """The tensors of ``new_base + alpha · (post − base)`` by name, in the order of the output's files.

    The values are those :func:`paramdelta.merge` would write. Each is handed out when it is computed, and held no
    longer; besides, at most 64 MiB of smaller tensors that were computed along are kept. Any thread may ask; the engine
    works on one batch at a time. The first error is kept in ``failure`` and ends every later request, too.
    """

    def __init__(
        self, plan: Plan, *, framework: Literal["np", "pt"] = "np", options: engine.EngineOptions | None = None
    ) -> None:
        if framework not in ("np", "pt"):
            raise OperandError(f"framework: expected 'np' or 'pt', got {framework!r}")
        self.plan, self.framework = plan, framework
        self.failure: BaseException | None = None
        self._options = options or engine.EngineOptions()
        self._numbers = {name: tensor for tensor, name in enumerate(plan.names)}
        self._following = sorted(range(len(plan.names)), key=lambda tensor: loading_order(plan.names[tensor]))
        self._places = {tensor: place for place, tensor in enumerate(self._following)}
        self._ready: dict[int, Any] = {}  # computed along; in the order of computing
        self._given: set[int] = set()
        self._work: Work | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        post: Folders,
        base: Folders,
        new_base: str | Path,
        *,
        framework: Literal["np", "pt"] = "np",
        threads: int | None = None,
        memory: int | None = None,
        isa: str | None = None,
        io: str = "auto",
        **policies: Any,
    ) -> MergedTensors:
        """Plan the merge; parameters and errors are those of :func:`paramdelta.stream`."""
        from paramdelta.plan import make_request

        request = make_request(post=post, base=base, new_base=new_base, out=None, **policies)
        options = engine.EngineOptions(threads=threads, memory=memory, isa=isa, io=io)
        return cls(prepare(request), framework=framework, options=options)

    def __getitem__(self, name: str) -> MergedTensor:
        return MergedTensor(self, self._numbers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def compute(self, tensor: int) -> Any:
        """Return the value of a tensor by its number in the plan. Raises StorageError, NonFiniteError."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            try:
                if tensor not in self._ready:
                    self._fill(tensor)
            except BaseException as error:
                self.failure = error
                raise
            self._given.add(tensor)
            return self._ready.pop(tensor)

    def _fill(self, tensor: int) -> None:
        """Compute a tensor, and along with it those that loaders ask for next, as far as they are small."""
        if self._work is None:
            self._work, _ = engine.settle(self.plan.work, tensors=len(self.plan.names), options=self._options)
        wanted, size = [tensor], self.plan.nbytes_of(tensor)
        for other in self._following[self._places[tensor] + 1 :]:
            size += self.plan.nbytes_of(other)
            if size > AHEAD_BYTES:
                break
            if other not in self._given and other not in self._ready:
                wanted.append(other)
        wanted.sort()
        batch = Batch(self.plan, self._work, wanted, self.framework, self._options)
        self._ready |= zip(wanted, (value for _, value in batch.finish()), strict=True)
        kept = sum(self.plan.nbytes_of(t) for t in self._ready if t != tensor)
        for other in [t for t in self._ready if t != tensor]:
            if kept <= KEPT_BYTES:
                break
            kept -= self.plan.nbytes_of(other)
            del self._ready[other]


def loading_order(name: str) -> tuple[Any, ...]:
    """Return a key that sorts names as loaders ask for them: numbers by value, layer by layer; within a layer all
    experts of one weight before the next weight, as they are stacked. A wrong guess costs time, not correctness."""
    first, numbers, key = True, [], []
    for part in re.split(r"[.]", name):
        if not part.isdecimal():
            key.append((1, part, 0))
        elif first:
            first = False
            key.append((0, "", int(part)))
        else:
            numbers.append(int(part))
    return (tuple(key), tuple(numbers))
