"""Small checkpoints in the layouts of the families that store four bits: NVFP4, MXFP4 and INT4."""

from __future__ import annotations

import families_fp8
from families_fp8 import HIDDEN, VOCAB, WIDE, Weights, compressed, config_of, linear, llama, llama_weights
from quantised_merges import Case, Layout
from stored_forms import BF16, GPT_OSS, INT4, INT4_F32, INT4_ZEROS, MXFP4_PACKED, NVFP4_MODELOPT, NVFP4_PACKED, Form

NVFP4_CONFIG = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
MXFP4_CONFIG = compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
INT4_CONFIG = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
ZEROS_CONFIG = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)


def nvfp4_modelopt() -> Layout:
    """Qwen3-235B-A22B-NVFP4 of modelopt: q, k, v and gate, up share a second scale; stacks have one per expert."""
    out = llama_weights(NVFP4_MODELOPT)
    for expert in range(2):
        for what, shape in {"gate": (WIDE, HIDDEN), "up": (WIDE, HIDDEN), "down": (HIDDEN, WIDE)}.items():
            out[f"model.layers.1.mlp.experts.{expert}.{what}_proj.weight"] = shape, NVFP4_MODELOPT
    out["model.layers.1.mlp.gate.weight"] = (2, HIDDEN), BF16
    out["model.layers.2.mlp.experts.gate_up_proj"] = (3, WIDE, HIDDEN), NVFP4_MODELOPT
    document = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.1.mlp.gate"],
        },
    }
    statistics = {f"{module}.input_scale": ("F32", ()) for module in linear(out) if not module.endswith("gate_up_proj")}
    files = {"hf_quant_config.json": document}
    return Layout(weights=out, config=config_of("qwen3_moe"), files=files, statistics=statistics, shards=2)


def gpt_oss() -> Layout:
    """gpt-oss: stacks of blocks [E, 2I, H / 32, 16] with biases, a router, sinks of attention."""
    at = "model.layers.0."
    out: Weights = {
        "model.embed_tokens.weight": ((VOCAB, HIDDEN), BF16),
        "lm_head.weight": ((VOCAB, HIDDEN), BF16),
        f"{at}self_attn.q_proj.weight": ((HIDDEN, HIDDEN), BF16),
        f"{at}self_attn.q_proj.bias": ((HIDDEN,), BF16),
        f"{at}self_attn.sinks": ((8,), BF16),
        f"{at}mlp.router.weight": ((3, HIDDEN), BF16),
        f"{at}mlp.router.bias": ((3,), BF16),
        f"{at}mlp.experts.gate_up_proj": ((3, 2 * WIDE, HIDDEN), GPT_OSS),
        f"{at}mlp.experts.gate_up_proj_bias": ((3, 2 * WIDE), BF16),
        f"{at}mlp.experts.down_proj": ((3, HIDDEN, WIDE), GPT_OSS),
        f"{at}mlp.experts.down_proj_bias": ((3, HIDDEN), BF16),
    }
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = config_of("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return Layout(weights=out, config=config, shards=2)


def kimi_k2() -> Layout:
    """Kimi-K2.5: experts alone are int4, the config is nested, names have a prefix."""
    at = "language_model.model.layers.1."
    out: Weights = {
        "language_model.model.embed_tokens.weight": ((VOCAB, HIDDEN), BF16),
        "language_model.lm_head.weight": ((VOCAB, HIDDEN), BF16),
        f"{at}self_attn.q_a_proj.weight": ((96, HIDDEN), BF16),
        f"{at}mlp.gate.weight": ((2, HIDDEN), BF16),
        f"{at}mlp.shared_experts.up_proj.weight": ((WIDE, HIDDEN), BF16),
    }
    for expert in range(3):
        for what, shape in {"gate": (WIDE, HIDDEN), "up": (WIDE, HIDDEN), "down": (HIDDEN, WIDE)}.items():
            out[f"{at}mlp.experts.{expert}.{what}_proj.weight"] = shape, INT4
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    inner = config_of("kimi_k2", INT4_CONFIG | {"ignore": ignore})
    return Layout(weights=out, config={"model_type": "kimi_k25", "text_config": inner, "tie_word_embeddings": False})


def packed(form: Form, config: dict[str, object], shards: int = 2) -> Layout:
    """A dense model as compressed-tensors packs it."""
    return llama(form, config, shards=shards)


NVFP4 = packed(NVFP4_PACKED, NVFP4_CONFIG)
MXFP4 = packed(MXFP4_PACKED, MXFP4_CONFIG)
INT4_LAYOUT = packed(INT4, INT4_CONFIG)
ASYMMETRIC = packed(INT4_ZEROS, ZEROS_CONFIG)
CASES = {
    "modelopt-nvfp4": Case.of(nvfp4_modelopt()),
    "compressed-nvfp4": Case.of(NVFP4),
    "compressed-mxfp4": Case.of(MXFP4),
    "compressed-int4": Case.of(INT4_LAYOUT, alpha=0.5),
    "compressed-int4-f32": Case.of(packed(INT4_F32, INT4_CONFIG)),
    "compressed-int4-asymmetric-post": Case(post=ASYMMETRIC, base=ASYMMETRIC, new_base=INT4_LAYOUT),
    "compressed-int4-asymmetric": Case.of(ASYMMETRIC),
    "gpt-oss": Case.of(gpt_oss()),
    "kimi-k2.5": Case.of(kimi_k2()),
}

ALL = families_fp8.CASES | CASES
