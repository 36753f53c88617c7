"""The shapes that packed weights say they have: `weight_shape` beside int4 codes that are packed eight to a word.

Headers give the words alone. Where a row of a matrix does not end with a word, its last codes are padding, and only the
values of `weight_shape` tell: they are the one piece of tensor data that is read to recognise weights, 16 bytes each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from paramdelta.checkpoint.folder import Checkpoint
from paramdelta.errors import Complaint, remedy_of, shown

if TYPE_CHECKING:
    from paramdelta.checkpoint.weights import QuantisedWeight

# A read each: some tenths of a second from local storage, some seconds from a slow network. Weights of like planes are
# of one kind, so that one of each kind is read in any case.
MOST_READ = 4096
_INTEGERS = {"i32": "<i4", "i64": "<i8"}
_REMEDY = "dequantise it first, or use the bf16 release"


def contradicted_shapes(checkpoint: Checkpoint, weights: Iterable[QuantisedWeight]) -> list[Complaint]:
    """Return complaints about weights whose `weight_shape` is not the shape that their codes have.

    Compared are int32 or int64 vectors of two sizes, rows and columns, or of all of a stack's; what has another form
    says nothing that is known here. Of more than ``MOST_READ`` weights, one of each kind is
    looked at, and the others as far as that number goes.
    """
    table = checkpoint.tensors
    kinds: dict[tuple[object, ...], QuantisedWeight] = {}
    others: list[QuantisedWeight] = []
    for weight in weights:
        row = weight.shape_row
        if (
            row < 0
            or table.dtype_of(row).name not in _INTEGERS
            or table.shapes[row] not in ((2,), (len(weight.shape),))
        ):
            continue
        if kinds.setdefault((weight.shape, table.shapes[weight.scale]), weight) is not weight:
            others.append(weight)
    chosen = [*kinds.values(), *others[: max(MOST_READ - len(kinds), 0)]]
    complaints: list[Complaint] = []
    for number, file in enumerate(checkpoint.files):
        there = sorted(
            (w for w in chosen if table.file[w.shape_row] == number), key=lambda w: table.offset[w.shape_row]
        )
        if not there:
            continue
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                complaints += [c for w in there for c in _contradicted(checkpoint, w, fd)]
            finally:
                os.close(fd)
        except OSError as error:
            complaints.append(Complaint(str(file.path), f"cannot be read: {error.strerror}", remedy_of(error)))
    return complaints


def _contradicted(checkpoint: Checkpoint, weight: QuantisedWeight, fd: int) -> Iterable[Complaint]:
    table, row = checkpoint.tensors, weight.shape_row
    data = os.pread(fd, int(table.nbytes[row]), int(table.offset[row]))
    if len(data) < table.nbytes[row]:  # cut since its header was read: whoever reads the codes finds that, too
        return
    said = tuple(np.frombuffer(data, _INTEGERS[table.dtype_of(row).name]).tolist())
    held = weight.shape[-len(said) :]
    if said == held:
        return
    padded = said[:-1] == held[:-1] and 0 < held[-1] - said[-1] < 8
    why = ": the last codes of every row are padding, which no format here has" if padded else ""
    file = checkpoint.files[int(table.file[row])].path
    yield Complaint(
        f"{file}: {shown(table.names[row])}",
        f"says that the weight is {list(said)}, but {shown(table.names[weight.codes])} holds {list(held)}{why}",
        _REMEDY,
    )
