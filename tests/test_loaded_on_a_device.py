"""Merges into tensors that lie on a GPU, run where there is none: the stage and the kernels of csrc/cuda compiled for
the host, whose device memory is memory. Operands there are merged where they lie."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_loaded import ROLES, Arrays, copied, made, same, write

sys.path.insert(0, str(Path(__file__).parent / "conformance"))

import cuda_on_host

import paramdelta
from paramdelta import engine, loaded
from paramdelta.checkpoint import HeldTensor
from paramdelta.deltas import apply_request
from paramdelta.errors import DeviceError, PartlyMergedError
from paramdelta.loaded_tensors import Loaded, read_model
from paramdelta.memory import DeviceMemory
from paramdelta.plan import make_request

pytestmark = pytest.mark.skipif(cuda_on_host.why_not() is not None, reason=str(cuda_on_host.why_not()))


def on_device(tensor: HeldTensor, device: str = "cuda:0") -> HeldTensor:
    place = tensor.memory.place
    there = DeviceMemory(place.__array_interface__["data"][0], place.nbytes)
    return replace(tensor, device=device, memory=replace(tensor.memory, place=there))


def held(model: Arrays, *names: str) -> Loaded:
    """Return a model of which the tensors named, by default all, lie on a device."""
    found = read_model(model, None, [])
    return Loaded(tuple(on_device(t) if not names or t.names[0] in names else t for t in found.tensors), found.config)


def options(**changed: Any) -> dict[str, engine.EngineOptions]:
    """Return the options by device: one stage for all batches."""
    stages = {"cpu": None, "cuda:0": cuda_on_host.module().stage(0)}
    return {
        device: engine.EngineOptions(threads=2, stage=stage, device=device, **changed)
        for device, stage in stages.items()
    }


@pytest.mark.parametrize("rehearse", [False, True], ids=["", "rehearsed"])
@pytest.mark.parametrize("role", ["new_base", "post"])
@pytest.mark.parametrize("memory", [None, 1 << 18], ids=["default", "smallest"])
def test_tensors_are_merged_where_they_lie(tmp_path: Path, role: str, memory: int | None, rehearse: bool) -> None:
    values = made(tmp_path)
    folders = {r: Path("the model") if r == role else tmp_path / r for r in ROLES}
    request = make_request(**folders, held=role, alpha=0.7)
    model = copied(values[role])
    report = loaded.merge_held(
        held(model), request, role=role, rehearse=rehearse, options=options(memory=memory), batch_bytes=1 << 16
    )
    same(model, values["out"])
    assert report.device == "cuda:0"


def test_a_model_on_several_devices(tmp_path: Path) -> None:
    values = made(tmp_path)
    request = make_request(
        post=tmp_path / "post", base=tmp_path / "base", new_base=Path("x"), held="new_base", alpha=0.7
    )
    model = copied(values["new_base"])
    report = loaded.merge_held(held(model, "a", "c"), request, role="new_base", options=options())
    same(model, values["out"])
    assert report.device == "cpu, cuda:0"


@pytest.mark.parametrize("memory", [None, 1 << 18], ids=["default", "smallest"])
def test_quantised_operands_meet_weights_of_the_device(tmp_path: Path, memory: int | None) -> None:
    rng = np.random.default_rng(1)
    values = {role: {"x.weight": rng.normal(size=(300, 257)).astype(np.float32)} for role in ROLES}
    for role, arrays in values.items():
        write(tmp_path / role, arrays)
    paramdelta.extract(post=tmp_path / "post", base=tmp_path / "base", out=tmp_path / "delta", dtype="f8")
    paramdelta.apply(new_base=tmp_path / "new_base", deltas=tmp_path / "delta", out=tmp_path / "out")
    model = copied(values["new_base"])
    request = apply_request(new_base=Path("x"), deltas=tmp_path / "delta", held="new_base")
    loaded.merge_held(held(model), request, role="new_base", options=options(memory=memory), batch_bytes=1 << 16)
    same(model, load_file(tmp_path / "out" / "model.safetensors"))


def test_a_stage_without_memory_is_refused(tmp_path: Path) -> None:
    values = made(tmp_path)
    request = make_request(post=tmp_path / "post", base=tmp_path / "base", new_base=Path("x"), held="new_base")
    model = copied(values["new_base"])
    with pytest.raises(ValueError, match="need a stage that computes there"):
        loaded.merge_held(held(model), request, role="new_base", options={"cuda:0": engine.EngineOptions(threads=1)})
    same(model, values["new_base"])


def test_a_device_that_fails_on_the_way(tmp_path: Path) -> None:
    """More deltas than a kernel takes is what can fail without a GPU. Tensors of the processor came first."""
    values = made(tmp_path)
    most = cuda_on_host.module().most_terms()
    folders = {role: [tmp_path / role] * (most + 1) for role in ("post", "base")}
    request = make_request(**folders, new_base=Path("x"), held="new_base", alpha=1e-3)
    with pytest.raises(PartlyMergedError, match="at most") as caught:
        loaded.merge_held(
            held(copied(values["new_base"]), "e"), request, role="new_base", options=options(memory=1 << 25)
        )
    assert isinstance(caught.value.__cause__, DeviceError)
    assert set(caught.value.done) == set(values["new_base"]) - {"e"}
    assert caught.value.in_part == ("e",)
