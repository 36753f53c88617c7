"""Renders a result file as Markdown tables, as docs/performance.md holds them: ``python -m benchmarks.report FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import OURS, Record

KERNEL_COLUMNS = ("merge", "instruction set", "threads", "GB/s", "bound GB/s", "of the bound", "best of best")
PROCESS_COLUMNS = ("case", "contender", "wall s", "user s", "sys s", "peak MB", "times ours")


def kernel_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Rows of ``KERNEL_COLUMNS``; medians unless said otherwise."""
    rows = []
    for r in records:
        if r.group != "kernels" or r.skipped:
            continue
        bandwidth, bound = r.metrics["bandwidth"], r.metrics["bound"]
        parameters = r.parameters
        rows.append(
            (
                str(parameters["merge"]),
                str(parameters["isa"]),
                str(parameters["threads"]),
                f"{bandwidth.median / 1e9:.1f}",
                f"{bound.median / 1e9:.1f}",
                f"{r.ratios['of_bound']:.2f}",
                f"{r.ratios['of_bound_best']:.2f}",
            )
        )
    return rows


def process_rows(records: Sequence[Record], group: str) -> list[tuple[str, ...]]:
    """Rows of ``PROCESS_COLUMNS`` for one group; medians, and the largest of the peaks."""
    rows = []
    for r in records:
        if r.group != group:
            continue
        if r.skipped:
            rows.append((r.case, r.contender, "skipped", "", "", "", ""))
            continue
        times = "1" if r.contender == OURS else f"{r.ratios['times_ours']:.2f}" if r.ratios else ""
        peak = max(r.metrics["peak_rss"].samples) / 1e6
        seconds = (f"{r.metrics[name].median:.3f}" for name in ("wall", "user", "sys"))
        rows.append((r.case, r.contender, *seconds, f"{peak:.0f}", times))
    return rows


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column left, numbers right."""
    numbers = [all(_is_number(row[i]) for row in rows if row[i]) for i in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---:" if number else "---" for number in numbers) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text == "skipped" or text.replace(".", "", 1).isdigit()


def describe(content: dict[str, Any]) -> str:
    """Say in a few lines what the numbers were taken on."""
    machine, versions, commit = content["machine"], content["versions"], content["commit"]
    caches = ", ".join(f"L{c['level']} {c['type'].lower()} {c['size']}" for c in machine["caches"])
    kept = ("paramdelta", "python", "numpy", "torch", "mergekit: mergekit", "mergekit: torch", "compiler", "cp")
    named = "; ".join(
        f"{name.replace('mergekit: ', 'mergekit’s ')} {versions[name]}" for name in kept if versions.get(name)
    )
    state = " with changes" if commit["dirty"] else ""
    return "\n".join(
        (
            f"- Machine: {machine['cpu']}{' (virtual)' if machine['virtual'] else ''}, "
            f"{machine['threads_allowed']} of {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
            f"{caches}; Linux {machine['kernel']}; load before the run {machine['load_at_start']:.1f}.",
            f"- Versions: {named}.",
            f"- Commit: {(commit['commit'] or 'unknown')[:12]}{state}.",
        )
    )


def render(content: dict[str, Any]) -> str:
    """Return the Markdown of a result: the machine, then a table per group that was measured."""
    records = results.records_of(content)
    parts = [describe(content)]
    kernels = kernel_rows(records)
    if kernels:
        parts.append("### Kernels against three reads and one write\n\n" + table(KERNEL_COLUMNS, kernels))
    titles = {
        "merges": "Whole merges",
        "storage": "Merges on a disk against loops without arithmetic",
        "sweeps": "Sweeps over alpha against merges",
        "quantised": "Whole fp8 merges",
        "many": "Very many tensors",
        "start": "Start",
    }
    for group, title in titles.items():
        rows = process_rows(records, group)
        if rows:
            parts.append(f"### {title}\n\n" + table(PROCESS_COLUMNS, rows))
    if any(r.metrics for r in records if r.group != "kernels"):
        parts.append(
            "Times are medians, peaks the largest seen; a peak below 16 MB cannot be told from the launcher's."
        )
    skipped = [f"- {r.case}, {r.contender}: {r.skipped}" for r in records if r.skipped]
    if skipped:
        parts.append("Not measured:\n\n" + "\n".join(skipped))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    sys.stdout.write(render(results.read(parser.parse_args(arguments).result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
