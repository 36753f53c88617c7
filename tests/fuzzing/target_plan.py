"""Fuzz target: from three folders to a published one. Bytes become three small checkpoints and a request; either both
are refused with complaints, or the plan is made: then the engine takes its columns, the merge runs to its end, and what
it wrote is what the reference computes."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import folders
import refusals
from choices import Choices

from paramdelta import engine, verification
from paramdelta.errors import InputError
from paramdelta.merging import prepare, run_merge
from paramdelta.plan import MergeRequest

ROLES = ("post", "base", "new_base")
_MODULES = (
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.0.gate_proj",
    "model.layers.0.mlp.experts.1.gate_proj",
    "lm_head",
)
_SIZES = ((8, 64), (4, 32), (9, 33), (1, 1), (0, 8), (130, 16))
_FORMATS = (None, "like-post", "bf16", "fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "mxfp4", "nvfp4", "int4")
_BLOCKS = (None, "1x8", "2x16", "32", "128x128", "1x0")


def seeds() -> list[bytes]:
    """Return inputs from which the fuzzer starts: every storage merged with itself, and with others."""
    count = len(folders.STORAGES)
    same = [bytes([0, i, 0, i, i, i]) for i in range(count)]
    mixed = [bytes([1, i, i + 1, i, i + 3, i + 5, i * 7]) + bytes(range(i, i + 40)) for i in range(count)]
    tied = [b"\2\0\6" + bytes([i] * 5) + bytes(range(i * 9, i * 9 + 60)) for i in range(4)]
    numbers = random.Random(5)
    return same + mixed + tied + [bytes([i % 3]) + numbers.randbytes(120) for i in range(30)]


def run(data: bytes) -> None:
    """Make the folders and the request, plan, merge and verify."""
    choices = Choices(data)
    with tempfile.TemporaryDirectory(dir=folders.MEMORY) as root:
        try:
            paths = _folders(choices, Path(root))
            request = _request(choices, paths, Path(root) / "out")
            plan = prepare(request)
        except InputError as error:
            refusals.check(error)
            return
        memory = choices.pick((None, 1 << 20, 1 << 17))
        run_merge(plan, options=engine.EngineOptions(threads=choices.pick((1, 2)), memory=memory))
        report = verification.verify(Path(root) / "out", **paths, everything=True)
        assert not report.problems, "\n".join(report.problems)


def _folders(choices: Choices, root: Path) -> dict[str, Path]:
    modules = [choices.pick(_MODULES) for _ in range(1 + choices.number(0, 2))]
    storages = {role: choices.pick(folders.STORAGES) for role in ROLES}
    sizes = {module: choices.pick(_SIZES) for module in modules}
    paths = {}
    for role, storage in storages.items():
        tensors: folders.Tensors = {"model.embed_tokens.weight": ("BF16", (8, 4)), "model.norm.weight": ("BF16", (5,))}
        for module in modules:
            rows, cols = sizes[module]
            tensors |= storage.planes(module, rows + (choices.odds(16) and 1), cols)
        while choices.odds(12):
            tensors = folders.odd_tensors(tensors, choices)
        config: dict[str, Any] = {"model_type": "toy", "tie_word_embeddings": choices.odds(3)}
        if storage.config is not None:
            config["quantization_config"] = dict(storage.config)
        if choices.odds(10):
            config = folders.odd_config(config, choices)
        paths[role] = folders.write_folder(root / role, tensors, config, choices)
    return paths


def _request(choices: Choices, paths: dict[str, Path], out: Path) -> MergeRequest:
    options: dict[str, Any] = {}
    if choices.odds(2):
        options["alpha"] = choices.pick((1.0, 0.0, -0.5, 1e-3, 1e300))
    if choices.odds(3):
        options["format"] = choices.pick(_FORMATS)
        options["block_size"] = choices.pick(_BLOCKS) if choices.odds(3) else None
        options["scale_type"] = choices.pick((None, "f32", "bf16", "ue8m0", "e8m0")) if choices.odds(3) else None
    if choices.odds(4):
        options["scale_policy"] = "recompute"
    if choices.odds(4):
        options["activation_scales"] = choices.pick(("post", "new-base", "drop"))
    if choices.odds(3):
        options["copy_from"] = choices.pick(("new-base", "post"))
    if choices.odds(4):
        options["vocab"] = "extend"
    if choices.odds(6):
        options["dtype"] = choices.pick(("bf16", "f32", "f16", "f64"))
    if choices.odds(6):
        options["max_shard_size"] = choices.pick((1, 1000, 5000))
    if choices.odds(6):
        options["exclude"] = choices.pick(("*", "*proj*", "lm_head*", "*_scale*"))
    unscaled = not choices.odds(4)
    return MergeRequest.build(**paths, out=out, allow_nonfinite=True, allow_unscaled=unscaled, **options)
