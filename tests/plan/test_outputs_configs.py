"""What an output's config says is what its folder holds: every wanted format, from every way of storing the inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from consumers import check_promises, folder_json
from quantised_toys import MODULES, STORAGES, folders, formats_of, skeleton

from plan_folders import plan
from paramdelta.checkpoint import recognise

FORMATS = ("like-post", "bf16", "fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "mxfp4", "nvfp4", "int4")
CONFIGS = ("config.json", "hf_quant_config.json")


@pytest.mark.parametrize("format_", [None, *FORMATS])
@pytest.mark.parametrize("storage", STORAGES)
def test_config_and_tensors_agree(storage: str, format_: str | None, tmp_path: Path) -> None:
    sources = folders(tmp_path, storage, storage, storage)
    made = plan(sources, format=format_)
    out = skeleton(made, tmp_path / "out")
    check_promises(out, MODULES)
    found, complaints = recognise(out)
    assert complaints == []
    assert {n.removesuffix(".weight"): w.format.name for n, w in found.weights.items()} == formats_of(made)
