"""What was expected before the full run, each with the rule that judges it by the numbers. Written down after a pilot
with one seed; the outcomes are computed, never edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments import findings
from experiments.settings import FAR, TASKS, VERSIONS

Document = dict[str, Any]
HELD, FAILED, OPEN = "held", "failed", "open"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a prediction held, and the numbers it was judged by."""

    verdict: str
    numbers: str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One finding, as expected here."""

    part: str
    said: str
    judge: Callable[[Document], Outcome]


def _bound(estimate: Any, least: float, most: float, label: str, digits: int = 2) -> Outcome:
    """Held: the whole interval lies within the bounds; failed: all of it outside; open: it straddles one."""
    numbers = f"{label} {estimate.text(digits)}".strip()
    if not estimate.values:
        return Outcome(OPEN, f"{label}: no seed to judge by")
    if least <= estimate.low and estimate.high <= most:
        return Outcome(HELD, numbers)
    if estimate.high < least or estimate.low > most:
        return Outcome(FAILED, numbers)
    return Outcome(OPEN, numbers)


def _all(outcomes: list[Outcome]) -> Outcome:
    """All must hold; one that failed fails the whole."""
    verdicts = {outcome.verdict for outcome in outcomes}
    verdict = FAILED if FAILED in verdicts else OPEN if OPEN in verdicts else HELD
    return Outcome(verdict, "; ".join(outcome.numbers for outcome in outcomes))


def _neighbours(task: str, least: float, most: float) -> Callable[[Document], Outcome]:
    return lambda document: _bound(findings.neighbour_recovery(document, task), least, most, task)


def _new_people(document: Document) -> Outcome:
    outcomes = []
    for version in (2, 3, 4):
        found = findings.transfer(document, "recall", "m1", f"m{version}", f"recall of version {version}")
        gain = findings.over_seeds(
            document,
            lambda seed, v=version: (
                seed["measured"]["transfer"]["recall"]["m1"][f"m{v}"][f"recall of version {v}"]
                - seed["measured"]["tuned"]["recall"]["m1"][f"recall of version {v}"]
            ),
        )
        outcomes.append(_bound(gain, 0.1, 1.0, f"{found.target} minus m1's own"))
    return _all(outcomes)


def _falls_with_distance(document: Document) -> Outcome:
    return _all(
        [_bound(findings.distance_correlation(document, task, "distance"), -1.01, -0.3, task) for task in TASKS]
    )


def _falls_with_barrier(document: Document) -> Outcome:
    return _all([_bound(findings.distance_correlation(document, task, "barrier"), -1.01, -0.3, task) for task in TASKS])


def _unrelated(document: Document) -> Outcome:
    return _all(
        [
            _bound(found.merged, -1.0, 0.15, f"{found.task} {found.source} → {found.target}")
            for found in findings.unrelated(document)
        ]
    )


def _fewer_steps(targets: tuple[str, ...]) -> Callable[[Document], Outcome]:
    def judge(document: Document) -> Outcome:
        rows = [row for row in findings.starts(document) if row.target in targets]
        return _all([_bound(row.share, 0.0, 0.999, f"{row.task} on {row.target}") for row in rows])

    return judge


def _recycling(document: Document) -> Outcome:
    last = [row for row in findings.recycled(document) if row.version == VERSIONS[-1]]
    return _all([_bound(row.gain, 0.001, 1.0, f"{row.task} on {row.version}") for row in last])


def _alpha_near_one(document: Document) -> Outcome:
    rows = [row for row in findings.sweeps(document) if row.target == VERSIONS[1]]
    outcomes = []
    for row in rows:
        judged = len(row.at(row.best).values) > 1 and row.at(row.best).mean >= 0.1
        verdict = OPEN if not judged else HELD if 0.75 <= row.best <= 1.25 else FAILED
        outcomes.append(Outcome(verdict, f"{row.task} best at {row.best:g}, {row.at(row.best).text()}"))
    return _all(outcomes)


def _mixture(wanted: tuple[str, str], least: float, most: float) -> Callable[[Document], Outcome]:
    def judge(document: Document) -> Outcome:
        row = next(row for row in findings.mixtures(document) if row.tasks == wanted)
        scores = row.scores[row.best]
        label = f"α {row.alphas[row.best]:g}:"
        return _all([_bound(s, least, most, f"{label} {task}") for s, task in zip(scores, wanted, strict=True)])

    return judge


def _hurt(document: Document) -> Outcome:
    row = next(row for row in findings.mixtures(document) if row.tasks == ("repeat", "reverse"))
    scores = row.scores[row.best]
    weaker = min(range(2), key=lambda i: scores[i].mean)
    return _bound(scores[weaker], -1.0, 0.6, f"α {row.alphas[row.best]:g}: {row.tasks[weaker]}")


PREDICTIONS = (
    Prediction("a", "recall: at least 0.8 of the gain from each version to the next", _neighbours("recall", 0.8, 9)),
    Prediction("a", "repeat: at least 0.8 of the gain from each version to the next", _neighbours("repeat", 0.8, 9)),
    Prediction("a", "reverse, which the base cannot do: less than 0.8 of the gain", _neighbours("reverse", -9, 0.8)),
    Prediction("a", "the merge answers about people only its base has read of, m1's own tuning does not", _new_people),
    Prediction(
        "b", "the fraction recovered falls with the distance (rank correlation below −0.3)", _falls_with_distance
    ),
    Prediction("b", "it falls with the barrier on the line between (rank correlation below −0.3)", _falls_with_barrier),
    Prediction("b", "nothing to or from a model of another initialisation (scores below 0.15)", _unrelated),
    Prediction("c", "the merged start on m2 and m4 needs fewer steps than the plain base", _fewer_steps(("m2", "m4"))),
    Prediction("c", f"so it does on {FAR}", _fewer_steps((FAR,))),
    Prediction("d", "on m4, after three rounds, recycling beats tuning afresh with the same budget", _recycling),
    Prediction("e", "the best α on m2 lies within 0.75 … 1.25", _alpha_near_one),
    Prediction("f", "recall and repeat live together: both at least 0.6", _mixture(("recall", "repeat"), 0.6, 1.01)),
    Prediction("f", "repeat and reverse hurt each other: one of them below 0.6", _hurt),
)
