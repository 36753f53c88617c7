"""From raw results to what the papers say: the tables' rows, each number a mean over seeds with its interval."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from experiments.estimates import Estimate, barrier, rank_correlation, recovered, steps_to
from experiments.settings import ALPHA_TARGETS, MODELS, ONWARD, TASKS, UNRELATED, VERSIONS

Document = dict[str, Any]
# A score along fine-tuning that counts as having learned it, against the end of fine-tuning from the plain base.
REACHED = 0.95


def over_seeds(document: Document, of: Callable[[dict[str, Any]], float | None]) -> Estimate:
    """What ``of`` finds in each seed; seeds of which it finds None, or NaN, are left out."""
    found = (of(seed) for seed in document["seeds"])
    return Estimate(tuple(float(x) for x in found if x is not None and not math.isnan(x)))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One task's delta from source to target: scores, and the fraction of direct fine-tuning's gain."""

    task: str
    score: str  # what is asked
    source: str
    target: str
    plain: Estimate
    source_tuned: Estimate
    merged: Estimate
    direct: Estimate
    recovered: Estimate


def transfer(document: Document, task: str, source: str, target: str, score: str | None = None) -> Transfer:
    asked = score or task

    def plain(seed: dict[str, Any]) -> float:
        return seed["measured"]["plain"][target][asked]

    def tuned(model: str) -> Callable[[dict[str, Any]], float]:
        return lambda seed: seed["measured"]["tuned"][task][model][asked]

    def merged(seed: dict[str, Any]) -> float:
        return seed["measured"]["transfer"][task][source][target][asked]

    return Transfer(
        task,
        asked,
        source,
        target,
        over_seeds(document, plain),
        over_seeds(document, tuned(source)),
        over_seeds(document, merged),
        over_seeds(document, tuned(target)),
        over_seeds(document, lambda seed: recovered(merged(seed), plain(seed), tuned(target)(seed))),
    )


def updates(document: Document) -> list[Transfer]:
    """(a) m1's delta on the later versions, and what only they know: people that m1 never read about."""
    found = [transfer(document, task, "m1", target) for task in TASKS for target in VERSIONS[1:]]
    return found + [transfer(document, "recall", "m1", f"m{v}", f"recall of version {v}") for v in (2, 3, 4)]


def neighbours() -> list[tuple[str, str]]:
    """Each version and the one after it."""
    return list(itertools.pairwise(VERSIONS))


def neighbour_recovery(document: Document, task: str) -> Estimate:
    """The fraction recovered from each version to the next, the pairs' mean in each seed."""

    def of(seed: dict[str, Any]) -> float | None:
        one = {**document, "seeds": [seed]}
        values = [x for a, b in neighbours() for x in transfer(one, task, a, b).recovered.values]
        return sum(values) / len(values) if values else None

    return over_seeds(document, of)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two versions: how far apart, how high the loss rises between them, and what deltas recover both ways."""

    source: str
    target: str
    distance: Estimate
    barrier: Estimate
    recovered: dict[str, Estimate]


def pairs(document: Document) -> list[Pair]:
    """(b) Every ordered pair of versions, the nearest first."""
    found = [
        Pair(
            a,
            b,
            over_seeds(document, lambda seed, a=a, b=b: seed["measured"]["geometry"]["distance"][f"{a} {b}"]),
            over_seeds(document, lambda seed, a=a, b=b: barrier_between(seed, a, b)),
            {task: transfer(document, task, a, b).recovered for task in TASKS},
        )
        for a, b in itertools.permutations(MODELS, 2)
    ]
    return sorted(found, key=lambda pair: pair.distance.mean)


def barrier_between(seed: dict[str, Any], a: str, b: str) -> float:
    line = next(line for line in seed["measured"]["lines"] if {line["from"], line["to"]} == {a, b})
    return barrier(line["at"], line["loss"])


def distance_correlation(document: Document, task: str, against: str) -> Estimate:
    """Spearman's correlation, over ordered pairs, of the fraction recovered with the distance, or with the barrier."""

    def of(seed: dict[str, Any]) -> float:
        x, y = [], []
        for a, b in itertools.permutations(MODELS, 2):
            fraction = transfer({**document, "seeds": [seed]}, task, a, b).recovered
            if fraction.values:
                x.append(
                    seed["measured"]["geometry"]["distance"][f"{a} {b}"]
                    if against == "distance"
                    else barrier_between(seed, a, b)
                )
                y.append(fraction.mean)
        return rank_correlation(x, y) if len(x) > 2 else math.nan

    return over_seeds(document, of)


@dataclasses.dataclass(frozen=True)
class Start:
    """(c) Fine-tuning from the plain base and from the merged start, on the same questions in the same order."""

    task: str
    target: str
    wanted: Estimate  # the score to reach
    merged_at_once: Estimate  # the merged start's score before any step
    plain_steps: Estimate
    merged_steps: Estimate
    share: Estimate  # merged steps over plain steps
    plain_end: Estimate
    merged_end: Estimate
    unreached: int  # seeds whose merged start never got there: their steps count as all of them


