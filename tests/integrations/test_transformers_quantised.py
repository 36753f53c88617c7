"""load_merged of quantised checkpoints: the loader gets the codes and scales that a merged folder would have, and makes
of them what it makes of the folder, dequantised or held as they are where a CPU can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import paramdelta

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")
pytest.importorskip("compressed_tensors", reason="transformers decompresses with it")

from quantised_models import assert_complete, dequantised, load, make_models, on_a_cpu, quantise_gpt_oss  # noqa: E402
from test_transformers import same_model, state  # noqa: E402

from paramdelta.integrations.transformers import load_merged  # noqa: E402

FORMATS = ("fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "nvfp4", "mxfp4", "int4")
Folders = dict[str, Path]


@pytest.fixture(scope="module", params=["llama", "qwen3-moe"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_models(request.param, tmp_path_factory.mktemp("models"))


def both(folders: Folders, out: Path, **policies: Any) -> tuple[Any, Any]:
    """Return the models, in bf16, of a merge that is not written and of one that is."""
    paramdelta.merge(**folders, out=out, **policies)
    with on_a_cpu():
        here, info = load_merged(**folders, model_options=dequantised(out), **policies)
    assert_complete(info)
    return here, load(out)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_as_from_the_folder(name: str, folders: Folders, tmp_path: Path) -> None:
    here, there = both(folders, tmp_path / "out", format=name)
    same_model(here, there)
    assert here.dtype == torch.bfloat16


def test_quantised_checkpoints_go_in(tmp_path: Path) -> None:
    """gpt-oss, whose stacks are blocks and scales in all three."""
    folders = make_models("gpt-oss", tmp_path)
    for folder in folders.values():
        quantise_gpt_oss(folder)
    same_model(*both(folders, tmp_path / "out"))


def test_held_quantised(tmp_path: Path) -> None:
    """What the loader keeps in fp8, with its scales beside it, is kept."""
    folders = make_models("llama", tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "out", format="fp8-channel")
    here = load_merged(**folders, format="fp8-channel")
    same_model(here, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in state(here).values()}
