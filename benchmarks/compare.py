"""Compares two result files and fails on a loss: ``python -m benchmarks.compare OLD NEW [--json]``.

Exit code 0: no loss beyond the noise. 1: losses. 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import differences, results
from benchmarks.differences import Change, Comparison, told

NO_LOSS, LOSS, NOT_COMPARABLE = 0, 1, 2
VERDICTS = (
    ("loss", "losses", "red"),
    ("gain", "gains", "green"),
    ("unsure", "unsure, the machine was busy", "yellow"),
    ("same", "within noise", ""),
)
COLUMNS = ("case", "number", "old", "new", "change", "noise", "noise is of")


def document(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as a JSON object; shares of an old value of zero are null."""
    changes = []
    for change in comparison.changes:
        group, case, contender = change.key
        values = asdict(change) | {"change": change.change}
        del values["key"]
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        changes.append({"group": group, "case": case, "contender": contender, **finite})
    return {
        "comparable": comparison.reason is None,
        "reason": comparison.reason,
        "losses": len(comparison.with_verdict("loss")),
        "gains": len(comparison.with_verdict("gain")),
        "changes": changes,
        **{name: list(getattr(comparison, name)) for name in ("missing", "added", "unlike", "notes")},
    }


def row(change: Change) -> tuple[str, ...]:
    """Return the row of ``COLUMNS`` of one change."""
    source = "samples" if change.from_samples >= change.floor else "floor"
    values = (_value(change, change.old), _value(change, change.new))
    return (told(change.key), change.number, *values, _share(change.change, "+"), _share(change.noise), source)


def _share(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if math.isfinite(value) else "of nothing"


def _value(change: Change, value: float) -> str:
    return f"{value:.3f}" if change.kind == "fraction" else f"{value:,.2f}".removesuffix(".00")


def show(comparison: Comparison, console: Console, *, every: bool = False) -> None:
    """Print losses and gains (or every number), then what could not be compared."""
    for verdict, title, style in VERDICTS:
        changes = comparison.with_verdict(verdict)
        if changes and (every or verdict != "same"):
            _print_table(f"{title}: {len(changes)}", [row(change) for change in changes], style, console)
    for title, lines in (
        ("missing in NEW", comparison.missing),
        ("new in NEW", comparison.added),
        ("not the same work", comparison.unlike),
        ("beside the code", comparison.notes),
    ):
        for line in lines:
            console.print(f"{title}: {line}", highlight=False, markup=False)
    if comparison.reason is not None:
        console.print(f"cannot be compared: {comparison.reason}", highlight=False, markup=False)
        return
    losses, gains = (len(comparison.with_verdict(verdict)) for verdict in ("loss", "gain"))
    console.print(f"{len(comparison.changes)} numbers compared, {losses} lost, {gains} gained", highlight=False)


def _print_table(title: str, rows: Sequence[Sequence[str]], style: str, console: Console) -> None:
    table = Table(title=title, title_justify="left", title_style=style, header_style="bold")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if 2 <= i <= 5 else "left")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def exit_code(comparison: Comparison) -> int:
    if comparison.reason is not None:
        return NOT_COMPARABLE
    return LOSS if comparison.with_verdict("loss") else NO_LOSS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="the result file of the baseline")
    parser.add_argument("new", type=Path, metavar="NEW", help="the result file to judge")
    parser.add_argument("--json", action="store_true", help="print a JSON object with every number")
    parser.add_argument("--all", action="store_true", help="show the numbers within noise, too")
    parser.add_argument("--allow-other-machine", action="store_true", help="compare across machines all the same")
    options = parser.parse_args(arguments)
    try:
        old, new = results.read(options.old), results.read(options.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))  # exits with 2
    comparison = differences.compare(old, new, other_machine=options.allow_other_machine)
    if options.json:
        print(json.dumps(document(comparison), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        console = Console()
        show(comparison, console if console.is_terminal else Console(width=160), every=options.all)
    return exit_code(comparison)


if __name__ == "__main__":
    sys.exit(main())
