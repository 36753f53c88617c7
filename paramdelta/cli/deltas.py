"""``paramdelta extract`` and ``paramdelta apply``: deltas as folders."""

from __future__ import annotations

import os
from typing import Any

import click

from paramdelta.cli import options

_EXTRACT_EXAMPLES = """
\b
Examples
  paramdelta extract --post Llama-3-8B-Instruct --base Llama-3-8B --out instruct-delta
  paramdelta extract ... --dtype bf16          half the size, one more rounding
  paramdelta extract ... --lossless            Instruct can be made again from the base
  paramdelta extract ... --dry-run             only say what would happen
"""

_APPLY_EXAMPLES = """
\b
Examples
  paramdelta apply --new-base Llama-3.1-8B --delta instruct-delta --out merged
  paramdelta apply --new-base Base-v2 --delta chat=0.8 --delta maths=0.5 \\
                   --alpha '2:lm_head*=0' --out mixed
  paramdelta apply --rebuild --new-base Llama-3-8B --delta instruct-delta --out Instruct
"""

_PUBLISHING = (
    click.option("--allow-nonfinite", is_flag=True, help="Publish even with NaN, Inf or overflow in the result."),
    click.option("--max-quant-error", metavar="E", help="Fail where quantising loses more than E of a tensor's norm."),
    click.option("--overwrite", is_flag=True, help="Replace an output folder that paramdelta wrote."),
    click.option("--restart", is_flag=True, help="Begin anew instead of continuing what was cut short."),
    click.option("--no-checksums", is_flag=True, help="Do not record the CRC-32 of every tensor in paramdelta.json."),
    click.option("--dry-run", is_flag=True, help="Only say what would happen; write nothing."),
)


def _publishing(function: Any) -> Any:
    for option in reversed(_PUBLISHING):
        function = option(function)
    return function


@click.command(short_help="Write the difference of two checkpoints as a folder.", epilog=_EXTRACT_EXAMPLES)
@click.option("--post", required=True, type=options.FOLDER, metavar="DIR", help="The post-trained model.")
@click.option("--base", required=True, type=options.FOLDER, metavar="DIR", help="The base it was trained from.")
@click.option("--out", required=True, type=options.FOLDER, metavar="DIR", help="The folder to write.")
@click.option(
    "--dtype",
    metavar="T",
    help="Type of the delta: f32 (default), bf16, f16, f64, or f8 (e4m3 with a scale for each block of 128x128).",
)
@click.option(
    "--lossless",
    is_flag=True,
    help="Keep all that applying needs to be bit-equal to a merge, and that makes post again from base.",
)
@options.policies_of_deltas
@options.machine
@options.device
@_publishing
@options.ranks
@options.output
def extract(**arguments: Any) -> None:
    """Write post - base as a checkpoint folder: a delta, to be kept and applied to other bases.

    It has the names, shapes and files of post, its tokenizer and configs. Integer tensors and what --exclude names are
    zeros in it.
    """
    from paramdelta.cli import running
    from paramdelta.deltas import extract_request

    running.run(extract_request, done="extracted", **arguments)


@click.command(short_help="Add deltas to a base.", epilog=_APPLY_EXAMPLES)
@click.option(
    "--new-base", required=True, type=options.FOLDER, metavar="DIR", help="The base that is to get the post-training."
)
@click.option(
    "--delta",
    "deltas",
    required=True,
    multiple=True,
    metavar="DIR[=A]",
    help="A folder that `paramdelta extract` wrote, and its scale. May be given several times.",
)
@click.option("--out", required=True, type=options.FOLDER, metavar="DIR", help="The folder to write.")
@click.option("--rebuild", is_flag=True, help="The base is the delta's own: write post again, byte for byte.")
@options.policies
@options.machine
@options.device
@_publishing
@options.ranks
@options.output
def apply(deltas: tuple[str, ...], activation_scales: str, **arguments: Any) -> None:
    """Add deltas to a base: new_base + sum of alpha * delta, over whole checkpoints.

    Options are those of `paramdelta merge`, the delta standing for post (--rename-post, --stacks post=...).
    """
    from paramdelta.cli import running
    from paramdelta.deltas import apply_request

    source = click.get_current_context().get_parameter_source("activation_scales")
    if source is not click.core.ParameterSource.DEFAULT:
        arguments["activation_scales"] = activation_scales
    running.run(apply_request, deltas=[_with_alpha(text) for text in deltas], **arguments)


def _with_alpha(text: str) -> str | tuple[str, Any]:
    """Read ``DIR=A``; a folder whose own name has an equals sign is found as it is."""
    folder, equals, alpha = text.rpartition("=")
    return text if not equals or not folder or os.path.isdir(text) else (folder, alpha)
