"""What the jobs do: train, merge and train on, measure. Runs in worker processes, one thread each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramdelta
from experiments import measuring, tasks, training
from experiments.jobs import DONE, Job, Place, mix_of
from experiments.settings import FAR


def run(job: Job, place: Place) -> None:
    """Do a job whose needs are done. What was cut short before is begun again."""
    kinds: dict[str, Callable[[Job, Place], dict[str, Any]]] = {
        "pretrain": _pretrain,
        "tune": _tune,
        "short": _tune,
        "onward": _tune_merged,
        "recycle": _tune_merged,
        "measure": measuring.measure,
    }
    folder = place.of(job)
    folder.mkdir(parents=True, exist_ok=True)
    said = json.dumps(kinds[job.kind](job, place), indent=1)
    unfinished = folder / "unfinished.json"
    unfinished.write_text(said + "\n")
    os.replace(unfinished, folder / DONE)


def _pretrain(job: Job, place: Place) -> dict[str, Any]:
    settings = place.settings
    if job.needs:
        model = training.load_model(place.of(job.needs[0]))
    else:
        model = training.make_model(settings.size, f"{job.model} {place.seed}")
    if job.model == FAR:
        steps, rate, last = settings.far_steps, settings.far_rate, settings.far_last_rate
    elif job.needs:
        steps, rate, last = settings.later_steps, settings.later_rate, settings.later_last_rate
    else:
        steps, rate, last = settings.first_steps, settings.first_rate, settings.first_last_rate
    texts = place.world().batches(mix_of(job.model), place.rng(f"text {job.model}"), settings.rows, settings.words)
    loss = training.train(model, training.text_batches(texts), steps=steps, rate=rate, final_rate=last)
    model.save_pretrained(place.of(job))
    return {"loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def _tune(job: Job, place: Place) -> dict[str, Any]:
    return _tune_from(place.of(job.needs[0]), job, place)


def _tune_merged(job: Job, place: Place) -> dict[str, Any]:
    source, base, target = (place.of(need) for need in job.needs)
    start = place.of(job) / "start"
    paramdelta.merge(post=source, base=base, new_base=target, out=start, threads=1, overwrite=True, restart=True)
    return _tune_from(start, job, place)


def _tune_from(start: Path, job: Job, place: Place) -> dict[str, Any]:
    """Fine-tune with the same questions in the same order whatever the start; keep the score along the way."""
    tuned = place.settings.tuning[job.task]
    steps = tuned.steps if job.kind in ("tune", "onward") else tuned.short_steps
    model = training.load_model(start)
    tests = {job.task: place.tests()[job.task]}
    curve: list[tuple[int, float]] = []

    def note(step: int) -> None:
        if step % tuned.every == 0 or step == steps:
            curve.append((step, training.scores(model, tests)[job.task]))

    loss = training.train(
        model,
        tasks.batches(place.world(), job.task, place.rng(f"questions {job.task}"), 2 * place.settings.rows),
        steps=steps,
        rate=tuned.rate,
        final_rate=tuned.rate / 10,
        at_step=note,
    )
    model.save_pretrained(place.of(job))
    return {"loss": loss, "curve": curve}
