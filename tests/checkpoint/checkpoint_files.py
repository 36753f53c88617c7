"""Safetensors files and checkpoint folders for tests, built byte by byte so that every rule can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paramdelta.dtypes import BY_SAFETENSORS


def file_bytes(header: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file of this header and data; ``length`` is what the first 8 bytes say instead of the truth."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any, **more: Any) -> dict[str, Any]:
    """Return what a header says about one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def tensors_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return a valid file of tensors given as name: (dtype, shape); byte i of the data is i modulo 251."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * BY_SAFETENSORS[dtype].bits // 8
        header[name] = entry(dtype, list(shape), at, at + size)
        at += size
    return file_bytes(json.dumps(header), bytes(i % 251 for i in range(at)))


def write_shard(path: Path, *names: str, **tensors: tuple[str, tuple[int, ...]]) -> Path:
    """Write a shard: ``names`` become BF16 tensors of two elements, ``tensors`` are what they say."""
    path.write_bytes(tensors_bytes({**dict.fromkeys(names, ("BF16", (2,))), **tensors}))
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a value as JSON, or a string or bytes as they are."""
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path
