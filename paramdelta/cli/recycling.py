"""``paramdelta recycle``: deltas that go from version to version of a base, with a command that fine-tunes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from paramdelta.cli import options

if TYPE_CHECKING:
    from paramdelta.recycling import Preview, RecycleReport, Watcher

_EXAMPLES = """
\b
Examples
  paramdelta recycle --example > plan.yaml     a plan to fill in
  paramdelta recycle plan.yaml --dry-run       the steps, and the room they take
  paramdelta recycle plan.yaml                 also continues what was cut short
  paramdelta recycle plan.yaml --until 1       only the first version
  paramdelta recycle plan.yaml --restart-from 3
"""


def _print_example(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from paramdelta.recycling.example import EXAMPLE

        click.echo(EXAMPLE, nl=False)
        ctx.exit()


@click.command(short_help="Fine-tune version after version, each from the last one's delta.", epilog=_EXAMPLES)
@click.argument("plan", type=click.Path(path_type=str), metavar="PLAN")
@click.option(
    "--example", is_flag=True, is_eager=True, expose_value=False, callback=_print_example, help="Print a plan."
)
@click.option("--out", type=options.FOLDER, metavar="DIR", help="The folder to work in, in place of the plan's.")
@click.option("--until", type=int, metavar="I", help="Stop after version I.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen; write nothing.")
@click.option("--restart", is_flag=True, help="Remove what is there and begin anew.")
@click.option("--restart-from", type=int, metavar="I", help="Keep the versions before I, and begin anew with I.")
@options.machine
@options.device
@options.output
def recycle(
    plan: str,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    threads: int | None,
    memory: str,
    isa: str | None,
    io: str,
    device: str,
    **chosen: Any,
) -> None:
    """Go through the versions of a base model as PLAN says (YAML or JSON): fine-tune each with a command of your own,
    starting from the version plus the delta of the one before, and extract what that changed: the next delta.

    Repeated, it continues where it was cut short. A signal (Ctrl-C) is passed on to the command.
    """
    from paramdelta import recycling
    from paramdelta.cli import present

    if dry_run:
        found = recycling.preview(plan, **chosen)
        if as_json:
            click.echo(json.dumps(found.to_dict(), indent=2))
        elif not quiet:
            _show_preview(found)
        return
    size = present.memory_bytes(memory)
    watcher = _watcher(quiet=quiet or as_json)
    chosen |= {"threads": threads, "memory": size, "isa": isa, "io": io, "device": device}
    report = recycling.recycle(plan, watcher=watcher, **chosen)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        _show_report(report)


def _watcher(*, quiet: bool) -> Watcher:
    from paramdelta.cli import render
    from paramdelta.recycling import Watcher

    class Shown(Watcher):
        show_output = not quiet and sys.stderr is not None

        def step(self, text: str) -> None:
            if not quiet:
                render.say(text, err=True)

        def warn(self, warnings: Iterable[str]) -> None:
            render.print_warnings(list(warnings))

        def output(self, data: bytes) -> None:
            """Show what the user's own command says as it is: its bars and colours are meant for this terminal."""
            with contextlib.suppress(OSError):
                sys.stderr.flush()
                os.write(sys.stderr.fileno(), data)

        @contextlib.contextmanager
        def moving(self, total: int, doing: str) -> Iterator[Callable[[int, int], None] | None]:
            with render.progress(total, quiet=quiet, doing=doing) as on_progress:
                yield on_progress

    return Shown()


def _show_preview(preview: Preview) -> None:
    from paramdelta.cli import render

    rows = []
    for step in preview.steps:
        size = f"{'+' if step.bytes > 0 else '-'}{render.human_bytes(abs(step.bytes))}" if step.bytes else ""
        rows.append((f"{step.index} {step.name}: {step.text}", "done" if step.done else size))
    render.print_columns(f"steps in {preview.out}", ("version and step", "weights on disk"), rows)
    most, end = (render.human_bytes(b) for b in (preview.bytes_at_most, preview.bytes_in_the_end))
    free = render.human_bytes(preview.free)
    render.say(f"needs {most} at the most, {end} in the end, and what the command writes besides; {free} are free")
    if preview.bytes_at_most > preview.free:
        render.print_warnings([f"{preview.out}: {most} are needed and {free} are free"])


def _show_report(report: RecycleReport) -> None:
    from paramdelta.cli import render

    rows = [
        (
            f"{v.index} {v.name}",
            "" if v.command_seconds is None else render.human_seconds(v.command_seconds),
            v.out or "",
            v.delta or "",
        )
        for v in report.versions
    ]
    title = f"recycled in {report.out}" if report.complete else f"recycled so far, in {report.out}"
    render.print_columns(title, ("version", "command took", "tuned", "delta"), rows)
