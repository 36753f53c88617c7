"""Small checkpoints in the layouts of the families that store fp8: names, dtypes and configs are the real ones', the
shapes are small and do not divide by their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantised_merges import Case, Layout, Shape
from stored_forms import (
    BF16,
    BLOCKS,
    BLOCKS_BF16,
    BLOCKS_UE8M0,
    CHANNELS,
    CHANNELS_F32,
    COMPRESSED_BLOCKS,
    COMPRESSED_TENSOR,
    DOT_E8M0,
    DOT_F32,
    DOT_FP4,
    F32,
    FBGEMM,
    FBGEMM_COLUMNS,
    FNUZ,
    MISTRAL,
    MODELOPT_FP8,
    MXFP8,
    Form,
)

Weights = dict[str, tuple[Shape, Form]]
HIDDEN, WIDE, VOCAB = 160, 192, 24
FINE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(layout: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    """Return a config of compressed-tensors."""
    arguments = {"dynamic": False, "symmetric": True, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def config_of(model: str, quantisation: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a config.json."""
    config: dict[str, Any] = {"model_type": model, "hidden_size": HIDDEN, "tie_word_embeddings": False, **more}
    return config if quantisation is None else config | {"quantization_config": dict(quantisation)}


def llama_weights(form: Form, layers: int = 1, *, bias: bool = False) -> Weights:
    """Return the weights of a dense model, its linear layers in ``form``."""
    out: Weights = {
        "model.embed_tokens.weight": ((VOCAB, HIDDEN), BF16),
        "lm_head.weight": ((VOCAB, HIDDEN), BF16),
        "model.norm.weight": ((HIDDEN,), BF16),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for what in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}{what}.weight"] = (HIDDEN,), BF16
        for what, shape in {"q": (HIDDEN, HIDDEN), "k": (64, HIDDEN), "v": (64, HIDDEN), "o": (HIDDEN, HIDDEN)}.items():
            out[f"{at}self_attn.{what}_proj.weight"] = shape, form
            if bias and what != "o":
                out[f"{at}self_attn.{what}_proj.bias"] = (shape[0],), BF16
        out[f"{at}mlp.gate_proj.weight"] = (WIDE, HIDDEN), form
        out[f"{at}mlp.up_proj.weight"] = (WIDE, HIDDEN), form
        out[f"{at}mlp.down_proj.weight"] = (HIDDEN, WIDE), form
    return out


def linear(weights: Weights) -> list[str]:
    """Return the modules whose weights are quantised."""
    return [name.removesuffix(".weight") for name, (_, form) in weights.items() if form.recipe]


def deepseek_v3(form: Form = BLOCKS, model: str = "deepseek_v3", **more: Any) -> Layout:
    """DeepSeek-V3 and R1: a dense layer, a layer of experts, and the layer that predicts a second token."""
    out: Weights = {
        "model.embed_tokens.weight": ((VOCAB, HIDDEN), BF16),
        "lm_head.weight": ((VOCAB, HIDDEN), BF16),
        "model.norm.weight": ((HIDDEN,), BF16),
    }
    for layer in range(3):
        at = f"model.layers.{layer}."
        for what, width in {"input": HIDDEN, "post_attention": HIDDEN}.items():
            out[f"{at}{what}_layernorm.weight"] = (width,), BF16
        out[f"{at}self_attn.q_a_layernorm.weight"] = (96,), BF16
        shapes = {
            "q_a": (96, HIDDEN),
            "q_b": (WIDE, 96),
            "kv_a": (144, HIDDEN),
            "kv_b": (WIDE, 128),
            "o": (HIDDEN, 128),
        }
        for what, shape in shapes.items():
            kv_a = "kv_a_proj_with_mqa" if what == "kv_a" else f"{what}_proj"
            out[f"{at}self_attn.{kv_a}.weight"] = shape, form
        mlps = ["mlp."]
        if layer:
            out[f"{at}mlp.gate.weight"] = (4, HIDDEN), BF16
            out[f"{at}mlp.gate.e_score_correction_bias"] = (4,), F32
            mlps = ["mlp.experts.0.", "mlp.experts.1.", "mlp.shared_experts."]
        for mlp in mlps:
            for what in ("gate", "up"):
                out[f"{at}{mlp}{what}_proj.weight"] = (WIDE, HIDDEN), form
            out[f"{at}{mlp}down_proj.weight"] = (HIDDEN, WIDE), form
    out["model.layers.2.eh_proj.weight"] = (HIDDEN, 2 * HIDDEN), BF16
    out["model.layers.2.enorm.weight"] = (HIDDEN,), BF16
    out["model.layers.2.embed_tokens.weight"] = (VOCAB, HIDDEN), BF16
    out["model.layers.2.shared_head.head.weight"] = (VOCAB, HIDDEN), BF16
    config = config_of(model, FINE | more, num_hidden_layers=2, num_nextn_predict_layers=1)
    return Layout(weights=out, config=config, shards=2)