def starts(document: Document) -> list[Start]:
    return [_start(document, task, target) for task in TASKS for target in ONWARD]


def _start(document: Document, task: str, target: str) -> Start:
    def plain(seed: dict[str, Any]) -> list[list[float]]:
        return seed["curves"][f"tune-{target}-{task}"]

    def merged(seed: dict[str, Any]) -> list[list[float]]:
        return seed["curves"][f"onward-{target}-{task}"]

    def wanted(seed: dict[str, Any]) -> float:
        return REACHED * plain(seed)[-1][1]

    def steps(curve: Callable[[dict[str, Any]], list[list[float]]]) -> Callable[[dict[str, Any]], float]:
        def of(seed: dict[str, Any]) -> float:
            found = steps_to(curve(seed), wanted(seed))
            return float(curve(seed)[-1][0] if found is None else found)

        return of

    return Start(
        task,
        target,
        over_seeds(document, wanted),
        over_seeds(document, lambda seed: merged(seed)[0][1]),
        over_seeds(document, steps(plain)),
        over_seeds(document, steps(merged)),
        over_seeds(document, lambda seed: steps(merged)(seed) / steps(plain)(seed) if steps(plain)(seed) else None),
        over_seeds(document, lambda seed: plain(seed)[-1][1]),
        over_seeds(document, lambda seed: merged(seed)[-1][1]),
        sum(steps_to(merged(seed), wanted(seed)) is None for seed in document["seeds"]),
    )


@dataclasses.dataclass(frozen=True)
class Recycled:
    """(d) One version after a short fine-tuning from the plain base, and after as short a one from m_i + Δ_{i−1}."""

    task: str
    version: str
    start: Estimate
    plain: Estimate
    recycled: Estimate
    gain: Estimate


def recycled(document: Document) -> list[Recycled]:
    found = []
    for task, version in itertools.product(TASKS, VERSIONS):
        first = version == VERSIONS[0]
        plain = f"short-{version}-{task}"
        again = plain if first else f"recycle-{version}-{task}"
        found.append(
            Recycled(
                task,
                version,
                over_seeds(document, lambda seed, x=again: seed["curves"][x][0][1]),
                over_seeds(document, lambda seed, x=plain: seed["curves"][x][-1][1]),
                over_seeds(document, lambda seed, x=again: seed["curves"][x][-1][1]),
                over_seeds(
                    document, lambda seed, x=again, y=plain: seed["curves"][x][-1][1] - seed["curves"][y][-1][1]
                ),
            )
        )
    return found


@dataclasses.dataclass(frozen=True)
class Sweep:
    """(e) One task's score on a target, along the factor of m1's delta."""

    task: str
    target: str
    alphas: tuple[float, ...]
    scores: tuple[Estimate, ...]

    @property
    def best(self) -> float:
        """The factor with the best mean score; the one nearest to 1 among equals."""
        top = max(score.mean for score in self.scores)
        return min(
            (a for a, s in zip(self.alphas, self.scores, strict=True) if s.mean == top), key=lambda a: abs(a - 1)
        )

    def at(self, alpha: float) -> Estimate:
        return self.scores[self.alphas.index(alpha)]


def sweeps(document: Document) -> list[Sweep]:
    alphas = tuple(document["settings"]["alphas"])
    return [
        Sweep(
            task,
            target,
            alphas,
            tuple(
                over_seeds(document, lambda seed, i=i, t=task, m=target: seed["measured"]["alphas"][t][m][i])
                for i in range(len(alphas))
            ),
        )
        for task, target in itertools.product(TASKS, ALPHA_TARGETS)
    ]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """(f) Two tasks' deltas in one sum, each with the same factor: both tasks' scores."""

    tasks: tuple[str, str]
    alphas: tuple[float, ...]
    scores: tuple[tuple[Estimate, Estimate], ...]  # for each factor, of each task

    @property
    def best(self) -> int:
        """The place of the factor at which the weaker of the two tasks does best."""
        return max(range(len(self.alphas)), key=lambda i: min(score.mean for score in self.scores[i]))


def mixtures(document: Document) -> list[Mixture]:
    alphas = tuple(document["settings"]["mix_alphas"])

    def score(which: int, i: int, task: str) -> Estimate:
        return over_seeds(document, lambda seed: seed["measured"]["mixes"][which]["scores"][i][task])

    return [
        Mixture(pair, alphas, tuple((score(k, i, pair[0]), score(k, i, pair[1])) for i in range(len(alphas))))
        for k, pair in enumerate(itertools.combinations(TASKS, 2))
    ]


def unrelated(document: Document) -> Iterator[Transfer]:
    """Deltas to and from the model with another initialisation."""
    for task in TASKS:
        yield transfer(document, task, "m1", UNRELATED)
        yield transfer(document, task, UNRELATED, "m1")
