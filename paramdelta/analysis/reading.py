"""Reads the operands of a load: bytes of spans as they are stored, rows of regions decoded by the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta import engine
from paramdelta.analysis.loads import LOAD, Load, Survey
from paramdelta.dtypes import DTYPES, F32
from paramdelta.errors import StorageError, storage_errors
from paramdelta.formats import CODEC_BITS, CODECS
from paramdelta.plan.work import REGION, Work, no_rows
from paramdelta.storage import CACHED, Paths

Bytes = NDArray[np.uint8]
Stored = tuple[NDArray[Any], int]  # the bytes of an operand, or its binary32 values, and the number of the dtype


class Files:
    """The input files of a survey, open. Those that were not in the page cache leave it again as they are read."""

    def __init__(self, survey: Survey, options: engine.EngineOptions) -> None:
        work = survey.plan.work
        self.paths = [path for path in work.inputs if isinstance(path, Path)]
        reached = engine.paths_for(work, [size for _, size in work.outputs], options)
        self.reached = reached
        self._passing = [access != CACHED for access in reached.inputs]
        self._descriptors: list[int] = []

    @contextmanager
    def opened(self) -> Iterator[Files]:
        """Open the files for the block."""
        engine.allow_open_files(len(self.paths))
        try:
            for path in self.paths:
                with storage_errors(path, "cannot be opened"):
                    self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            yield self
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)
            self._descriptors.clear()

    def read(self, number: int, offset: int, into: Bytes) -> None:
        """Fill ``into`` with the bytes at ``offset``. Raises StorageError."""
        view, at = into.data, offset
        with storage_errors(self.paths[number], f"reading at byte {offset} failed"):
            while view:
                count = os.preadv(self._descriptors[number], [view], at)
                if count == 0:
                    raise StorageError(f"{self.paths[number]}: ends at byte {at}, where its header says there is more")
                view, at = view[count:], at + count
        if self._passing[number]:
            os.posix_fadvise(self._descriptors[number], offset, len(into), os.POSIX_FADV_DONTNEED)


class Reader:
    """One worker's memory. What :meth:`operands` returns is good until its next call."""

    def __init__(self, survey: Survey, files: Files, options: engine.EngineOptions) -> None:
        self._survey, self._files, self._options = survey, files, options
        self._buffers: list[Bytes] = []

    def operands(self, load: Load) -> list[Stored]:
        """Return the operands of a load, in the order of its comparison, and count what was read."""
        return self._decoded(load) if load.of_region else self._stored(load)

    def nbytes(self, load: Load) -> int:
        """Return about how many bytes reading a load takes."""
        if not load.of_region:
            return sum(load.size * DTYPES[code].itemsize for _, _, code in self._survey.span_operands(load))
        codecs = self._survey.plan.work.views[self._survey.region_views(load)]["codec"]
        return sum(self._survey.elements_of(load) * CODEC_BITS[CODECS[codec]] // 8 for codec in codecs)

    def _buffer(self, number: int, nbytes: int) -> Bytes:
        while len(self._buffers) <= number:
            self._buffers.append(np.empty(0, np.uint8))
        if len(self._buffers[number]) < nbytes:
            self._buffers[number] = np.empty(max(nbytes, 2 * LOAD), np.uint8)
        return self._buffers[number][:nbytes]

    def _stored(self, load: Load) -> list[Stored]:
        found: list[Stored] = []
        for number, (file, offset, code) in enumerate(self._survey.span_operands(load)):
            into = self._buffer(number, load.size * DTYPES[code].itemsize)
            self._files.read(file, offset, into)
            found.append((into, code))
        return found

    def _decoded(self, load: Load) -> list[Stored]:
        views = self._survey.region_views(load)
        nbytes = 4 * self._survey.elements_of(load)
        buffers = [self._buffer(number, nbytes) for number in range(len(views))]
        work, files = decoding(self._survey.plan.work, load, views)
        reached = self._files.reached
        paths = Paths(inputs=tuple(reached.inputs[f] for f in files), outputs=(None,) * len(views), cold=())
        engine.carry_out(work, buffers, tensors=1, options=self._options, paths=paths)
        return [(buffer, F32.code) for buffer in buffers]


def decoding(work: Work, load: Load, views: list[int]) -> tuple[Work, list[int]]:
    """Return the work that decodes some rows of views to binary32, each view to an output of its own, and which of the
    input files it has."""
    region = work.regions[load.number]
    cols = int(region["cols"])
    rows = np.zeros(len(views), REGION)
    rows["out_pitch"], rows["rows"], rows["cols"], rows["end_row"] = 4 * cols, load.size, cols, load.size
    for column in ("scale_out_file", "given_file", "second_file", "recipe", "unit"):
        rows[column] = -1
    rows["out_file"] = rows["new_view"] = np.arange(len(views))
    rows["out_dtype"] = F32.code
    chosen = work.views[views].copy()
    bits = np.array([CODEC_BITS[codec] for codec in CODECS])[chosen["codec"]]
    turned = chosen["col_stride"] != np.maximum(bits // 8, 1)
    chosen["offset"] += np.where(turned, load.first * bits // 8, load.first * chosen["row_stride"])
    grid = np.maximum(chosen["grid_rows"].astype(np.int64), 1)
    first = load.first + chosen["row_phase"].astype(np.int64)
    scaled = chosen["grid_rows"] > 0
    chosen["scale_offset"] += np.where(scaled, first // grid * chosen["scale_row_stride"], 0)
    chosen["row_phase"] = np.where(scaled, first % grid, chosen["row_phase"])
    chosen["zero_offset"] += load.first // 8 * chosen["zero_row_stride"]
    columns = ("file", "scale_file", "zero_file", "second_file")
    used = sorted({int(number) for column in columns for number in chosen[column] if number >= 0})
    for column in columns:
        chosen[column] = [used.index(number) if number >= 0 else -1 for number in chosen[column].tolist()]
    made = Work(
        inputs=tuple(work.inputs[number] for number in used),
        outputs=tuple(("", 4 * cols * load.size) for _ in views),
        headers=(),
        spans=no_rows(work.spans.dtype),
        terms=no_rows(work.terms.dtype),
        regions=rows,
        views=chosen,
    )
    return made, used
