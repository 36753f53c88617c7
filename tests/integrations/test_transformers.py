"""load_merged against from_pretrained of the merged folder: parameters, buffers, ties and configs, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import paramdelta

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")

from test_models import FAMILIES, SIZES, Family, make_models, tensors_of  # noqa: E402

from paramdelta import mapping  # noqa: E402
from paramdelta.integrations.transformers import load_merged  # noqa: E402

ROLES = ("post", "base", "new_base")
Folders = dict[str, Path]


def made(family: str, where: Path) -> Folders:
    make_models(FAMILIES[family], where)
    (where / "post" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    return {role: where / role for role in ROLES}


def state(model: Any) -> dict[str, Any]:
    """Return every parameter and buffer, those too that are not saved."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def same_model(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape, tensor.device) == (b[name].dtype, b[name].shape, b[name].device), name
        assert tensor.requires_grad == b[name].requires_grad, name
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, b[name])]
        assert torch.equal(*raw), name
    ties = [[[n for n, t in s.items() if t is tensor] for tensor in s.values()] for s in (a, b)]
    assert ties[0] == ties[1]
    configs = [model.config.to_dict() for model in (one, other)]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    assert one.training == other.training
    if one.can_generate():
        assert one.generation_config.to_dict() == other.generation_config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_that_of_the_folder(family: str, tmp_path: Path) -> None:
    folders = made(family, tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.7)
    auto = FAMILIES[family].auto
    here = load_merged(auto, **folders, alpha=0.7)
    there = getattr(transformers, auto).from_pretrained(tmp_path / "out", dtype="auto")
    same_model(here, there)
    assert here.config.name_or_path == "new_base"
    if family == "llama-tied":
        assert here.lm_head.weight is here.model.embed_tokens.weight
    if family == "qwen3-moe":
        assert any(name.endswith("experts.gate_up_proj") for name in state(here)), "no stack: the point is lost"
    if here.can_generate():
        tokens = [
            m.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
            for m in (here, there)
        ]
        assert torch.equal(*tokens)


