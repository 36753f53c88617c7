"""Runs what a command asks for, a merge, a delta that is extracted, deltas that are applied: alone or as one of several
ranks, or only as a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from paramdelta.plan import MergeRequest


def run(
    make_request: Callable[..., MergeRequest],
    *,
    as_json: bool,
    quiet: bool,
    threads: int | None,
    memory: str,
    isa: str | None,
    io: str,
    device: str,
    restart: bool,
    rank: int | None,
    world_size: int | None,
    no_checksums: bool,
    dry_run: bool = False,
    done: str = "merged",
    **request: Any,
) -> None:
    """Carry out the request that ``make_request`` makes of the options ``request``, and show what came of it; ``done``
    is the word for it."""
    from paramdelta import merging
    from paramdelta.cli import many, present, render

    def inputs() -> Any:
        return present.merge_inputs(
            request, make_request, threads=threads, memory=memory, isa=isa, io=io, device=device
        )

    this = None if dry_run else many.rank_of(rank, world_size)
    if this is not None:
        many.merge_as(this, inputs, restart=restart, checksums=not no_checksums, as_json=as_json, quiet=quiet)
        return
    merge_request, run_options = inputs()
    plan = merging.prepare(merge_request)
    if not as_json or dry_run:
        render.print_warnings(plan.warnings)
    if dry_run:
        if as_json:
            click.echo(json.dumps(plan.describe(), indent=2))
        elif not quiet:
            present.plan(plan)
        return
    total = plan.bytes_read + plan.bytes_written
    with render.progress(total, quiet=quiet or as_json) as on_progress:
        report = merging.run_merge(
            plan, options=run_options, restart=restart, checksums=not no_checksums, on_progress=on_progress
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        present.merge_report(report, done)
