"""Fuzz target: the header parser. Any bytes end in a header or in a CheckpointError; what is accepted, the safetensors
library accepts too, and reads alike."""

from __future__ import annotations

import contextlib
import json
import struct

import refusals
import safetensors

from paramdelta.checkpoint.header import parse_header
from paramdelta.dtypes import DTYPES
from paramdelta.errors import CheckpointError

_LARGEST_DATA = 1 << 16
_LIBRARY_LACKS = {"U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def seeds() -> list[bytes]:
    """Return inputs from which the fuzzer starts."""
    one = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    two = {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}
    documents: list[object] = [
        {},
        {"a": one},
        {"__metadata__": {"format": "pt"}, "a": one, "b\n\u202e": two},
        {"a": {**one, "x": [[[1.5e3, None, True]]]}},
        {"a": {"dtype": "F4", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"a": {"dtype": "U8", "shape": [2**64 - 1], "data_offsets": [0, 2**64 - 1]}},
        {"a": {**one, "data_offsets": [-1, 11]}, "b": {**one, "shape": [[2], 3]}, "c": {**one, "dtype": [[]]}},
    ]
    sizes = (0, 12, 16, 12, 0, 0, 16)
    made = [struct.pack("<H", n) + json.dumps(d).encode() for n, d in zip(sizes, documents, strict=True)]
    return [*made, b"\x0c\x00" + b'{"a":1,"a":2}', b"\0\0" + b'{"a":' * 70 + b"}" * 70]


def run(data: bytes) -> None:
    """Read two bytes as the size of the data, the rest as the JSON."""
    (size,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
    raw = data[2:]
    try:
        header = parse_header(raw, file_size=8 + len(raw) + size, subject="file")
    except CheckpointError as error:
        refusals.check(error)
        return
    assert int(header.nbytes.sum()) == size <= _LARGEST_DATA
    with contextlib.suppress(safetensors.SafetensorError):
        content = struct.pack("<Q", len(raw)) + raw + bytes(size)
        found = {name: (info["dtype"], tuple(info["shape"])) for name, info in safetensors.deserialize(content)}
        rows = zip(header.names, header.dtypes.tolist(), header.shapes, strict=True)
        assert found == {name: (DTYPES[code].safetensors, shape) for name, code, shape in rows}
        return
    # The library knows fewer types; whatever else it refuses, this reader must refuse.
    assert {DTYPES[code].safetensors for code in header.dtypes.tolist()} & _LIBRARY_LACKS, "only the library refuses"
