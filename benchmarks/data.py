"""Checkpoints to measure on: three folders of the size asked, or three of very many tiny tensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from paramdelta.demo import shape_for, write_demo

TENSORS_PER_LAYER = 1000


class Folders(NamedTuple):
    """The three inputs of a merge."""

    post: Path
    base: Path
    new_base: Path

    @property
    def nbytes(self) -> int:
        """Bytes of all safetensors files of new_base: about what a merge writes."""
        return sum(file.stat().st_size for file in self.new_base.glob("*.safetensors"))


def write_many(folder: Path, *, tensors: int = 100_000, elements: int = 64, shards: int = 40, seed: int = 0) -> Folders:
    """Write three folders of ``tensors`` bf16 tensors of ``elements`` elements each, in ``shards`` files each."""
    names = [f"model.layers.{i // TENSORS_PER_LAYER}.experts.{i % TENSORS_PER_LAYER}.weight" for i in range(tensors)]
    cuts = [tensors * i // shards for i in range(shards + 1)]
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    index = {
        "metadata": {"total_size": tensors * elements * 2},
        "weight_map": {name: file for i, file in enumerate(files) for name in names[cuts[i] : cuts[i + 1]]},
    }
    config = {"architectures": ["Synthetic"], "model_type": "synthetic", "tie_word_embeddings": False}
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((tensors, elements), dtype=np.float32) * np.float32(0.02)
    roles = {}
    for role, spread in (("post", 1e-3), ("base", 0.0), ("new_base", 4e-3)):
        moved = base + rng.standard_normal(base.shape, dtype=np.float32) * np.float32(spread)
        values = moved.astype(ml_dtypes.bfloat16)
        roles[role] = folder / role
        roles[role].mkdir(parents=True)
        for i, file in enumerate(files):
            shard = {names[k]: values[k] for k in range(cuts[i], cuts[i + 1])}
            save_file(shard, roles[role] / file, metadata={"format": "pt"})
        (roles[role] / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        (roles[role] / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Folders(**roles)


class NoRoomError(Exception):
    """A place has less room than a case needs."""


@contextmanager
def workspace(where: Path, *, need: int) -> Iterator[Path]:
    """Give a folder of its own under ``where`` and remove it afterwards; NoRoomError if ``need`` bytes do not fit."""
    where.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(where).free
    if free < need:
        raise NoRoomError(f"{free / 1e9:.1f} GB are free, {need / 1e9:.1f} GB are needed")
    folder = Path(tempfile.mkdtemp(prefix="paramdelta-bench-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def bytes_needed(size: str) -> int:
    """Bytes that a comparison of merges needs at once: three inputs, an output, its temporary, and some air."""
    return int(shape_for(size).nbytes * 5.2)


def write_inputs(folder: Path, size: str) -> Folders:
    """Write three Llama-shaped folders of ``size`` each."""
    return Folders(*write_demo(folder, size=size))


def forget(folders: Folders) -> None:
    """Write the files back and drop them from the page cache, so that the next reader meets the disk."""
    os.sync()
    for folder in folders:
        for file in folder.iterdir():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
