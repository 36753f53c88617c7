"""The command `analyze`: measures deltas, says what the numbers suggest, and writes reports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from paramdelta.cli import options

if TYPE_CHECKING:
    from paramdelta.analysis import Analysis, DeltaMeasures, Finding

_EXAMPLES = """
\b
Examples
  paramdelta analyze --post Llama-3-8B-Instruct --base Llama-3-8B \\
                     --new-base Llama-3.1-8B --html delta.html
  paramdelta analyze --post Chat --base Base --spectrum '*proj*' --csv delta.csv
  paramdelta analyze --post Chat --base Base --post Maths --base Base --json delta.json
"""
_FILE = click.Path(path_type=str)  # writing to it says more
_MOST_MODULES = 12


@click.command(short_help="Say how large a delta is, where, and what it suggests.", epilog=_EXAMPLES)
@options.inputs(required=True, new_base_required=False)
@click.option(
    "--spectrum", multiple=True, metavar="GLOB", help="Singular values and stable rank of the matrices that match."
)
@click.option(
    "--singular-values",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="K",
    help="How many of them.",
)
@options.pairing
@options.threads_and_paths
@click.option("--csv", "csv_file", type=_FILE, metavar="FILE", help="Write one row a tensor.")
@click.option(
    "--html", "html_file", type=_FILE, metavar="FILE", help="Write a report with plots: one page, no network."
)
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    type=click.Path(allow_dash=True, path_type=str),
    metavar="[FILE]",
    help="Write one JSON document (docs/json.md); without FILE, print it.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and warnings.")
def analyze(
    post: Any,
    base: Any,
    new_base: str | None,
    spectrum: tuple[str, ...],
    singular_values: int,
    threads: int | None,
    isa: str | None,
    io: str,
    csv_file: str | None,
    html_file: str | None,
    json_file: str | None,
    quiet: bool,
    **pairing: Any,
) -> None:
    """Measure post - base tensor by tensor in one pass: norms, unchanged elements, and, with --new-base, how the delta
    lies to the drift new_base - base. Says in words what the numbers suggest (docs/analysis.md). Several deltas are
    compared with each other."""
    from paramdelta import analysis
    from paramdelta.analysis.result import check_writable, write_text
    from paramdelta.cli import render
    from paramdelta.engine import EngineOptions

    check_writable([csv_file, html_file, None if json_file == "-" else json_file])
    plan = analysis.plan_of(post=post, base=base, new_base=new_base, **pairing)
    printed = json_file == "-"
    if not printed:
        render.print_warnings(plan.warnings)
    with render.progress(plan.bytes_read, quiet=quiet or printed, doing="analysing") as on_progress:
        found = analysis.run_analysis(
            plan,
            drift=new_base is not None,
            spectrum=spectrum,
            singular_values=singular_values,
            options=EngineOptions(threads=threads, isa=isa, io=io),
            on_progress=on_progress,
        )
    if csv_file is not None:
        write_text(csv_file, found.to_csv())
    if html_file is not None:
        write_text(html_file, found.to_html())
    if printed:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    if json_file is not None:
        write_text(json_file, json.dumps(found.to_dict(), indent=2) + "\n")
    if not quiet:
        _show(found)


def _show(found: Analysis) -> None:
    """Print the totals, the modules that moved most, and what the numbers suggest."""
    from paramdelta.cli import render

    several = len(found.sources) > 1
    for k, delta in enumerate(found.total.deltas):
        if delta is None:
            continue
        title = f"delta {k + 1}" if several else "delta"
        render.print_table(title, _rows(delta))
        measured = [(g.name, d) for g in found.modules if (d := g.deltas[k]) is not None]
        measured.sort(key=lambda pair: -(pair[1].relative_norm or 0.0))
        rows = [
            (
                name,
                _number(d.relative_norm),
                _number(d.unchanged_fraction),
                _number(d.cosine_to_drift),
                f"{d.elements:,}",
            )
            for name, d in measured[:_MOST_MODULES]
        ]
        header = ("module", "relative norm", "unchanged", "cosine to drift", "elements")
        render.print_columns("by type of module, the most changed first", header, rows)
    for i, j in sorted(found.total.inner):
        render.say(f"cosine between deltas {i + 1} and {j + 1}: {_number(found.total.cosine(i, j))}")
    if found.unpaired:
        names = ", ".join(found.unpaired[:4]) + (" …" if len(found.unpaired) > 4 else "")
        render.say(f"not compared, for want of a partner: {render.count(len(found.unpaired), 'tensor')} ({names})")
    for finding in found.findings:
        render.say(_sentence(finding, several=several))


def _sentence(finding: Finding, *, several: bool) -> str:
    of = f"delta {finding.delta + 1}: " if several and finding.delta is not None else ""
    return f"{finding.weight}: {of}{finding.text}"


def _rows(delta: DeltaMeasures) -> list[tuple[str, str]]:
    rows = [
        ("‖delta‖ / ‖base‖", _number(delta.relative_norm)),
        ("unchanged elements", _number(delta.unchanged_fraction)),
        ("cosine post, base", _number(delta.cosine_post_base)),
        ("largest change", _number(delta.largest)),
    ]
    if delta.drift_squared is not None:
        rows += [
            ("‖drift‖ / ‖base‖", _number(delta.relative_drift)),
            ("‖drift‖ / ‖delta‖", _number(delta.drift_to_delta)),
            ("cosine delta, drift", _number(delta.cosine_to_drift)),
        ]
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
