"""Checkpoints that several ranks merge, and the commands that do it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROLES = ("post", "base", "new_base")
SEGMENT = 1 << 17
_TAKEN = ("RANK", "WORLD_SIZE", "SLURM_", "OMPI_", "PMI_", "MASTER_", "LOCAL_", "TORCHELASTIC_")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(_TAKEN)} | {
    "PARAMDELTA_SEGMENT_BYTES": str(SEGMENT)
}


def write(root: Path, *, seed: int = 0, inf: bool = False, rows: int = 512) -> dict[str, Path]:
    """Write three checkpoints of two shards, about 3 MB of bf16 each where ``rows`` is 512."""
    folders = {}
    for i, role in enumerate(ROLES):
        rng = np.random.default_rng([seed, i])
        shapes = {
            "model.layers.0.mlp.gate_proj.weight": (rows, 544),
            "model.layers.0.mlp.up_proj.weight": (rows, 544),
            "model.layers.0.mlp.down_proj.weight": (544, rows),
            "model.layers.0.norm.weight": (545,),
            "model.layers.1.mlp.gate_proj.weight": (rows, 544),
            "model.layers.1.mlp.up_proj.weight": (rows, 544),
            "model.embed_tokens.weight": (1001, 544),
        }
        tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if inf and role == "post":
            tensors["model.embed_tokens.weight"][3, 5] = np.inf
        names = {name: f"model-0000{1 + ('layers.0' not in name)}-of-00002.safetensors" for name in shapes}
        folders[role] = root / role
        folders[role].mkdir(parents=True)
        for file in sorted(set(names.values())):
            part = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items() if names[n] == file}
            save_file(part, folders[role] / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": names}
        (folders[role] / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {"model_type": "x", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
        (folders[role] / "config.json").write_text(json.dumps(config))
    return folders


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def merge_arguments(folders: dict[str, Path], out: Path, *options: str) -> list[str]:
    """Return the arguments of ``python`` for a merge."""
    inputs = [f"--{role.replace('_', '-')}={folder}" for role, folder in folders.items()]
    return ["-m", "paramdelta", "merge", *inputs, f"--out={out}", "--threads=1", *options]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python command."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command to its end."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
