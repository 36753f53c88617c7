"""Merges of checkpoints that store the same model in three different ways, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import families_fp8 as fp8
import families_low_bit as low
import numpy as np
import pytest
from quantised_merges import (
    Case,
    Folders,
    Layout,
    check_same,
    deltas,
    expected,
    make_folders,
    places,
    read,
    store,
    values_of,
    weight_values,
    write,
)
from stored_forms import (
    BF16,
    BLOCKS,
    BLOCKS_BF16,
    BLOCKS_UE8M0,
    DOT_E8M0,
    DOT_FP4,
    F16,
    F32,
    FBGEMM,
    GPT_OSS,
    MISTRAL,
    NVFP4_MODELOPT,
)

import paramdelta
from paramdelta import reference_scaled as scaled

UE8M0 = fp8.FINE | {"scale_fmt": "ue8m0"}
MISTRAL_CONFIG = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
NVFP4_FILE = {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}}


def fp4_experts() -> Layout:
    """A model whose MLP is stored as DeepSeek-V4 stores experts."""
    weights = {n: (s, DOT_FP4 if ".mlp." in n else f) for n, (s, f) in fp8.llama_weights(DOT_E8M0).items()}
    return Layout(weights=weights, config=fp8.config_of("llama", UE8M0, expert_dtype="fp4"), shards=2)


STORED: Mapping[str, Layout] = {
    "bf16": fp8.llama(BF16, None),
    "nvfp4": low.NVFP4,
    "fp8-block": fp8.llama(BLOCKS, fp8.FINE, shards=2),
    "int4": low.INT4_LAYOUT,
    "fp8-channel": fp8.CHANNEL_LAYOUT,
    "mxfp4": low.MXFP4,
    "f32": fp8.llama(F32, None),
    "modelopt-nvfp4": fp8.llama(NVFP4_MODELOPT, None, files=NVFP4_FILE),
    "fp8-block-bf16": fp8.llama(BLOCKS_BF16, fp8.FINE),
    "mxfp8": fp8.minimax_m3(),
    "modelopt-fp8": fp8.modelopt_fp8(),
    "fp8-block-ue8m0": fp8.llama(BLOCKS_UE8M0, UE8M0),
    "fbgemm": fp8.llama(FBGEMM, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "f16": fp8.llama(F16, None),
    "fp4-experts": fp4_experts(),
    "mistral": fp8.llama(MISTRAL, MISTRAL_CONFIG),
}
READ_ONLY: Mapping[str, Layout] = {"fnuz": fp8.FNUZ_LAYOUT, "int4-asymmetric": low.ASYMMETRIC}


def mixes() -> dict[str, tuple[str, str, str]]:
    """Return triples in which every way of storing is once each role, with the named ones first."""
    names = list(STORED)
    triples = [("fp8-block", "bf16", "nvfp4"), ("int4", "fp8-channel", "mxfp4")]
    triples += [(names[k], names[(k + 5) % len(names)], names[(k + 11) % len(names)]) for k in range(len(names))]
    triples += [("fnuz", "int4-asymmetric", "fp8-channel"), ("int4-asymmetric", "fnuz", "bf16")]
    return {"-".join(t): t for t in triples}


def case_of(post: str, base: str, new_base: str) -> Case:
    """Return the merge of three ways of storing; models of one type, so that their configs differ in nothing else."""
    every = STORED | READ_ONLY
    layouts = [replace(every[n], config={**every[n].config, "model_type": "llama"}) for n in (post, base, new_base)]
    options = {"alpha": 0.7, "activation_scales": "new-base"}
    return Case(post=layouts[0], base=layouts[1], new_base=layouts[2], options=options)


CASES = {name: case_of(*triple) for name, triple in mixes().items()}
every_mix = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@every_mix
def test_mix(case: Case, policy: str, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """The sum in binary64 of whatever each operand's codes are worth, quantised once as new_base is."""
    folders, out = folders_of(case), tmp_path / "out"
    paramdelta.merge(**folders.sources(), out=out, scale_policy=policy, **case.options)
    check_same(read(out), expected(case, folders, policy))
    assert places(out) == places(folders.new_base)
    assert (out / "config.json").read_bytes() == (folders.new_base / "config.json").read_bytes()
    assert paramdelta.verify(out, **folders.sources(), everything=True).problems == ()


