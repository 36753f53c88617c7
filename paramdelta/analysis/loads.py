"""Cuts what a plan pairs into loads: a part of a span, or some rows of a region, with the places of all its
operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from paramdelta.analysis.comparison import Comparison
from paramdelta.dtypes import DTYPES
from paramdelta.plan import Plan
from paramdelta.plan.deltas import roles_of

# Elements of a load: whole leaves, and in bf16 a MiB an operand, which stays in the cache from reading to summing.
LOAD = 1 << 19
_ROWS = 64  # rows of a load of a region are a multiple: whole words of packed zero points


class Load(NamedTuple):
    """``size`` elements of a span from ``first`` on; of a region, rows."""

    tensor: int
    comparison: Comparison
    of_region: bool
    number: int  # of the span or the region
    first: int
    size: int


@dataclass(frozen=True)
class Survey:
    """What is compared: the deltas of a plan, and the drift of new_base where that is more than a stand-in."""

    plan: Plan
    drift: bool

    @cached_property
    def base_of(self) -> list[int]:
        """The first delta that has the same base, of every delta: what is shared is read once."""
        bases = [self.plan.checkpoints[roles_of(k)[1]].path.resolve() for k in range(self.deltas)]
        return [bases.index(path) for path in bases]

    @property
    def deltas(self) -> int:
        """How many deltas there are."""
        return len(self.plan.request.sources)

    @cached_property
    def _first_files(self) -> dict[str, int]:
        counts = [len(c.files) for c in self.plan.checkpoints.values()]
        return dict(zip(self.plan.checkpoints, np.cumsum([0, *counts]).tolist(), strict=False))

    @cached_property
    def _delta_of_file(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for k in range(self.deltas):
            role = roles_of(k)[0]
            first = self._first_files[role]
            found |= dict.fromkeys(range(first, first + len(self.plan.checkpoints[role].files)), k)
        return found

    @cached_property
    def begins(self) -> dict[int, int]:
        """Where each output tensor would begin in its file."""
        extents = self.plan.work.extents
        return dict(zip(extents["tensor"].tolist(), extents["begin"].tolist(), strict=True))

    def loads(self) -> Iterator[Load]:
        """Yield every load, in the order of the output. Rows of a vocabulary that one of the operands lacks are left
        out, and so is what no delta reaches."""
        work = self.plan.work
        for number in np.flatnonzero(work.spans["n_terms"]).tolist():
            span = work.spans[number]
            comparison = self._comparison(self.terms(span))
            if comparison is None or (self.drift and span["new_file"] < 0):
                continue
            for first in range(0, int(span["count"]), LOAD):
                count = min(LOAD, int(span["count"]) - first)
                yield Load(int(span["tensor"]), comparison, False, number, first, count)
        for number in np.flatnonzero(work.regions["n_terms"]).tolist():
            region = work.regions[number]
            comparison = self._comparison(self.region_terms(region))
            if comparison is None or (self.drift and work.views[region["new_view"]]["file"] < 0):
                continue
            rows, step = int(region["rows"]), max(LOAD // int(region["cols"]) // _ROWS, 1) * _ROWS
            for first in range(0, rows, step):
                count = min(step, rows - first)
                yield Load(int(region["tensor"]), comparison, True, number, first, count)

    def _comparison(self, terms: dict[int, Any]) -> Comparison | None:
        return Comparison.of(sorted(terms), self.base_of, drift=self.drift) if terms else None

    def terms(self, span: Any) -> dict[int, Any]:
        """Return the terms of a span by delta, but for those that lack an operand."""
        terms = self.plan.work.terms[span["first_term"] : span["first_term"] + span["n_terms"]]
        there = [t for t in terms if t["post_file"] >= 0 and t["base_file"] >= 0]
        return {self._delta_of_file[int(t["post_file"])]: t for t in there}

    def region_terms(self, region: Any) -> dict[int, Any]:
        """Return the terms of a region by delta, but for those that lack an operand."""
        work = self.plan.work
        terms = work.region_terms[region["first_term"] : region["first_term"] + region["n_terms"]]
        there = [t for t in terms if min(work.views[t["post_view"]]["file"], work.views[t["base_view"]]["file"]) >= 0]
        return {self._delta_of_file[int(work.views[t["post_view"]]["file"])]: t for t in there}

    def elements_of(self, load: Load) -> int:
        """Return the number of elements of a load."""
        return load.size * int(self.plan.work.regions[load.number]["cols"]) if load.of_region else load.size

    def place(self, load: Load, element: int) -> int:
        """Return where an element of a load lies in its tensor, counted in row-major order."""
        begin = self.begins[load.tensor]
        if not load.of_region:
            span = self.plan.work.spans[load.number]
            item = DTYPES[int(span["out_dtype"])].itemsize
            return (int(span["out_offset"]) - begin) // item + load.first + element
        region = self.plan.work.regions[load.number]
        item = DTYPES[int(region["out_dtype"])].itemsize
        row, col = divmod(element, int(region["cols"]))
        offset = int(region["out_offset"]) - begin + (load.first + row) * int(region["out_pitch"])
        return offset // item + col

    def span_operands(self, load: Load) -> list[tuple[int, int, int]]:
        """Return (file, byte offset, dtype) of the operands of a span, in the order of its comparison."""
        span = self.plan.work.spans[load.number]
        terms = self.terms(span)
        found = [self._at(terms[k], "post") for k in load.comparison.deltas]
        found += [self._at(terms[k], "base") for k in self._owners(load)]
        if self.drift:
            found.append(self._at(span, "new"))
        items = [DTYPES[code].itemsize for _, _, code in found]
        return [(f, offset + load.first * item, code) for (f, offset, code), item in zip(found, items, strict=True)]

    def region_views(self, load: Load) -> list[int]:
        """Return the views of the operands of a region, in the order of its comparison."""
        region = self.plan.work.regions[load.number]
        terms = self.region_terms(region)
        found = [int(terms[k]["post_view"]) for k in load.comparison.deltas]
        found += [int(terms[k]["base_view"]) for k in self._owners(load)]
        return [*found, int(region["new_view"])] if self.drift else found

    def _owners(self, load: Load) -> list[int]:
        """Return one delta for each different base of a comparison."""
        deltas, bases = load.comparison.deltas, load.comparison.bases
        return [deltas[bases.index(base)] for base in range(load.comparison.n_bases)]

    @staticmethod
    def _at(row: Any, role: str) -> tuple[int, int, int]:
        return int(row[f"{role}_file"]), int(row[f"{role}_offset"]), int(row[f"{role}_dtype"])
