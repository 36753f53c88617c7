"""Sound little checkpoints, and what makes them hostile: files of any header, of any size without taking any disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ROLES = ("post", "base", "new_base")
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def tensor(shape: list[int], begin: int = 0, end: int | None = None, dtype: str = "BF16") -> dict[str, Any]:
    """Return what a header says about a BF16 tensor."""
    size = 2
    for extent in shape:
        size *= extent
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size if end is None else end]}


def write(folder: Path, header: Any = None, config: Any = None, *, data: int | None = None) -> Path:
    """Write a folder of one file. ``header`` is a document, or text or bytes as they are; ``data`` bytes follow."""
    folder.mkdir(parents=True)
    header = {WEIGHT: tensor([4, 4])} if header is None else header
    if isinstance(header, dict):
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__" and isinstance(t, dict)]
        data = max(ends, default=0) if data is None else data
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    write_file(folder / SINGLE, raw, data or 0)
    write_json(
        folder / "config.json", {"model_type": "toy", "tie_word_embeddings": False} if config is None else config
    )
    return folder


def write_file(path: Path, raw: bytes, data: int, *, length: int | None = None) -> Path:
    """Write a safetensors file whose data is a hole; ``length`` is what it says of its header instead of the truth."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        file.truncate(8 + len(raw) + data)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a document, or text as it is."""
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def three(root: Path) -> dict[str, Path]:
    """Write three sound folders."""
    return {role: write(root / role) for role in ROLES}


def inputs(folders: dict[str, Path]) -> list[str]:
    """Return the options that name three folders."""
    return [part for role, path in folders.items() for part in (f"--{role.replace('_', '-')}", str(path))]


def nested(depth: int, inner: str = "1") -> str:
    """Return a JSON object nested ``depth`` deep."""
    return '{"a":' * depth + inner + "}" * depth