@every_mix
def test_no_difference(case: Case, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """post == base in any format: new_base's tensors byte for byte."""
    folders, out = folders_of(case), tmp_path / "out"
    sources = {"post": folders.base, "base": folders.base, "new_base": folders.new_base}
    paramdelta.merge(**sources, out=out, **case.options)
    check_same(read(out), read(folders.new_base))


@pytest.mark.parametrize("new_base", ["bf16", "fp8-block", "nvfp4", "int4"])
def test_equal_values_in_different_formats(new_base: str, tmp_path: Path) -> None:
    """Codes and scales of two formats may be worth the same: such a delta is zero, and new_base stays as it is."""
    post, base = STORED["fp8-block"], STORED["f32"]
    case = Case(post=post, base=base, new_base=STORED[new_base])
    folders = make_folders(tmp_path, case)
    tensors = read(folders.post)
    values: dict[str, Any] = {}
    for name, (shape, form) in post.weights.items():
        matrices = form.read(name, tensors, shape).matrices
        values[name] = np.stack([scaled.decode(m) for m in matrices]).reshape(shape)
        if form.recipe:  # scales of few bits, so that the products are binary32
            data = np.frombuffer(tensors[form.names(name)["scale"]].data, np.uint32) & np.uint32(0xFFFF0000)
            scale = form.names(name)["scale"]
            tensors[scale] = tensors[scale]._replace(data=data.tobytes())
            matrices = form.read(name, tensors, shape).matrices
            values[name] = np.stack([scaled.decode(m) for m in matrices]).reshape(shape)
    write(tmp_path / "coarse", post, tensors)
    write(tmp_path / "wide", base, store(base, values, "base"))
    sources = {"post": tmp_path / "coarse", "base": tmp_path / "wide", "new_base": folders.new_base}
    paramdelta.merge(**sources, out=tmp_path / "out")
    check_same(read(tmp_path / "out"), read(folders.new_base))


def test_blocks_of_gpt_oss_on_plain_stacks(tmp_path: Path) -> None:
    """The plain release of gpt-oss stores its stacks transposed, [E, in, out]: post and base plain, new_base blocks."""
    layout = low.gpt_oss()
    new_base = write(tmp_path / "new_base", layout, store(layout, values_of(layout, "new_base"), "new_base"))
    turned = {n: ((*s[:-2], s[-1], s[-2]) if f is GPT_OSS else s, BF16) for n, (s, f) in layout.weights.items()}
    plain = replace(layout, weights=turned, config=fp8.config_of("gpt_oss"), shards=1)
    values: dict[str, dict[str, Any]] = {"post": {}, "base": {}}
    for number, (name, (shape, form)) in enumerate(sorted(layout.weights.items())):
        base = weight_values(number, shape, seed=1)
        post = base + deltas(number, shape)
        for role, value in (("post", post), ("base", base)):
            values[role][name] = np.swapaxes(value, -1, -2) if form is GPT_OSS else value
    folders = {role: write(tmp_path / role, plain, store(plain, values[role], role)) for role in ("post", "base")}
    paramdelta.merge(**folders, new_base=new_base, out=tmp_path / "out", scale_policy="recompute")
    found, stored = read(tmp_path / "out"), read(new_base)
    for name, (shape, form) in layout.weights.items():
        if form is not GPT_OSS:
            continue
        first = form.read(name, stored, shape).matrices
        after = form.read(name, found, shape).matrices
        others = [BF16.read(name, read(folders[role]), turned[name][0]).matrices for role in ("post", "base")]
        for new, made, post, base in zip(first, after, *others, strict=True):
            acc = scaled.decode(new) + (scaled.decode(post).T - scaled.decode(base).T)
            want = scaled.quantise(acc, form.made_by, 1, 32, "f8_e8m0")
            assert np.array_equal(made.codes, want.codes)
            assert np.array_equal(made.scales, want.scales)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == layout.config
    sources = {**folders, "new_base": new_base}
    assert paramdelta.verify(tmp_path / "out", **sources, everything=True).problems == ()
