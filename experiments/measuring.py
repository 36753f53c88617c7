"""What is measured of one seed's models once all are there: every transfer between versions, the lines between them,
the deltas' geometry, scaled and mixed deltas. Every merge is paramdelta's: streamed into a model, or on arrays."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

import paramdelta
from experiments import jobs, training
from experiments.jobs import Job, Place
from experiments.settings import ALPHA_TARGETS, MIX_TARGET, MODELS, TASKS
from paramdelta import ops

Tensors = dict[str, torch.Tensor]


class Bench:
    """One model that takes the weights of each merge in turn, and what it is asked."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.plain = {model: place.of(jobs.pretraining(model)) for model in MODELS}
        self.tuned = {(model, task): place.of(jobs.tuning(model, task)) for model in MODELS for task in TASKS}
        self.tests = place.tests()
        self.text = _held_out(place)
        self._model = training.load_model(self.plain["m1"])

    def of(self, folder: Path) -> dict[str, float]:
        """Scores and loss of a checkpoint as it is."""
        return self._asked(training.load_model(folder))

    def merged(self, post: Any, base: Any, new_base: Path, alpha: float | list[float] = 1.0) -> dict[str, float]:
        """Scores and loss of new_base + alpha · (post − base)."""
        tensors = paramdelta.stream(post, base, new_base, alpha=alpha, framework="pt", threads=1)
        return self._asked(training.fill(self._model, tensors))

    def loss_between(self, a: Path, b: Path, x: float) -> float:
        """The loss on text at a + x · (b − a)."""
        tensors = paramdelta.stream(b, a, a, alpha=x, framework="pt", threads=1)
        return training.text_loss(training.fill(self._model, tensors), self.text)

    def _asked(self, model: LlamaForCausalLM) -> dict[str, float]:
        return {**training.scores(model, self.tests), "loss": training.text_loss(model, self.text)}


def _held_out(place: Place) -> np.ndarray:
    """Text no model was trained on, as much of each version's mix."""
    rows, words = place.settings.held_out_rows, place.settings.words
    mixes = list(dict.fromkeys(jobs.mix_of(model) for model in MODELS))
    made = (place.world().batches(mix, place.rng(f"held out {i}"), rows, words) for i, mix in enumerate(mixes))
    return np.concatenate([next(batches) for batches in made])


def measure(_: Job, place: Place) -> dict[str, Any]:
    bench, settings = Bench(place), place.settings
    plain, tuned = bench.plain, bench.tuned
    return {
        "plain": {model: bench.of(plain[model]) for model in MODELS},
        "tuned": {task: {model: bench.of(tuned[model, task]) for model in MODELS} for task in TASKS},
        "transfer": {
            task: {
                source: {
                    target: bench.merged(tuned[source, task], plain[source], plain[target])
                    for target in MODELS
                    if target != source
                }
                for source in MODELS
            }
            for task in TASKS
        },
        "lines": [
            {
                "from": a,
                "to": b,
                "at": list(settings.line),
                "loss": [bench.loss_between(plain[a], plain[b], x) for x in settings.line],
            }
            for a, b in itertools.combinations(MODELS, 2)
        ],
        "alphas": {
            task: {
                target: [bench.merged(tuned["m1", task], plain["m1"], plain[target], x)[task] for x in settings.alphas]
                for target in ALPHA_TARGETS
            }
            for task in TASKS
        },
        "mixes": [
            {
                "tasks": pair,
                "alphas": list(settings.mix_alphas),
                "scores": [
                    bench.merged(
                        [tuned["m1", task] for task in pair],
                        [plain["m1"]] * 2,
                        plain[MIX_TARGET],
                        [x] * 2,
                    )
                    for x in settings.mix_alphas
                ],
            }
            for pair in itertools.combinations(TASKS, 2)
        ],
        "geometry": _geometry(bench),
    }


def _geometry(bench: Bench) -> dict[str, Any]:
    """Lengths and angles, over all weights as one vector: of versions' differences and of fine-tuning's deltas."""
    plain = {model: _load(folder) for model, folder in bench.plain.items()}
    tuned = {key: _load(folder) for key, folder in bench.tuned.items()}
    zero = {name: torch.zeros_like(x) for name, x in plain["m1"].items()}
    deltas = {key: _merge(plain[key[0]], x, zero) for key, x in tuned.items()}
    length = {model: _dots(x, zero, x)[0] for model, x in plain.items()}
    between = {
        f"{a} {b}": math.sqrt(_dots(plain[a], plain[b], zero)[0] / length[a])
        for a, b in itertools.permutations(MODELS, 2)
    }
    return {
        "distance": between,  # ‖b − a‖ / ‖a‖
        "delta": {
            task: {m: math.sqrt(_dots(tuned[m, task], plain[m], zero)[0] / length[m]) for m in MODELS} for task in TASKS
        },
        "cosine of deltas": {
            task: {
                f"{a} {b}": _cosine(deltas[a, task], zero, deltas[b, task])
                for a, b in itertools.combinations(MODELS, 2)
            }
            for task in TASKS
        },
        "cosine with drift": {
            task: {b: _cosine(tuned["m1", task], plain["m1"], plain[b]) for b in MODELS if b != "m1"} for task in TASKS
        },
        "cosine between tasks": {
            f"{a} {b}": _cosine(deltas["m1", a], zero, deltas["m1", b]) for a, b in itertools.combinations(TASKS, 2)
        },
    }


def _load(folder: Path) -> Tensors:
    return training.load_model(folder).state_dict()


def _merge(base: Tensors, post: Tensors, zero: Tensors) -> Tensors:
    return {name: ops.merge(post[name], base[name], zero[name], threads=1).out for name in zero}


def _dots(post: Tensors, base: Tensors, new_base: Tensors) -> tuple[float, float, float]:
    """‖post − base‖², ‖new_base − base‖² and their inner product, over all weights."""
    found = [ops.norms(post[name], base[name], new_base[name], threads=1) for name in post]
    return math.fsum(x[0] for x in found), math.fsum(x[1] for x in found), math.fsum(x[2] for x in found)


def _cosine(post: Tensors, base: Tensors, new_base: Tensors) -> float:
    first, second, both = _dots(post, base, new_base)
    return both / math.sqrt(first * second)
