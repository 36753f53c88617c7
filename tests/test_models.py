"""Real checkpoints, made by transformers: merged, bit-equal to the reference, loaded again, and generating."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paramdelta
from paramdelta import dtypes, reference
from paramdelta.checkpoint import open_checkpoint

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """An architecture, how to configure it, and what its checkpoints must contain to be worth testing."""

    config: Callable[[], Any]
    auto: str
    needs: str


def moe() -> Any:
    return transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8, tie_word_embeddings=False
    )


def bert() -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return transformers.BertConfig(**sizes)


FAMILIES = {
    "llama-untied": Family(
        lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
        "AutoModelForCausalLM",
        "lm_head.weight",
    ),
    "llama-tied": Family(
        lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "AutoModelForCausalLM",
        "model.embed_tokens.weight",
    ),
    "qwen2": Family(lambda: transformers.Qwen2Config(**SIZES), "AutoModelForCausalLM", "q_proj.bias"),
    "qwen3-moe": Family(moe, "AutoModelForCausalLM", "experts.0.gate_proj.weight"),
    "gemma3": Family(
        lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8), "AutoModelForCausalLM", "q_norm.weight"
    ),
    "bert": Family(bert, "AutoModelForMaskedLM", "LayerNorm.bias"),
}

SHARDS = {"post": 7, "base": 1, "new_base": 3}  # about as many, each operand split differently


def make_models(family: Family, folder: Path) -> dict[str, dict[str, Any]]:
    """Save post, base and new_base in bf16, each split differently; return what the library reads back."""
    torch.manual_seed(5)
    auto = getattr(transformers, family.auto)
    model = auto.from_config(family.config(), dtype=torch.bfloat16)
    stored = {}
    for role, spread in (("base", 0.0), ("post", 0.01), ("new_base", 0.05)):
        with torch.no_grad():
            original = {name: p.clone() for name, p in model.named_parameters()}
            for p in model.parameters():
                p.add_(torch.randn_like(p) * spread)
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(folder / role, max_shard_size=int(1.2 * size / SHARDS[role]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name])
        stored[role] = tensors_of(folder / role)
    return stored


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def codes(tensor: Any) -> reference.Array:
    dtype = dtypes.BY_NAME[{torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}[tensor.dtype]]
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return reference.Array(raw.view(reference.code_type(dtype)), dtype)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_merge_equals_the_reference_and_loads(name: str, alpha: float, tmp_path: Path) -> None:
    family = FAMILIES[name]
    stored = make_models(family, tmp_path)
    assert any(family.needs in n for n in stored["new_base"]), f"no {family.needs}: the test has lost its point"
    assert len({len(list((tmp_path / r).glob("*.safetensors"))) for r in stored}) == 3, "sharded alike"

    out = tmp_path / "out"
    report = paramdelta.merge(
        **{role: tmp_path / role for role in stored}, out=out, alpha=alpha, memory=1 << 18, threads=2
    )
    merged = tensors_of(out)
    assert merged.keys() == stored["new_base"].keys()
    assert report.policies["tensors"]["merged"] == len(merged)
    for tensor, value in merged.items():
        arrays = {role: codes(stored[role][tensor]) for role in stored}
        term = reference.Term(arrays["post"], arrays["base"], alpha)
        expected = reference.merge(arrays["new_base"], [term], arrays["new_base"].dtype)
        np.testing.assert_array_equal(codes(value).codes, expected.codes, err_msg=tensor)
        assert value.shape == stored["new_base"][tensor].shape

    model, info = getattr(transformers, family.auto).from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        if family.auto == "AutoModelForCausalLM":
            generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert generated.shape[1] > tokens.shape[1]
        else:
            assert torch.isfinite(model(tokens).logits.float()).all()
    assert paramdelta.verify(out, **{role: tmp_path / role for role in stored}, everything=True).problems == ()


def test_two_libraries_read_what_is_written(tmp_path: Path) -> None:
    stored = make_models(FAMILIES["llama-untied"], tmp_path)
    out = tmp_path / "out"
    paramdelta.merge(**{role: tmp_path / role for role in stored}, out=out, max_shard_size="40kB")
    theirs, ours = tensors_of(out), open_checkpoint(out)
    assert set(ours.tensors.names) == theirs.keys()
    for name, tensor in theirs.items():
        spec = ours.tensors.spec(name)
        assert spec.shape == tuple(tensor.shape)
        with open(ours.files[spec.file].path, "rb") as file:
            file.seek(spec.offset)
            assert file.read(spec.nbytes) == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert all(f.size < 40_000 + 8192 or len(ours.files) == 1 for f in ours.files)


def test_index_is_what_transformers_writes(tmp_path: Path) -> None:
    """post == base gives new_base back: with its index, byte for byte, and its tensors."""
    make_models(FAMILIES["qwen2"], tmp_path)
    out = tmp_path / "out"
    paramdelta.merge(post=tmp_path / "base", base=tmp_path / "base", new_base=tmp_path / "new_base", out=out)
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "new_base" / index).read_bytes()
    assert (out / "config.json").read_bytes() == (tmp_path / "new_base" / "config.json").read_bytes()
    for name, tensor in tensors_of(tmp_path / "new_base").items():
        assert torch.equal(tensors_of(out)[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_tied_post_merges_into_an_untied_base(tmp_path: Path) -> None:
    """The head that post does not store is its embedding."""
    tied, untied = tmp_path / "tied", tmp_path / "untied"
    for folder, family in ((tied, "llama-tied"), (untied, "llama-untied")):
        folder.mkdir()
        make_models(FAMILIES[family], folder)
    out = tmp_path / "out"
    paramdelta.merge(post=tied / "post", base=tied / "base", new_base=untied / "new_base", out=out)
    post, base, new = (tensors_of(f) for f in (tied / "post", tied / "base", untied / "new_base"))
    embedding = "model.embed_tokens.weight"
    term = reference.Term(codes(post[embedding]), codes(base[embedding]))
    expected = reference.merge(codes(new["lm_head.weight"]), [term], dtypes.BF16)
    np.testing.assert_array_equal(codes(tensors_of(out)["lm_head.weight"]).codes, expected.codes)


def test_stream_gives_the_merged_tensors(tmp_path: Path) -> None:
    stored = make_models(FAMILIES["qwen3-moe"], tmp_path)
    roles = {role: tmp_path / role for role in stored}
    paramdelta.merge(**roles, out=tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    streamed = dict(paramdelta.stream(**roles, framework="pt", batch_bytes=10_000))
    assert streamed.keys() == merged.keys()
    for name, tensor in streamed.items():
        assert tensor.dtype == merged[name].dtype
        assert torch.equal(tensor.view(torch.uint8), merged[name].view(torch.uint8)), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "shares memory with another tensor"
    arrays = dict(paramdelta.stream(**roles, framework="np"))
    for name, array in arrays.items():
        assert array.dtype.name == "bfloat16"
        assert array.tobytes() == merged[name].contiguous().view(torch.uint8).numpy().tobytes()
