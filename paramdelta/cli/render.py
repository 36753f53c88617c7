"""How the command line looks: progress while data moves, closing tables, errors. Everything a program should read goes
through ``--json`` instead, and nothing here is reached with ``--quiet``."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paramdelta.errors import InputError, ParamDeltaError, escaped, shown

_LINE_SECONDS = 10.0  # between progress lines where the output is no terminal


def human_bytes(count: float) -> str:
    """Return ``count`` bytes in decimal units, three digits: ``1.24 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """Return a duration: ``0.42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str) -> str:
    """Return ``1 file``, ``1,200 files``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def say(text: str = "", *, err: bool = False) -> None:
    """Print text, escaped but for its ends of lines."""
    _put(escaped(text, keep="\n"), err=err)


def _put(text: str, *, err: bool = False) -> None:
    """Print text as it is; a reader that has gone away (a closed pipe) is no error of the merge. Nor is anything that
    befalls standard error: a terminal that hung up, a full disk."""
    stream = sys.stderr if err else sys.stdout
    with contextlib.suppress(OSError if err else BrokenPipeError):
        print(text, file=stream, flush=True)


def print_error(error: ParamDeltaError) -> None:
    """Print an error on standard error: every complaint it carries, then how many there were."""
    if isinstance(error, InputError):
        for complaint in error.complaints:
            say(f"error: {complaint}", err=True)
        say(f"{count(len(error.complaints), 'problem')}; nothing was written.", err=True)
    else:
        say(f"error: {error}", err=True)
        if error.remedy:
            say(f"    → {error.remedy}", err=True)


def print_warnings(warnings: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        say(f"warning: {warning}", err=True)


@contextlib.contextmanager
def progress(total: int, *, quiet: bool, doing: str = "merging") -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback for (bytes read, bytes written) that shows a bar with GB/s and time left on standard error: a
    live bar on a terminal, a line every ten seconds elsewhere."""
    if quiet:
        yield None
    elif sys.stderr is None or not sys.stderr.isatty():
        yield _line_progress(total)
    else:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        bar = Progress(
            TextColumn(doing),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            task = bar.add_task(doing, total=total)
            yield lambda read, written: bar.update(task, completed=read + written)


def _line_progress(total: int) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def update(read: int, written: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_SECONDS:
            return
        last = now
        done = read + written
        speed = done / (now - started)
        left = (total - done) / max(speed, 1.0)
        say(
            f"{done / max(total, 1):4.0%}  {human_bytes(done)} of {human_bytes(total)}  "
            f"{human_bytes(speed)}/s  {human_seconds(left)} left",
            err=True,
        )

    return update


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a two-column table: names and values."""
    from rich.box import ROUNDED
    from rich.table import Table

    table = Table(title=title, box=ROUNDED, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escaped(value))
    print_rich(table)


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a header; all columns but the first are right-aligned."""
    from rich.box import ROUNDED
    from rich.table import Table

    table = Table(title=title, box=ROUNDED, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(shown, row))
    print_rich(table)


def print_rich(renderable: Any) -> None:
    """Print a rich object on standard output: in colour on a terminal, plain and 100 columns wide in a pipe."""
    from rich.console import Console

    if sys.stdout is None:
        return
    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:  # left to itself, rich ends the program where the reader has gone away
        console.print(renderable)
    _put(captured.get().removesuffix("\n"))
