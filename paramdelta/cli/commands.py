"""The commands. Each collects its options, calls the Python function of the same name, and shows what came back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from paramdelta import __version__
from paramdelta.cli import analysis, deltas, options, recycling, sweeps

_EXAMPLES = """
\b
Examples
  paramdelta merge --post Llama-3-8B-Instruct --base Llama-3-8B \\
                   --new-base Llama-3.1-8B --out merged
  paramdelta merge ... --alpha 0.7 --alpha 'lm_head*=0'
  paramdelta merge --post Chat --base Base --post Maths --base Base \\
                   --alpha 1:0.8 --alpha 2:0.5 --new-base Base-v2 --out mixed
  paramdelta merge ... --vocab align --tokenizer new-base
  paramdelta plan ...      the same, but only say what would happen
  paramdelta merge --post org/model-chat --base org/model \\
                   --new-base org/model-2@main --out merged      from the Hub
\b
Exit codes
  0 done    1 failed while running    2 bad input, nothing written
  3 finished, but NaN, Inf or overflow in the result: not published
"""


_RANK_EXAMPLES = """
\b
Many processes
  torchrun --nproc-per-node 4 -m paramdelta merge --post ... --out merged
  srun -n 64 paramdelta merge --post ... --out merged && paramdelta finalize merged
  paramdelta merge ... --rank 0 --world-size 2     and --rank 1 elsewhere, then finalize
"""

_PLAN_EXAMPLES = """
\b
Examples
  paramdelta plan --post ... --base ... --new-base ...
  paramdelta plan ... --ranks 64 --ranks-per-node 8 \\
                  --read-speed 200GB/s --write-speed 100GB/s --link-speed 50GB/s
"""

_FINALIZE_EXAMPLES = """
\b
Examples
  srun -n 64 paramdelta merge --post ... --out merged
  paramdelta finalize merged
"""


_INFO_EXAMPLES = """
\b
Examples
  paramdelta info
  paramdelta info --json
"""


class _InOrder(click.Group):
    """Shows commands in the order of a session, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXAMPLES,
)
@click.version_option(version=__version__, prog_name="paramdelta")
def cli() -> None:
    """Carry post-training over to another base: new_base + alpha * (post - base), over whole checkpoints.

    Give it three folders as transformers writes them (safetensors); it writes the fourth, bit-exact, as fast as the
    storage goes.
    """


@cli.command(epilog=_RANK_EXAMPLES)
@options.inputs(required=True)
@click.option("--out", required=True, type=options.FOLDER, metavar="DIR", help="The folder to write.")
@options.policies
@options.machine
@options.device
@click.option("--allow-nonfinite", is_flag=True, help="Publish even with NaN, Inf or overflow in the result.")
@click.option("--max-quant-error", metavar="E", help="Fail where quantising loses more than E of a tensor's norm.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that an earlier merge wrote.")
@click.option("--restart", is_flag=True, help="Begin anew instead of continuing a merge that was cut short.")
@options.ranks
@click.option("--no-checksums", is_flag=True, help="Do not record the CRC-32 of every tensor in paramdelta.json.")
@options.output
def merge(**arguments: Any) -> None:
    """Merge three checkpoints into a fourth. Cut short, a large merge continues when the command is repeated.

    Several deltas are added in one pass where --post and --base are given several times, in the same order.

    Several processes can share the work: under torchrun, which also publishes, or as tasks of a scheduler, after which
    `paramdelta finalize` publishes.
    """
    from paramdelta.cli import running
    from paramdelta.plan import make_request

    running.run(make_request, **arguments)


cli.add_command(deltas.extract)
cli.add_command(deltas.apply)


@cli.command(short_help="Publish what several ranks have merged.", epilog=_FINALIZE_EXAMPLES)
@click.argument("out", type=options.FOLDER, metavar="OUT")
@options.machine
@click.option("--allow-nonfinite", is_flag=True, help="Publish even with NaN, Inf or overflow in the result.")
@click.option("--max-quant-error", metavar="E", help="Fail where quantising loses more than E of a tensor's norm.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that an earlier merge wrote.")
@options.output
def finalize(
    out: str,
    as_json: bool,
    quiet: bool,
    threads: int | None,
    memory: str,
    isa: str | None,
    io: str,
    **allowed: Any,
) -> None:
    """Publish the folder OUT that the ranks of a merge have written, once all of them are done; say which are not."""
    from paramdelta import gathering
    from paramdelta.cli import present, render

    run_options = present.engine_options(memory, threads=threads, isa=isa, io=io)
    report = gathering.finalize(out, options=run_options, **allowed)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    render.print_warnings(report.warnings)
    if not quiet:
        present.merge_report(report)


