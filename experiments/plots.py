"""The findings as SVG files, one for each part, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import findings
from experiments.estimates import Estimate
from experiments.findings import over_seeds
from experiments.settings import ALPHA_TARGETS, FAR, MIX_TARGET, MODELS, ONWARD, TASKS, UNRELATED, VERSIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = dict[str, Any]
COLOURS = {"recall": "#0072b2", "repeat": "#009e73", "reverse": "#d55e00"}
_PLAIN, _MERGED, _GREYS = "#666666", "#0072b2", ("#bbbbbb", "#888888", "#0072b2", "#e69f00")


def draw(document: Document, folder: Path) -> list[Path]:
    """Write every plot into a folder; the same results give the same bytes under the same matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "paramdelta", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
        | {"axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False}
    )
    from matplotlib import pyplot

    plots: dict[str, Callable[[Document], Figure]] = {
        "update": _update,
        "distance": _distance,
        "start": _start,
        "recycling": _recycling,
        "alpha": _alpha,
        "mixture": _mixture,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in plots.items():
        figure = plot(document)
        path = folder / f"{document['configuration']}-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _axes(columns: int, rows: int = 1, height: float = 2.8) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(9, height * rows), squeeze=False)


def _line(axes: Axes, x: Any, estimates: Any, **style: Any) -> None:
    """Means as a line, intervals as a band; single seeds have no band."""
    means = np.array([e.mean for e in estimates])
    half = np.array([e.half if np.isfinite(e.half) else 0 for e in estimates])
    (drawn,) = axes.plot(x, means, **style)
    axes.fill_between(x, means - half, means + half, color=drawn.get_color(), alpha=0.15, linewidth=0)


def _bar_errors(estimates: list[Estimate]) -> list[float]:
    return [e.half if np.isfinite(e.half) else 0.0 for e in estimates]


def _update(document: Document) -> Figure:
    figure, axes = _axes(3, height=3.2)
    rows = findings.updates(document)
    for panel, target in zip(axes[0], VERSIONS[1:], strict=True):
        shown = [row for row in rows if row.target == target]
        kinds = ("plain", "source_tuned", "merged", "direct")
        labels = (f"{target}, plain", "m1, fine-tuned", f"{target} + Δ(m1)", f"{target}, fine-tuned")
        for i, (kind, label, colour) in enumerate(zip(kinds, labels, _GREYS, strict=True)):
            estimates = [getattr(row, kind) for row in shown]
            x = np.arange(len(shown)) + (i - 1.5) * 0.2
            panel.bar(x, [e.mean for e in estimates], 0.2, yerr=_bar_errors(estimates), color=colour, label=label)
        names = [row.score if row.score == row.task else f"recall,\n{target}'s people" for row in shown]
        panel.set_xticks(np.arange(len(shown)), names)
        panel.set_ylim(0, 1.35)
        panel.set_title(f"m1's delta on {target}")
        panel.legend(fontsize=7, ncols=2, loc="upper center")
    axes[0][0].set_ylabel("answers right")
    return figure


def _distance(document: Document) -> Figure:
    figure, axes = _axes(3, height=3.2)
    lines, by_distance, by_barrier = axes[0]
    for k, line in enumerate(document["seeds"][0]["measured"]["lines"]):
        if line["from"] == VERSIONS[0]:
            at = [
                over_seeds(document, lambda s, k=k, i=i: s["measured"]["lines"][k]["loss"][i])
                for i in range(len(line["at"]))
            ]
            _line(lines, line["at"], at, label=f"m1 – {line['to']}")
    lines.set_xlabel("place between the two")
    lines.set_ylabel("loss on text of all mixes, nats")
    lines.legend(fontsize=7)
    for pair, task in itertools.product(findings.pairs(document), TASKS):
        found = pair.recovered[task]
        if found.values:
            style = {"color": COLOURS[task], "marker": _marker(pair), "alpha": 0.8, "s": 22}
            by_distance.scatter(pair.distance.mean, found.mean, **style)
            by_barrier.scatter(max(pair.barrier.mean, 1e-4), found.mean, **style)
    for task in TASKS:
        by_distance.scatter([], [], color=COLOURS[task], label=task)
    for label, marker in (("later", "o"), ("earlier", "<"), (f"to or from {FAR}", "s"), (UNRELATED, "x")):
        by_distance.scatter([], [], color="grey", marker=marker, label=label)
    by_distance.legend(fontsize=7)
    by_distance.set_xlabel("‖target − source‖ / ‖source‖")
    by_distance.set_ylabel("fraction of the gain recovered")
    by_barrier.set_xscale("log")
    by_barrier.set_xlabel("barrier on the line, nats")
    return figure


def _marker(pair: findings.Pair) -> str:
    if UNRELATED in (pair.source, pair.target):
        return "x"
    if FAR in (pair.source, pair.target):
        return "s"
    return "o" if MODELS.index(pair.source) < MODELS.index(pair.target) else "<"


def _start(document: Document) -> Figure:
    figure, axes = _axes(len(ONWARD), len(TASKS), height=2.0)
    for (row, task), (column, target) in itertools.product(enumerate(TASKS), enumerate(ONWARD)):
        panel = axes[row][column]
        for name, label, colour in (
            (f"tune-{target}-{task}", "from the plain base", _PLAIN),
            (f"onward-{target}-{task}", "from base + Δ(m1)", _MERGED),
        ):
            steps = [step for step, _ in document["seeds"][0]["curves"][name]]
            at = [over_seeds(document, lambda s, n=name, i=i: s["curves"][n][i][1]) for i in range(len(steps))]
            _line(panel, steps, at, color=colour, label=label)
        panel.set_title(f"{task} on {target}")
        panel.set_ylim(-0.05, 1.1)
    for panel in axes[-1]:
        panel.set_xlabel("steps of fine-tuning")
    for panel in axes[:, 0]:
        panel.set_ylabel("answers right")
    axes[0][0].legend(fontsize=7)
    return figure


def _recycling(document: Document) -> Figure:
    figure, axes = _axes(len(TASKS))
    rows = findings.recycled(document)
    for panel, task in zip(axes[0], TASKS, strict=True):
        shown = [row for row in rows if row.task == task]
        _line(panel, VERSIONS, [row.plain for row in shown], color=_PLAIN, marker="o", label="tuned afresh")
        _line(panel, VERSIONS, [row.recycled for row in shown], color=_MERGED, marker="o", label="recycled, then tuned")
        starts = [row.start for row in shown]
        _line(panel, VERSIONS, starts, color=_MERGED, linestyle=":", label="recycled, before tuning")
        panel.set_title(task)
        panel.set_ylim(-0.05, 1.1)
    axes[0][0].set_ylabel("answers right")
    axes[0][0].legend(fontsize=7)
    return figure


def _alpha(document: Document) -> Figure:
    figure, axes = _axes(len(TASKS))
    rows = findings.sweeps(document)
    for panel, task in zip(axes[0], TASKS, strict=True):
        for target in ALPHA_TARGETS:
            row = next(row for row in rows if (row.task, row.target) == (task, target))
            _line(panel, row.alphas, row.scores, marker=".", label=f"m1's delta on {target}")
        panel.set_title(task)
        panel.set_xlabel("α")
        panel.set_ylim(-0.05, 1.1)
    axes[0][0].set_ylabel("answers right")
    axes[0][0].legend(fontsize=7)
    return figure


def _mixture(document: Document) -> Figure:
    rows = findings.mixtures(document)
    figure, axes = _axes(len(rows))
    for panel, row in zip(axes[0], rows, strict=True):
        for i, task in enumerate(row.tasks):
            _line(panel, row.alphas, [scores[i] for scores in row.scores], color=COLOURS[task], marker=".", label=task)
            alone = findings.transfer(document, task, VERSIONS[0], MIX_TARGET).merged
            panel.axhline(alone.mean, color=COLOURS[task], linestyle=":", linewidth=1)
        panel.set_title(f"{MIX_TARGET} + α (Δ {row.tasks[0]} + Δ {row.tasks[1]})")
        panel.set_xlabel("α of both; dotted: one alone, α = 1")
        panel.set_ylim(-0.05, 1.1)
        panel.legend(fontsize=7)
    axes[0][0].set_ylabel("answers right")
    return figure
