"""JSON documents of a folder (config, index, records), read within bounds: whoever wrote the file decides neither how
much memory is taken nor how deep a program has to go."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from paramdelta.checkpoint.header import MAX_VALUES, is_unicode
from paramdelta.errors import Complaint, remedy_of, shown

MAX_BYTES = 100_000_000  # an index of half a million tensors with names of 150 letters
MAX_DEPTH = 64  # configs nest four or five levels; Python gives up at a thousand, and copying one at a few hundred


class _Refused(ValueError):  # noqa: N818  (it never leaves this file)
    """The document cannot be taken; the text says why."""


def read_json(folder: Path, name: str, complaints: list[Complaint]) -> dict[str, Any]:
    """Read a JSON object; what is wrong with it becomes a complaint and an empty object.

    Refused are files that are no regular files, larger than 100 MB, hold more than 4 million values, nest deeper than
    64 levels, hold a key twice in one object, or text that is not Unicode. NaN and Infinity pass: configs hold them.
    """
    path, remedy = folder / name, ""
    try:
        value = _parsed(read_document(path))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} (line {error.lineno})"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem, remedy = f"cannot be read: {error.strerror}", remedy_of(error)
    else:
        return value
    complaints.append(Complaint(str(path), problem, remedy))
    return {}


def read_document(path: Path) -> bytes:
    """Return what a file holds, once it is known to be a file and not too large. Raises OSError, and ValueError that
    says why it is not taken."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("is not a regular file")
        if status.st_size > MAX_BYTES:
            raise _Refused(f"holds {status.st_size:,} bytes; the most allowed is {MAX_BYTES:,}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)
    finally:
        os.close(fd)


def _parsed(raw: bytes) -> dict[str, Any]:
    values = sum(map(raw.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise _Refused(f"holds about {values:,} values; the most allowed is {MAX_VALUES:,}")
    value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise _Refused("is not a JSON object")
    _check_levels(value, strings=b"\\u" in raw)
    return value


def _check_levels(document: dict[str, Any], *, strings: bool) -> None:
    """Check the depth of a document and, where asked, that its strings are Unicode, without recursion."""
    level: list[Any] = [document]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"is nested too deeply: {MAX_DEPTH} levels are allowed")
        if strings and not all(map(is_unicode, (text for holder in level for text in _strings(holder)))):
            raise _Refused("holds a lone surrogate, which no Unicode text has")
        level = [child for holder in level for child in _children(holder) if isinstance(child, dict | list)]


def _children(holder: Any) -> Any:
    return holder.values() if isinstance(holder, dict) else holder


def _strings(holder: Any) -> list[str]:
    texts = [child for child in _children(holder) if isinstance(child, str)]
    return [*holder, *texts] if isinstance(holder, dict) else texts


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"holds the key {shown(twice)} twice")
    return value
