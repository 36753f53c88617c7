"""Fuzz target: opening a folder. Whatever its index, config, record and shards hold, it opens or is refused with a
CheckpointError; what is told about it is valid JSON and a request that a record holds is built or refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import folders
import refusals
from choices import Choices

from paramdelta.checkpoint import INDEX, describe, open_checkpoint
from paramdelta.errors import CheckpointError, InputError
from paramdelta.plan.sidefiles import RECORD
from paramdelta.verification import recorded_request

_NAMES = ("config.json", INDEX, RECORD, "hf_quant_config.json")


def seeds() -> list[bytes]:
    """Return inputs from which the fuzzer starts: which document, then its text."""
    texts: list[tuple[int, Any]] = [(0, {"quantization_config": config}) for config in folders.CONFIGS]
    texts += [(0, {"architectures": [1], "model_type": "x", "tie_word_embeddings": True, "text_config": {}})]
    texts += [(1, {"metadata": {"total_size": 4}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})]
    texts += [(1, {"weight_map": {"a": "../a.safetensors"}}), (1, {"weight_map": {"a": "pipe", "b": "loop"}})]
    texts += [(2, {"request": {"alphas": ["*=0.5"], "rename_post": [["a", "b"]], "block_size": [1, 32]}})]
    texts += [(3, {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": []}})]
    return [bytes([number, 0]) + json.dumps(value).encode() for number, value in texts]


def run(data: bytes) -> None:
    """Take the first byte for the document, the second for the tensors beside it, the rest for the text."""
    choices = Choices(data)
    name, storage = choices.pick(_NAMES), choices.pick(folders.STORAGES)
    text = choices.rest()
    with tempfile.TemporaryDirectory(dir=folders.MEMORY) as root:
        folder = Path(root)
        tensors = storage.planes("a", 8, 64)
        folders.write_shard(folder / ("a.safetensors" if name == INDEX else "model.safetensors"), tensors, Choices(b""))
        if name == INDEX:
            folders.write_shard(folder / "b.safetensors", {"b": ("BF16", (2,))}, Choices(b""))
            (folder / "loop").symlink_to("loop")
        if name == "hf_quant_config.json":
            (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(text)
        _look(folder)
        if name == RECORD:
            try:
                recorded_request(folder, post=folder, base=folder, new_base=folder)
            except InputError as error:
                refusals.check(error)


def _look(folder: Path) -> None:
    try:
        described = describe(open_checkpoint(folder))
    except CheckpointError as error:
        refusals.check(error)
        return
    json.loads(json.dumps(described), parse_constant=_refuse)


def _refuse(text: str) -> NoReturn:
    raise AssertionError(f"{text} is no JSON")
