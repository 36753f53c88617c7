"""What an output's config says is what its folder holds: every wanted format, from every way of storing the inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from consumers import check_promises, promises
from plan_folders import plan
from quantised_toys import HEAD, LINEAR, MODULES, RAGGED, STORAGES, folders, formats_of, skeleton

from paramdelta.checkpoint import Checkpoint, open_checkpoint, recognise

FORMATS = ("like-post", "bf16", "fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "mxfp4", "nvfp4", "int4")
CONFIGS = ("config.json", "hf_quant_config.json")


def merged(root: Path, roles: tuple[str, str, str], head: bool = True, **options: Any) -> tuple[Checkpoint, set[str]]:
    """Plan a merge of toys, check the output's config against its tensors, and that the package itself recognises the
    formats that were planned; return the output and its quantised modules."""
    made = plan(folders(root, *roles, head=head), **options)
    out = skeleton(made, root / "out")
    check_promises(out, MODULES)
    found, complaints = recognise(out)
    assert complaints == []
    assert {w.name.removesuffix(".weight"): w.format.name for w in found.weights.values()} == formats_of(made)
    assert not found.weights or [w.format for w in found.weights.values()] == [f for f in made.stored.formats if f]
    return out, {name for name, promise in promises(out, MODULES)[0].items() if promise is not None}


def same_configs(out: Checkpoint, source: Path) -> bool:
    """Whether the configs of two folders are equal to the byte."""

    def content(folder: Path) -> list[bytes | None]:
        return [(folder / name).read_bytes() if (folder / name).exists() else None for name in CONFIGS]

    return content(out.path) == content(source)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_format_from_every_storage(storage: str, format_: str, tmp_path: Path) -> None:
    """A wanted format is written for what is a linear layer, or for what is quantised already; where the sources have
    that very format, their own variant of it and their config are kept."""
    stored = STORAGES[storage]
    out, quantised = merged(tmp_path, (storage, storage, storage), format=format_)
    if format_ == "bf16":
        assert quantised == set()
    elif format_ in ("like-post", stored.format):
        assert quantised == set(stored.quantised())
        assert same_configs(out, tmp_path / "new_base")
    else:
        grouped = format_ in ("mxfp8", "mxfp4", "nvfp4", "int4")
        assert quantised == (set(LINEAR) if grouped or stored.grouped else {*LINEAR, RAGGED})


@pytest.mark.parametrize("storage", STORAGES)
def test_an_output_like_new_base_keeps_its_configs(storage: str, tmp_path: Path) -> None:
    out, quantised = merged(tmp_path, (storage, storage, storage))
    assert same_configs(out, tmp_path / "new_base")
    assert quantised == set(STORAGES[storage].quantised())


@pytest.mark.parametrize("storage", [name for name in STORAGES if STORAGES[name].format])
@pytest.mark.parametrize("role", ["new_base", "post"])
def test_one_quantised_checkpoint_among_plain_ones(storage: str, role: str, tmp_path: Path) -> None:
    """The output is as new_base is, or as post is where that is wanted, and so is its quantisation config."""
    roles = ("plain", "plain", storage) if role == "new_base" else (storage, "plain", "plain")
    options = {} if role == "new_base" else {"format": "like-post"}
    scales = role.replace("_", "-")
    out, quantised = merged(tmp_path, roles, activation_scales=scales, **options)
    assert quantised == set(STORAGES[storage].quantised())
    if role == "new_base":
        assert same_configs(out, tmp_path / role)
    found, source = recognise(out)[0], recognise(open_checkpoint(tmp_path / role))[0]
    assert (found.config, found.config_place) == (source.config, source.config_place)


@pytest.mark.parametrize("storage", [name for name in STORAGES if STORAGES[name].format])
def test_a_plain_new_base_gives_a_plain_output(storage: str, tmp_path: Path) -> None:
    out, quantised = merged(tmp_path, (storage, storage, "plain"))
    assert quantised == set()
    assert same_configs(out, tmp_path / "new_base")


@pytest.mark.parametrize("storage", [name for name in STORAGES if STORAGES[name].format])
@pytest.mark.parametrize("format_", ["bf16", "f16", "f32"])
def test_plain_outputs_of_quantised_checkpoints(storage: str, format_: str, tmp_path: Path) -> None:
    """What was quantised is written in the plain dtype, what was plain as it was; no config mentions quantisation."""
    out, quantised = merged(tmp_path, (storage, storage, storage), format=format_)
    assert quantised == set()
    assert "quantization_config" not in out.config
    assert not (out.path / CONFIGS[1]).exists()
    table = out.tensors
    for name in MODULES:
        wanted = format_ if name in STORAGES[storage].quantised() else "bf16"
        assert table.dtype_of(table.row(f"{name}.weight")).name == wanted


@pytest.mark.parametrize("format_", ["fp8-block", "fp8-channel", "nvfp4"])
@pytest.mark.parametrize("storage", ["plain", "blocks", "channels", "modelopt nvfp4"])
def test_a_tied_head_is_listed_where_configs_are_written(storage: str, format_: str, tmp_path: Path) -> None:
    """The module is there, although no tensor of its own is stored: a loader would look for its scales."""
    _, quantised = merged(tmp_path, (storage, storage, storage), head=False, format=format_)
    assert HEAD not in quantised


SPARED = {
    "one": (["model.layers.0.self_attn.k_proj.weight"], {"model.layers.0.self_attn.k_proj"}),
    "attention": (["*self_attn*"], {n for n in (*LINEAR, RAGGED) if "self_attn" in n}),
    "experts": (["*.experts.*", "*o_proj*"], {n for n in LINEAR if "experts" in n or "o_proj" in n}),
}


@pytest.mark.parametrize(("globs", "spared"), SPARED.values(), ids=SPARED.keys())
@pytest.mark.parametrize("format_", ["fp8-block", "fp8-channel", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("storage", ["plain", "blocks", "channels", "mxfp8", "nvfp4", "modelopt nvfp4", "fbgemm"])
def test_what_is_not_to_be_quantised(
    storage: str, format_: str, globs: list[str], spared: set[str], tmp_path: Path
) -> None:
    """Plain, and listed in the config, whether that is a new one or the sources' own with names added."""
    roles = (storage, storage, storage)
    _, quantised = merged(tmp_path, roles, format=format_, no_quantise=globs)
    possible = {*LINEAR, RAGGED} if format_.startswith("fp8") else set(LINEAR)
    if STORAGES[storage].grouped or format_ == STORAGES[storage].format:
        possible &= set(STORAGES[storage].quantised())
    assert quantised == possible - spared
