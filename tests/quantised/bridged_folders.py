"""One small model of experts, or of fused layers, stored in every structure, and read back from any of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import save_file

from paramdelta import reference
from paramdelta import reference_scaled as scaled
from paramdelta.dtypes import BF16
from paramdelta.formats import DEEPGEMM, MXFP4_OPENAI
from paramdelta.reference_scaled import Scaled

Array = NDArray[Any]
Key = tuple[int, str]  # expert (−1: none) and part
Tensors = dict[str, Array]
EXPERTS, INNER, HIDDEN = 3, 128, 256
PREFIX = "model.layers.0.mlp.experts"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def weights(seed: int, inner: int = INNER, hidden: int = HIDDEN) -> dict[Key, Array]:
    """Return the matrices of every expert, as values that bf16 holds."""
    rng = np.random.default_rng([seed, inner, hidden])
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    made = {(e, p): rng.normal(size=s) * 0.02 for e in range(EXPERTS) for p, s in shapes.items()}
    return {key: reference.decode(reference.encode(x, BF16)[0], BF16) for key, x in made.items()}


def bf16(x: Array) -> Array:
    return reference.encode(x, BF16)[0].view(ml_dtypes.bfloat16)


def fp8(x: Array) -> Scaled:
    made = scaled.quantise(x, DEEPGEMM, 128, 128, "f32")
    assert made.scales is not None
    return Scaled(made.codes, "f8_e4m3", made.scales, "f32", 128, 128)


def singles(w: dict[Key, Array], name: Callable[[Key], str], quantised: bool) -> tuple[Tensors, dict[Key, Scaled]]:
    """Return every matrix as a tensor of its own, and what it decodes to."""
    tensors: Tensors = {}
    held = {}
    for key, x in w.items():
        if quantised:
            held[key] = fp8(x)
            tensors[name(key)] = held[key].codes.view(ml_dtypes.float8_e4m3fn)
            tensors[f"{name(key)}_scale_inv"] = held[key].scales.view(np.float32)
        else:
            tensors[name(key)] = bf16(x)
            held[key] = Scaled(reference.encode(x, BF16)[0], "bf16")
    return tensors, held


def expert_name(key: Key) -> str:
    return f"{PREFIX}.{key[0]}.{key[1]}_proj.weight"


def mixtral_name(key: Key) -> str:
    return f"{PREFIX}.{key[0]}.{MIXTRAL[key[1]]}.weight"


def stacks(w: dict[Key, Array], how: str) -> Tensors:
    """Return all experts as two stacks: straight, transposed, with gate and up in alternating rows (interleaved), or
    both at once, as gpt-oss has them in bf16."""
    join = _alternating if how in ("interleaved", "gpt-oss") else _below
    both = np.stack([join(w[e, "gate"], w[e, "up"]) for e in range(EXPERTS)])
    down = np.stack([w[e, "down"] for e in range(EXPERTS)])
    if how in ("transposed", "gpt-oss"):
        both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
    return {f"{PREFIX}.gate_up_proj": bf16(both), f"{PREFIX}.down_proj": bf16(down)}


def _alternating(a: Array, b: Array) -> Array:
    return np.stack([a, b], 1).reshape(-1, a.shape[1])


def _below(a: Array, b: Array) -> Array:
    return np.concatenate([a, b])


def blocks(w: dict[Key, Array]) -> tuple[Tensors, dict[Key, Scaled]]:
    """Return gpt-oss's blocks, gate and up in alternating rows, and what each matrix decodes to."""
    tensors: Tensors = {}
    held: dict[Key, Scaled] = {}
    for part in ("gate_up", "down"):
        codes, scales = [], []
        for e in range(EXPERTS):
            x = w[e, "down"]
            if part == "gate_up":
                x = _alternating(w[e, "gate"], w[e, "up"])
            made = scaled.quantise(x, MXFP4_OPENAI, 1, 32, "f8_e8m0")
            assert made.scales is not None
            codes.append(scaled.pack(made.codes, "f4").reshape(x.shape[0], -1, 16))
            scales.append(made.scales.view(np.uint8))
            rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2)} if part == "gate_up" else {"down": slice(None)}
            for name, at in rows.items():
                held[e, name] = Scaled(made.codes[at], "f4", made.scales[at], "f8_e8m0", 1, 32)
        tensors[f"{PREFIX}.{part}_proj_blocks"] = np.stack(codes)
        tensors[f"{PREFIX}.{part}_proj_scales"] = np.stack(scales)
    return tensors, held


def write(folder: Path, tensors: Tensors, quantisation: dict[str, Any] | None = None) -> Path:
    """Write a folder of these tensors and a norm."""
    folder.mkdir(parents=True)
    everything = {"model.norm.weight": bf16(np.ones(8)), **tensors}
    save_file({n: np.ascontiguousarray(t) for n, t in everything.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "toy", "tie_word_embeddings": True}
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def store(folder: Path, w: dict[Key, Array], how: str) -> dict[Key, Scaled]:
    """Write a folder in one structure; return what each matrix decodes to."""
    plain = {key: Scaled(reference.encode(x, BF16)[0], "bf16") for key, x in w.items()}
    if how in ("separate", "separate fp8", "w1 w2 w3", "w1 w2 w3 fp8"):
        name = mixtral_name if how.startswith("w1") else expert_name
        tensors, held = singles(w, name, how.endswith("fp8"))
        write(folder, tensors, BLOCKS if how.endswith("fp8") else None)
        return held
    if how == "blocks":
        tensors, held = blocks(w)
        write(folder, tensors, {"quant_method": "mxfp4"})
        return held
    write(folder, stacks(w, how))
    return plain


def read(folder: Path) -> Tensors:
    """Read a folder as raw bytes by name."""
    raw = deserialize((folder / "model.safetensors").read_bytes())
    return {name: np.frombuffer(bytes(i["data"]), np.uint8).reshape(*i["shape"], -1) for name, i in raw}


def expected(held: dict[str, dict[Key, Scaled]], how: str) -> Tensors:
    """Return the tensors of the merged experts in a structure, as raw bytes, merged and quantised by the reference."""
    acc = {
        key: scaled.accumulate(new, [scaled.ScaledTerm(held["post"][key], held["base"][key])])[0]
        for key, new in held["new_base"].items()
    }
    if how.endswith("fp8"):
        tensors, _ = singles(acc, mixtral_name if how.startswith("w1") else expert_name, True)
    elif how in ("separate", "w1 w2 w3"):
        tensors, _ = singles(acc, mixtral_name if how.startswith("w1") else expert_name, False)
    elif how == "blocks":
        tensors, _ = blocks(acc)
    else:
        tensors = stacks(acc, how)
    return {n: np.ascontiguousarray(t).view(np.uint8).reshape(*t.shape, -1) for n, t in tensors.items()}
