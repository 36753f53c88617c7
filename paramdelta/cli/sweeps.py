"""``paramdelta sweep`` and ``paramdelta interpolate``: many folders from inputs that are read once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from paramdelta.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

_SWEEP_EXAMPLES = """
\b
Examples
  paramdelta sweep --post Chat --base Base --new-base Base-v2 \\
                   --alphas 0.25,0.5,0.75,1 --out sweep     sweep/alpha-0.25 and so on
  paramdelta sweep ... --out 'runs/chat-{alpha}'            runs/chat-0.25 and so on
  paramdelta sweep ... --alphas 0.5,1 --alpha 'lm_head*=0'
  paramdelta sweep --post Chat --base Base --post Maths --base Base \\
                   --alphas 2:0,0.5,1 --alpha 1:0.8 --new-base Base-v2 --out mixes
\b
Each folder is the one that `paramdelta merge` writes with that alpha, byte for byte.
Exit code 3: folders with NaN, Inf or overflow were not published, the others were.
"""

_LINE_EXAMPLES = """
\b
Examples
  paramdelta interpolate Base Base-v2 --at 0,0.25,0.5,0.75,1 --out line
  paramdelta interpolate A B --at=-0.5,0,0.5,1,1.5 --out 'runs/line-{at}'
\b
Each folder is the merge of post B, base A and new base A with alpha t; at 0 the weights
are A's, byte for byte.
"""


def _running(function: Any) -> Any:
    """Add the options that both commands share behind their own."""
    for option in reversed(
        [
            click.option(
                "--allow-nonfinite", is_flag=True, help="Publish even with NaN, Inf or overflow in the result."
            ),
            click.option(
                "--max-quant-error",
                metavar="E",
                help="Leave out where quantising loses more than E of a tensor's norm.",
            ),
            click.option("--overwrite", is_flag=True, help="Replace folders that an earlier merge wrote."),
            click.option("--restart", is_flag=True, help="Begin anew instead of continuing what was cut short."),
            click.option("--no-checksums", is_flag=True, help="Do not record the CRC-32 of every tensor."),
        ]
    ):
        function = option(function)
    return function


@click.command(short_help="Merge with many alphas, reading the inputs once.", epilog=_SWEEP_EXAMPLES)
@options.inputs(required=True)
@click.option(
    "--alphas",
    "values",
    required=True,
    multiple=True,
    metavar="[N:]A,A,…",
    help="The alphas, one folder each. Of several deltas, N: is for the Nth alone; several lists vary together.",
)
@click.option(
    "--out",
    required=True,
    type=options.FOLDER,
    metavar="DIR",
    help="Where the folders alpha-A are written, or their names, with {alpha} in the last part.",
)
@options.policies
@options.machine
@options.device
@_running
@options.output
def sweep(values: tuple[str, ...], **rest: Any) -> None:
    """Merge with several alphas in one pass: the inputs are read once, and each alpha gets a folder.

    Cut short, a sweep continues when the command is repeated; folders that are there are complete.
    """
    _run(values, **rest)


@click.command(short_help="Write points on the line between two checkpoints.", epilog=_LINE_EXAMPLES)
@click.argument("a", type=options.FOLDER, metavar="A")
@click.argument("b", type=options.FOLDER, metavar="B")
@click.option("--at", required=True, metavar="T,T,…", help="Where on the line: 0 is A, 1 is B.")
@click.option(
    "--out",
    required=True,
    type=options.FOLDER,
    metavar="DIR",
    help="Where the folders at-T are written, or their names, with {at} in the last part.",
)
@options.policies
@options.machine
@options.device
@_running
@options.output
def interpolate(a: str, b: str, at: str, **rest: Any) -> None:
    """Write A + t · (B − A) for every T, in one pass over both. For studies of linear connectivity."""
    _run((at,), word="at", option="--at", post=b, base=a, new_base=a, **rest)


def _run(
    values: Sequence[str],
    *,
    as_json: bool,
    quiet: bool,
    threads: int | None,
    memory: str,
    isa: str | None,
    io: str,
    device: str,
    restart: bool,
    no_checksums: bool,
    **request: Any,
) -> None:
    from paramdelta import sweeping
    from paramdelta.cli import many, present, render
    from paramdelta.engine import EngineOptions
    from paramdelta.errors import Complaint, InputError

    wrong: list[Complaint] = []
    rank = many.rank_of(None, None)
    if rank is not None:
        problem = f"several processes cannot share a sweep, and this one is {rank} (from {rank.source})"
        remedy = "start one process, or let the processes share a merge for each alpha"
        wrong.append(Complaint(click.get_current_context().info_name or "sweep", problem, remedy))
    run_options = EngineOptions()
    try:
        run_options = present.engine_options(memory, threads=threads, isa=isa, io=io, device=device)
    except InputError as error:
        wrong += error.complaints
    plans = sweeping.prepare(sweeping.make_requests(values, *wrong, **request), restart=restart)
    if not as_json:
        render.print_warnings(tuple(dict.fromkeys(warning for plan in plans for warning in plan.warnings)))
    total = sweeping.bytes_moved(plans)
    with render.progress(total, quiet=quiet or as_json) as on_progress:
        report = sweeping.run_sweep(
            plans, options=run_options, restart=restart, checksums=not no_checksums, on_progress=on_progress
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        present.sweep_report(report)
