"""The journal of a large merge: which segments are safely on disk, so that the same command continues after whatever
cut it short.

A file of lines, each a JSON document, synced before a segment counts as finished. The first line says what the merge
is: the request, the plan, and fingerprints of the inputs. A journal of another merge, or of inputs that have changed
since, is never continued.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paramdelta
from paramdelta.checksums import combined
from paramdelta.engine import NOTHING, RunResult, TensorCounts, TensorLoss
from paramdelta.errors import Complaint, InputError, shown, storage_errors

if TYPE_CHECKING:
    from paramdelta.checkpoint import Checkpoint
    from paramdelta.plan import Plan, Work

VERSION = 2
_MIB = 1 << 20
_MOST_SHOWN = 10


@dataclass
class Finished:
    """What a journal says is done: segments by number, what they counted and lost, what they contribute to the
    checksums of tensors, and the measured units, if they are."""

    segments: set[int] = field(default_factory=set)
    counts: list[TensorCounts] = field(default_factory=list)
    losses: list[TensorLoss] = field(default_factory=list)
    measured: list[tuple[float, bool]] | None = None
    checksums: dict[int, int] | None = field(default_factory=dict)  # None: a segment was written without
    sources: dict[str, Any] | None = None  # a rank's: where inputs lie, and what may be published
    totals: dict[str, Any] | None = None  # a rank's, once its part is done
    publishing: dict[str, Any] | None = None  # a sweep's, once all is done: the marks of what is to be published

    def result(self) -> RunResult:
        """Return what the finished segments counted, lost and summed up."""
        return replace(NOTHING, counts=tuple(self.counts), losses=tuple(self.losses), checksums=self.checksums)


def identity(plan: Plan, *, ranks: int = 1, works: Sequence[Work] = ()) -> dict[str, Any]:
    """Return what must be the same for a merge to be continued; ``works`` are carried out in place of the plan's own.
    Raises StorageError where an input cannot be read."""
    return {
        "version": VERSION,
        "ranks": ranks,
        "paramdelta": paramdelta.__version__,
        "request": plan.request.to_dict(),
        "inputs": {
            role: {file.name: _fingerprint(checkpoint, i) for i, file in enumerate(checkpoint.inputs)}
            for role, checkpoint in plan.checkpoints.items()
            if not checkpoint.zeros
        },
        "plan": [_digest(plan.names, work) for work in works] if works else _digest(plan.names, plan.work),
    }


def _fingerprint(checkpoint: Checkpoint, number: int) -> dict[str, Any]:
    """Size, time of the last modification, digest of the header, and digests of the first and the last MiB of a
    file. The time is there for what the rest does not cover."""
    file = checkpoint.files[number]
    with storage_errors(file.path, "cannot be read"), open(file.path, "rb") as stream:
        first = stream.read(_MIB)
        stream.seek(max(0, file.size - _MIB))
        last = stream.read(_MIB)
    return {
        "bytes": file.size,
        "modified": file.signature.modified,
        "header": file.digest,
        "first_mib": hashlib.sha256(first).hexdigest(),
        "last_mib": hashlib.sha256(last).hexdigest(),
    }


def _digest(names: Sequence[str], work: Work) -> str:
    """Digest of where every byte of the output comes from and goes to."""
    digest = hashlib.sha256(json.dumps([names, work.outputs]).encode("utf-8", "surrogatepass"))
    for column in (work.spans, work.terms, work.regions, work.region_terms, work.views, work.recipes):
        digest.update(column.tobytes())
    return digest.hexdigest()


class Journal:
    """The journal in ``folder``, new or continued. ``finished`` is what it said when it was opened. Each rank has
    one of its own, under the name that :func:`rank_name` gives."""

    NAME = "journal"

    def __init__(self, folder: Path, who: dict[str, Any], *, restart: bool, name: str = NAME) -> None:
        self.path = folder / name
        self.finished = Finished()
        lines, length = ([], 0) if restart else read_lines(self.path)
        if lines:
            found = differences(lines[0], who)
            if found:
                raise InputError(_refusal(folder, found))
            self.finished = replay(lines[1:])
        with storage_errors(self.path, "cannot be written"):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, length)  # what is whole stays untouched: a kill here must not lose it
        self._who = who
        if not lines:
            self._append(who)

    def add_measured(self, measured: tuple[tuple[float, bool], ...]) -> None:
        """Note what the measuring pass found."""
        self._append({"measured": [[float(amax), bool(touched)] for amax, touched in measured]})

    def add_segment(self, number: int, result: RunResult) -> None:
        """Note that a segment is on disk; its files must be synced already."""
        counts, losses = ([asdict(row) for row in rows] for rows in (result.counts, result.losses))
        checksums = None if result.checksums is None else sorted(result.checksums.items())
        self._append({"segment": number, "counts": counts, "losses": losses, "checksums": checksums})

    def add_sources(self, sources: dict[str, Any]) -> None:
        """Note what whoever publishes needs to know beside the request."""
        self._append({"sources": sources})

    def add_totals(self, totals: dict[str, Any]) -> None:
        """Note that everything is done, and what it took."""
        self._append({"totals": totals})

    def add_publishing(self, marks: dict[str, Any]) -> None:
        """Note that everything is done and synced, and the folders that are about to be published, by name."""
        self._append({"publishing": marks})

    def forget(self) -> None:
        """Begin anew: what the journal speaks of is gone."""
        self.finished = Finished()
        with storage_errors(self.path, "cannot be written"):
            os.ftruncate(self._fd, 0)
        self._append(self._who)

    def _append(self, *lines: dict[str, Any]) -> None:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
        with storage_errors(self.path, "cannot be written"):
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def replay(lines: list[dict[str, Any]]) -> Finished:
    """Return what the lines behind the first say."""
    finished = Finished()
    for line in lines:
        if "measured" in line:
            finished.measured = [(amax, touched) for amax, touched in line["measured"]]
        elif "sources" in line:
            finished.sources = line["sources"]
        elif "totals" in line:
            finished.totals = line["totals"]
        elif "publishing" in line:
            finished.publishing = line["publishing"]
        else:
            finished.segments.add(line["segment"])
            finished.counts += [TensorCounts(**c) for c in line["counts"]]
            finished.losses += [TensorLoss(**c) for c in line["losses"]]
            sums = line["checksums"]
            finished.checksums = combined([finished.checksums, None if sums is None else dict(sums)])
    return finished


def rank_name(rank: int, world: int) -> str:
    """Return the name of a rank's journal."""
    return f"{Journal.NAME}-{rank}-of-{world}"


