"""gpt-oss stores experts as blocks and scales, [experts, out, in], or as plain stacks, [experts, in, out]: any mix of
the two merges, and the output lies as its own kind does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

import paramdelta
from paramdelta import dtypes, reference
from paramdelta import reference_scaled as scaled
from paramdelta.formats import MXFP4_OPENAI
from paramdelta.plan import MergeRequest, make_plan, open_all
from paramdelta.plan.order import samples_of
from paramdelta.reference_scaled import Output, Scaled

BF16 = ml_dtypes.bfloat16
ROLES = ("post", "base", "new_base")
EXPERTS = 3
SHAPES = {"gate_up_proj": (66, 64), "down_proj": (64, 64)}  # out, in: the second is square
PREFIX = "model.layers.0.mlp.experts."


def make(folder: Path, seed: int, kind: str) -> dict[str, list[Scaled]]:
    """Write a checkpoint of either kind; return its matrices as [out, in]."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {"model.norm.weight": np.ones(64, BF16)}
    config: dict[str, Any] = {"model_type": "gpt_oss", "tie_word_embeddings": True}
    matrices: dict[str, list[Scaled]] = {}
    for part, shape in SHAPES.items():
        x = rng.normal(size=(EXPERTS, *shape)) * 0.02
        if kind == "plain":
            stack = x.astype(BF16)
            tensors[PREFIX + part] = np.ascontiguousarray(stack.swapaxes(1, 2))
            matrices[part] = [Scaled(e.view(np.uint16), "bf16") for e in stack]
            continue
        made = [scaled.quantise(e, MXFP4_OPENAI, 1, 32, "f8_e8m0") for e in x]
        codes = np.stack([scaled.pack(m.codes, "f4") for m in made])
        tensors[f"{PREFIX}{part}_blocks"] = codes.reshape(EXPERTS, shape[0], -1, 16)
        tensors[f"{PREFIX}{part}_scales"] = np.stack([m.scales for m in made])
        matrices[part] = [Scaled(m.codes, "f4", m.scales, "f8_e8m0", 1, 32) for m in made]
        config["quantization_config"] = {"quant_method": "mxfp4"}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return matrices


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = deserialize((folder / "model.safetensors").read_bytes())
    return {n: np.frombuffer(bytes(t["data"]), np.uint8).reshape(*t["shape"][:-1], -1) for n, t in found}


@pytest.mark.parametrize("wanted", [None, "bf16", "like-post"])
@pytest.mark.parametrize("kinds", list(itertools.product(("plain", "blocks"), repeat=3)), ids="-".join)
def test_any_mix_merges(kinds: tuple[str, str, str], wanted: str | None, tmp_path: Path) -> None:
    operands = {r: make(tmp_path / r, seed, kind) for seed, (r, kind) in enumerate(zip(ROLES, kinds, strict=True))}
    folders = {role: tmp_path / role for role in ROLES}
    paramdelta.merge(**folders, out=tmp_path / "out", format=wanted, memory=1 << 17, threads=2)
    kind = {None: kinds[2], "bf16": "plain", "like-post": kinds[0]}[wanted]
    found = stored(tmp_path / "out")
    for part in SHAPES:
        assert (PREFIX + part in found) == (kind == "plain")
        post, base, new = (operands[role][part] for role in ROLES)
        for e in range(EXPERTS):
            output = Output("bf16") if kind == "plain" else Output("f4", MXFP4_OPENAI, 1, 32, "f8_e8m0")
            made = scaled.merge_scaled(new[e], [scaled.ScaledTerm(post[e], base[e])], output, keep=True)
            if kind == "plain":
                np.testing.assert_array_equal(found[PREFIX + part][e].view(np.uint16).T, made.codes)
            else:
                blocks = found[f"{PREFIX}{part}_blocks"][e].reshape(SHAPES[part][0], -1)
                np.testing.assert_array_equal(blocks, scaled.pack(made.codes, "f4"))
                np.testing.assert_array_equal(found[f"{PREFIX}{part}_scales"][e], made.scales)
    assert paramdelta.verify(tmp_path / "out", **folders, everything=True).problems == ()


def test_what_is_only_copied_lies_as_its_kind_does(tmp_path: Path) -> None:
    operands = {role: make(tmp_path / role, seed, "blocks") for seed, role in enumerate(ROLES)}
    folders = {role: tmp_path / role for role in ROLES}
    paramdelta.merge(**folders, out=tmp_path / "out", format="bf16", exclude="*experts*")
    for part, matrices in operands["new_base"].items():
        for e, matrix in enumerate(matrices):
            codes, _ = reference.encode(scaled.decode(matrix), dtypes.BF16)
            found = stored(tmp_path / "out")[PREFIX + part][e].view(np.uint16).T
            np.testing.assert_array_equal(found, codes)


def test_samples_of_turned_blocks_are_their_values(tmp_path: Path) -> None:
    kinds = ("blocks", "blocks", "plain")
    operands = {r: make(tmp_path / r, seed, kind) for seed, (r, kind) in enumerate(zip(ROLES, kinds, strict=True))}
    request = MergeRequest.build(**{role: tmp_path / role for role in ROLES})
    samples = [s for s in samples_of(make_plan(request, *open_all(request)).work) if s[0].ndim == 2]
    assert len(samples) > 2
    for sample in samples:  # of which matrix is not known
        for number, role in enumerate(ROLES):
            values = [scaled.decode(m).T for part in operands[role].values() for m in part]
            assert sum(v.shape == sample[number].shape and (v == sample[number]).all() for v in values) == 1
