"""Folders in quantised formats, loaded by transformers on a CPU: nothing is missing, every weight is what the reference
decodes, and the model computes what the same merge in bf16 computes, up to what quantising lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from quantised_models import (
    SIZES,
    assert_complete,
    bf16_of,
    decoded,
    distance,
    load,
    logits,
    make_models,
    quantise_fp8,
    quantise_gpt_oss,
    tensors_of,
    torch,
    values_of,
)

import paramdelta
from paramdelta.checkpoint import open_checkpoint, recognise

compressed_tensors = pytest.importorskip("compressed_tensors", reason="it decompresses what is compared here")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402

FAMILIES = ("llama", "qwen3", "qwen3-moe")
FORMATS = ("fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "nvfp4", "mxfp4", "int4")
COMPRESSED = ("fp8-channel", "fp8-tensor", "nvfp4", "mxfp4", "int4")
NVFP4_EXPERTS = (
    "transformers leaves out weight_global_scale where it decompresses NVFP4 experts (CompressedTensorsDequantize): "
    "all else is equal, and compressed-tensors itself gives the experts' values"
)

# q, k, v, o, gate, up and down of a layer.
MATRICES = 7 * SIZES["num_hidden_layers"]


def never(_: str) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """The folders of a family, and the logits of its merge in bf16 and of new_base."""

    folders: dict[str, Path]
    merged: Any
    own: Any


def make_family(name: str, folder: Path) -> Family:
    folders = make_models(name, folder)
    paramdelta.merge(**folders, out=folder / "bf16", format="bf16")
    merged, own = (logits(load(at)[0]) for at in (folder / "bf16", folders["new_base"]))
    return Family(folders, merged, own)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("llama", tmp_path_factory.mktemp("variants"))


def check(out: Path, plain: Path, lost: float, merged: Any, own: Any, *, but: Callable[[str], bool] = never) -> None:
    """Load ``out``; compare its weights with the reference's, to the bit, and its logits with those of the merge.

    A matrix that lost a part ε of its norm adds about ε of its output as an error, and errors of different matrices
    have nothing to do with each other: along n matrices they add up as sides of right angles do, to √n · ε. ``but``
    names parameters that the loader is known to get wrong; logits are then those of the reference's weights.
    """
    model, info = load(out)
    assert_complete(info)
    twin, info = load(decoded(out, plain))
    assert_complete(info)
    theirs, ours = model.state_dict(), twin.state_dict()
    assert theirs.keys() == ours.keys()
    different = [name for name, value in ours.items() if not same_bits(theirs[name], value)]
    assert not [name for name in different if not but(name)]
    got = logits(twin if different else model)
    assert 0 < distance(got, merged) < math.sqrt(MATRICES) * lost
    assert distance(got, own) > 2 * distance(got, merged), "the delta cannot be told from the noise"
    if different:
        pytest.skip(NVFP4_EXPERTS)


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype == torch.bfloat16 and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_merge_loads(name: str, family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = paramdelta.merge(**family.folders, out=out, format=name)
    (quantised,) = report.quantised
    if name in COMPRESSED:
        assert_decompressed(out)
    wrong = (lambda n: ".experts." in n) if name == "nvfp4" else never
    check(out, tmp_path / "plain", quantised.relative_error, family.merged, family.own, but=wrong)


def assert_decompressed(out: Path) -> None:
    """compressed-tensors itself, asked weight by weight, gives what the reference decodes."""
    checkpoint = open_checkpoint(out)
    found, _ = recognise(checkpoint)
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    stored = tensors_of(out)
    assert found.weights
    for name, weight in found.weights.items():
        module = name.removesuffix("weight")
        state = {n.removeprefix(module): t for n, t in stored.items() if n.startswith(module)}
        value = compressor.decompress(state, scheme)["weight"].bfloat16()
        expected = torch.from_numpy(values_of(checkpoint, weight)[0]).float().bfloat16()
        assert same_bits(value, expected), name


def test_gpt_oss_blocks_take_a_delta_from_plain_stacks(tmp_path: Path) -> None:
    """new_base has blocks and scales; post and base have stacks in bf16, which lie the other way round."""
    folders = make_models("gpt-oss", tmp_path)
    original, info = load(folders["new_base"])
    assert_complete(info)
    quantise_gpt_oss(folders["new_base"])
    own, info = load(folders["new_base"])
    assert_complete(info)
    assert distance(logits(own), logits(original)) < 0.5, "blocks and plain stacks lie differently"

    report = paramdelta.merge(**folders, out=tmp_path / "bf16", format="bf16")
    assert not report.quantised
    merged, info = load(tmp_path / "bf16")
    assert_complete(info)
    report = paramdelta.merge(**folders, out=tmp_path / "out")
    (quantised,) = report.quantised
    assert quantised.format == "mxfp4"
    assert quantised.tensors == 2 * SIZES["num_hidden_layers"]
    check(tmp_path / "out", tmp_path / "plain", quantised.relative_error, logits(merged), logits(own))
    assert paramdelta.verify(tmp_path / "out", **folders, everything=True).problems == ()

    stacks = {role: load(folders[role])[0].state_dict() for role in ("post", "base", "new_base")}
    for name, value in merged.state_dict().items():
        p, b, n = (stacks[role][name].double() for role in ("post", "base", "new_base"))
        assert same_bits(value, bf16_of(torch.where(p == b, n, n + (p - b)).numpy())), name


@pytest.mark.parametrize("quantiser", ["transformers", "reference"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_fp8_folders_merge_and_load(name: str, quantiser: str, tmp_path: Path) -> None:
    folders = make_models(name, tmp_path)
    for folder in folders.values():
        quantise_fp8(folder, theirs=quantiser == "transformers")
    paramdelta.merge(**folders, out=tmp_path / "bf16", format="bf16")
    merged, own = (logits(load(at)[0]) for at in (tmp_path / "bf16", folders["new_base"]))
    (quantised,) = paramdelta.merge(**folders, out=tmp_path / "out").quantised
    assert quantised.format == "fp8-block"
    old, new = (json.loads((at / "config.json").read_text()) for at in (folders["new_base"], tmp_path / "out"))
    assert old["quantization_config"] == new["quantization_config"]
    check(tmp_path / "out", tmp_path / "plain", quantised.relative_error, merged, own)


VARIANTS: dict[str, dict[str, Any]] = {
    "int4, a scale for each row": {"format": "int4", "block_size": "1x0"},
    "int4, groups of 64": {"format": "int4", "block_size": 64, "scale_type": "f32"},
    "fp8, blocks of 64x128": {"format": "fp8-block", "block_size": "64x128"},
    "fp8, powers of two": {"format": "fp8-block", "scale_type": "ue8m0"},
    "fp8, powers of two as bytes": {"format": "fp8-block", "scale_type": "e8m0"},
    "fp8, scales in bf16": {"format": "fp8-block", "scale_type": "bf16"},
    "fp8, rows with scales in f32": {"format": "fp8-channel", "scale_type": "f32"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_formats_load(options: dict[str, Any], variants: Family, tmp_path: Path) -> None:
    (quantised,) = paramdelta.merge(**variants.folders, out=tmp_path / "out", **options).quantised
    check(tmp_path / "out", tmp_path / "plain", quantised.relative_error, variants.merged, variants.own)
