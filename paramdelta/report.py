"""What a merge did, for people and for programs. ``to_dict`` is the ``--json`` of the command line; its schema is in
docs/json.md and its ``version`` rises when a field changes its meaning or goes away."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from paramdelta import JSON_VERSION


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """One output tensor with results that are NaN, infinite or beyond its type's range, and how many of each."""

    tensor: str
    dtype: str
    elements: int
    nan: int
    inf: int
    overflow: int


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """What quantising lost in all tensors of one format: ‖q − merged‖ / ‖merged‖, where q is what the output decodes to
    and merged the value before. ``worst`` are (tensor, relative error), the largest first."""

    format: str
    tensors: int
    relative_error: float
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The outcome of one merge.

    ``out`` is the folder (None for a merge that was not published). Bytes count tensor data as read and written by
    the engine. ``seconds`` is the whole call, ``engine_seconds`` the part that moved data. ``policies`` is the plan's
    summary of what happened to which tensors; ``warnings`` are lines a person should read. ``resumed_bytes`` of the
    output were there already, from a run that was cut short. ``io`` counts the files that were read and written by each
    way of :mod:`paramdelta.storage`. ``device`` is what computed, ``device_why`` why it was chosen.
    """

    out: Path | None
    parameters: int
    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    seconds: float
    engine_seconds: float
    threads: int
    slot_bytes: int
    isa: str
    policies: dict[str, Any]
    warnings: tuple[str, ...]
    nonfinite: tuple[NonFinite, ...]
    quantised: tuple[Quantised, ...] = ()
    resumed_bytes: int = 0
    io: dict[str, dict[str, int]] = field(default_factory=dict)
    device: str = "cpu"
    device_why: str = ""

    @property
    def gigabytes_per_second(self) -> float:
        """Tensor data read and written, in 10⁹ bytes per second of engine time."""
        return (self.bytes_read + self.bytes_written) / 1e9 / max(self.engine_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = asdict(self)
        values["out"] = None if self.out is None else str(self.out)
        return {
            "version": JSON_VERSION,
            "kind": "merge",
            **values,
            "gigabytes_per_second": round(self.gigabytes_per_second, 3),
        }


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """The outcome of one sweep.

    ``folders`` are the reports of its merges, in the order of the alphas; in each, bytes read and seconds are those of
    the pass that made it together with others. ``passes`` over the inputs were needed. Bytes and seconds are those of
    the sweep; ``out`` is the folder that the folders are in.
    """

    out: Path
    folders: tuple[MergeReport, ...]
    passes: int
    bytes_read: int
    bytes_written: int
    seconds: float
    engine_seconds: float
    resumed_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "version": JSON_VERSION,
            "kind": "sweep",
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "out": str(self.out),
            "folders": [report.to_dict() for report in self.folders],
        }


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank of several did for a merge. The folder ``out`` is published when all are done.

    ``source`` says where the rank's number comes from. Bytes and seconds are those of this rank; ``resumed_bytes`` of
    its part of the output were there already.
    """

    out: Path
    rank: int
    ranks: int
    source: str
    bytes_read: int
    bytes_written: int
    resumed_bytes: int
    seconds: float
    threads: int
    slot_bytes: int
    isa: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"version": JSON_VERSION, "kind": "rank", **asdict(self), "out": str(self.out)}
