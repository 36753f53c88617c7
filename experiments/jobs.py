"""The jobs of one seed and what each needs: pre-train a version, fine-tune it, merge and fine-tune on, measure. Every
job writes one folder: a checkpoint as transformers saves it, if it makes a model, and ``job.json``, last of all."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from experiments import tasks
from experiments.settings import FAR, MODELS, ONWARD, TASKS, UNRELATED, VERSIONS, Settings
from experiments.world import FAR_MIX, FIRST_MIX, Mix, World, later_mix

DONE = "job.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One piece of work of one seed: what it does, to what, and the jobs whose folders it reads."""

    kind: str
    model: str = ""
    task: str = ""
    needs: tuple[Job, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self.model, self.task) if part)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one seed's jobs leave their folders, and what they are to do it with."""

    folder: Path
    seed: int
    settings: Settings

    def of(self, job: Job) -> Path:
        return self.folder / job.name

    def is_done(self, job: Job) -> bool:
        return (self.of(job) / DONE).exists()

    def result(self, job: Job) -> dict[str, Any]:
        return json.loads((self.of(job) / DONE).read_text())

    def rng(self, purpose: str) -> random.Random:
        return random.Random(f"{purpose} {self.seed}")

    def world(self) -> World:
        return World(self.seed)

    def tests(self) -> dict[str, tasks.Batch]:
        return tasks.tests(self.world(), self.settings.questions)


def pretraining(model: str) -> Job:
    if model in ("m1", UNRELATED):
        return Job("pretrain", model)
    before = "m1" if model == FAR else VERSIONS[VERSIONS.index(model) - 1]
    return Job("pretrain", model, needs=(pretraining(before),))


def tuning(model: str, task: str) -> Job:
    """Fine-tuning from the plain base."""
    return Job("tune", model, task, (pretraining(model),))


def short_tuning(model: str, task: str) -> Job:
    return Job("short", model, task, (pretraining(model),))


def onward(model: str, task: str) -> Job:
    """Fine-tuning from model + (tuned m1 − m1)."""
    return Job("onward", model, task, (tuning("m1", task), pretraining("m1"), pretraining(model)))


def recycling(model: str, task: str) -> Job:
    """Fine-tuning, for a short while, from m_i + Δ_{i−1}, where Δ_{i−1} is what recycling gave one version before."""
    before = VERSIONS[VERSIONS.index(model) - 1]
    source = short_tuning(before, task) if before == VERSIONS[0] else recycling(before, task)
    return Job("recycle", model, task, (source, pretraining(before), pretraining(model)))


def all_jobs() -> list[Job]:
    """Every job of one seed, each after those it needs."""
    found = [pretraining(model) for model in MODELS]
    for task in TASKS:
        found += [tuning(model, task) for model in MODELS]
        found += [onward(model, task) for model in ONWARD]
        found += [short_tuning(model, task) for model in VERSIONS]
        found += [recycling(model, task) for model in VERSIONS[1:]]
    return [*found, Job("measure", needs=tuple(found))]


def mix_of(model: str) -> Mix:
    if model == FAR:
        return FAR_MIX
    return FIRST_MIX if model in ("m1", UNRELATED) else later_mix(VERSIONS.index(model) + 1)
