"""Models: made, trained, loaded, and measured. One thread and deterministic algorithms, so that a seed gives the same
bits again on the same machine and versions."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.settings import Size
from experiments.tasks import IGNORED, Batch
from experiments.world import NUMBER, PAD, VOCABULARY


def settle() -> None:
    """One thread, deterministic algorithms: call once in every process that trains."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def make_model(size: Size, seed: str) -> LlamaForCausalLM:
    torch.manual_seed(zlib.crc32(seed.encode()))
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=NUMBER[PAD],
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def load_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def fill(model: LlamaForCausalLM, tensors: Iterable[tuple[str, torch.Tensor]]) -> LlamaForCausalLM:
    """Give a model the tensors of a merge, as they stream by."""
    model.load_state_dict(dict(tensors), strict=True)
    return model


def text_batches(texts: Iterator[np.ndarray]) -> Iterator[Batch]:
    """Pre-training: every word is to be predicted."""
    return (Batch(text, text) for text in texts)


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    *,
    steps: int,
    rate: float,
    final_rate: float,
    warm_up: int = 20,
    decay: float = 0.01,
    at_step: Callable[[int], None] = lambda _: None,
) -> float:
    """Train with AdamW, its rate along half a cosine from rate to final_rate; return the last ten steps' mean loss.

    ``at_step`` is called before the first step with 0, and after each with the number of steps done.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    losses: list[float] = []
    at_step(0)
    for step in range(steps):
        model.train()
        along = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = min(1.0, (step + 1) / warm_up) * (final_rate + (rate - final_rate) * along)
        loss = loss_of(model, next(batches))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        at_step(step + 1)
    return float(np.mean(losses[-10:]))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy, in nats, of the words that are to be predicted."""
    logits = model(input_ids=torch.from_numpy(batch.words)).logits[:, :-1]
    labels = torch.from_numpy(batch.labels)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, text: np.ndarray) -> float:
    """The loss on held-out text [rows, words]."""
    model.eval()
    return float(loss_of(model, Batch(text, text)))


@torch.no_grad()
def scores(model: LlamaForCausalLM, tests: Mapping[str, Batch]) -> dict[str, float]:
    """The share of questions answered right, word for word.

    Greedy decoding gives the right answer exactly where the most likely word is right at every place of it, given
    the right words before: one pass over questions with their answers tells.
    """
    model.eval()
    found = {}
    for name, batch in tests.items():
        guesses = model(input_ids=torch.from_numpy(batch.words)).logits[:, :-1].argmax(-1).numpy()
        labels = batch.labels[:, 1:]
        found[name] = float(np.mean(((guesses == labels) | (labels == IGNORED)).all(axis=1)))
    return found
