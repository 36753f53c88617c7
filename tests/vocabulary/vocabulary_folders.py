"""Tokenizers trained by the tokenizers library, variants of them with other tokens in another order, checkpoints whose
embeddings they fit, and what ``--vocab align`` must give for each token, looked up by its text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_folders import Tensors, write

from paramdelta import reference
from paramdelta.dtypes import BY_NAME

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers of these tests are trained by the library")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BF16 = ml_dtypes.bfloat16
_TYPES = {2: "bf16", 4: "f32"}
_TEXT = (
    "the quick brown fox jumps over the lazy dog while the other dogs sleep near the river",
    "a delta is a difference between two checkpoints and the differences are added to another checkpoint",
    "the rows of an embedding are tokens and the tokens of one tokenizer are not the tokens of another",
)


def trained(size: int = 320, specials: Sequence[str] = ("<s>", "</s>"), text: Sequence[str] = _TEXT) -> dict[str, Any]:
    """Return the JSON of a byte-level BPE tokenizer of about so many tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text, trainer)
    return dict(json.loads(tokenizer.to_str()))


def variant(
    source: Mapping[str, Any],
    *,
    seed: int | None = None,
    without: Sequence[str] = (),
    added: Sequence[str] = (),
) -> dict[str, Any]:
    """Return another tokenizer: ids permuted by a seed, some tokens taken out, others added as special tokens."""
    made = json.loads(json.dumps(source))
    model = made["model"]
    texts = [t for t in sorted(model["vocab"], key=model["vocab"].__getitem__) if t not in without]
    if seed is not None:
        texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    model["vocab"] = {text: number for number, text in enumerate(texts)}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [m for m in merges if not {*m, "".join(m)} & set(without)]
    like = made["added_tokens"][0]
    made["added_tokens"] = [
        {**t, "id": model["vocab"][t["content"]]} for t in made["added_tokens"] if t["content"] in model["vocab"]
    ] + [{**like, "id": len(texts) + i, "content": text} for i, text in enumerate(added)]
    return dict(made)


def unigram(size: int = 120) -> dict[str, Any]:
    """Return the JSON of a Unigram tokenizer that spells spaces as SentencePiece does."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return dict(json.loads(tokenizer.to_str()))


def reordered(source: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return a Unigram tokenizer with other ids."""
    made = json.loads(json.dumps(source))
    pieces = [made["model"]["vocab"][i] for i in np.random.default_rng(seed).permutation(len(made["model"]["vocab"]))]
    numbers = {text: number for number, (text, _) in enumerate(pieces)}
    made["model"] |= {"vocab": pieces, "unk_id": numbers["<unk>"]}
    made["added_tokens"] = [{**t, "id": numbers[t["content"]]} for t in made["added_tokens"]]
    return dict(made)


def ids_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token, as the library reads the tokenizer."""
    return dict(tokenizers.Tokenizer.from_str(json.dumps(tokenizer)).get_vocab(with_added_tokens=True))


@dataclass
class Sources:
    """Checkpoints with tokenizers: what is in them, by role, and where they are."""

    tokenizers: dict[str, Mapping[str, Any]]
    tensors: dict[str, Tensors]
    folders: dict[str, Path] = field(default_factory=dict)

    def ids(self, role: str) -> dict[str, int]:
        return ids_of(self.tokenizers[role])

    def row(self, role: str, name: str, text: str) -> np.ndarray[Any, Any] | None:
        """Return the row of a token, None where the role lacks it."""
        number = self.ids_by_role[role].get(text)
        table = self.tensors[role].get(name, self.tensors[role][EMBED])
        return None if number is None or number >= len(table) else table[number]

    def expected(self, name: str, text: str, alpha: Sequence[float] = (1.0,)) -> np.ndarray[Any, Any]:
        """Return the row that a token must have in the output, by the reference."""
        table = self.tensors["new_base"][name]
        suffixes = ["", *(f"_{number}" for number in range(2, len(alpha) + 1))]
        pairs = [(self.row(f"post{s}", name, text), self.row(f"base{s}", name, text)) for s in suffixes]
        starts = [self.row("new_base", name, text), *(base for post, base in pairs if post is not None)]
        start = next((row for row in starts if row is not None), np.zeros_like(table[0]))
        terms = [
            reference.Term(_array(post), _array(start if base is None else base), scale)
            for (post, base), scale in zip(pairs, alpha, strict=True)
            if post is not None
        ]
        merged = reference.merge(_array(start), terms, BY_NAME[_TYPES[table.itemsize]], int(np.prod(table.shape[1:])))
        return merged.codes.view(table.dtype).reshape(table.shape[1:])

    def __post_init__(self) -> None:
        self.ids_by_role = {role: self.ids(role) for role in self.tokenizers}


def _array(values: np.ndarray[Any, Any]) -> reference.Array:
    dtype = BY_NAME[_TYPES[values.itemsize]]
    return reference.Array(np.ascontiguousarray(values).reshape(-1).view(reference.code_type(dtype)), dtype)


def sources(
    root: Path,
    by_role: dict[str, Mapping[str, Any]],
    *,
    pads: Mapping[str, int] | None = None,
    tied: bool = False,
    width: int = 24,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    shards: int = 1,
    extra: Mapping[str, tuple[int, ...]] | None = None,
) -> Sources:
    """Write a checkpoint for each role, its vocabulary padded to a multiple; values are random, so that every sum is
    rounded. ``extra`` are further tensors by name; a −1 in a shape stands for the rows."""
    made = Sources(by_role, {})
    for number, role in enumerate(by_role):
        rng = np.random.default_rng([5, number])
        pad = (pads or {}).get(role, 1)
        rows = -(-(max(made.ids(role).values()) + 1) // pad) * pad
        dtype = (dtypes or {}).get(role, BF16)
        shapes: dict[str, tuple[int, ...]] = {EMBED: (rows, width), "model.norm.weight": (width,)}
        if not tied:
            shapes |= {HEAD: (rows, width), "lm_head.bias": (rows,)}
        for name, shape in (extra or {}).items():
            shapes[name] = tuple(rows if size == -1 else size for size in shape)
        tensors = {name: rng.standard_normal(shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}
        config = {"model_type": "llama", "vocab_size": rows, "hidden_size": width, "tie_word_embeddings": tied}
        config |= dict((configs or {}).get(role, {}))
        files = {"tokenizer.json": json.dumps(by_role[role])}
        made.folders[role] = write(root / role, tensors, config=config, files=files, shards=shards)
        made.tensors[role] = tensors
    return made


def folder_options(made: Sources) -> dict[str, Any]:
    """Return post, base and new_base as arguments of a merge."""
    posts = [path for role, path in made.folders.items() if role.startswith("post")]
    bases = [path for role, path in made.folders.items() if role.startswith("base")]
    several = len(posts) > 1
    return {
        "post": posts if several else posts[0],
        "base": bases if several else bases[0],
        "new_base": made.folders["new_base"],
    }


def three_tokenizers() -> dict[str, Mapping[str, Any]]:
    """Return tokenizers of post, base and new_base that differ in every way: tokens added, taken out, and moved."""
    first = trained()
    texts = [t for t in first["model"]["vocab"] if len(t) > 2 and not t.startswith("<")]
    return {
        "post": variant(first, seed=1, without=texts[:4], added=("<|user|>", "<|both|>", "<|only post|>")),
        "base": variant(first, seed=2, without=texts[3:7], added=("<|user|>", "<|base|>")),
        "new_base": variant(first, seed=3, without=texts[6:11], added=("<|new|>", "<|both|>", "<|more|>")),
    }