def deepseek_v4(experts: Form, experts_dtype: str) -> Layout:
    """DeepSeek-V4: no prefix, dense weights with E8M0 scales; experts in fp4, or of the base release in fp8."""
    out: Weights = {"embed.weight": ((VOCAB, HIDDEN), BF16), "head.weight": ((VOCAB, HIDDEN), F32)}
    for what, shape in {"wq_a": (96, HIDDEN), "wq_b": (WIDE, 96), "wkv": (144, HIDDEN), "wo_a": (128, HIDDEN)}.items():
        out[f"layers.0.attn.{what}.weight"] = shape, DOT_E8M0
    out["layers.0.attn.attn_sink"] = (8,), F32
    out["layers.0.attn_norm.weight"] = (HIDDEN,), BF16
    for what, shape in {"fn": (24, HIDDEN), "base": (24,), "scale": (3,)}.items():
        out[f"layers.0.hc_attn_{what}"] = shape, F32
    out["layers.0.ffn.gate.weight"] = (4, HIDDEN), BF16
    for expert in range(3):
        for what, shape in {"w1": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE), "w3": (WIDE, HIDDEN)}.items():
            out[f"layers.0.ffn.experts.{expert}.{what}.weight"] = shape, experts
    for what, shape in {"w1": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE), "w3": (WIDE, HIDDEN)}.items():
        out[f"layers.0.ffn.shared_experts.{what}.weight"] = shape, DOT_E8M0
    config = config_of("deepseek_v4", FINE | {"scale_fmt": "ue8m0"}, expert_dtype=experts_dtype)
    return Layout(weights=out, config=config, integers={"layers.0.ffn.gate.tid2eid": (VOCAB, 2)}, shards=2)


V4, V4_BASE = deepseek_v4(DOT_FP4, "fp4"), deepseek_v4(DOT_F32, "fp8")


def qwen3(form: Form = BLOCKS_BF16) -> Layout:
    """Qwen3 and its FP8 release: scales in bf16, norms of queries and keys."""
    out = llama_weights(form) | {f"model.layers.0.self_attn.{w}_norm.weight": ((32,), BF16) for w in "qk"}
    skipped = ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    quantisation = FINE | {"modules_to_not_convert": skipped} if form.recipe else None
    return Layout(weights=out, config=config_of("qwen3", quantisation))


def glm() -> Layout:
    """GLM-4.5-FP8 of compressed-tensors: per channel, experts, biases of attention, a router in F32."""
    out = llama_weights(CHANNELS_F32, bias=True)
    at = "model.layers.1.mlp."
    out |= {f"{at}gate.weight": ((4, HIDDEN), BF16), f"{at}gate.e_score_correction_bias": ((4,), F32)}
    for expert in range(2):
        for what, shape in {"gate": (WIDE, HIDDEN), "up": (WIDE, HIDDEN), "down": (HIDDEN, WIDE)}.items():
            out[f"{at}experts.{expert}.{what}_proj.weight"] = shape, CHANNELS_F32
    return Layout(weights=out, config=config_of("glm4_moe", CHANNEL_CONFIG), shards=2)


def llama_405b() -> Layout:
    """Llama-3.1-405B-FP8 of FBGEMM: the MLP of the inner layers alone is quantised."""
    out = llama_weights(FBGEMM, 2)
    out = {n: (s, BF16 if "self_attn" in n or "layers.0" in n else f) for n, (s, f) in out.items()}
    skipped = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    quantisation = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": skipped}
    statistics = {f"{module}.input_scale_ub": ("F32", (1,)) for module in linear(out)}
    return Layout(weights=out, config=config_of("llama", quantisation), statistics=statistics)


def llama_4() -> Layout:
    """Llama-4 of FBGEMM: stacks [E, in, out] with a scale for each column."""
    at = "language_model.model.layers.0.feed_forward."
    out: Weights = {
        "language_model.model.embed_tokens.weight": ((VOCAB, HIDDEN), BF16),
        "language_model.lm_head.weight": ((VOCAB, HIDDEN), BF16),
        f"{at}router.weight": ((3, HIDDEN), BF16),
        f"{at}experts.gate_up_proj": ((3, HIDDEN, 2 * WIDE), FBGEMM_COLUMNS),
        f"{at}experts.down_proj": ((3, WIDE, HIDDEN), FBGEMM_COLUMNS),
        f"{at}shared_expert.up_proj.weight": ((WIDE, HIDDEN), FBGEMM),
    }
    quantisation = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "tie_word_embeddings": False}}
    return Layout(weights=out, config=config | {"quantization_config": quantisation})


def modelopt_fp8() -> Layout:
    """Llama-3.1-70B-Instruct-FP8 of modelopt: scales of activations and of the key-value cache; config in a file."""
    out = llama_weights(MODELOPT_FP8)
    statistics: dict[str, tuple[str, Shape]] = {f"{module}.input_scale": ("F32", ()) for module in linear(out)}
    statistics |= {f"model.layers.0.self_attn.{w}_proj.{w}_scale": ("F32", ()) for w in "kv"}
    document = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    }
    files = {"hf_quant_config.json": document}
    return Layout(weights=out, config=config_of("llama"), files=files, statistics=statistics, shards=2)