cli.add_command(sweeps.sweep)
cli.add_command(sweeps.interpolate)
cli.add_command(recycling.recycle)


@cli.command(short_help="Say what a merge would do; write nothing.", epilog=_PLAN_EXAMPLES)
@options.inputs(required=True)
@click.option("--out", type=options.FOLDER, metavar="DIR", help="The folder that would be written.")
@options.policies
@click.option("--overwrite", is_flag=True, help="Plan to replace the output folder.")
@options.cluster
@options.output
def plan(
    as_json: bool,
    quiet: bool,
    ranks: int | None,
    ranks_per_node: int,
    read_speed: str | None,
    write_speed: str | None,
    link_speed: str | None,
    memory_speed: str | None,
    **request: Any,
) -> None:
    """Say what a merge would do: tensors, bytes, files, policies, and a lower bound of its time. Writes nothing.

    With --ranks also how the work would be split, and with speeds the least time they allow.
    """
    from paramdelta import merging
    from paramdelta.cli import present, render
    from paramdelta.plan import make_request

    speeds = present.speeds(read_speed, write_speed, link_speed, memory_speed, ranks_per_node)
    made = merging.prepare(make_request(**request))
    document, split = made.describe(), None
    if ranks is not None or speeds is not None:
        from paramdelta import forecast

        split = forecast.forecast(made, ranks or 1, speeds)
        document["split"] = forecast.describe(made, split)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    render.print_warnings(made.warnings)
    if not quiet:
        present.plan(made)
        if split is not None:
            present.split(split)


@cli.command(short_help="Show what a checkpoint folder holds.")
@click.argument("folder", type=options.FOLDER, metavar="DIR")
@options.output
def inspect(folder: str, as_json: bool, quiet: bool) -> None:
    """Show what a checkpoint folder holds, from its headers and configs alone."""
    from paramdelta.checkpoint import describe, open_checkpoint
    from paramdelta.cli import present

    description = describe(open_checkpoint(folder))
    if as_json:
        click.echo(json.dumps(description, indent=2))
    elif not quiet:
        present.checkpoint(description)


@cli.command(short_help="Check a merged folder, alone or against its sources.")
@click.argument("out", type=options.FOLDER, metavar="OUT")
@options.inputs(required=False)
@click.option(
    "--delta", multiple=True, type=options.FOLDER, metavar="DIR", help="A delta that was applied, without its alpha."
)
@click.option("--all", "everything", is_flag=True, help="Recompute every element instead of a sample of each tensor.")
@options.machine
@options.output
def verify(out: str, memory: str, as_json: bool, quiet: bool, **arguments: Any) -> None:
    """Check a merged folder. Alone: its files, and the CRC-32 of every tensor, against what paramdelta.json records.
    With the sources (--post, --base and --new-base of a merge, --post and --base of a delta, --delta and --new-base of
    what it was applied to) also the values, recomputed by the reference in NumPy and read through the safetensors
    library."""
    from paramdelta import verification
    from paramdelta.cli import present, render

    arguments["memory"] = present.memory_bytes(memory)
    arguments["delta"] = list(arguments["delta"]) or None
    total = verification.bytes_to_read(out)
    with render.progress(total, quiet=quiet or as_json, doing="checking") as on_progress:
        report = verification.verify(out, **arguments, on_progress=on_progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        present.verify_report(report)
    if report.problems:
        raise click.exceptions.Exit(1)


cli.add_command(analysis.analyze)


@cli.command(short_help="Show which backends run here, and why others do not.", epilog=_INFO_EXAMPLES)
@options.output
def info(as_json: bool, quiet: bool) -> None:
    """Show the version, the threads that a merge would use, and for each backend its instruction sets or
    architectures, or why it cannot run here."""
    from paramdelta.cli import info as facts

    gathered = facts.gather()
    if as_json:
        click.echo(json.dumps(gathered, indent=2))
    elif not quiet:
        facts.show(gathered)


@cli.command(short_help="Make, merge and verify three small checkpoints.")
@click.argument("folder", type=options.FOLDER, metavar="DIR", default="paramdelta-demo")
@click.option("--overwrite", is_flag=True, help="Replace the folder of an earlier demo.")
@options.output
def demo(folder: str, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write three small Llama-shaped checkpoints into DIR, merge them, verify the result and show it."""
    from paramdelta.cli import present, tour

    outcome = tour.run_demo(Path(folder), overwrite=overwrite, quiet=quiet or as_json)
    if as_json:
        click.echo(json.dumps(outcome, indent=2))
    elif not quiet:
        present.demo_end(Path(folder))
