"""What changed between two result files: the numbers that are compared, how far noise reaches, and the verdicts.

Compared are fractions (a kernel's share of the roofline, a peer's time over ours) and counters (bytes, calls, page
faults, peak memory, instructions); never seconds. A number is the median of its samples. Its noise is the larger of

- what the samples say: the range of a file's samples is that from the tenth to the ninetieth percentile (from the least
  to the largest of fewer than ten), and noise reaches as far as the ranges of old and new overlap. Of eleven samples
  this range holds the median in 98.8 of 100 cases, and a machine with two moods shows both of them in it; and
- the floor of its kind, which also holds where the samples agree to the last bit.

A change for the worse beyond the noise is a loss, one for the better a gain. On a busy machine a short process loses
less of its time than a long one, and one thread less than two: what depends on that is then unsure, whatever the
samples say.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.results import OURS, Metric, Record, records_of

Key = tuple[str, str, str]  # group, case, contender

# What makes two machines incomparable; versions and the kernel are told as notes.
MACHINE = ("cpu", "architecture", "threads_allowed", "isa_flags")
# Parameters that say how the work was done, not what it was.
MANNER = ("isa", "bound_loops", "command", "environment")


BUSY = 0.75  # load for each core from which on a file is told to be of a busy machine
MANY = 10  # samples from which on the outermost are left out of their range


@dataclass(frozen=True)
class Kind:
    """A kind of number: whether more of it is better, its smallest noise as a share, and in its own unit."""

    name: str
    more_is_better: bool
    floor: float
    grain: float = 0.0


FRACTION = Kind("fraction", True, 0.05)
BYTES = Kind("bytes", False, 0.001, 64 << 10)  # the grain: a changed module or message
CALLS = Kind("calls", False, 0.001, 16)
INSTRUCTIONS = Kind("instructions", False, 0.005, 0.01)
FAULTS = Kind("page faults", False, 0.05, 100)
PEAK = Kind("peak memory", False, 0.05, 1 << 20)
COUNTERS = {
    "read": BYTES,
    "written": BYTES,
    "storage_read": BYTES,
    "storage_written": BYTES,
    "read_calls": CALLS,
    "write_calls": CALLS,
    "minor_faults": FAULTS,
    "major_faults": FAULTS,
    "peak_rss": PEAK,
    "instructions": INSTRUCTIONS,
}


@dataclass(frozen=True)
class Number:
    """One compared number of one record: its samples in the order in which they were taken, and whether it needs a
    machine to itself."""

    kind: Kind
    samples: tuple[float, ...]
    needs_quiet: bool = False

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return _percentile(self.samples, 0.1 if len(self.samples) >= MANY else 0.0)

    @property
    def high(self) -> float:
        return _percentile(self.samples, 0.9 if len(self.samples) >= MANY else 1.0)


@dataclass(frozen=True)
class Change:
    """One number in both files. ``noise`` is a share of the old value; ``verdict`` is loss, gain, same or unsure."""

    key: Key
    number: str
    kind: str
    old: float
    new: float
    noise: float
    from_samples: float
    floor: float
    verdict: str

    @property
    def change(self) -> float:
        """The new value over the old, less one; infinite where something came of nothing."""
        if self.old == self.new:
            return 0.0
        return self.new / self.old - 1 if self.old else math.inf


@dataclass(frozen=True)
class Comparison:
    """Everything that two files say about each other; ``reason`` where that is nothing."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    unlike: tuple[str, ...]
    notes: tuple[str, ...]
    reason: str | None = None

    def with_verdict(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


def _percentile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def is_ours(record: Record) -> bool:
    """Whether the record measures this project, be it as a contender under another name."""
    return record.contender == OURS or str(record.parameters.get("command", "")).startswith("paramdelta ")


def numbers_of(record: Record, peers: Sequence[Record]) -> dict[str, Number]:
    """Return the compared numbers of one record of ours; ``peers`` are the others of its case."""
    metrics = record.metrics
    found = {}
    if "bound" in metrics:
        shares = _quotients(metrics["bandwidth"], metrics["bound"])
        found["of_bound"] = Number(FRACTION, shares, record.parameters.get("threads", 1) > 1)
    for peer in peers:
        for label, parts in (("time", ("wall",)), ("processor time", ("user", "sys"))):
            ours, theirs = _sum(metrics, parts), _sum(peer.metrics, parts)
            if ours and theirs and min(ours.samples) > 0:
                found[f"{label} of {peer.contender} over ours"] = Number(
                    FRACTION, _quotients(theirs, ours), label == "time"
                )
    for name, kind in COUNTERS.items():
        if name in metrics:
            found[name] = Number(kind, metrics[name].samples)
    return found


def _sum(metrics: dict[str, Metric], names: Sequence[str]) -> Metric | None:
    if not all(name in metrics for name in names):
        return None
    return Metric("s", tuple(map(math.fsum, zip(*(metrics[name].samples for name in names), strict=True))))


def _quotients(above: Metric, below: Metric) -> tuple[float, ...]:
    """Round by round: what disturbs a round disturbs both."""
    return tuple(a / b for a, b in zip(above.samples, below.samples, strict=False))


def judge(key: Key, name: str, old: Number, new: Number, *, busy: bool = False) -> Change:
    """Return what became of one number; ``busy``: at least one file was taken on a busy machine."""
    kind = old.kind
    before, after = old.value, new.value
    fallen = (before - old.low) + (new.high - after)
    risen = (old.high - before) + (after - new.low)
    from_samples = fallen if after < before else risen
    floor = max(kind.floor * before, kind.grain)
    reach = max(floor, from_samples)
    better = after - before if kind.more_is_better else before - after
    verdict = "loss" if better < -reach else "gain" if better > reach else "same"
    if busy and old.needs_quiet and verdict != "same":
        verdict = "unsure"
    share = (lambda x: x / before) if before else (lambda _: math.inf)
    return Change(key, name, kind.name, before, after, share(reach), share(from_samples), share(floor), verdict)


def compare(old: dict[str, Any], new: dict[str, Any], *, other_machine: bool = False) -> Comparison:
    """Compare two checked result files."""
    notes = tuple(_notes(old, new))
    apart = [
        f"{key}: {old['machine'].get(key)} in OLD, {new['machine'].get(key)} in NEW"
        for key in MACHINE
        if old["machine"].get(key) != new["machine"].get(key)
    ]
    if apart and not other_machine:
        return Comparison((), (), (), (), notes, "another machine: " + "; ".join(apart))
    before, after = _measured(old), _measured(new)
    busy = any(map(_is_busy, (old, new)))
    changes: list[Change] = []
    unlike = []
    for key in before.keys() & after.keys():
        different = _different_work(before[key][0], after[key][0])
        if different:
            unlike.append(f"{told(key)}: {different}")
            continue
        first, second = numbers_of(*before[key]), numbers_of(*after[key])
        changes += [judge(key, name, first[name], second[name], busy=busy) for name in first if name in second]
    reason = None
    if not changes:
        reason = "no record of ours is in both files" if not unlike else "no case did the same work in both files"
    return Comparison(
        changes=tuple(sorted(changes, key=lambda change: (change.key, change.number))),
        missing=tuple(_absent(before, after, new)),
        added=tuple(_absent(after, before, old)),
        unlike=tuple(sorted(unlike)),
        notes=(*notes, *apart),
        reason=reason,
    )


def told(key: Key) -> str:
    """A record's name for people."""
    group, case, contender = key
    return f"{group}: {case}" + ("" if contender == OURS else f", {contender}")


def _measured(content: dict[str, Any]) -> dict[Key, tuple[Record, list[Record]]]:
    """Return every measured record of ours with the peers of its case."""
    cases = defaultdict(list)
    for record in records_of(content):
        if not record.skipped:
            cases[record.group, record.case].append(record)
    return {
        (record.group, record.case, record.contender): (record, [r for r in group if not is_ours(r)])
        for group in cases.values()
        for record in group
        if is_ours(record)
    }


def _different_work(old: Record, new: Record) -> str:
    names = sorted((old.parameters.keys() & new.parameters.keys()) - set(MANNER))
    pairs = [(name, old.parameters[name], new.parameters[name]) for name in names]
    return "; ".join(f"{name} {before} in OLD, {after} in NEW" for name, before, after in pairs if before != after)


def _absent(
    there: dict[Key, tuple[Record, list[Record]]], here: dict[Key, tuple[Record, list[Record]]], content: dict[str, Any]
) -> Iterator[str]:
    """Say what is there and not here, with the reason where the other file holds one."""
    reasons = {(r["group"], r["case"], r["contender"]): r["skipped"] for r in content["records"] if r["skipped"]}
    for key in sorted(there.keys() - here.keys()):
        yield told(key) + (f" ({reasons[key]})" if key in reasons else "")


def _notes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Say what differs beside the code and may move the numbers."""
    for part, keys in (("machine", ("kernel", "instructions")), ("versions", sorted(old["versions"]))):
        for key in keys:
            before, after = old[part].get(key), new[part].get(key)
            if before != after and before is not None and after is not None:
                yield f"{key}: {before} in OLD, {after} in NEW"
    for name, content in (("OLD", old), ("NEW", new)):
        if _is_busy(content):
            machine = content["machine"]
            told_load = f"load {machine['load_at_start']:.1f} on {machine['threads_allowed']} cores"
            yield f"{name} was taken on a busy machine ({told_load})"


def _is_busy(content: dict[str, Any]) -> bool:
    machine = content["machine"]
    return bool(machine.get("load_at_start", 0) > BUSY * (machine.get("threads_allowed") or 1))