def llama4() -> Any:
    vision = {
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    widths = dict.fromkeys(("hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    text = SIZES | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    return transformers.Llama4Config(text_config=text, vision_config=vision | widths)


def test_a_model_of_several_parts(tmp_path: Path) -> None:
    """All of it, and the language model alone, whose class takes a part of the config."""
    whole = "AutoModelForImageTextToText"
    make_models(Family(llama4, whole, ""), tmp_path)
    folders = {role: tmp_path / role for role in ROLES}
    paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.5)
    for auto in (whole, "AutoModelForCausalLM"):
        there = getattr(transformers, auto).from_pretrained(tmp_path / "out", dtype="auto")
        same_model(load_merged(auto, **folders, alpha=0.5), there)


def test_class_and_dtype(tmp_path: Path) -> None:
    """A class instead of a name; the dtype is that of the merge, rounded once."""
    folders = made("llama-untied", tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "out", dtype="f32")
    there = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    here = load_merged(transformers.LlamaForCausalLM, **folders, dtype=torch.float32)
    assert here.dtype == torch.float32
    same_model(here, there)
    without_head = load_merged("AutoModel", **folders, dtype="f32", model_options={"output_loading_info": True})
    assert not without_head[1]["missing_keys"]
    same_model(without_head[0], transformers.AutoModel.from_pretrained(tmp_path / "out", dtype="auto"))


def test_nothing_is_written_or_left_empty(tmp_path: Path) -> None:
    """No file is left or written beside the inputs; nothing of the model is on the meta device."""
    folders = made("qwen2", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    model = load_merged(**folders)
    assert sorted(tmp_path.rglob("*")) == before
    assert {tensor.device.type for tensor in state(model).values()} == {"cpu"}
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


PEAK = """
import sys
import torch
from paramdelta import mapping
from paramdelta.integrations.transformers import load_merged
from transformers import Qwen3MoeForCausalLM  # before memory is looked at

torch.set_num_threads(1)
mapping.AHEAD_BYTES, mapping.KEPT_BYTES = 1 << 20, 4 << 20


def status(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) << 10


before = status("VmRSS")
folder = sys.argv[1]
model = load_merged(Qwen3MoeForCausalLM, post=folder, base=folder, new_base=folder, threads=2, memory=8 << 20)
sizes = [p.nbytes for p in model.parameters()]
print(status("VmHWM") - before, sum(sizes), max(sizes))
"""


def test_memory_is_that_of_the_model(tmp_path: Path) -> None:
    """Beside the model there are the parts of one stack of experts, the stack of each half, and the engine's buffers;
    not the tensors of the whole checkpoint."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 3}
    config = transformers.Qwen3MoeConfig(**SIZES | sizes, head_dim=32, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "model"],
        env=os.environ | {"PYTHONPATH": str(Path(paramdelta.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, model, stack = map(int, done.stdout.split())
    assert stack > 30_000_000, "no stack of experts: the test has lost its point"
    assert peak < model + 3 * stack + (32 << 20) < 2 * model


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_new_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folders = made("llama-untied", tmp_path)
    for folder in folders.values():
        (folder / "own.py").write_text(CUSTOM)
        config = json.loads((folder / "config.json").read_text())
        own = {"model_type": "own", "architectures": ["OwnModel"]}
        auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (folder / "config.json").write_text(json.dumps(config | own | {"auto_map": auto}))
    paramdelta.merge(**folders, out=tmp_path / "out")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", trust_remote_code=True)
    here = load_merged(**folders, model_options={"trust_remote_code": True})
    assert type(here).__name__ == "OwnModel"
    a, b = state(here), state(there)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_errors_are_ours(tmp_path: Path) -> None:
    """Also those that come while transformers loads."""
    folders = made("llama-untied", tmp_path)
    with pytest.raises(paramdelta.InputError, match="expected a class of transformers"):
        load_merged("AutoModelForNothing", **folders)
    with pytest.raises(paramdelta.NonFiniteError, match="results that are not finite"):
        load_merged(**folders, alpha=1e45)
    (folders["new_base"] / "config.json").unlink()
    with pytest.raises(paramdelta.InputError, match="no model can be made"):
        load_merged(**folders)


def test_a_device(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers puts models on a device with accelerate")
    folders = made("llama-tied", tmp_path)
    same_model(load_merged(**folders, device="cpu"), load_merged(**folders))


@pytest.mark.parametrize("theirs", [False, True], ids=["in-loading-order", "in-any-order"])
def test_the_mapping_has_the_tensors_of_the_folder(
    theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order, and however little is kept of what was computed along."""
    folders = made("qwen3-moe", tmp_path)
    paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.5)
    if theirs:
        monkeypatch.setattr(mapping, "AHEAD_BYTES", 8192)
        monkeypatch.setattr(mapping, "KEPT_BYTES", 4096)
    tensors = mapping.MergedTensors.open(**folders, framework="pt", alpha=0.5)
    expected = tensors_of(tmp_path / "out")
    assert set(tensors) == set(expected)
    order = sorted(tensors, key=mapping.loading_order)
    if theirs:
        order = [order[i] for i in torch.randperm(len(order), generator=torch.Generator().manual_seed(1))] * 2
    for name in order:
        lazy = tensors[name]
        value = lazy[...]
        assert torch.equal(value.view(torch.int16), expected[name].view(torch.int16)), name
        assert (lazy.get_shape(), lazy.get_dtype(), lazy.dtype) == (list(value.shape), "BF16", value.dtype)
    name = next(iter(tensors))
    assert torch.equal(tensors[name][1:], expected[name][1:])


def test_experts_of_one_weight_come_together() -> None:
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{w}_proj.weight"
        for i in (0, 10, 9)
        for e in (1, 10, 2)
        for w in ("up", "down")
    ]
    parts = [name.split(".") for name in sorted(names, key=mapping.loading_order)]
    weights = ["down_proj"] * 3 + ["up_proj"] * 3
    assert [(p[2], p[6], p[5]) for p in parts] == [
        (layer, weight, expert)
        for layer in ("0", "9", "10")
        for weight, expert in zip(weights, ["1", "2", "10"] * 2, strict=True)
    ]