def rank_journals(folder: Path) -> list[Path]:
    """Return the journals of ranks in a folder that hold anything."""
    found = folder.glob(f"{Journal.NAME}-*-of-*")
    return sorted(path for path in found if path.stat().st_size)


def check_same(path: Path, who: dict[str, Any], remedy: str = "") -> None:
    """Raise InputError where a journal speaks of another merge."""
    lines, _ = read_lines(path)
    found = differences(lines[0], who) if lines else []
    if found:
        raise InputError(_refusal(path.parent, found, remedy))


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the documents of a journal up to the first that was not written to its end, and their bytes; nothing where
    that is the first of all."""
    with storage_errors(path, "cannot be read"):
        if not path.exists():
            return [], 0
        data = path.read_bytes()
    documents, length = [], 0
    for line in data.split(b"\n")[:-1]:
        try:
            document = json.loads(line)
        except ValueError:
            break
        if not isinstance(document, dict):
            break
        documents.append(document)
        length += len(line) + 1
    return documents, length


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Return lines that say in which values two documents differ, ``now`` and what was written ``then``."""
    if isinstance(then, dict) and isinstance(now, dict):
        found: list[str] = []
        for key in sorted({*then, *now}):
            found += differences(then.get(key), now.get(key), f"{where}{'.' if where else ''}{shown(key)}")
        return found
    if json.dumps(then) == json.dumps(now):
        return []
    return [f"{where}: {_short(then)} then, {_short(now)} now"]


def _short(value: Any) -> str:
    text = shown(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


def listed(lines: list[str]) -> str:
    """Return the first of some lines, each indented on a line of its own, and how many more there are."""
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return "".join(f"\n      {line}" for line in lines[:_MOST_SHOWN] + more)


def _refusal(folder: Path, found: list[str], remedy: str = "") -> Complaint:
    return Complaint(
        str(folder),
        f"holds an unfinished merge that differs from this one:{listed(found)}",
        remedy or "repeat the command that was cut short to continue it; --restart discards it and begins anew",
    )
