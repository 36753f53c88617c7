"""Runs the jobs of all seeds in a few worker processes, each job after those it needs; what is done already is not done
again. Interrupted at any time, the same call continues."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from experiments.jobs import Job, Place, all_jobs
from experiments.settings import Settings

Work = tuple[Place, Job]


def places(folder: Path, settings: Settings) -> list[Place]:
    """Where each seed's jobs work: below a folder that is named after all that the results depend on."""
    root = folder / settings.digest()
    return [Place(root / f"seed-{seed}", seed, settings) for seed in range(settings.seeds)]


def carry_out(seeds: Sequence[Place], *, workers: int, say: Callable[[str], None]) -> None:
    """Do what is not done. ``say`` is told of each job that ends. The first job that fails ends the run."""
    work = [(place, job) for place in seeds for job in all_jobs()]
    waiting = [item for item in work if not item[0].is_done(item[1])]
    done, total = len(work) - len(waiting), len(work)
    if done:
        say(f"{done} of {total} jobs were done before")
    if not waiting:
        return
    progress = _Progress(waiting, say, done, total)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    # A worker that trains on several threads would give other bits, and take the other worker's core.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        running: dict[Future[float], Work] = {}
        try:
            while waiting or running:
                ready = [item for item in waiting if all(item[0].is_done(need) for need in item[1].needs)]
                for item in ready[: workers - len(running)]:
                    waiting.remove(item)
                    running[pool.submit(_timed, item[1], item[0])] = item
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    progress.ended(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Progress:
    """Says what ended, and how long the rest will take by what its like took."""

    def __init__(self, waiting: Sequence[Work], say: Callable[[str], None], done: int, total: int) -> None:
        self._left = [job.kind for _, job in waiting]
        self._say, self._done, self._total, self._began = say, done, total, time.monotonic()
        self._seconds: dict[str, list[float]] = {}

    def ended(self, item: Work, seconds: float) -> None:
        place, job = item
        self._done += 1
        self._left.remove(job.kind)
        self._seconds.setdefault(job.kind, []).append(seconds)
        elapsed = time.monotonic() - self._began
        spent = sum(sum(of_kind) for of_kind in self._seconds.values())
        kinds = set(self._left)
        rest = ""
        if kinds <= self._seconds.keys() and spent > 0:
            ahead = sum(sum(self._seconds[k]) / len(self._seconds[k]) * self._left.count(k) for k in kinds)
            rest = f", about {ahead * elapsed / spent / 60:.0f} min left"
        what = f"[{self._done}/{self._total}] seed {place.seed} {job.name} {seconds:.0f} s"
        self._say(f"{what}; {elapsed / 60:.1f} min so far{rest}")


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted worker ends without a word; its job is begun again
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers

    from experiments import training  # here, not above: the process that only hands out work needs no torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    training.settle()


def _timed(job: Job, place: Place) -> float:
    from experiments import doing

    began = time.monotonic()
    doing.run(job, place)
    return time.monotonic() - began