def mistral() -> Layout:
    """Mistral's per-tensor fp8: scales of no dimension, one for each expert of a stack."""
    out = llama_weights(MISTRAL) | {"model.layers.1.mlp.experts.down_proj": ((3, HIDDEN, WIDE), MISTRAL)}
    quantisation = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    statistics = {f"{m}.activation_scale": ("F32", ()) for m in linear(out) if "experts" not in m}
    return Layout(weights=out, config=config_of("mistral3", quantisation), statistics=statistics)


def minimax_m2() -> Layout:
    """MiniMax-M2: fp8 blocks, experts called w1, w2, w3, a config with its own spelling of e4m3."""
    out = {n: v for n, v in llama_weights(BLOCKS).items() if ".mlp." not in n}
    at = "model.layers.0.block_sparse_moe."
    out |= {f"{at}gate.weight": ((2, HIDDEN), F32), f"{at}e_score_correction_bias": ((2,), F32)}
    for expert in range(2):
        for what, shape in {"w1": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE), "w3": (WIDE, HIDDEN)}.items():
            out[f"{at}experts.{expert}.{what}.weight"] = shape, BLOCKS
    skipped = ["gate", "e_score_correction_bias", "lm_head"]
    quantisation = FINE | {"fmt": "float8_e4m3fn", "modules_to_not_convert": skipped}
    return Layout(weights=out, config=config_of("minimax_m2", quantisation), shards=2)


def minimax_m3() -> Layout:
    """MiniMax-M3: MXFP8, the scales' bytes called U8."""
    quantisation = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    return Layout(weights=llama_weights(MXFP8), config=config_of("minimax_m3", quantisation), shards=2)


TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CHANNEL_CONFIG = compressed("float-quantized", TOKENS, num_bits=8, type="float", strategy="channel")
TENSOR_CONFIG = compressed("float-quantized", STATIC, num_bits=8, type="float", strategy="tensor")
BLOCK_CONFIG = compressed(
    "float-quantized", TOKENS, num_bits=8, type="float", strategy="block", block_structure=[128, 128]
)


def plain(like: Layout, model: str = "") -> Layout:
    """Return the bf16 release of a layout."""
    config = {k: v for k, v in like.config.items() if k not in ("quantization_config", "expert_dtype")}
    weights = {name: (shape, BF16 if form.recipe else form) for name, (shape, form) in like.weights.items()}
    return replace(like, weights=weights, config=config, files={}, statistics={}, shards=1)


def llama(form: Form, quantisation: Mapping[str, Any] | None, **more: Any) -> Layout:
    """Return a dense model in any form."""
    return Layout(weights=llama_weights(form), config=config_of("llama", quantisation), **more)


def _static(layout: Layout) -> Layout:
    return replace(layout, statistics={f"{m}.input_scale": ("BF16", (1,)) for m in linear(dict(layout.weights))})


CHANNEL_LAYOUT = llama(CHANNELS, CHANNEL_CONFIG, shards=2)
FNUZ_LAYOUT = llama(FNUZ, CHANNEL_CONFIG)
CASES = {
    "deepseek-v3": Case.of(deepseek_v3()),
    "deepseek-v3.2": Case.of(deepseek_v3(BLOCKS_UE8M0, "deepseek_v32", scale_fmt="ue8m0")),
    "deepseek-v4": Case.of(V4),
    "deepseek-v4-post-on-base": Case(post=V4, base=V4_BASE, new_base=V4_BASE),
    "deepseek-v4-base-on-post": Case(post=V4, base=V4_BASE, new_base=V4, options={"alpha": 0.7}),
    "qwen3-fp8": Case.of(qwen3()),
    "qwen3-fp8-post": Case(post=qwen3(), base=qwen3(BF16), new_base=qwen3(BF16)),
    "qwen3-fp8-new-base": Case(post=qwen3(BF16), base=qwen3(BF16), new_base=qwen3()),
    "glm-4.5-fp8": Case.of(glm()),
    "llama-405b-fbgemm": Case.of(llama_405b()),
    "llama-4-fbgemm": Case.of(llama_4()),
    "modelopt-fp8": Case.of(modelopt_fp8()),
    "mistral": Case.of(mistral()),
    "minimax-m2": Case.of(minimax_m2()),
    "minimax-m3": Case.of(minimax_m3()),
    "compressed-channel": Case.of(CHANNEL_LAYOUT, alpha=0.3),
    "compressed-tensor": Case.of(_static(llama(COMPRESSED_TENSOR, TENSOR_CONFIG))),
    "compressed-block": Case.of(llama(COMPRESSED_BLOCKS, BLOCK_CONFIG)),
    "fnuz-post": Case(post=FNUZ_LAYOUT, base=FNUZ_LAYOUT, new_base=CHANNEL_LAYOUT),
}
