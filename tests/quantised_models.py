"""Tiny real models for tests of quantised merges: made by transformers, saved as post, base and new_base, and loaded
again from the folders that a merge writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)


def gpt_oss() -> Any:
    sizes = SIZES | {"intermediate_size": 64}
    return transformers.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "qwen3-moe": qwen3_moe,
    "gpt-oss": gpt_oss,
}


def make_models(name: str, folder: Path) -> dict[str, Path]:
    """Save base, post = base + a delta, and new_base = base + another, in bf16; return the folders."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    for role, spread in (("base", 0.0), ("post", 0.01), ("new_base", 0.02)):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(original[n] + torch.randn_like(p) * spread)
        model.save_pretrained(folder / role)
    return {role: folder / role for role in ("post", "base", "new_base")}
