"""Folders laid out like DeepSeek-V3, 671 billion parameters in fp8 with scales of 128 × 128 blocks: real headers and
no data behind them (sparse files)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

LAYERS, DENSE, EXPERTS = 61, 3, 256
HIDDEN, WIDE, NARROW, VOCAB = 7168, 18432, 2048, 129280
SHARD = 4_300_000_000
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512),
    "o_proj": (HIDDEN, 16384),
}

Tensor = tuple[str, str, tuple[int, ...]]


def tensors() -> Iterator[Tensor]:
    """Yield (name, dtype, shape) in the order of the files."""
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in ATTENTION.items():
            yield from _quantised(f"{at}.self_attn.{name}.weight", shape)
        yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        if layer < DENSE:
            yield from _gated(f"{at}.mlp", WIDE)
        else:
            yield f"{at}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
            yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
            for expert in range(EXPERTS):
                yield from _gated(f"{at}.mlp.experts.{expert}", NARROW)
            yield from _gated(f"{at}.mlp.shared_experts", NARROW)
        yield f"{at}.input_layernorm.weight", "BF16", (HIDDEN,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (HIDDEN,)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN)


def _gated(at: str, width: int) -> Iterator[Tensor]:
    for name, shape in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
        yield from _quantised(f"{at}.{name}_proj.weight", shape)


def _quantised(name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
    yield name, "F8_E4M3", shape
    yield f"{name}_scale_inv", "F32", (-(-shape[0] // 128), -(-shape[1] // 128))


def write_deepseek(folder: Path) -> int:
    """Write the folder; return how many parameters it has, not counting scales."""
    folder.mkdir(parents=True)
    shards: list[list[Tensor]] = [[]]
    used = parameters = 0
    for name, dtype, shape in tensors():
        size = math.prod(shape) * BYTES[dtype]
        if used + size > SHARD and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append((name, dtype, shape))
        used += size
        parameters += 0 if name.endswith("_scale_inv") else math.prod(shape)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, shard)
        weight_map |= {name: file for name, _, _ in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return parameters


def _write(path: Path, shard: list[Tensor]) -> None:
    header, end = {}, 0
    for name, dtype, shape in shard:
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
