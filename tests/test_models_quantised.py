"""Folders in quantised formats, loaded by transformers on a CPU: nothing is missing, every weight is what the reference
decodes, and the model computes what the same merge in bf16 computes, up to what quantising lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from quantised_models import (
    SIZES,
    assert_complete,
    decoded,
    distance,
    load,
    logits,
    make_models,
    torch,
)

import paramdelta

FAMILIES = ("llama", "qwen3", "qwen3-moe")
FORMATS = ("fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "nvfp4", "mxfp4", "int4")

# q, k, v, o, gate, up and down of a layer.
MATRICES = 7 * SIZES["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """The folders of a family, and the logits of its merge in bf16 and of new_base."""

    folders: dict[str, Path]
    merged: Any
    own: Any


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    folders = make_models(request.param, folder)
    paramdelta.merge(**folders, out=folder / "bf16", format="bf16")
    merged, own = (logits(load(at)[0]) for at in (folder / "bf16", folders["new_base"]))
    return Family(folders, merged, own)


def check(out: Path, plain: Path, lost: float, merged: Any, own: Any) -> None:
    """Load ``out``; compare its weights with the reference's, to the bit, and its logits with those of the merge.

    Each matrix multiplies its output's error by about (1 + what it lost), and errors of different matrices have nothing to do
    with each other: through n matrices they add up like the sides of a right angle, to √n · lost.
    """
    model, info = load(out)
    assert_complete(info)
    twin, info = load(decoded(out, plain))
    assert_complete(info)
    theirs, ours = model.state_dict(), twin.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == torch.bfloat16, name
        assert torch.equal(theirs[name].view(torch.int16), value.view(torch.int16)), name
    got = logits(model)
    bound = math.sqrt(MATRICES) * lost
    print(distance(got, merged), bound, distance(own, merged))
    assert 0 < distance(got, merged) < bound
    assert distance(got, own) > 2 * distance(got, merged), "the delta cannot be told from the noise"


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_merge_loads(name: str, family: Family, tmp_path: Path) -> None:
    report = paramdelta.merge(**family.folders, out=tmp_path / "out", format=name)
    (quantised,) = report.quantised
    check(tmp_path / "out", tmp_path / "plain", quantised.relative_error, family.merged, family.own)
