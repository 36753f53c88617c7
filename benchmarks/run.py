"""The one runner: measures what was asked, prints tables, writes a result file. ``python -m benchmarks.run --help``."""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import bound, machine, pooled, quantised, report, results, storage, sweeps, whole
from benchmarks.results import Record
from paramdelta.plan.values import parse_size

RESULTS = Path(__file__).with_name("results")
GROUPS = results.GROUPS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer rounds, smaller data")
    parser.add_argument("--only", action="append", choices=GROUPS, help="measure this group (repeatable; default: all)")
    parser.add_argument("--size", help="bytes of each checkpoint of a merge (default: 1.2GB, quick: 200MB)")
    parser.add_argument("--threads", type=int, default=machine.threads_allowed(), help="threads of whole processes")
    parser.add_argument("--place", choices=("tmpfs", "disk", "both"), default="both", help="where merges are measured")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="a folder on the disk to measure (default: build/)")
    parser.add_argument("--out", type=Path, help="the result file (default: a dated one in benchmarks/results)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, console: Console) -> Iterator[Record]:
    """Yield the records of every group asked for."""
    groups = options.only or GROUPS
    log = lambda text: console.print(text, style="dim", highlight=False)  # noqa: E731
    if "kernels" in groups:
        reason = bound.why_not()
        if reason:
            log(f"kernels skipped: {reason}")
            yield Record("kernels", "all", results.OURS, {}, skipped=reason)
        else:
            log("kernels")
            yield from pooled.run(quick=options.quick)
    places = whole.default_places(options.disk)
    if options.place != "both":
        places = tuple(p for p in places if (p == whole.TMPFS) == (options.place == "tmpfs"))
    if "quantised" in groups:
        yield from quantised.merges(options.size, quick=options.quick, threads=options.threads, places=places, log=log)
    if "merges" in groups:
        yield from whole.merges(options.size, quick=options.quick, threads=options.threads, places=places, log=log)
    if "storage" in groups and options.place != "tmpfs":
        size = parse_size(options.size, option="--size")
        yield from storage.merges(size, threads=options.threads, place=options.disk or whole.DISK, log=log)
    if "sweeps" in groups:
        for place in places:
            yield from sweeps.sweeps(options.size, threads=options.threads, place=place, log=log)
    if "many" in groups:
        yield from whole.many(quick=options.quick, threads=options.threads, log=log)
    if "start" in groups:
        yield from whole.start(quick=options.quick, log=log)


def show(records: Sequence[Record], console: Console) -> None:
    """Print a table of the kernels, and one for each case of whole processes."""
    print_table("kernels", report.KERNEL_COLUMNS, report.kernel_rows(records), console)
    for group in GROUPS[1:]:
        for case, rows in itertools.groupby(report.process_rows(records, group), key=lambda row: row[0]):
            bare = [row[1:] for row in rows]
            print_table(f"{group}: {case}", report.PROCESS_COLUMNS[1:], bare, console)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print one table, first column left, or nothing where there are no rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.size = options.size or ("200MB" if options.quick else "1.2GB")
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    about = {
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
        "commit": machine.describe_commit(),
    }
    told = {
        "quick": options.quick,
        "groups": list(options.only or GROUPS),
        "size": options.size,
        "threads": options.threads,
    }
    records = list(measure(options, console))
    content = results.document(records, **about, options=told)
    now = datetime.datetime.now(datetime.timezone.utc)
    out = options.out or RESULTS / f"{now:%Y-%m-%d-%H%M}.json"
    results.write(out, content)
    show(records, console)
    console.print(f"written: {out}  (python -m benchmarks.report {out} renders it)", highlight=False)
    return 1 if any(r.skipped and r.contender == results.OURS for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
