"""What the record of a merged folder must say of its bytes, by two libraries that share no code with the merge: tensors
as safetensors reads them, sums by zlib."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import safetensors


def sums_of(folder: Path) -> dict[str, str]:
    """Return the CRC-32 of each tensor of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            assert name not in found
            found[name] = f"{zlib.crc32(bytes(tensor['data'])):08x}"
    return found


def recorded(folder: Path) -> dict[str, Any]:
    """Return what the record says of the bytes of a folder."""
    document = json.loads((folder / "paramdelta.json").read_text())["checksums"]
    assert isinstance(document, dict)
    return document


def check_sums(folder: Path) -> None:
    """Assert that the record of a folder has the sum of every tensor and of every other file, in its place."""
    document = recorded(folder)
    assert document["algorithm"] == "crc32"
    assert document["tensors"] == sums_of(folder)
    there = {path.name: path for path in folder.iterdir() if path.name != "paramdelta.json"}
    assert document["files"].keys() == there.keys()
    for name, row in document["files"].items():
        assert row["bytes"] == there[name].stat().st_size
        if name.endswith(".safetensors"):
            assert row.keys() == {"bytes", "header_sha256"}
        else:
            assert row["crc32"] == f"{zlib.crc32(there[name].read_bytes()):08x}"
