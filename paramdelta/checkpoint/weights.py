"""Which tensors of a checkpoint are quantised weights: found by the headers, confirmed by the quantisation config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from paramdelta.checkpoint.folder import Checkpoint
from paramdelta.errors import Complaint
from paramdelta.formats import Format

NONE = -1


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """A quantised weight of a checkpoint: its logical name and shape, its format, and the rows of its planes.

    ``shape`` is [out, in], or [E, out, in] for stacks: of elements, however they are packed. ``format`` has this
    weight's own grid. ``codes``, ``scale``, ``second``, ``zero_point`` and ``shape_row`` are rows of the checkpoint's
    table, NONE where there is no such plane; ``scale`` is NONE only where unscaled codes were allowed.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    codes: int
    scale: int
    second: int = NONE
    zero_point: int = NONE
    shape_row: int = NONE


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What is quantised in a checkpoint, and how.

    ``weights`` are by logical name, in the order of the table; ``parts`` are all rows that are planes of one.
    ``statistics`` are rows of calibration (input_scale, k_scale, …): no arithmetic. ``method`` is the config's family,
    None for a plain checkpoint; ``config`` and ``config_place`` are the quantisation config and where it stood;
    ``ignored`` are the modules that it leaves alone, as written; ``dynamic`` tells that activations are scaled as they
    come, or not at all; ``description`` says it in words.
    """

    weights: dict[str, QuantisedWeight] = field(default_factory=dict)
    parts: frozenset[int] = frozenset()
    statistics: tuple[int, ...] = ()
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_place: str = ""
    ignored: tuple[str, ...] = ()
    dynamic: bool = True
    description: str = ""


def recognise(checkpoint: Checkpoint, *, allow_unscaled: bool = False) -> tuple[Quantisation, list[Complaint]]:
    """Return what is quantised in a checkpoint, and every complaint about it.

    ``allow_unscaled`` takes fp8 codes without a scale for values. A plain checkpoint gives an empty Quantisation and no
    complaints.
    """
    return Quantisation(), []
