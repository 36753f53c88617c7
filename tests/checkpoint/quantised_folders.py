"""Folders of quantised checkpoints for tests: real shapes in the headers, and no data behind them (sparse files)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_files import write_json

from paramdelta.checkpoint import INDEX, SINGLE, Checkpoint, Quantisation, open_checkpoint, recognise
from paramdelta.dtypes import BY_SAFETENSORS
from paramdelta.errors import Complaint

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def write_headers(path: Path, tensors: Tensors) -> None:
    """Write a file of these tensors, given as name: (dtype, shape), whose data is a hole."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BY_SAFETENSORS[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def folder_of(
    folder: Path, tensors: Tensors, config: Any = None, modelopt: Any = None, *, shards: int = 1
) -> Checkpoint:
    """Write a folder and open it. ``config`` is its quantization_config, or the whole config.json where that has
    ``config.json``'s own keys (model_type); with ``shards``, neighbours in ``tensors`` lie in different files."""
    if config is not None:
        whole = config if "model_type" in config or "text_config" in config else {"quantization_config": config}
        write_json(folder / "config.json", whole)
    if modelopt is not None:
        write_json(folder / "hf_quant_config.json", modelopt)
    if shards == 1:
        write_headers(folder / SINGLE, tensors)
    else:
        weight_map = {name: f"{i % shards}.safetensors" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            write_headers(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
        write_json(folder / INDEX, {"weight_map": weight_map})
    state_shapes(folder)
    return open_checkpoint(folder, role="post")


def state_shapes(folder: Path) -> None:
    """Write the shape of every packed int4 weight into its weight_shape, which headers do not have."""
    table = (opened := open_checkpoint(folder, role="post")).tensors
    for name in table.names:
        packed = name.removesuffix("_shape") + "_packed"
        if name.endswith(".weight_shape") and packed in table:
            spec, (rows, words) = table.spec(name), table.spec(packed).shape
            if spec.shape != (2,) or spec.dtype.name not in ("i32", "i64"):
                continue
            with open(opened.files[spec.file].path, "r+b") as file:
                file.seek(spec.offset)
                file.write(struct.pack("<2q" if spec.dtype.itemsize == 8 else "<2i", rows, 8 * words))


def recognised(folder: Path, tensors: Tensors, config: Any = None, modelopt: Any = None, **more: Any) -> Quantisation:
    """Return what is recognised in a folder that nothing is wrong with."""
    found, complaints = recognise(folder_of(folder, tensors, config, modelopt, **more))
    assert complaints == []
    return found


def refused(folder: Path, tensors: Tensors, config: Any = None, modelopt: Any = None) -> list[Complaint]:
    """Return the complaints about a folder, of which there is at least one."""
    _, complaints = recognise(folder_of(folder, tensors, config, modelopt))
    assert complaints
    return complaints


def planes(checkpoint: Checkpoint, found: Quantisation, name: str) -> dict[str, str]:
    """Return the names of the tensors that make up a weight, by part."""
    weight = found.weights[name]
    rows = {part: getattr(weight, part) for part in ("codes", "scale", "second", "zero_point", "shape_row")}
    return {part: checkpoint.tensors.names[row] for part, row in rows.items() if row >= 0}
