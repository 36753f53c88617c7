"""``paramdelta merge`` as one of several ranks: alone, for ``paramdelta finalize`` to publish, or under torchrun, where
rank 0 publishes when all are done."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from paramdelta.errors import ParamDeltaError

if TYPE_CHECKING:
    from paramdelta import coordination
    from paramdelta.engine import EngineOptions
    from paramdelta.plan import MergeRequest, Plan
    from paramdelta.ranks import Rank
    from paramdelta.report import MergeReport

_PATIENCE_SECONDS = 60.0  # for what a killed rank has locked, where torchrun starts it again


def merge_as(
    rank: Rank,
    inputs: Callable[[], tuple[MergeRequest, EngineOptions]],
    *,
    restart: bool,
    checksums: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do a rank's part of the merge that ``inputs`` spells, and show what came of it."""
    from paramdelta import coordination

    if coordination.coordinated(rank, os.environ):
        _in_company(rank, inputs, restart=restart, checksums=checksums, as_json=as_json, quiet=quiet)
        return
    from paramdelta import gathering, meeting
    from paramdelta.cli import present, render

    request, options = inputs()
    if restart:
        assert request.out is not None
        raise meeting.refuse_restart(request.out)
    plan = _prepared(request, rank, quiet=quiet or as_json, warn=not as_json and rank.number == 0)
    plan = plan if checksums else plan.without_checksums()
    with render.progress(_share_of(plan, rank), quiet=quiet or as_json) as on_progress:
        report = gathering.merge_part(plan, rank, options=options, on_progress=on_progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        present.rank_report(report)


def _share_of(plan: Plan, rank: Rank) -> int:
    return (plan.bytes_read + plan.bytes_written) // rank.world


def _prepared(request: MergeRequest, rank: Rank, *, quiet: bool, warn: bool) -> Plan:
    from paramdelta import merging
    from paramdelta.cli import render

    plan = merging.prepare(request)
    if warn:
        render.print_warnings(plan.warnings)
    if not quiet and rank.number == 0:
        render.say(f"{rank} (from {rank.source})", err=True)
    return plan


def _in_company(
    rank: Rank,
    inputs: Callable[[], tuple[MergeRequest, EngineOptions]],
    *,
    restart: bool,
    checksums: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from paramdelta import cli, coordination
    from paramdelta.cli import present, render

    first = rank.number == 0
    company = coordination.Company(rank, _document)
    outcome: list[MergeReport] = []
    try:
        with company:
            request, options = inputs()
            again = bool(company.restarts)
            if restart:
                from paramdelta.meeting import discard

                assert request.out is not None
                out = request.out
                company.once("discarded", lambda: discard(out))
            plan = _prepared(request, rank, quiet=quiet or as_json or again, warn=first and not as_json)
            plan = plan if checksums else plan.without_checksums()
            total = plan.bytes_read + plan.bytes_written
            with render.progress(total, quiet=quiet or as_json or not first) as shown:
                _part_and_end(company, plan, options, shown, outcome, patience=_PATIENCE_SECONDS if again else 0.0)
    except coordination.OtherRankError as error:
        if as_json and first:
            click.echo(json.dumps(error.document, indent=2))
        raise click.exceptions.Exit(error.exit_code) from None
    except ParamDeltaError as error:
        if company.spoke:  # here too with --json: torchrun may end rank 0 before it can print
            render.say(f"{rank}:", err=True)
            cli.report_error(error, as_json=False)
        if as_json and first:
            cli.report_error(error, as_json=True)
        raise click.exceptions.Exit(error.exit_code) from None
    for report in outcome:
        if as_json:
            click.echo(json.dumps(report.to_dict(), indent=2))
        elif not quiet:
            present.merge_report(report)


def _part_and_end(
    company: coordination.Company,
    plan: Plan,
    options: EngineOptions,
    shown: Callable[[int, int], None] | None,
    outcome: list[MergeReport],
    *,
    patience: float,
) -> None:
    """Do this rank's part, wait for the others, and publish on rank 0."""
    from paramdelta import gathering

    started = time.perf_counter()

    def conclude() -> None:
        request = plan.request
        assert request.out is not None
        report = gathering.finalize(request.out, options=options)
        outcome.append(dataclasses.replace(report, seconds=time.perf_counter() - started))

    gathering.merge_part(plan, company.rank, options=options, on_progress=company.watch(shown), patience=patience)
    company.finished(conclude, shown)


def _document(error: BaseException) -> dict[str, Any]:
    from paramdelta import cli

    if isinstance(error, ParamDeltaError):
        return cli.error_document(error)
    return cli.error_document(ParamDeltaError(f"{type(error).__name__}: {error}"))


def rank_of(number: int | None, world: int | None) -> Rank | None:
    """Return which rank this process is, None for a process alone."""
    from paramdelta.ranks import find_rank

    return find_rank(number, world, os.environ)
