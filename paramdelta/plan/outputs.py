"""The tensors of the output files: one for each plain tensor, and the planes of each quantised weight."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paramdelta.checkpoint.weights import QuantisedWeight
from paramdelta.dtypes import BY_NAME, DTYPES, F32, DType
from paramdelta.formats import Format
from paramdelta.plan.choice import Stored
from paramdelta.plan.naming import Names
from paramdelta.plan.pairing import NONE, Kind, Pairing

_BITS = np.array([d.bits for d in DTYPES], np.int64)
_I64 = BY_NAME["i64"]

# Layers that consumers fuse: their parts must have one second-level scale.
_FUSED = (
    (re.compile(r"(.*\.)(?:q|k|v)_proj(\..*)?"), r"\1qkv\2"),
    (re.compile(r"(.*\.)(?:gate|up)_proj(\..*)?"), r"\1gate_up\2"),
    (re.compile(r"(.*\.)w[13](\..*)?"), r"\1w13\2"),
)


class Making(enum.IntEnum):
    """How the bytes of an output tensor come about."""

    SPANS = 0  # a plain tensor from plain tensors
    COPY = 1  # the bytes of a tensor of new_base or post
    REGIONS = 2  # a plane of a weight that is decoded, merged or quantised
    LITERAL = 3  # bytes that the plan or the measuring pass makes


@dataclass(kw_only=True)
class Outputs:
    """Output tensors as columns, in the order of the pairing.

    ``logical`` is the entry of the pairing (−1 for calibration statistics) and ``part`` which of its planes ("" for a
    plain tensor). ``donor`` and ``row`` say what a COPY copies; ``home`` is the row of new_base's table beside which
    the tensor is stored, NONE at the end.
    """

    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[int] = field(default_factory=list)
    making: list[int] = field(default_factory=list)
    logical: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    donors: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    homes: list[int] = field(default_factory=list)
    planes: dict[int, dict[str, int]] = field(default_factory=dict)  # of a logical tensor: outputs by part

    def add(
        self,
        name: str,
        dtype: DType,
        shape: tuple[int, ...],
        making: Making,
        *,
        logical: int,
        part: str = "",
        donor: str = "",
        row: int = NONE,
        home: int = NONE,
    ) -> None:
        """Append an output tensor."""
        if making == Making.REGIONS or part:
            self.planes.setdefault(logical, {})[part] = len(self.names)
        self.names.append(name)
        self.shapes.append(shape)
        self.dtypes.append(dtype.code)
        self.making.append(making)
        self.logical.append(logical)
        self.parts.append(part)
        self.donors.append(donor)
        self.rows.append(row)
        self.homes.append(home)

    def elements(self) -> NDArray[np.int64]:
        """Return the elements of each tensor, as its header counts them."""
        return np.array([math.prod(shape) for shape in self.shapes], np.int64)

    def nbytes(self) -> NDArray[np.int64]:
        """Return the bytes of each tensor."""
        return self.elements() * _BITS[self.dtypes] // 8


def make_outputs(
    pairing: Pairing, stored: Stored, names: dict[str, Names], statistics: list[tuple[str, int]]
) -> Outputs:
    """Return the output tensors of a pairing; ``statistics`` are (role, row) of calibration tensors to copy."""
    outputs = Outputs()
    new_base = names["new_base"]
    remade = {fused(n) for i, n in enumerate(pairing.names) if not _copied(pairing, i)}
    for i, name in enumerate(pairing.names):
        format_ = stored.formats[i]
        kind = pairing.kinds[i]
        donor = "post" if kind == Kind.FROM_POST else "new_base"
        row = (pairing.post if donor == "post" else pairing.new_base)[i]
        weight = names[donor].weights.get(row)
        home = pairing.new_base[i] if pairing.new_base[i] != NONE else new_base.rows.get(name, NONE)
        if format_ is None and weight is None and not _decodes(pairing, i, names):
            outputs.add(name, stored.dtypes[i], pairing.shapes[i], Making.SPANS, logical=i, home=home)
        elif format_ is None:
            outputs.add(name, stored.dtypes[i], pairing.shapes[i], Making.REGIONS, logical=i, home=home)
        elif weight is not None and weight.format == format_:
            # A scale that several weights share may change where one of them does.
            copied = _copied(pairing, i) and not (format_.second and fused(name) in remade)
            _as_stored(outputs, i, weight, names[donor], donor, copied, home)
        else:
            _planes(outputs, i, name, pairing.shapes[i], format_, home)
    for role, row in statistics:
        table = names[role].checkpoint.tensors
        name = table.names[row]
        home = new_base.checkpoint.tensors.rows.get(name, NONE)
        outputs.add(
            name, table.dtype_of(row), table.shapes[row], Making.COPY, logical=-1, donor=role, row=row, home=home
        )
    return outputs


def _copied(pairing: Pairing, i: int) -> bool:
    """Whether nothing is added to a tensor."""
    return not pairing.adds(i)


def _decodes(pairing: Pairing, i: int, names: dict[str, Names]) -> bool:
    """Whether some operand of a merged tensor is quantised."""
    if _copied(pairing, i):
        return False
    return i in pairing.bridges or any(
        d.post in names[d.post_role].weights or d.base in names[d.base_role].weights for d in pairing.deltas(i)
    )


def _as_stored(
    outputs: Outputs, i: int, weight: QuantisedWeight, names: Names, donor: str, copied: bool, home: int
) -> None:
    """Add the planes of a weight under the names, dtypes and shapes that they have in the donor."""
    table = names.checkpoint.tensors
    whole = weight.format.whole
    parts = {
        "codes": (weight.codes, Making.REGIONS),
        "scale": (weight.scale, Making.LITERAL if whole and not weight.format.second else Making.REGIONS),
        "second": (weight.second, Making.LITERAL),
        "shape": (weight.shape_row, Making.COPY),
    }
    for part, (row, making) in parts.items():
        if row == NONE:
            continue
        outputs.add(
            table.names[row],
            table.dtype_of(row),
            table.shapes[row],
            Making.COPY if copied else making,
            logical=i,
            part=part,
            donor=donor,
            row=row,
            home=row if donor == "new_base" else home,
        )


def _planes(outputs: Outputs, i: int, name: str, shape: tuple[int, ...], format_: Format, home: int) -> None:
    """Add the planes of a weight in a format that the donor does not store it in."""
    spelling = format_.spelling

    def named(part: str) -> str:
        found = spelling.of(name, part)
        assert found is not None
        return found

    outputs.add(
        named("codes"),
        format_.codes_dtype,
        codes_shape(format_, shape),
        Making.REGIONS,
        logical=i,
        part="codes",
        home=home,
    )
    per_tensor = format_.whole and not format_.second
    outputs.add(
        named("scale"),
        format_.scale_dtype,
        scale_shape(format_, shape),
        Making.LITERAL if per_tensor else Making.REGIONS,
        logical=i,
        part="scale",
        home=home,
    )
    if format_.second:
        stack = shape[:-2] if len(shape) > 2 else ((1,) if format_.second == "divide" else ())
        outputs.add(named("second"), F32, stack, Making.LITERAL, logical=i, part="second", home=home)
    if spelling.shape:
        outputs.add(named("shape"), _I64, (len(shape),), Making.LITERAL, logical=i, part="shape", home=home)


def codes_shape(format_: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the codes of a weight, as the header states it."""
    if format_.bits == 8:
        return shape
    if format_.spelling.stacked_codes == "_blocks":
        return (*shape[:-1], shape[-1] // format_.cols, format_.cols // 2)
    per_item = format_.codes_dtype.bits // format_.bits
    return (*shape[:-1], shape[-1] // per_item)


def grid_shape(format_: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of the grid of one matrix."""
    rows, cols = matrix_shape(shape)[1:]
    return (
        -(-rows // format_.rows) if format_.rows else 1,
        -(-cols // format_.cols) if format_.cols else 1,
    )


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a weight's shape as a stack of matrices (stack, rows, cols)."""
    cols = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    return math.prod(shape[:-2]), rows, cols


def scale_shape(format_: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight, as the header states it."""
    if format_.whole and not format_.second:
        return (*shape[:-2], *{"one": (1,), "grid": (1, 1)}.get(format_.scale_shape, ()))
    rows, cols = grid_shape(format_, shape)
    if format_.scale_shape == "spread" and len(shape) == 2:
        return rows, 1, cols, 1
    if format_.scale_shape == "row":
        return (*shape[:-2], rows)
    return (*shape[:-2], rows, cols)


def fused(name: str) -> str:
    """Return one name for the weights that consumers fuse into one."""
    for pattern, replacement in _FUSED:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    return name
