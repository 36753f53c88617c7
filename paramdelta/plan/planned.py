"""What planning gives: a merge, ready to run, with every byte of its output accounted for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta import JSON_VERSION
from paramdelta.checkpoint import INDEX, Checkpoint
from paramdelta.checkpoint.signature import check_unchanged
from paramdelta.dtypes import DTYPES, DType
from paramdelta.formats import Format
from paramdelta.plan.choice import Stored
from paramdelta.plan.layout import Layout
from paramdelta.plan.naming import Names
from paramdelta.plan.pairing import Pairing
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.sidefiles import SideFile
from paramdelta.plan.work import Work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge, ready to run. Tensors are numbered in the order of the output files.

    ``work`` fills the output files; ``index`` and ``side_files`` are the rest of the folder. ``policies`` is the
    JSON-ready summary of what happens to which tensors.
    """

    request: MergeRequest
    checkpoints: dict[str, Checkpoint]  # by role: post, base, new_base, post_2, base_2 and so on
    names_by_role: dict[str, Names]
    pairing: Pairing
    stored: Stored
    layout: Layout
    side_files: tuple[SideFile, ...]
    policies: dict[str, Any]
    warnings: tuple[str, ...]
    sums: dict[str, str] = field(default_factory=dict)  # CRC-32 that tensors are known to have in the end

    @property
    def post(self) -> Checkpoint:
        """post of the first delta."""
        return self.checkpoints["post"]

    @property
    def new_base(self) -> Checkpoint:
        """The checkpoint that deltas are added to."""
        return self.checkpoints["new_base"]

    @property
    def work(self) -> Work:
        """The spans and terms for the engine."""
        return self.layout.work

    @property
    def index(self) -> bytes | None:
        """The bytes of the index, None for a single file."""
        return self.layout.index

    @property
    def integer_pairs(self) -> list[tuple[str, int, int]]:
        """Integer tensors of the first delta as (name, row in post, row in base): a merge compares their data before it
        starts."""
        return self.pairing.integers

    @cached_property
    def names(self) -> list[str]:
        """Names of the output tensors."""
        return [self.layout.outputs.names[i] for i in self.layout.order]

    @property
    def out_files(self) -> NDArray[np.int64]:
        """The output file of each tensor."""
        return self.layout.files

    @property
    def has_checksums(self) -> bool:
        """Whether the merge is to record checksums of its tensors."""
        return bool(len(self.work.extents))

    def without_checksums(self) -> Plan:
        """Return the plan of the same merge, of whose tensors no checksums are wanted; itself where they are known."""
        if self.sums:
            return self
        work = replace(self.work, extents=self.work.extents[:0])
        return replace(self, layout=replace(self.layout, work=work))

    def dtype_of(self, tensor: int) -> DType:
        """Return the dtype of an output tensor."""
        return DTYPES[int(self.layout.dtypes[tensor])]

    def shape_of(self, tensor: int) -> tuple[int, ...]:
        """Return the shape of an output tensor."""
        return self.layout.outputs.shapes[int(self.layout.order[tensor])]

    def format_of(self, tensor: int) -> Format | None:
        """Return the format of the weight whose codes an output tensor holds, None for any other tensor."""
        i = int(self.layout.order[tensor])
        outputs = self.layout.outputs
        return self.stored.formats[outputs.logical[i]] if outputs.parts[i] == "codes" else None

    def nbytes_of(self, tensor: int) -> int:
        """Return the bytes of an output tensor."""
        return int(self.layout.nbytes[tensor])

    def elements_of(self, tensor: int) -> int:
        """Return the number of elements of an output tensor."""
        return self.nbytes_of(tensor) * 8 // self.dtype_of(tensor).bits

    @cached_property
    def parameters(self) -> int:
        """The number of elements of all weights and other tensors, not counting scales and packing."""
        return sum(math.prod(shape) for shape in self.pairing.shapes)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data the merge writes."""
        return int(self.layout.nbytes.sum())

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of tensor data the merge reads, those that are read twice to find a scale included."""
        return self.work.bytes_read()

    def written_files(self) -> Iterator[tuple[str, bytes | Path]]:
        """Yield the files of the output that are not weights, as (name, bytes or the file to copy)."""
        if self.index is not None:
            yield INDEX, self.index
        for file in self.side_files:
            content = file.data if file.data is not None else file.source
            assert content is not None
            yield file.name, content

    def check_inputs(self) -> None:
        """Raise StorageError where a shard of an input is not what it was when its header was read."""
        check_unchanged((f.path, f.signature) for c in self.checkpoints.values() for f in c.inputs)

    @contextlib.contextmanager
    def watched_inputs(self) -> Iterator[None]:
        """Raise StorageError where a shard of an input is another at the end of the block, also in place of whatever
        error that led to."""
        try:
            yield
        except Exception:
            self.check_inputs()
            raise
        self.check_inputs()

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        return {
            "version": JSON_VERSION,
            "kind": "plan",
            "parameters": self.parameters,
            "tensors": len(self.names),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "files": [{"name": name, "bytes": size} for name, size in self.work.outputs],
            "side_files": [{"name": f.name, "origin": f.origin} for f in self.side_files],
            "policies": self.policies,
            "warnings": list(self.warnings),
        }
