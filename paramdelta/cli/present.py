"""What the commands show when they are done: closing tables made from reports and plans, and the request their options
spell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta.cli.render import (
    count,
    human_bytes,
    human_seconds,
    print_columns,
    print_rich,
    print_table,
    print_warnings,
    say,
)
from paramdelta.errors import Complaint, InputError, OperandError, escaped, shown

if TYPE_CHECKING:
    from paramdelta.engine import EngineOptions
    from paramdelta.forecast import Forecast, Speeds
    from paramdelta.plan import MergeRequest, Plan
    from paramdelta.report import MergeReport, RankReport, SweepReport
    from paramdelta.verification import VerifyReport

_PROBE_BYTES = 256 << 20
_WORST_SHOWN = 5
_RANKS_SHOWN = 64
_TOKENS_SHOWN = 5


def merge_inputs(
    options: dict[str, Any], make_request: Callable[..., MergeRequest], *, memory: str, **machine: Any
) -> tuple[MergeRequest, EngineOptions]:
    """Return the request that ``make_request`` makes of ``options`` and the engine's options (``memory``: ``auto``, or
    a size such as ``256MiB``), or raise one InputError for both."""
    from paramdelta.engine import EngineOptions

    wrong: list[Complaint] = []
    run_options = EngineOptions()
    try:
        run_options = engine_options(memory, **machine)
    except InputError as error:
        wrong += error.complaints
    return make_request(*wrong, **options), run_options


def engine_options(memory: str, **machine: Any) -> EngineOptions:
    """Return the engine's options, ``memory`` as ``auto`` or a size such as ``256MiB``, or raise InputError."""
    from paramdelta.engine import EngineOptions
    from paramdelta.plan.values import parse_size

    size = None if memory == "auto" else parse_size(memory, option="--memory")
    try:
        return EngineOptions(memory=size, **machine)
    except OperandError as error:
        name, _, text = str(error).partition(": ")
        raise InputError(Complaint(f"--{name}", text)) from None


def rank_report(report: RankReport) -> None:
    """Print what closes the part of one rank."""
    moved = f"{human_bytes(report.bytes_read)} read, {human_bytes(report.bytes_written)} written"
    if report.resumed_bytes:
        moved += f", {human_bytes(report.resumed_bytes)} were there already"
    say(
        f"rank {report.rank} of {report.ranks} (from {report.source}) is done: {moved}, {human_seconds(report.seconds)}"
    )
    say(f"when all {report.ranks} are: paramdelta finalize {report.out}")


def memory_bytes(memory: str) -> int | None:
    """Return the bytes that ``--memory`` spells, None for ``auto``. Raises InputError."""
    from paramdelta.plan.values import parse_size

    return None if memory == "auto" else parse_size(memory, option="--memory")


def merge_report(report: MergeReport, done: str = "merged") -> None:
    """Print the table that closes a merge; ``done`` says what became of the tensors."""
    moved = report.bytes_read + report.bytes_written
    rows = [
        ("result", str(report.out)),
        ("parameters", f"{report.parameters:,} in {count(report.tensors, 'tensor')}, {count(report.files, 'file')}"),
        ("tensors", tensor_summary(report.policies, done)),
        ("moved", f"{human_bytes(report.bytes_read)} read, {human_bytes(report.bytes_written)} written"),
        ("time", f"{human_seconds(report.seconds)}, {human_bytes(moved / max(report.engine_seconds, 1e-9))}/s"),
        (
            "engine",
            f"{count(report.threads, 'thread')}, {report.isa}, "
            f"{human_bytes(report.threads * report.slot_bytes)} of buffers",
        ),
        ("device", report.device + (f": {report.device_why}" if report.device_why else "")),
        ("storage", "; ".join(f"{_files(ways)} {what}" for what, ways in report.io.items() if ways)),
    ]
    rows += vocabulary_rows(report.policies)
    if report.resumed_bytes:
        rows.append(("continued", f"{human_bytes(report.resumed_bytes)} were there already, from an earlier run"))
    rows += _lossless(report.policies)
    if report.nonfinite:
        rows.append(("not finite", f"{count(len(report.nonfinite), 'tensor')} (allowed)"))
    if report.policies.get("formats"):
        rows.append(("formats", _formats(report.policies)))
    print_table(done, rows)
    if report.quantised:
        _quantised_table(report)


def sweep_report(report: SweepReport) -> None:
    """Print what closes a sweep."""
    rows = [(str(one.out), human_bytes(one.bytes_written), tensor_summary(one.policies)) for one in report.folders]
    print_columns("folders", ("folder", "written", "tensors"), rows)
    moved = report.bytes_read + report.bytes_written
    speed = human_bytes(moved / max(report.engine_seconds, 1e-9))
    closing = [
        ("moved", f"{human_bytes(report.bytes_read)} read, {human_bytes(report.bytes_written)} written"),
        ("passes", f"{report.passes:,} over the inputs"),
        ("time", f"{human_seconds(report.seconds)}, {speed}/s"),
    ]
    if report.resumed_bytes:
        closing.append(("continued", f"{human_bytes(report.resumed_bytes)} were there already, from an earlier run"))
    print_table("swept", closing)


