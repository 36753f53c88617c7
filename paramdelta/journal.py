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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paramdelta
from paramdelta.checksums import combined
from paramdelta.engine import TensorCounts, TensorLoss
from paramdelta.errors import Complaint, InputError, StorageError, shown

if TYPE_CHECKING:
    from paramdelta.checkpoint import Checkpoint
    from paramdelta.engine import RunResult
    from paramdelta.plan import Plan

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


def identity(plan: Plan) -> dict[str, Any]:
    """Return what must be the same for a merge to be continued. Raises StorageError where an input cannot be read."""
    return {
        "version": VERSION,
        "paramdelta": paramdelta.__version__,
        "request": plan.request.to_dict(),
        "inputs": {
            checkpoint.role: {file.name: _fingerprint(checkpoint, i) for i, file in enumerate(checkpoint.files)}
            for checkpoint in (plan.post, plan.base, plan.new_base)
        },
        "plan": _digest(plan),
    }


def _fingerprint(checkpoint: Checkpoint, number: int) -> dict[str, Any]:
    """Size, digest of the header, and digests of the first and the last MiB of a file."""
    file = checkpoint.files[number]
    try:
        with open(file.path, "rb") as stream:
            first = stream.read(_MIB)
            stream.seek(max(0, file.size - _MIB))
            last = stream.read(_MIB)
    except OSError as error:
        raise StorageError(error.errno, f"{file.path}: cannot be read: {error.strerror}") from error
    return {
        "bytes": file.size,
        "header": file.digest,
        "first_mib": hashlib.sha256(first).hexdigest(),
        "last_mib": hashlib.sha256(last).hexdigest(),
    }


def _digest(plan: Plan) -> str:
    """Digest of where every byte of the output comes from and goes to."""
    work = plan.work
    digest = hashlib.sha256(json.dumps([plan.names, work.outputs]).encode("utf-8", "surrogatepass"))
    for column in (work.spans, work.terms, work.regions, work.region_terms, work.views, work.recipes):
        digest.update(column.tobytes())
    return digest.hexdigest()


class Journal:
    """The journal in ``folder``, new or continued. ``finished`` is what it said when it was opened."""

    NAME = "journal"

    def __init__(self, folder: Path, who: dict[str, Any], *, restart: bool) -> None:
        self.path = folder / self.NAME
        self.finished = Finished()
        lines, length = ([], 0) if restart else _lines(self.path)
        if lines:
            differences = _differences(lines[0], who, "")
            if differences:
                raise InputError(_refusal(folder, differences))
            self._replay(lines[1:])
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, length)  # what is whole stays untouched: a kill here must not lose it
        except OSError as error:
            raise StorageError(error.errno, f"{self.path}: cannot be written: {error.strerror}") from error
        self._who = who
        if not lines:
            self._append(who)

    def _replay(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "measured" in line:
                self.finished.measured = [(amax, touched) for amax, touched in line["measured"]]
            else:
                self.finished.segments.add(line["segment"])
                self.finished.counts += [TensorCounts(**c) for c in line["counts"]]
                self.finished.losses += [TensorLoss(**c) for c in line["losses"]]
                found = line["checksums"]
                self.finished.checksums = combined([self.finished.checksums, None if found is None else dict(found)])

    def add_measured(self, measured: tuple[tuple[float, bool], ...]) -> None:
        """Note what the measuring pass found."""
        self._append({"measured": [[float(amax), bool(touched)] for amax, touched in measured]})

    def add_segment(self, number: int, result: RunResult) -> None:
        """Note that a segment is on disk; its files must be synced already."""
        counts, losses = ([asdict(row) for row in rows] for rows in (result.counts, result.losses))
        checksums = None if result.checksums is None else sorted(result.checksums.items())
        self._append({"segment": number, "counts": counts, "losses": losses, "checksums": checksums})

    def forget(self) -> None:
        """Begin anew: what the journal speaks of is gone."""
        self.finished = Finished()
        os.ftruncate(self._fd, 0)
        self._append(self._who)

    def _append(self, *lines: dict[str, Any]) -> None:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(error.errno, f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the documents of a journal up to the first that was not written to its end, and their bytes; nothing where
    that is the first of all."""
    try:
        data = path.read_bytes()
    except OSError:
        return [], 0
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


def _differences(then: Any, now: Any, where: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        found: list[str] = []
        for key in sorted({*then, *now}):
            found += _differences(then.get(key), now.get(key), f"{where}{'.' if where else ''}{shown(key)}")
        return found
    if json.dumps(then) == json.dumps(now):
        return []
    return [f"{where}: {_short(then)} then, {_short(now)} now"]


def _short(value: Any) -> str:
    text = shown(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


def _refusal(folder: Path, differences: list[str]) -> Complaint:
    listed = "".join(f"\n      {line}" for line in differences[:_MOST_SHOWN])
    more = f"\n      and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
    return Complaint(
        str(folder),
        f"holds an unfinished merge that differs from this one:{listed}{more}",
        "repeat the command that was cut short to continue it; --restart discards it and begins anew",
    )
