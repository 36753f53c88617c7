"""Checkpoints in memory: tensors that are loaded stand where the folder of a checkpoint would, so that pairing,
policies and layout know nothing of models.

Each tensor is a file of its own, whose data is memory; the plan's output files are then the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paramdelta.checkpoint.folder import Checkpoint, ShardFile
from paramdelta.checkpoint.signature import Signature
from paramdelta.checkpoint.table import TensorTable
from paramdelta.dtypes import DType
from paramdelta.memory import Memory

LABEL = "the model"


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldTensor:
    """A loaded tensor, in row-major order. ``names`` are all that it goes by: a tied one has several. ``device`` is
    ``cpu`` or ``cuda:N``."""

    names: tuple[str, ...]
    dtype: DType
    shape: tuple[int, ...]
    memory: Memory
    device: str = "cpu"


def held_checkpoint(
    tensors: Sequence[HeldTensor], names: Sequence[str], *, role: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return loaded tensors as a checkpoint, each under one of its names. ``config`` is the model's, as its config.json
    would have it."""
    nothing = Signature(0, 0, 0, 0)
    files = tuple(
        ShardFile(
            name=f"{number}.safetensors",
            path=Path(LABEL),
            size=tensor.memory.nbytes,
            metadata={},
            digest="",
            signature=nothing,
        )
        for number, tensor in enumerate(tensors)
    )
    return Checkpoint(
        path=Path(LABEL),
        role=role,
        files=files,
        tensors=TensorTable(
            names=list(names),
            dtype=np.array([tensor.dtype.code for tensor in tensors], np.uint8),
            shapes=[tensor.shape for tensor in tensors],
            file=np.arange(len(tensors), dtype=np.int32),
            offset=np.zeros(len(tensors), np.int64),
            nbytes=np.array([tensor.memory.nbytes for tensor in tensors], np.int64),
        ),
        sharded=True,
        index_metadata={},
        config=dict(config or {}),
        side_files=(),
        notes=(),
        memory=tuple(tensor.memory for tensor in tensors),
    )
