"""Models of transformers, merged in place: what from_pretrained makes of the merged folder, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import paramdelta
from paramdelta.errors import InputError

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")

from test_models import FAMILIES, make_models  # noqa: E402

ROLES = ("post", "base", "new_base")


def load(family: str, folder: Path) -> Any:
    return getattr(transformers, FAMILIES[family].auto).from_pretrained(folder, dtype="auto")


def state(model: Any) -> dict[str, Any]:
    """Return every parameter and buffer, those too that are not saved."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def same(one: Any, other: Any) -> None:
    """Tensors, ties and logits, bit for bit."""
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        raw = [t.detach().reshape(-1).view(torch.uint8) for t in (tensor, b[name])]
        assert torch.equal(*raw), name
        assert tensor.requires_grad == b[name].requires_grad, name
    assert [[t is u for u in a.values()] for t in a.values()] == [[t is u for u in b.values()] for t in b.values()]
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = [model.eval()(tokens).logits.view(torch.uint8) for model in (one, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_that_of_the_folder(family: str, tmp_path: Path) -> None:
    make_models(FAMILIES[family], tmp_path)
    folders = {role: tmp_path / role for role in ROLES}
    written = paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.7)
    there = load(family, tmp_path / "out")
    model = load(family, folders["new_base"])
    before = {name: tensor.data_ptr() for name, tensor in state(model).items()}
    report = paramdelta.merge_into(model, post=folders["post"], base=folders["base"], alpha=0.7)
    same(model, there)
    assert {name: tensor.data_ptr() for name, tensor in state(model).items()} == before
    assert (report.out, report.files, report.device) == (None, 0, "cpu")
    assert report.parameters == written.parameters
    assert report.bytes_read == written.bytes_read * 2 // 3, "new_base is read from disk"
    assert report.bytes_written == written.bytes_written


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_a_trained_model_is_carried_over(family: str, tmp_path: Path) -> None:
    """The model is post; base and new_base are folders."""
    make_models(FAMILIES[family], tmp_path)
    folders = {role: tmp_path / role for role in ROLES}
    paramdelta.merge(**folders, out=tmp_path / "out")
    model = load(family, folders["post"])
    paramdelta.merge_into(model, base=folders["base"], new_base=folders["new_base"])
    same(model, load(family, tmp_path / "out"))


def test_a_delta_is_added(tmp_path: Path) -> None:
    make_models(FAMILIES["llama-tied"], tmp_path)
    folders = {role: tmp_path / role for role in ROLES}
    paramdelta.extract(post=folders["post"], base=folders["base"], out=tmp_path / "delta", dtype="f64")
    paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.5)
    model = load("llama-tied", folders["new_base"])
    paramdelta.merge_into(model, delta={str(tmp_path / "delta"): 0.5})
    same(model, load("llama-tied", tmp_path / "out"))


def test_wrapped_modules_are_those_within(tmp_path: Path) -> None:
    make_models(FAMILIES["qwen2"], tmp_path)
    paramdelta.merge(**{role: tmp_path / role for role in ROLES}, out=tmp_path / "out")
    model = load("qwen2", tmp_path / "new_base")
    paramdelta.merge_into(torch.compile(model), post=tmp_path / "post", base=tmp_path / "base")
    same(model, load("qwen2", tmp_path / "out"))


def test_other_names_are_mapped(tmp_path: Path) -> None:
    make_models(FAMILIES["llama-tied"], tmp_path)
    folders = {"post": tmp_path / "post", "base": tmp_path / "base"}
    paramdelta.merge(**folders, new_base=tmp_path / "new_base", out=tmp_path / "out")
    model = load("llama-tied", tmp_path / "new_base")
    engine = torch.nn.ModuleDict({"engine": model})
    with pytest.raises(InputError, match=r"engine\.model\.layers"):
        paramdelta.merge_into(engine, **folders)
    same(model, load("llama-tied", tmp_path / "new_base"))
    paramdelta.merge_into(engine, **folders, names=lambda name: name.removeprefix("engine."))
    same(model, load("llama-tied", tmp_path / "out"))


def test_an_inference_model_and_one_that_trains(tmp_path: Path) -> None:
    make_models(FAMILIES["qwen2"], tmp_path)
    folders = {"post": tmp_path / "post", "base": tmp_path / "base"}
    paramdelta.merge(**folders, new_base=tmp_path / "new_base", out=tmp_path / "out")
    there = load("qwen2", tmp_path / "out")
    with torch.inference_mode():
        inference = load("qwen2", tmp_path / "new_base")
    training = load("qwen2", tmp_path / "new_base").train()
    training(torch.arange(1, 9)[None]).logits.float().sum().backward()
    for model in (inference, training):
        paramdelta.merge_into(model, **folders)
    same(training, there)
    for name, tensor in state(there).items():
        assert torch.equal(state(inference)[name].view(torch.uint8), tensor.detach().view(torch.uint8)), name


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    make_models(FAMILIES["qwen2"], tmp_path)
    model = load("qwen2", tmp_path / "new_base")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match="quantised"):
        paramdelta.merge_into(model, post=tmp_path / "post", base=tmp_path / "base")


def test_the_config_that_post_changed_is_told_of(tmp_path: Path) -> None:
    make_models(FAMILIES["qwen2"], tmp_path)
    config = tmp_path / "post" / "config.json"
    config.write_text(config.read_text().replace('"bos_token_id": null', '"bos_token_id": 7'))
    model = load("qwen2", tmp_path / "new_base")
    report = paramdelta.merge_into(model, post=tmp_path / "post", base=tmp_path / "base")
    assert any("bos_token_id = 7" in line and "keeps its own" in line for line in report.warnings), report.warnings
    assert model.config.bos_token_id is None
