"""Reads a plan, in YAML or JSON, with the line that every field is on, so that complaints can name it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paramdelta.checkpoint.documents import read_document
from paramdelta.errors import Complaint, InputError, remedy_of, shown

Where = tuple[str | int, ...]  # the fields and numbers of entries that lead to a value

_MOST_BYTES = 1 << 20
_DEEPEST = 4  # no complaint is about anything further down
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')


@dataclass(frozen=True)
class Document:
    """What a plan says, and where. ``name`` is how complaints call it, ``folder`` what its relative paths begin at."""

    name: str
    folder: Path
    value: Any
    lines: Mapping[Where, int] = field(default_factory=dict)

    def complaint(self, where: Where, problem: str, remedy: str = "") -> Complaint:
        """Return a complaint about a value: ``plan.yaml:7: versions[2].model``."""
        found = where
        while found and found not in self.lines:
            found = found[:-1]
        line = f":{self.lines[found]}" if found in self.lines else ""
        spelled = "".join(f"[{key}]" if isinstance(key, int) else f".{shown(key)}" for key in where)
        return Complaint(f"{self.name}{line}{': ' if spelled else ''}{spelled.removeprefix('.')}", problem, remedy)


def read(plan: str | Path | Mapping[str, Any]) -> Document:
    """Return a plan: a file, in JSON where its name ends so and in YAML else, or what such a file holds. Raises
    InputError."""
    if isinstance(plan, Mapping):
        return Document("plan", Path(), plan)
    path = Path(plan)
    try:
        raw = read_document(path)
        if len(raw) > _MOST_BYTES:
            raise InputError(Complaint(str(path), f"holds {len(raw):,} bytes; no plan is that large"))
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(Complaint(str(path), f"is not UTF-8 (byte {error.start})")) from None
    except ValueError as error:
        raise InputError(
            error.complaints if isinstance(error, InputError) else Complaint(str(path), str(error))
        ) from None
    except OSError as error:
        remedy = (
            "paramdelta recycle --example > plan.yaml" if isinstance(error, FileNotFoundError) else remedy_of(error)
        )
        raise InputError(Complaint(str(path), f"cannot be read: {error.strerror}", remedy)) from None
    value, lines = _json(path, text) if path.suffix.lower() == ".json" else _yaml(path, text)
    return Document(str(path), path.absolute().parent, value, lines)


def _json(path: Path, text: str) -> tuple[Any, dict[Where, int]]:
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        raise InputError(Complaint(f"{path}:{error.lineno}", f"is not JSON: {error.msg}")) from None
    except RecursionError:
        raise InputError(Complaint(str(path), "is nested too deeply")) from None
    tokens = ((match[0], text.count("\n", 0, match.start()) + 1) for match in _TOKEN.finditer(text))
    return value, dict(_lines_of_json(tokens, ()))


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(Complaint(str(path), f"holds the field {shown(twice)} twice in one object"))
    return value


def _lines_of_json(tokens: Iterator[tuple[str, int]], where: Where) -> Iterator[tuple[Where, int]]:
    """Yield the line of every value of a document that is known to be JSON, from its tokens."""
    token, line = next(tokens)
    yield where, line
    if token not in "[{":
        return
    number = 0
    while True:
        key: str | int = number
        if token == "{" or number == 0:  # an empty list has to be found out before its first value is read
            first, at = next(tokens)
            if first in ("}", "]"):
                return
            if token == "{":
                key = json.loads(first)
                next(tokens)  # the colon
            else:
                tokens = itertools.chain([(first, at)], tokens)
        yield from _lines_of_json(tokens, (*where, key))
        number += 1
        if next(tokens)[0] in "]}":
            return


def _yaml(path: Path, text: str) -> tuple[Any, dict[Where, int]]:
    try:
        import yaml
    except ImportError:
        raise InputError(
            Complaint(str(path), "plans in YAML need PyYAML", "pip install 'paramdelta[yaml]', or write plan.json")
        ) from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines = dict(_lines_of_yaml(path, node, ())) if node is not None else {}
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(Complaint(f"{path}{line}", f"is not YAML: {error.problem or error.context}")) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(Complaint(str(path), f"is not YAML: {str(error).splitlines()[0]}")) from None
    except RecursionError:
        raise InputError(Complaint(str(path), "is nested too deeply")) from None
    finally:
        loader.dispose()


def _lines_of_yaml(path: Path, node: Any, where: Where) -> Iterator[tuple[Where, int]]:
    """Yield the line of every value, and refuse a field that is there twice, which YAML readers let pass."""
    yield where, node.start_mark.line + 1
    if len(where) >= _DEEPEST:
        return
    if node.id == "sequence":
        for number, child in enumerate(node.value):
            yield from _lines_of_yaml(path, child, (*where, number))
    elif node.id == "mapping":
        seen: set[str] = set()
        for key, child in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                problem = f"the field {shown(name)} is there twice"
                raise InputError(Complaint(f"{path}:{key.start_mark.line + 1}", problem))
            seen.add(name)
            yield from _lines_of_yaml(path, child, (*where, name))
