"""Synthetic checkpoints in the real layout, for the demo, the tests and the benchmarks.

Three Llama-shaped folders of sharded bf16 safetensors with config and tokenizer files, written by numpy,
ml_dtypes and the safetensors library alone.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from paramdelta.errors import Complaint, InputError

__all__ = ["Shape", "shape_for", "write_demo"]

BYTES_PER_ELEMENT = 2
SHARD_BYTES = 500_000_000
DRAW_CHUNK = 1 << 18  # elements drawn at once: the scratch arrays stay in L2

BASE_SPREAD = 0.02  # initializer_range of the published Llama models
DELTA_SPREAD = 1e-3  # what a post-training moves a weight by, in order of magnitude
DRIFT_SPREAD = 4e-3  # what a continued pretraining moves it by

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
HEADER_START, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, HEADER_START, HEADER_END, EOT)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama: everything that its tensor list follows from."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one decoder layer, in the order in which transformers lists them."""
        at, h, kv = f"model.layers.{layer}.", self.hidden, self.kv_heads * self.head_dim
        return {
            f"{at}self_attn.q_proj.weight": (h, h),
            f"{at}self_attn.k_proj.weight": (kv, h),
            f"{at}self_attn.v_proj.weight": (kv, h),
            f"{at}self_attn.o_proj.weight": (h, h),
            f"{at}mlp.gate_proj.weight": (self.intermediate, h),
            f"{at}mlp.up_proj.weight": (self.intermediate, h),
            f"{at}mlp.down_proj.weight": (h, self.intermediate),
            f"{at}input_layernorm.weight": (h,),
            f"{at}post_attention_layernorm.weight": (h,),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the whole model, output head untied."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            found.update(self.layer_tensors(layer))
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(shape) for shape in self.tensors().values())


def _nbytes(shape: tuple[int, ...]) -> int:
    """Bytes of one bf16 tensor."""
    return int(np.prod(shape, dtype=np.int64)) * BYTES_PER_ELEMENT


NAMED_SHAPES = {
    "tiny": Shape(vocab=512, hidden=64, intermediate=160, layers=3, heads=4, kv_heads=2),
    "small": Shape(vocab=8192, hidden=512, intermediate=1408, layers=6, heads=8, kv_heads=4),
}

