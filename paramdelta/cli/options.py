"""Options that several commands share, spelled once. A request for a merge is the same for ``merge``, ``plan`` and
Python's ``paramdelta.merge``: each option here is one keyword there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(file_okay=True, dir_okay=True, readable=False, path_type=str)  # opening it says more


def _apply(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def _one_or_several(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> str | list[str] | None:
    """Return one folder as it is, several as a list."""
    return list(value) if len(value) > 1 else next(iter(value), None)


def inputs(*, required: bool, new_base_required: bool | None = None) -> Callable[[F], F]:
    """Add ``--post``, ``--base`` and ``--new-base``. The first two are lists where they are given more than once."""

    def wrap(function: F) -> F:
        return _apply(
            function,
            [
                click.option(
                    "--post",
                    required=required,
                    multiple=True,
                    callback=_one_or_several,
                    type=FOLDER,
                    metavar="DIR",
                    help="The post-trained model: a folder, or org/name[@revision] on the Hub. Give --post and --base "
                    "once for each delta to add.",
                ),
                click.option(
                    "--base",
                    required=required,
                    multiple=True,
                    callback=_one_or_several,
                    type=FOLDER,
                    metavar="DIR",
                    help="The base it was trained from.",
                ),
                click.option(
                    "--new-base",
                    required=required if new_base_required is None else new_base_required,
                    type=FOLDER,
                    metavar="DIR",
                    help="The base that is to get the post-training.",
                ),
            ],
        )

    return wrap


def policies(function: F) -> F:
    """Add the options that decide what the output of a merge holds."""
    return _apply(
        function,
        [
            click.option(
                "--alpha",
                "alphas",
                multiple=True,
                metavar="[N:]A | [N:]GLOB=A",
                help="Scale of the delta (default 1); GLOB=A for the tensors whose names match, the last match wins. "
                "Of several deltas, N: is for the Nth alone.",
            ),
            click.option(
                "--dtype",
                metavar="T",
                help="Write every float tensor as T: bf16, f16, f32, f64, f8_e4m3, f8_e5m2. Default: as in new_base.",
            ),
            *_selection("copied from new_base", "new-base", "post"),
            *_vocabulary("post and new_base", aligned=True),
            *_formats(),
            *_shards("new_base"),
        ],
    )


def pairing(function: F) -> F:
    """Add the options that decide which tensors are compared with which."""
    roles = ("post", "base", "new-base")
    return _apply(function, [*_globs("left out"), *_renames(*roles), _stacks(), _unscaled()])


def policies_of_deltas(function: F) -> F:
    """Add the options that decide what a delta holds."""
    left_plain = click.option(
        "--no-quantise", multiple=True, metavar="GLOB", help="Leave tensors that match in f32 under --dtype f8."
    )
    return _apply(
        function, [*_selection("zeros", "new-base"), *_vocabulary("post and base"), left_plain, *_shards("post")]
    )


def _selection(untouched: str, *donors: str) -> list[Callable[[F], F]]:
    """Return the options that say which tensors are paired, and what the others become."""
    several = len(donors) > 1
    roles = ("post", "base", "new-base") if several else ("post", "base")
    return [
        *_globs(untouched),
        click.option(
            "--copy-from",
            type=click.Choice(["error", *donors]),
            default="error",
            show_default=True,
            help="Where tensors come from that cannot be paired."
            if several
            else "new-base: zeros for what cannot be paired.",
        ),
        *_renames(*roles),
    ]


def _globs(untouched: str) -> list[Callable[[F], F]]:
    return [
        click.option("--include", multiple=True, metavar="GLOB", help=f"Only what matches is not {untouched}."),
        click.option("--exclude", multiple=True, metavar="GLOB", help=f"What matches is {untouched}."),
    ]


def _renames(*roles: str) -> list[Callable[[F], F]]:
    return [
        click.option(
            f"--rename-{role}",
            multiple=True,
            metavar="REGEX=REPL",
            help=f"Rename tensors of {role} before pairing (re.sub).",
        )
        for role in roles
    ]


def _vocabulary(larger: str, *, aligned: bool = False) -> list[Callable[[F], F]]:
    """Return the options about tensors whose shapes differ or do not tell; ``aligned``: rows can be paired by token."""
    by_token = "; align: rows are paired by token, from the three tokenizer.json" if aligned else ""
    tokenizer = click.option(
        "--tokenizer",
        type=click.Choice(["post", "new-base"]),
        help="Whose tokenizer the output has under --vocab align (default: post).",
    )
    return [
        click.option(
            "--vocab",
            type=click.Choice(["error", "extend", *(["align"] if aligned else [])]),
            default="error",
            show_default=True,
            help=f"Where vocabularies differ: an error; extend: as many rows as the larger of {larger}{by_token}.",
        ),
        *([tokenizer] if aligned else []),
        _stacks(),
    ]


def _stacks() -> Callable[[F], F]:
    return click.option(
        "--stacks",
        multiple=True,
        metavar="ROLE=KIND",
        help="How a checkpoint stores stacked experts, where shapes do not tell: straight, transposed or "
        "interleaved (gate and up row by row).",
    )


def _shards(followed: str) -> list[Callable[[F], F]]:
    """Return the options about the files of the output and what is read of fp8."""
    return [
        click.option(
            "--max-shard-size",
            metavar="SIZE",
            help=f"Split the output anew, e.g. 5GB. Default: the files of {followed}.",
        ),
        _unscaled(),
    ]


def _unscaled() -> Callable[[F], F]:
    return click.option("--allow-unscaled", is_flag=True, help="Treat fp8 tensors without scales as plain numbers.")


def _formats() -> list[Callable[[F], F]]:
    """Return the options about quantised weights."""
    return [
        click.option(
            "--format",
            metavar="F",
            help="Store weights as F: like-post, bf16, f16, f32, fp8-block, fp8-channel, fp8-tensor, mxfp8, mxfp4, "
            "nvfp4, int4. Default: each as in new_base.",
        ),
        click.option("--block-size", metavar="RxC", help="Elements per scale, for --format fp8-block or int4."),
        click.option("--scale-type", metavar="T", help="Type of new scales: f32, bf16, ue8m0 or e8m0."),
        click.option(
            "--no-quantise", multiple=True, metavar="GLOB", help="Leave tensors that match plain under --format."
        ),
        click.option(
            "--scale-policy",
            type=click.Choice(["keep", "recompute"]),
            default="keep",
            show_default=True,
            help="Keep new_base's scales where no delta touches them or they still fit, or compute all anew.",
        ),
        click.option(
            "--activation-scales",
            type=click.Choice(["post", "new-base", "drop"]),
            default="post",
            show_default=True,
            help="Where calibrated activation and KV scales come from; drop makes the config dynamic.",
        ),
    ]


def machine(function: F) -> F:
    """Add the options that say how much of the machine a run may use."""
    return _apply(
        function,
        [
            _threads(),
            click.option(
                "--memory",
                metavar="SIZE",
                default="auto",
                show_default=True,
                help="Memory for buffers, e.g. 256MiB; auto: what the storage asks for, 2 to 128 MiB as a rule.",
            ),
            *_paths(),
        ],
    )


def device(function: F) -> F:
    """Add the option of what computes."""
    return _apply(
        function,
        [
            click.option(
                "--device",
                metavar="NAME",
                default="auto",
                show_default=True,
                help="cpu, cuda or cuda:N; auto: the GPU, where there is one and measured rates say that it is faster.",
            )
        ],
    )


def threads_and_paths(function: F) -> F:
    """Add the options of a pass that reads and writes nothing."""
    return _apply(function, [_threads(), *_paths()])


def _threads() -> Callable[[F], F]:
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Workers (default: all allowed CPUs, 16 where they wait for storage).",
    )


def _paths() -> list[Callable[[F], F]]:
    return [
        click.option(
            "--io",
            type=click.Choice(["auto", "buffered", "direct"]),
            default="auto",
            show_default=True,
            help="Reach files through the page cache or past it (O_DIRECT); auto: file by file, measured.",
        ),
        click.option(
            "--isa",
            type=click.Choice(["scalar", "avx2", "avx512"]),
            help="Instruction set (default: the best here; same bytes).",
        ),
    ]


def ranks(function: F) -> F:
    """Add the options that make this process one of several."""
    return _apply(
        function,
        [
            click.option(
                "--rank",
                type=click.IntRange(min=0),
                metavar="R",
                help="Do part R of --world-size parts. Default: what torchrun, Slurm or MPI put into the environment.",
            ),
            click.option(
                "--world-size",
                type=click.IntRange(min=1),
                metavar="N",
                help="How many processes share the merge; 1 for this one alone, whatever the environment says.",
            ),
        ],
    )


def cluster(function: F) -> F:
    """Add the options of ``plan`` that describe the machines several ranks would run on."""
    speeds = {
        "read": "What the storage reads for all ranks together, e.g. 50GB/s.",
        "write": "What the storage writes for all ranks together.",
        "link": "What the network of one node carries in each direction.",
        "memory": "What the memory of one node carries, reads and writes together.",
    }
    return _apply(
        function,
        [
            click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="Show the split among N processes."),
            click.option(
                "--ranks-per-node",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="K",
                help="How many of them share a node.",
            ),
            *(click.option(f"--{name}-speed", metavar="SPEED", help=text) for name, text in speeds.items()),
        ],
    )


def _no_download_bars(_: click.Context, __: click.Parameter, value: bool) -> bool:
    """Keep the Hub's progress bars away, too, unless the user has said what they want."""
    if value:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return value


def output(function: F) -> F:
    """Add ``--json`` and ``--quiet``, which every command that writes or reports has."""
    return _apply(
        function,
        [
            click.option(
                "--json",
                "as_json",
                is_flag=True,
                callback=_no_download_bars,
                help="Print one JSON document (docs/json.md) instead.",
            ),
            click.option(
                "--quiet",
                "-q",
                is_flag=True,
                callback=_no_download_bars,
                help="Print nothing but errors and warnings.",
            ),
        ],
    )
