"""Fuzz target: the engine's columns of work. Rows that are nearly right, and fields of any value, end in ValueError, or
run without reading or writing outside of the memory that the engine was given (`make sanitize` runs this, too, under
AddressSanitizer)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from choices import Choices

from paramdelta import _cpu
from paramdelta.dtypes import BF16, BY_SAFETENSORS, F32, MERGE_DTYPES
from paramdelta.formats import CODECS
from paramdelta.plan.work import EXTENT, RECIPE, REGION, REGION_TERM, SPAN, TERM, VIEW

COLUMNS = {
    "spans": SPAN,
    "terms": TERM,
    "regions": REGION,
    "region_terms": REGION_TERM,
    "views": VIEW,
    "recipes": RECIPE,
    "extents": EXTENT,
}
_INPUT, _OUTPUT = 4096, 2048  # bytes of each input and output
_NUMBERS = (0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 63, 64, 255, 1024, 2047, 2048, 4095, 4096, -1, -2, 1 << 20, 1 << 30)
_FAR = (2**31 - 1, 2**32 - 1, 1 << 45, (1 << 46) - 1, 1 << 46, 1 << 60, 2**63 - 1, -(2**63), -(2**31))
_SECONDS = 0.3  # work on operands of zeros may be long without touching any memory: it is told to stop
_SCALES = (F32, BF16, BY_SAFETENSORS["F8_E8M0"])

# What was rejected, by its words: how far into the checks the inputs came.
rejections: set[str] = set()
accepted = 0


def seeds() -> list[bytes]:
    """Return inputs from which the fuzzer starts."""
    made = [b"", bytes([1, 1])]
    for codec in range(len(CODECS)):
        for recipe in range(6):
            made.append(bytes([1, 0, codec, recipe, 3, 15, recipe, 1, codec % 3, 2, 1, 0, 1, 1]) + bytes([255] * 12))
    numbers = random.Random(3)
    return made + [bytes([i % 3]) + numbers.randbytes(200) for i in range(60)]


def run(data: bytes) -> None:
    """Make columns, hand them to the engine and run it."""
    global accepted
    choices = Choices(data)
    columns = {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
    kind = choices.number(0, 2)
    if kind != 1:
        columns["spans"], columns["terms"] = _spans(choices)
    if kind != 0:
        _add_regions(choices, columns)
    columns["extents"] = _extents(choices)
    for _ in range(choices.number(0, 3)):
        _disturb(choices, columns)
    inputs = [bytes(choices.take(64) or b"\x3f\x80") * _INPUT for _ in range(2)]
    inputs = [bytearray(data[:_INPUT]) for data in inputs]  # bytes would be a path
    outputs = [np.zeros(_OUTPUT, np.uint8) for _ in range(2)]
    try:
        engine = _cpu.Engine(
            columns=columns,
            tensors=choices.pick((2, 1, 0)),
            units=choices.pick((1, 0)),
            inputs=inputs,
            outputs=outputs,
            threads=choices.pick((1, 2, 0)),
            slot_bytes=choices.pick((1 << 17, 1 << 16, 1 << 14, 4096, 0, 1 << 62)),
            isa=choices.pick((None, "scalar")),
        )
    except (ValueError, MemoryError) as error:
        rejections.add("".join(c for c in str(error) if not c.isdigit()))
        return
    accepted += 1
    engine.start()
    if not engine.wait_for(_SECONDS):
        engine.stop()
        assert engine.wait_for(5.0), "the engine does not stop"
    engine.finish()


def _spans(choices: Choices) -> tuple[Any, Any]:
    """Spans one after the other, with terms of any types that merge."""
    spans, terms = [], []
    at = 0
    for tensor in range(1 + choices.number(0, 2)):
        out, new, post, base = (choices.pick(MERGE_DTYPES) for _ in range(4))
        count = choices.pick((5, 0, 1, 64, 100))
        n_terms = choices.number(0, 2)
        offset, file = choices.number(0, 300), choices.pick((0, 1, -1))
        spans.append(
            (at, count, offset, tensor % 2, 0, file, len(terms), n_terms, out.code, new.code, b""),
        )
        at += count * out.itemsize
        for _ in range(n_terms):
            alpha = choices.pick((1.0, 0.5, 0.0, 1e300, -1.0))
            files = choices.pick(((0, 1), (1, -1), (-1, 0), (1, 1)))
            terms.append((alpha, choices.number(0, 300), choices.number(0, 300), *files, post.code, base.code, b""))
    return np.array(spans, SPAN), np.array(terms, TERM)


def _extents(choices: Choices) -> Any:
    """Tensors whose checksums are wanted, one after the other in both outputs."""
    rows = []
    for file in (0, 1):
        at = 0
        for _ in range(choices.number(0, 3)):
            begin = at + choices.pick((0, 0, 1, 100))
            at = begin + choices.pick((64, 0, 1, 500, _OUTPUT - 601))
            rows.append((begin, at, file, choices.number(0, 1)))
    return np.array(rows, EXTENT)


def _add_regions(choices: Choices, columns: dict[str, Any]) -> None:
    """One region, its recipe and its views, so that they fit most of the time."""
    codec, recipe_codec = choices.number(0, len(CODECS) - 1), choices.pick((4, 8, 9))
    rule, scale = choices.number(0, 5), choices.pick(_SCALES)
    rows, cols = 1 + choices.number(0, 15), 2 * (1 + choices.number(0, 15))
    grid_rows, grid_cols = choices.pick((1, 0, 2, 4)), choices.pick((0, 2, 4, 8, 16, 32))
    n_terms = choices.number(0, 2)
    numbers = [_view(choices, columns, codec, rows, cols) for _ in range(1 + 2 * n_terms)]
    columns["recipes"] = np.array([(448.0, 1e-12, 1.0, recipe_codec, scale.code, rule, 0, 0, b"")], RECIPE)
    pairs = [(1.0, numbers[2 * t + 1], numbers[2 * t + 2]) for t in range(n_terms)]
    columns["region_terms"] = np.array(pairs, REGION_TERM)
    region = np.zeros(1, REGION)
    values = {
        "out_pitch": cols * choices.pick((1, 2, 4)),
        "rows": rows,
        "cols": cols,
        "end_row": rows,
        "scale_out_offset": 1024,
        "scale_out_row_stride": 64,
        "scale_out_col_stride": scale.itemsize,
        "out_file": choices.pick((0, 1, -1)),
        "scale_out_file": choices.pick((1, 0, -1)),
        "given_file": choices.pick((-1, 0)),
        "second_file": choices.pick((-1, 1)),
        "recipe": choices.pick((0, -1)),
        "new_view": numbers[0],
        "n_terms": n_terms,
        "unit": 0,
        "grid_rows": grid_rows,
        "grid_cols": grid_cols,
        "out_dtype": choices.number(0, len(MERGE_DTYPES) - 1),
        "keep": choices.number(0, 3),
        "measure": choices.pick((0, 1)),
    }
    for name, value in values.items():
        region[name] = value
    columns["regions"] = region


def _view(choices: Choices, columns: dict[str, Any], codec: int, rows: int, cols: int) -> int:
    """Add a view of a matrix, straight or turned, and return its number."""
    if choices.odds(4):
        codec = choices.number(0, len(CODECS) - 1)
    bits = (16, 16, 32, 64, 8, 8, 8, 8, 4, 4)[codec]
    item = max(bits // 8, 1)
    turned = choices.odds(4)
    pitch = (rows if turned else cols) * bits // 8 + choices.pick((0, 1, 40))
    view = np.zeros(1, VIEW)
    values = {
        "offset": choices.number(0, 500),
        "row_stride": item if turned else pitch,
        "col_stride": pitch if turned else item,
        "scale_offset": choices.number(0, 500),
        "scale_row_stride": 64,
        "scale_col_stride": 4,
        "zero_row_stride": 64,
        "file": choices.pick((0, 1, -1)),
        "scale_file": choices.pick((0, -1)),
        "zero_file": choices.pick((-1, 1)) if codec == CODECS.index("i4") else -1,
        "second_file": choices.pick((-1, 0)),
        "grid_rows": choices.pick((1, 0, 2, 3, 4)),
        "grid_cols": choices.pick((2, 0, 1, 4, 5, 16)),
        "row_phase": choices.pick((0, 1, 2, 9)),
        "col_phase": choices.pick((0, 1, 3, 40)),
        "codec": codec,
        "scale_dtype": choices.pick(_SCALES).code,
        "second": choices.number(0, 2),
    }
    for name, value in values.items():
        view[name] = value
    columns["views"] = np.concatenate([columns["views"], view])
    return len(columns["views"]) - 1


def _disturb(choices: Choices, columns: dict[str, Any]) -> None:
    """Set one field of one row to some value."""
    filled = [name for name, rows in columns.items() if len(rows)]
    rows = columns[choices.pick(filled)]
    field = choices.pick([name for name in rows.dtype.names if not name.startswith("_")])
    value = choices.pick(_NUMBERS) if not choices.odds(4) else choices.pick(_FAR)
    kind = rows.dtype[field]
    row = choices.number(0, len(rows) - 1)
    if kind.kind == "f":
        rows[field][row] = choices.pick((0.0, -1.0, np.nan, np.inf, 1e-30, 3e38, float(value & 7)))
    else:
        rows[field][row] = np.array(value & (2 ** (8 * kind.itemsize) - 1), np.uint64).astype(kind)