# From which size on, in bytes of a checkpoint: the width of the model.
_WIDTHS = (
    (0, Shape(vocab=512, hidden=64, intermediate=160, layers=1, heads=4, kv_heads=2)),
    (8_000_000, Shape(vocab=2048, hidden=256, intermediate=704, layers=1, heads=8, kv_heads=4)),
    (60_000_000, Shape(vocab=16_384, hidden=768, intermediate=2048, layers=1, heads=12, kv_heads=4)),
    (600_000_000, Shape(vocab=32_000, hidden=2048, intermediate=5632, layers=1, heads=32, kv_heads=4)),
    (8_000_000_000, Shape(vocab=128_256, hidden=4096, intermediate=14_336, layers=1, heads=32, kv_heads=8)),
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def shape_for(size: str) -> Shape:
    """Return the sizes of the model named ``tiny`` or ``small``, or of one of about the bytes asked.

    Whole layers are added up to the bytes asked; the vocabulary takes the remainder.
    """
    if size in NAMED_SHAPES:
        return NAMED_SHAPES[size]
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", size.upper())
    if not found:
        raise InputError(Complaint("size", f"expected tiny, small or bytes such as 1.2GB, got {size!r}"))
    wanted = int(float(found[1]) * _UNITS[found[2] or ""])
    width = next(shape for least, shape in reversed(_WIDTHS) if wanted >= least)
    layer = sum(map(_nbytes, width.layer_tensors(0).values()))
    layers = max(1, (wanted - (width.nbytes - layer)) // layer)
    row = 2 * width.hidden * BYTES_PER_ELEMENT  # one token costs a row of the embedding and one of the head
    without_vocab = width.nbytes - width.vocab * row + (layers - 1) * layer
    vocab = max(512, (wanted - without_vocab) // row // 64 * 64)
    return Shape(vocab, width.hidden, width.intermediate, layers, width.heads, width.kv_heads)


def write_demo(folder: str | Path, *, size: str = "small", seed: int = 0) -> tuple[Path, Path, Path]:
    """Write three checkpoint folders and return their paths: ``post``, ``base``, ``new_base``.

    post = base + delta and new_base = base + drift, with base ~ N(0, 0.02²), delta ~ N(0, 0.001²) and drift
    ~ N(0, 0.004²), rounded to bf16. The input norms of every second layer and the last norm are bit-equal in
    post and base, as frozen tensors are. Only post has a chat template, and it ends its turns with a token of
    its own. Each folder is sharded differently. The same size and seed give the same bytes.

    Parameters
    ----------
    folder
        Where the three folders are made. Files of the same names are overwritten.
    size
        ``tiny`` (below 1 MB per folder), ``small`` (about 50 MB) or bytes per folder such as ``1.2GB``.
    seed
        Any non-negative integer.
    """
    shape = shape_for(size)
    fewest = -(-shape.nbytes // SHARD_BYTES)
    root = Path(folder)
    for role, shards in (("post", fewest + 1), ("base", fewest + 2), ("new_base", fewest)):
        target = root / role
        target.mkdir(parents=True, exist_ok=True)
        _write_weights(target, role, shape, shards, seed)
        _write_configs(target, role, shape)
        _write_tokenizer(target, role)
    return root / "post", root / "base", root / "new_base"


@cache
def _normal_quantiles() -> npt.NDArray[np.float32]:
    """65536 quantiles of N(0, 1): a random 16-bit integer looks up a normal number."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=np.float32)


def _draws(elements: int, seed: int, name: str, part: int) -> Iterator[npt.NDArray[np.uint16]]:
    """Yield random 16-bit integers, a chunk at a time: a stream per tensor and part."""
    source = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode()), part]))
    for start in range(0, elements, DRAW_CHUNK):
        count = min(DRAW_CHUNK, elements - start)
        yield source.random_raw(-(-count // 4)).view(np.uint16)[:count]


def _weight(role: str, name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    """Return one tensor of one operand: base's values, moved by post's delta or new_base's drift."""
    out = np.empty(shape, dtype=ml_dtypes.bfloat16)
    flat = out.reshape(-1)
    centre = np.float32(1.0 if "norm" in name else 0.0)
    rounded = (centre + _normal_quantiles() * np.float32(BASE_SPREAD)).astype(ml_dtypes.bfloat16)
    values = rounded.astype(np.float32)
    part, spread = {"post": (1, DELTA_SPREAD), "base": (0, 0.0), "new_base": (2, DRIFT_SPREAD)}[role]
    moved = part > 0 and not (role == "post" and _is_frozen(name))
    moves = _normal_quantiles() * np.float32(spread)
    move_draws = _draws(flat.size, seed, name, part)
    start = 0
    for draw in _draws(flat.size, seed, name, 0):
        piece = values.take(draw)
        if moved:
            piece += moves.take(next(move_draws))
        flat[start : start + draw.size] = piece
        start += draw.size
    return out


def _is_frozen(name: str) -> bool:
    """Whether post-training left the tensor alone: the input norms of even layers and the last norm."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.input_layernorm\.weight", name)
    return name == "model.norm.weight" or (layer is not None and int(layer[1]) % 2 == 0)


def _split(tensors: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """Cut the tensor list into ``shards`` runs of about equal bytes, none empty."""
    total = sum(map(_nbytes, tensors.values()))
    groups: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name, shape in tensors.items():
        middle = before + _nbytes(shape) / 2
        groups[min(shards - 1, int(middle * shards / total))].append(name)
        before += _nbytes(shape)
    return [group for group in groups if group]


def _write_weights(folder: Path, role: str, shape: Shape, shards: int, seed: int) -> None:
    """Write the shards, one in memory at a time, and the index, all named as transformers names them."""
    tensors = shape.tensors()
    groups = _split(tensors, shards)
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, groups, strict=True):
        values = {name: _weight(role, name, tensors[name], seed) for name in names}
        save_file(values, folder / file, metadata={"format": "pt"})
        del values
    if len(groups) > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        metadata = {"total_parameters": shape.nbytes // BYTES_PER_ELEMENT, "total_size": shape.nbytes}
        _write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": where})


def _write_json(path: Path, content: dict[str, Any], *, sort_keys: bool = True) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _token_ids() -> dict[str, int]:
    """Ids of the special tokens: they follow the vocabulary's other entries."""
    first = len(_vocabulary())
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


def _write_configs(folder: Path, role: str, shape: Shape) -> None:
    """Write both configs. Post differs in its end tokens and sampling, new_base in its context length."""
    ids = _token_ids()
    ends: int | list[int] = [ids[EOS], ids[EOT]] if role == "post" else ids[EOS]
    version = "4.46.0"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids[BOS],
        "eos_token_id": ends,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": BASE_SPREAD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 8192 if role == "new_base" else 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    generation: dict[str, Any] = {
        "bos_token_id": ids[BOS],
        "eos_token_id": ends,
        "transformers_version": version,
    }
    if role == "post":
        generation |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    else:
        generation |= {"_from_model_config": True}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


_MERGES = ("t h", "th e", "i n", "Ġ the", "a n", "an d", "Ġ and", "in g", "Ġ t", "Ġ a")


@cache
def _vocabulary() -> tuple[str, ...]:
    """The tokens of a byte-level BPE: one per byte, in GPT-2's printable alphabet, then one per merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return (*(alphabet[b] for b in range(256)), *(merge.replace(" ", "") for merge in _MERGES))


def _write_tokenizer(folder: Path, role: str) -> None:
    """Write a small byte-level BPE that encodes any text, its special tokens, and post's chat template."""
    ids = _token_ids()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in ids.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(_vocabulary())},
            "merges": list(_MERGES),
        },
    }
    end = EOT if role == "post" else EOS
    special = {"bos_token": BOS, "eos_token": end}
    _write_json(folder / "tokenizer.json", tokenizer, sort_keys=False)
    _write_json(folder / "special_tokens_map.json", special)
    settings = {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", settings | special)
    if role == "post":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
