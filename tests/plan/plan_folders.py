"""Small checkpoint folders for the tests of plans, written by the safetensors library, and a NumPy engine that
carries a plan's work out on them, so that layouts are checked without the extension."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

from paramdelta import reference
from paramdelta.dtypes import BY_SAFETENSORS, DTYPES
from paramdelta.errors import PlanError
from paramdelta.plan import MergeRequest, Plan, make_plan, open_all

BF16 = ml_dtypes.bfloat16
Tensors = dict[str, np.ndarray[Any, Any]]


def values(shape: tuple[int, ...], seed: int, dtype: Any = BF16) -> np.ndarray[Any, Any]:
    """Return values with few significant bits, so that sums of them are exact."""
    integers = np.random.default_rng([seed, *shape]).integers(-64, 64, shape)
    return np.asarray(integers / 16).astype(dtype)


def llama(
    seed: int, *, vocab: int = 8, layers: int = 2, head: bool = True, dtype: Any = BF16, prefix: str = ""
) -> Tensors:
    """Return the tensors of a two-layer toy in Llama's layout."""
    shapes = {"model.embed_tokens.weight": (vocab, 4), "model.norm.weight": (4,)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (4, 4)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (6, 4)
    if head:
        shapes["lm_head.weight"] = (vocab, 4)
    return {prefix + name: values(shape, seed + i, dtype) for i, (name, shape) in enumerate(shapes.items())}


def write(
    folder: Path,
    tensors: Tensors,
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder as transformers lays it out; ``shards`` > 1 deals the tensors out in turn."""
    folder.mkdir(parents=True)
    if config is None:
        head = any(name.endswith("lm_head.weight") for name in tensors)
        config = {"model_type": "llama", "tie_word_embeddings": not head}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0, **(metadata or {})}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def three(root: Path, post: Tensors, base: Tensors, new_base: Tensors, **options: Any) -> dict[str, Path]:
    """Write three folders that differ in their tensors alone."""
    tensors = {"post": post, "base": base, "new_base": new_base}
    return {role: write(root / role, t, **options) for role, t in tensors.items()}


def plan(folders: Mapping[str, Path], **options: Any) -> Plan:
    """Plan a merge of three folders."""
    request = MergeRequest.build(**folders, **options)
    return make_plan(request, *open_all(request))


def complaint(folders: Mapping[str, Path], **options: Any) -> str:
    """Return the text of the complaints that planning raises."""
    try:
        plan(folders, **options)
    except PlanError as error:
        return str(error)
    raise AssertionError("the plan was made without a complaint")


def carry_out(made: Plan, folder: Path) -> Tensors:
    """Write the output of a plan with NumPy, check that spans fill every byte once, and read it back through the
    safetensors library."""
    work = made.work
    folder.mkdir()
    for number, ((name, size), header) in enumerate(zip(work.outputs, work.headers, strict=True)):
        data = bytearray(header)
        for span in work.spans[work.spans["out_file"] == number]:
            assert span["out_offset"] == len(data), f"{name}: a hole or an overlap at byte {len(data)}"
            data += _evaluate(work, span)
        assert len(data) == size
        assert len(header) % 4096 == 0
        (folder / name).write_bytes(data)
    for name, content in made.written_files():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return read(folder)


def _evaluate(work: Any, span: Any) -> bytes:
    out = DTYPES[span["out_dtype"]]
    count = int(span["count"])

    def operand(file: int, offset: int, code: int) -> reference.Array:
        dtype = DTYPES[code]
        if file < 0:
            return reference.Array(np.zeros(count, reference.code_type(dtype)), dtype)
        with open(work.inputs[file], "rb") as stream:
            stream.seek(int(offset))
            raw = stream.read(count * dtype.itemsize)
        assert len(raw) == count * dtype.itemsize
        return reference.Array(np.frombuffer(raw, reference.code_type(dtype)), dtype)

    new_base = operand(span["new_file"], span["new_offset"], span["new_dtype"])
    rows = work.terms[span["first_term"] : span["first_term"] + span["n_terms"]]
    if not out.merges:
        assert len(rows) == 0
        assert new_base.dtype == out
        assert new_base.codes is not None
        return new_base.codes.tobytes()
    terms = [
        reference.Term(
            operand(t["post_file"], t["post_offset"], t["post_dtype"]),
            operand(t["base_file"], t["base_offset"], t["base_dtype"]),
            float(t["alpha"]),
        )
        for t in rows
    ]
    return reference.merge(new_base, terms, out).codes.tobytes()


def read(folder: Path) -> Tensors:
    """Read every tensor of a folder through the safetensors library, as its index says."""
    index = folder / "model.safetensors.index.json"
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    tensors: Tensors = {}
    for name in names:
        for key, info in deserialize((folder / name).read_bytes()):
            array = np.frombuffer(bytes(info["data"]), BY_SAFETENSORS[info["dtype"]].to_numpy())
            tensors[key] = array.reshape(info["shape"])
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert set(weight_map) == set(tensors)
        assert sorted(set(weight_map.values())) == names
    return tensors


def expected(
    post: np.ndarray[Any, Any], base: np.ndarray[Any, Any], new_base: np.ndarray[Any, Any], alpha: float = 1.0
) -> np.ndarray[Any, Any]:
    """Return the formula, for values whose sums are exact in the output's type."""
    wide = new_base.astype(np.float64) + alpha * (post.astype(np.float64) - base.astype(np.float64))
    return np.asarray(wide).astype(new_base.dtype)


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays are equal to the bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
