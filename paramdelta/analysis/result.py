"""The result of an analysis, typed, and as a document and as rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paramdelta import JSON_VERSION
from paramdelta.analysis.findings import Finding
from paramdelta.analysis.measures import DeltaMeasures, Group, Tensor, gathered
from paramdelta.errors import Complaint, InputError, shown, storage_errors


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The folders of a delta."""

    post: str
    base: str


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What :func:`paramdelta.analyze` found.

    ``tensors`` are those that some delta reaches, in the order of the checkpoint's files; ``layers`` and ``modules``
    are the same ones together by layer and by type of module, ``total`` all of them. ``unpaired`` are tensors that
    were not compared because one of the checkpoints lacks them, or has another shape.
    """

    sources: tuple[Sources, ...]
    new_base: str | None
    tensors: tuple[Tensor, ...]
    findings: tuple[Finding, ...]
    unpaired: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    bytes_read: int
    threads: int

    @cached_property
    def total(self) -> Group:
        """All tensors together."""
        return gathered("all", self.tensors)

    @cached_property
    def layers(self) -> tuple[Group, ...]:
        """Tensors by layer, in the order in which they come; what is in no layer stands for itself."""
        return self._by(lambda tensor: tensor.place.layer_name)

    @cached_property
    def modules(self) -> tuple[Group, ...]:
        """Tensors by type of module."""
        return self._by(lambda tensor: tensor.place.module)

    def _by(self, name_of: Callable[[Tensor], str]) -> tuple[Group, ...]:
        groups: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(name_of(tensor), []).append(tensor)
        return tuple(gathered(name, members) for name, members in groups.items())

    def to_dict(self) -> dict[str, Any]:
        """Return it as the document ``analysis`` of docs/json.md."""
        return {
            "version": JSON_VERSION,
            "kind": "analysis",
            "deltas": [{"post": s.post, "base": s.base} for s in self.sources],
            "new_base": self.new_base,
            "findings": [f.to_dict() for f in self.findings],
            "total": self.total.to_dict(),
            "layers": [g.to_dict() for g in self.layers],
            "modules": [g.to_dict() for g in self.modules],
            "tensors": [t.to_dict() for t in self.tensors],
            "unpaired": list(self.unpaired),
            "warnings": list(self.warnings),
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "gigabytes_per_second": self.bytes_read / self.seconds / 1e9 if self.seconds else None,
            "threads": self.threads,
        }

    def to_csv(self) -> str:
        """Return one row a tensor, with a header. Columns of one delta end with its number where there are several."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(self._rows())
        return text.getvalue()

    def to_html(self) -> str:
        """Return the report: one page that asks for nothing else."""
        from paramdelta.analysis.page import page

        return page(self)

    def _rows(self) -> Iterator[Sequence[Any]]:
        several = len(self.sources) > 1
        measured = [*DeltaMeasures.__dataclass_fields__, *DeltaMeasures.RATIOS]
        ends = [f"_{k + 1}" if several else "" for k in range(len(self.sources))]
        pairs = sorted({pair for t in self.tensors for pair in t.inner})
        yield [
            *("name", "layer", "module", "shape", "dtype"),
            *(f"{name}{end}" for end in ends for name in (*measured, "largest_at", "stable_rank")),
            *(f"cosine_{i + 1}_{j + 1}" for i, j in pairs),
        ]
        for tensor in self.tensors:
            row: list[Any] = [
                _guarded(tensor.name),
                _guarded(tensor.place.layer_name),
                _guarded(tensor.place.module),
                "x".join(map(str, tensor.shape)),
                tensor.dtype,
            ]
            ranks = {s.delta: s.stable_rank for s in tensor.spectra}
            for k, (delta, at) in enumerate(zip(tensor.deltas, tensor.where, strict=True)):
                row += [None if delta is None else getattr(delta, name) for name in measured]
                row += [None if at is None else " ".join(map(str, at)), ranks.get(k)]
            yield [*row, *(tensor.cosine(i, j) for i, j in pairs)]


def _guarded(text: str) -> str:
    """Return a name that no spreadsheet takes for a formula: names come from strangers."""
    return f"'{text}" if text[:1] in "=+-@\t\r" and text else text


def check_writable(paths: Sequence[str | Path | None]) -> None:
    """Raise InputError for every report that could not be written, before anything is read for it."""
    wrong = []
    for path in (Path(p) for p in paths if p is not None):
        if path.is_dir():
            wrong.append(Complaint(str(path), "is a folder, expected the name of a file"))
        elif not path.parent.is_dir():
            wrong.append(Complaint(str(path), f"its folder {shown(path.parent)} does not exist", "make it first"))
    if wrong:
        raise InputError(wrong)


def write_text(path: str | Path, text: str) -> None:
    """Write a report. Raises StorageError."""
    with storage_errors(Path(path), "cannot be written"):
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
