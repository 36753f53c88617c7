"""Checks a merged folder against what its own record says of its bytes, without its sources: which files there are, how
large they are, what their headers say, and the CRC-32 of every tensor and of every other file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paramdelta import checksums
from paramdelta.checkpoint.documents import read_json
from paramdelta.checkpoint.header import read_header
from paramdelta.engine import EngineOptions
from paramdelta.errors import CheckpointError, Complaint, InputError, shown
from paramdelta.plan.sidefiles import RECORD

_HEADER = "header_sha256"  # only files with weights have one


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a record says: of each file its size and a digest or checksum, of each tensor its checksum. ``document`` is
    all of it as it stands there."""

    files: dict[str, dict[str, Any]]
    tensors: dict[str, str]
    document: dict[str, Any]


@dataclass
class _Stored:
    """What is there: the tensors that were found (name, file) with their extents, and what is wrong so far."""

    files: list[Path] = field(default_factory=list)
    tensors: list[tuple[str, str]] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    unreadable: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Integrity:
    """How many tensors and files were checked, and what is wrong."""

    tensors: int
    files: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def read_record(out: Path) -> dict[str, Any]:
    """Return the record of a merged folder. Raises InputError where there is none, or it cannot be understood."""
    complaints: list[Complaint] = []
    document = read_json(out, RECORD, complaints)
    for complaint in complaints:
        what = f"does not say how the folder was made: it {complaint.problem}"
        raise InputError(replace(complaint, problem=what, remedy="verify takes folders merge wrote"))
    return document


def recorded(out: Path) -> Recorded | None:
    """Return what the record of a folder says of its bytes, None where it was written without checksums. Raises
    InputError as :func:`read_record`, and where it is damaged."""
    document = read_record(out).get("checksums")
    if document is None:
        return None
    subject, remedy = str(out / RECORD), "verify with --post, --base and --new-base does not need them"
    if isinstance(document, dict) and document.get("algorithm") != checksums.ALGORITHM:
        what = f"has checksums of a kind that is not known here: {shown(document.get('algorithm'))}"
        raise InputError(Complaint(subject, what, "a later version of paramdelta may know it"))
    if not _well_formed(document):
        raise InputError(Complaint(subject, "has checksums that are damaged", remedy))
    return Recorded(files=document["files"], tensors=document["tensors"], document=document)


def _well_formed(document: Any) -> bool:
    if not isinstance(document, dict):
        return False
    files, tensors = document.get("files"), document.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        return False
    return all(isinstance(value, str) for value in tensors.values()) and all(
        Path(name).name == name
        and isinstance(row, dict)
        and isinstance(row.get("bytes"), int)
        and isinstance(row.get(_HEADER, row.get(checksums.ALGORITHM)), str)
        for name, row in files.items()
    )


def check(
    out: Path,
    *,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Integrity:
    """Check a merged folder against its record. Raises InputError where the record has no checksums, StorageError where
    a file cannot be read."""
    found = recorded(out)
    if found is None:
        raise InputError(
            Complaint(
                str(out / RECORD),
                "has no checksums: the folder was merged without them",
                "verify with --post, --base and --new-base recomputes it from its sources",
            )
        )
    problems, notes = _files(out, found)
    of_weights = check_weights(out, found, options=options, on_progress=on_progress)
    return Integrity(
        tensors=of_weights.tensors,
        files=len(found.files) + 1,
        problems=(*problems, *of_weights.problems),
        notes=tuple(notes),
    )


def _files(out: Path, found: Recorded) -> tuple[list[str], list[str]]:
    """Check that all files are there that are no weights, as they were, and no others; return what is wrong, and what
    is worth knowing."""
    problems: list[str] = []
    notes: list[str] = []
    for name, row in found.files.items():
        path = out / name
        if _HEADER in row:
            continue
        if not path.is_file():
            problems.append(f"{shown(name)}: missing")
        elif path.stat().st_size != row["bytes"]:
            problems.append(f"{shown(name)}: {path.stat().st_size:,} bytes, expected {row['bytes']:,}")
        else:
            sum_ = f"{checksums.of_file(path):08x}"
            if sum_ != row[checksums.ALGORITHM]:
                problems.append(f"{shown(name)}: its CRC-32 is {sum_}, expected {row[checksums.ALGORITHM]}")
    for path in sorted(out.iterdir()):
        if path.name in found.files or path.name == RECORD:
            continue
        # What version control and download tools leave beside a checkpoint is none of it.
        (notes if path.name.startswith(".") else problems).append(f"{shown(path.name)}: was not written by the merge")
    return problems, notes


def check_weights(
    out: Path,
    found: Recorded,
    *,
    options: EngineOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Integrity:
    """Check the files with weights: sizes, headers, the names of the tensors, and the CRC-32 of each."""
    stored = _Stored()
    for name, row in found.files.items():
        if _HEADER in row:
            _look_into(out / name, row, stored)
    _compare_names(found, stored)
    extents = checksums.extents_of(stored.rows)
    contributions = checksums.read(stored.files, extents, options=options, on_progress=on_progress)
    sums = checksums.spelled(contributions, [end - begin for _, begin, end in stored.rows])
    for (name, file), sum_ in zip(stored.tensors, sums, strict=True):
        expected = found.tensors.get(name, sum_)
        if sum_ != expected:
            stored.problems.append(f"{shown(name)}: its CRC-32 in {shown(file)} is {sum_}, expected {shown(expected)}")
    return Integrity(tensors=len(stored.tensors), files=len(stored.files), problems=tuple(stored.problems), notes=())


def _look_into(path: Path, row: dict[str, Any], stored: _Stored) -> None:
    """Read the header of a file with weights, and note its tensors and what is wrong."""
    if not path.is_file():
        stored.problems.append(f"{shown(path.name)}: missing")
        stored.unreadable += 1
        return
    size = path.stat().st_size
    if size != row["bytes"]:
        stored.problems.append(f"{shown(path.name)}: {size:,} bytes, expected {row['bytes']:,}")
    try:
        header = read_header(path, subject=path.name)
    except CheckpointError as error:
        stored.problems += [str(complaint) for complaint in error.complaints]
        stored.unreadable += 1
        return
    if header.digest != row[_HEADER]:
        stored.problems.append(
            f"{shown(path.name)}: its header is not the one that was written: "
            f"SHA-256 {header.digest}, expected {shown(row[_HEADER])}"
        )
    number = len(stored.files)
    stored.files.append(path)
    begins = (header.begin + header.data_start).tolist()
    for name, begin, nbytes in zip(header.names, begins, header.nbytes.tolist(), strict=True):
        stored.tensors.append((name, path.name))
        stored.rows.append((number, begin, begin + nbytes))


def _compare_names(found: Recorded, stored: _Stored) -> None:
    there = {name for name, _ in stored.tensors}
    missing = [name for name in found.tensors if name not in there]
    if missing and stored.unreadable:  # they are in the files that cannot be read, which are named already
        stored.problems.append(
            f"{len(missing):,} tensors were not found in the files that can be read, {shown(missing[0])} the first"
        )
    else:
        stored.problems += [f"{shown(name)}: missing" for name in missing]
    stored.problems += [
        f"{shown(name)}: is in {shown(file)}, but was not written by the merge"
        for name, file in stored.tensors
        if name not in found.tensors
    ]