_WAYS = {"cached": "in the page cache", "passing": "through the page cache", "direct": "past the page cache"}


def _files(ways: dict[str, int]) -> str:
    """Return how many files were reached which way: ``3 files past the page cache``."""
    return ", ".join(f"{count(n, 'file')} {_WAYS[way]}" for way, n in ways.items())


def _lossless(policies: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a lossless delta keeps, as rows of a table."""
    kept = policies.get("lossless")
    if not kept:
        return []
    delta = f"{human_bytes(kept['delta_bytes'])}: {count(kept['f32'], 'tensor')} in f32, {kept['f64']:,} in f64"
    more = f"{human_bytes(kept['rebuild_bytes'])}: {count(kept['whole'], 'tensor')} whole, "
    return [("delta", delta), ("to rebuild post", more + count(kept["single_elements"], "single element"))]


def _formats(policies: dict[str, Any]) -> str:
    """Return how many weights are stored in which format: ``252 weights in fp8-block``."""
    return ", ".join(f"{count(n, 'weight')} in {name}" for name, n in policies["formats"].items())


def _quantised_table(report: MergeReport) -> None:
    """Print what quantising lost: each format, then its worst tensors."""
    rows = []
    for q in report.quantised:
        rows.append((q.format, f"all {count(q.tensors, 'weight')}", f"{q.relative_error:.3%}"))
        rows += [("", name, f"{error:.3%}") for name, error in q.worst[:_WORST_SHOWN]]
    title = "lost by quantising: ‖stored − exact‖ / ‖exact‖"
    print_columns(title, ("format", "weight", "error"), rows)


def tensor_summary(policies: dict[str, Any], done: str = "merged") -> str:
    """Return the plan's counts of tensors by what happens to them: ``290 merged, 1 copied``."""
    counts = policies.get("tensors", {})
    words = {"merged": done}
    return ", ".join(f"{n:,} {words.get(what, what).replace('_', ' ')}" for what, n in counts.items() if n) or "none"


def vocabulary_rows(policies: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows that say how tokens were paired, none where they were not: ``20 in all (3 moved)``."""
    found = policies.get("vocabulary")
    if found is None:
        return []
    rows = [("tokenizer", f"{found['tokenizer']}'s, {found['tokens']:,} tokens")]
    for number, delta in enumerate(found["deltas"], 1):
        parts = [f"{delta['in_all']:,} in all ({delta['moved']:,} moved)"]
        for kind, group in delta.items():
            if isinstance(group, dict) and group["count"]:
                parts.append(f"{group['count']:,} {kind.replace('_', ' ')} ({_some(group)})")
        rows.append(("tokens" if len(found["deltas"]) == 1 else f"tokens, delta {number}", ", ".join(parts)))
    lost = [
        f"{group['count']:,} of {role} ({_some(group)})" for role, group in found["left_out"].items() if group["count"]
    ]
    return [*rows, ("left out", ", ".join(lost))] if lost else rows


def _some(group: dict[str, Any]) -> str:
    """Return the first few of a group of tokens."""
    listed = " ".join(shown(token) for token in group["tokens"][:_TOKENS_SHOWN])
    return f"{listed} …" if group["count"] > _TOKENS_SHOWN else listed


def plan(plan: Plan) -> None:
    """Print what a merge would do, and the least time it could take here."""
    rows = [
        ("parameters", f"{plan.parameters:,} in {count(len(plan.names), 'tensor')}"),
        ("tensors", tensor_summary(plan.policies)),
        ("reads", human_bytes(plan.bytes_read)),
        ("writes", f"{human_bytes(plan.bytes_written)} in {count(len(plan.work.outputs), 'file')}"),
    ]
    if plan.policies.get("formats"):
        rows.append(("formats", _formats(plan.policies)))
    rows += _lossless(plan.policies)
    rows += vocabulary_rows(plan.policies)
    bound = lower_bound(plan)
    if bound is not None:
        rows.append(("at least", bound))
    print_table("plan", rows)
    print_columns(
        "output files",
        ("file", "tensors", "size"),
        [
            (name, f"{int((plan.out_files == i).sum()):,}", human_bytes(size))
            for i, (name, size) in enumerate(plan.work.outputs)
        ][:40],
    )
    files = ", ".join(f"{f.name} ({f.origin})" for f in plan.side_files)
    if files:
        print_rich(escaped(f"side files: {files}"))


def speeds(
    read: str | None, write: str | None, link: str | None, memory: str | None, ranks_per_node: int
) -> Speeds | None:
    """Return the speeds that options spell (``50GB/s``), None where there are none. Raises InputError."""
    from paramdelta.forecast import Speeds
    from paramdelta.plan.values import parse_size

    given = {"read": read, "write": write, "link": link, "memory": memory}
    wrong: list[Complaint] = []
    found: dict[str, int] = {}
    for name, text in given.items():
        try:
            if text is not None:
                found[name] = parse_size(text.strip().removesuffix("/s"), option=f"--{name}-speed")
        except InputError as error:
            wrong += error.complaints
    if wrong:
        raise InputError(wrong)
    return Speeds(**found, ranks_per_node=ranks_per_node) if found else None


def split(forecast: Forecast) -> None:
    """Print how a merge would be split among ranks, and the least time it could take."""
    rows = [
        (str(s.rank), human_bytes(s.bytes_read), human_bytes(s.bytes_written), f"{len(s.files):,}")
        for s in forecast.shares[:_RANKS_SHOWN]
    ]
    if len(forecast.shares) > _RANKS_SHOWN:
        rows.append((f"and {len(forecast.shares) - _RANKS_SHOWN:,} more", "", "", ""))
    seam = forecast.seam
    rows.append(("borders", human_bytes(seam.bytes_read), human_bytes(seam.bytes_written), f"{len(seam.files):,}"))
    print_columns("split", ("rank", "reads", "writes", "files"), rows)
    moved = [s.bytes_read + s.bytes_written for s in forecast.shares]
    say(f"the largest part is {max(moved) * len(moved) / max(sum(moved), 1):.3f} times the average")
    if forecast.seconds is not None:
        each = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in forecast.bounds.items())
        say(f"at least {human_seconds(forecast.seconds)} ({each})")


def lower_bound(plan: Plan) -> str | None:
    """Return the time the page cache alone would need for the bytes the plan moves, from a short copy in memory."""
    import numpy as np

    moved = plan.bytes_read + plan.bytes_written
    if moved == 0:
        return None
    source = np.ones(min(moved, _PROBE_BYTES) // 8 + 1)
    target = np.empty_like(source)
    target[:] = source
    started = time.perf_counter()
    target[:] = source
    speed = 2 * source.nbytes / max(time.perf_counter() - started, 1e-9) * len(os.sched_getaffinity(0))
    # Each byte moves between page cache and slot (2) and between slot and core (about 2).
    return f"{human_seconds(4 * moved / speed)} with every file in memory ({human_bytes(speed)}/s copied here)"


def checkpoint(description: dict[str, Any]) -> None:
    """Print what ``paramdelta inspect`` found."""
    rows = [
        (name.replace("_", " "), _value(name, value))
        for name, value in description.items()
        if not isinstance(value, list | dict) and value is not None and name not in ("version", "kind")
    ]
    rows += [
        (name.replace("_", " "), ", ".join(map(str, value)))
        for name, value in description.items()
        if isinstance(value, list) and value and not isinstance(value[0], dict)
    ]
    print_table("checkpoint", rows)
    formats = description.get("formats", {})
    if formats:
        print_columns(
            "quantised weights",
            ("format", "weights", "parameters"),
            [(name, f"{f['weights']:,}", f"{f['parameters']:,}") for name, f in formats.items()],
        )
    dtypes = description.get("dtypes", {})
    print_columns(
        "dtypes",
        ("dtype", "tensors", "elements", "size"),
        [(name, f"{d['tensors']:,}", f"{d['elements']:,}", human_bytes(d["bytes"])) for name, d in dtypes.items()],
    )


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return human_bytes(value) if "bytes" in name else f"{value:,}"
    return str(value)


def verify_report(report: VerifyReport) -> None:
    """Print the outcome of ``paramdelta verify``."""
    print_warnings(report.notes)
    for problem in report.problems:
        say(f"wrong: {problem}", err=True)
    rows = [("folder", str(report.out))]
    if report.elements or not report.checksums:
        compared = f"{report.elements:,} recomputed by the reference ({report.fraction:.1%} of all)"
        rows += [("tensors", f"{report.tensors:,} compared"), ("elements", compared)]
    if report.checksums:
        rows.append(("checksums", f"{count(report.checksums, 'tensor')} summed up and compared with the record"))
    rows += [
        ("files", f"{report.files:,} checked"),
        ("problems", str(len(report.problems)) if report.problems else "none: bit-equal"),
    ]
    wrong = "NOT what these sources give" if report.elements else "NOT what was written"
    print_table(wrong if report.problems else "verified", rows)


def demo_end(folder: Path) -> None:
    """Print what a person may try next."""
    say(
        "Try it yourself:\n"
        f"  paramdelta inspect {folder}/merged\n"
        f"  paramdelta merge --post {folder}/post --base {folder}/base --new-base {folder}/new_base "
        f"--out {folder}/half --alpha 0.5"
    )
