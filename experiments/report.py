"""The numbers of README.md: every passage between ``<!-- filled: NAME -->`` and ``<!-- end -->`` is made of the
results, whole tables and single numbers alike. What stands around them is written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import findings
from experiments.estimates import Estimate
from experiments.predictions import HELD, PREDICTIONS
from experiments.settings import FAR, MODELS, TASKS, UNRELATED, VERSIONS

Document = dict[str, Any]
README = Path(__file__).with_name("README.md")
_FILLED = re.compile(r"(<!-- filled: (?P<name>[^>]+?) -->)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def fill(text: str, document: Document, plots: str = "results/") -> str:
    """Put the results into the marked passages, plots lying in ``plots``; a name nobody knows is a ValueError."""
    known = passages(document, plots)

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise ValueError(f"README: no passage is called {name!r}; expected one of {', '.join(sorted(known))}")
        said = known[name]()
        # A line that begins with a comment is no Markdown to its end: what stands alone gets lines of its own.
        alone = text[: match.start()].endswith("\n")
        return f"{match[1]}\n\n{said}\n\n{match[4]}" if alone else f"{match[1]}{said}{match[4]}"

    return _FILLED.sub(put, text)


def passages(document: Document, plots: str) -> dict[str, Callable[[], str]]:
    """What may be filled in: tables and plots by their part, and numbers for use within a sentence."""
    name = document["configuration"]

    def plot(part: str, said: str) -> Callable[[], str]:
        return lambda: f"![{said}]({plots}{name}-{part}.svg)"

    tables = {
        "run": lambda: _run(document),
        "predictions": lambda: _predictions(document),
        "updates": lambda: _updates(document),
        "pairs": lambda: _pairs(document),
        "correlations": lambda: _correlations(document),
        "geometry": lambda: _geometry(document),
        "starts": lambda: _starts(document),
        "recycled": lambda: _recycled(document),
        "sweeps": lambda: _sweeps(document),
        "mixtures": lambda: _mixtures(document),
        "plot of updates": plot("update", "scores of the plain base, m1's tuning, the merge and direct tuning"),
        "plot of distances": plot("distance", "loss along the lines; fraction recovered by distance and by barrier"),
        "plot of starts": plot("start", "scores along fine-tuning, from the plain base and from the merge"),
        "plot of recycling": plot("recycling", "scores after short fine-tuning, version by version"),
        "plot of alphas": plot("alpha", "scores along alpha"),
        "plot of mixtures": plot("mixture", "scores of two tasks along the factor of both deltas"),
    }
    return tables | _numbers(document)


def _numbers(document: Document) -> dict[str, Callable[[], str]]:
    """Single numbers: ``recovered TASK SOURCE TARGET`` (SCORE asked of TASK), ``neighbours TASK``, ``seeds``."""
    found: dict[str, Callable[[], str]] = {
        "seeds": lambda: str(len(document["seeds"])),
        "parameters": lambda: f"{document['seeds'][0]['parameters']:,}",
        "held": lambda: str(sum(p.judge(document).verdict == HELD for p in PREDICTIONS)),
        "predictions made": lambda: str(len(PREDICTIONS)),
    }
    for task in TASKS:
        found[f"neighbours {task}"] = lambda t=task: findings.neighbour_recovery(document, t).text()
        for a in MODELS:
            for b in MODELS:
                if a != b:
                    found[f"recovered {task} {a} {b}"] = lambda t=task, a=a, b=b: findings.transfer(
                        document, t, a, b
                    ).recovered.text()
                    found[f"merged {task} {a} {b}"] = lambda t=task, a=a, b=b: findings.transfer(
                        document, t, a, b
                    ).merged.text()
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(heads) - text_columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def _run(document: Document) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    commit = (document["commit"]["commit"] or "unknown")[:12] + (" with changes" if document["commit"]["dirty"] else "")
    machine = document["machine"]
    return "\n".join(
        [
            f"- seeds: {len(document['seeds'])}; models of {document['seeds'][0]['parameters']:,} parameters, f32",
            f"- {versions}; commit {commit}",
            f"- {machine['cpu']}, {machine['cores']} cores, {machine['architecture']}, Linux {machine['kernel']}",
        ]
    )


def _predictions(document: Document) -> str:
    rows = []
    for prediction in PREDICTIONS:
        outcome = prediction.judge(document)
        rows.append((prediction.part, prediction.said, f"**{outcome.verdict}**", outcome.numbers))
    return _table(("part", "expected", "outcome", "by"), rows, 4)


def _updates(document: Document) -> str:
    rows = [
        (
            row.score,
            row.target,
            *(x.text() for x in (row.plain, row.source_tuned, row.merged, row.direct, row.recovered)),
        )
        for row in findings.updates(document)
    ]
    heads = ("asked", "on", "plain", "m1, fine-tuned", "merged", "fine-tuned directly", "fraction of the gain")
    return _table(heads, rows, 2)


def _pairs(document: Document) -> str:
    rows = [
        (
            *(pair.source, pair.target, pair.distance.text(3), pair.barrier.text(3)),
            *(pair.recovered[task].text() for task in TASKS),
        )
        for pair in findings.pairs(document)
    ]
    return _table(("from", "to", "distance", "barrier", *TASKS), rows, 2)


def _correlations(document: Document) -> str:
    rows = [
        (task, *(findings.distance_correlation(document, task, against).text() for against in ("distance", "barrier")))
        for task in TASKS
    ]
    return _table(("fraction recovered", "with distance", "with barrier"), rows)


def _geometry(document: Document) -> str:
    def of(part: str, task: str, key: str) -> Estimate:
        return findings.over_seeds(document, lambda seed: seed["measured"]["geometry"][part][task][key])

    rows = [
        (
            *(task, of("delta", task, "m1").text(3)),
            *(of("cosine of deltas", task, f"m1 {other}").text() for other in (*VERSIONS[1:], FAR, UNRELATED)),
            of("cosine with drift", task, "m2").text(),
        )
        for task in TASKS
    ]
    others = (f"cos Δ({other})" for other in (*VERSIONS[1:], FAR, UNRELATED))
    return _table(("Δ(m1) for", "‖Δ‖ / ‖m1‖", *others, "cos m2 − m1"), rows)


def _starts(document: Document) -> str:
    rows = []
    for row in findings.starts(document):
        late = f" ({row.unreached} never)" if row.unreached else ""
        steps = (row.plain_steps.text(0), row.merged_steps.text(0) + late, row.share.text())
        rows.append(
            (row.task, row.target, row.merged_at_once.text(), *steps, row.plain_end.text(), row.merged_end.text())
        )
    heads = (
        "task",
        "on",
        "merge alone",
        "steps, plain",
        "steps, merged",
        "share",
        "plain at the end",
        "merged at the end",
    )
    return _table(heads, rows, 2)


def _recycled(document: Document) -> str:
    rows = [
        (row.task, row.version, *(x.text() for x in (row.plain, row.start, row.recycled, row.gain)))
        for row in findings.recycled(document)
    ]
    return _table(("task", "version", "tuned afresh", "recycled, before", "recycled, after", "gain"), rows, 2)


def _sweeps(document: Document) -> str:
    rows = findings.sweeps(document)
    heads = ("task", "on", *(f"α {a:g}" for a in rows[0].alphas))
    return _table(heads, [(row.task, row.target, *(f"{x.mean:.2f}" for x in row.scores)) for row in rows], 2)


def _mixtures(document: Document) -> str:
    rows = []
    for row in findings.mixtures(document):
        for i, task in enumerate(row.tasks):
            rows.append((" + ".join(row.tasks), task, *(scores[i].text() for scores in row.scores)))
    alphas = findings.mixtures(document)[0].alphas
    return _table(("deltas", "asked", *(f"α {a:g}" for a in alphas)), rows, 2)
