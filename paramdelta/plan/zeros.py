"""Operands of zeros: what stands for a checkpoint that a request does not name. A delta is post − base added to zeros,
and it is applied as the difference between itself and zeros, so that extracting and applying are merges like any other.

A checkpoint of zeros has the names and shapes of another one, and no data: its files are never opened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paramdelta.checkpoint import Checkpoint, Quantisation, TensorTable
from paramdelta.checkpoint.documents import read_json
from paramdelta.dtypes import F32, F64, DType
from paramdelta.errors import Complaint, shown
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.sidefiles import BASE_CONFIG

MARK = "paramdelta"  # the key of header metadata that says what a file with weights is
DELTA = "delta"


def is_delta(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds a delta, by the headers of its files."""
    return any(file.metadata.get(MARK) == DELTA for file in checkpoint.files)


def checked_kinds(request: MergeRequest, opened: Mapping[str, Checkpoint]) -> list[Complaint]:
    """Return a complaint about each folder that is a delta where a model belongs, or a model where a delta does."""
    wrong = []
    for role, checkpoint in opened.items():
        wanted = request.takes_deltas and role.partition("_")[0] == "post"
        if is_delta(checkpoint) and not wanted:
            about = checkpoint.files[0].metadata
            text = f"{checkpoint.role} is a delta ({about.get('post', '?')} − {about.get('base', '?')}), not a model"
            wrong.append(
                Complaint(str(checkpoint.path), shown(text), "paramdelta apply --delta DIR adds it to a model")
            )
        elif wanted and not is_delta(checkpoint):
            text = "is no delta: its files do not say that they hold one"
            remedy = "paramdelta extract --post DIR --base DIR --out DIR makes a delta; merge takes post and base"
            wrong.append(Complaint(str(checkpoint.path), text, remedy))
    return wrong


def with_zeros(
    request: MergeRequest, opened: Sequence[Checkpoint], found: Sequence[Quantisation], wrong: list[Complaint]
) -> tuple[dict[str, Checkpoint], list[Quantisation]]:
    """Return every checkpoint of a request by role, and what is quantised in each: those that were opened, and zeros
    in place of those that the request does not name."""
    checkpoints = dict(zip(request.folders, opened, strict=True))
    quantisations = dict(zip(request.folders, found, strict=True))
    ordered: dict[str, Checkpoint] = {}
    for number in range(len(request.sources)):
        for role in (*roles_of(number), *(() if number else ("new_base",))):
            if role not in checkpoints:
                like = "post" if role == "new_base" else role.replace("base", "post")
                quantisation = quantisations[like]
                quantisations[role] = Quantisation()
                checkpoints[role] = (
                    _of_new_base(request, checkpoints, quantisation)
                    if role == "new_base"
                    else _of_base(checkpoints[like], quantisation, wrong)
                )
            ordered[role] = checkpoints[role]
    return ordered, [quantisations[role] for role in ordered]


def _of_new_base(
    request: MergeRequest, checkpoints: Mapping[str, Checkpoint], quantisation: Quantisation
) -> Checkpoint:
    """Return the zeros that a delta is added to when it is extracted; the output follows their names, types, files and
    metadata."""
    post = checkpoints["post"]
    made = _zeros_like(post, quantisation, "new_base", F64 if request.lossless else request.delta_dtype or F32)
    metadata = {MARK: DELTA, "post": post.label, "base": checkpoints["base"].label}
    return replace(made, files=tuple(replace(file, metadata={**file.metadata, **metadata}) for file in made.files))


def _of_base(delta: Checkpoint, quantisation: Quantisation, wrong: list[Complaint]) -> Checkpoint:
    """Return the zeros that are subtracted from a delta when it is applied; their config is that of the base which the
    delta was taken from, or the delta's own where the folder keeps none, so that no field counts as changed."""
    config: dict[str, Any] = delta.config
    if BASE_CONFIG in delta.side_files:
        config = read_json(delta.path, BASE_CONFIG, wrong)
    return replace(_zeros_like(delta, quantisation, "base", F32), config=config)


def _zeros_like(checkpoint: Checkpoint, quantisation: Quantisation, role: str, dtype: DType) -> Checkpoint:
    """Return zeros of ``dtype`` for the weights of a checkpoint; types without arithmetic stay what they are. A
    quantised weight stands there plain, under its own name."""
    table = checkpoint.tensors
    weights = {weight.codes: weight for weight in quantisation.weights.values()}
    hidden = quantisation.parts.union(quantisation.statistics).difference(weights)
    rows = [row for row in range(len(table)) if row not in hidden]
    shapes = [weights[row].shape if row in weights else table.shapes[row] for row in rows]
    dtypes = [dtype if row in weights or table.dtype_of(row).merges else table.dtype_of(row) for row in rows]
    bits = [math.prod(shape) * d.bits for shape, d in zip(shapes, dtypes, strict=True)]
    return replace(
        checkpoint,
        role=role,
        zeros=True,
        notes=(),
        tensors=TensorTable(
            names=[weights[row].name if row in weights else table.names[row] for row in rows],
            dtype=np.array([d.code for d in dtypes], np.uint8),
            shapes=shapes,
            file=table.file[rows],
            offset=table.offset[rows],
            nbytes=np.array(bits, np.int64) // 8,
        ),
    )
