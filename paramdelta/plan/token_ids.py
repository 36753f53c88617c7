"""Ids of tokens in configs, under ``--vocab align``: which tokens begin, end and pad a text is said by number, and the
numbers of the output are those of its own tokenizer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.documents import read_json
from paramdelta.errors import Complaint, shown
from paramdelta.plan.config import USE_FIELDS
from paramdelta.plan.vocabulary import Alignment

GENERATION = "generation_config.json"
_FIELD = re.compile(r"(^|_)token_(id|ids|index)$")
_SEQUENCES = ("bad_words_ids", "force_words_ids")  # lists of texts: one token lost, the text is
_PLACES = ("forced_decoder_ids",)  # pairs of a place and a token
_LOST = object()


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Configs by role with the ids of the output's tokenizer; the bytes of generation_config.json where its ids change
    (``generation_role`` says whose it is); ``changed`` lists, by file, what the ids of new_base's config and of the
    generation config became; and what to warn of."""

    configs: dict[str, dict[str, Any]]
    generation: bytes | None
    generation_role: str
    changed: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def token_ids(alignment: Alignment, checkpoints: Mapping[str, Checkpoint], wrong: list[Complaint]) -> TokenIds:
    """Return the configs of post, base and new_base, and the generation config, with the output's ids.

    An id whose token the output lacks goes: post's gives way to new_base's, new_base's to post's, with a warning.
    """
    warnings: list[str] = []
    changed: dict[str, dict[str, list[Any]]] = {}
    configs = {role: copy.deepcopy(checkpoints[role].config) for role in ("post", "base", "new_base")}
    for role, config in configs.items():
        for level, path, key in _fields(config):
            old, new = level[key], _translated(alignment, role, key, level[key])
            if new is not _LOST:
                level[key] = new
            elif role == "base":  # compared with, and never written
                level[key] = f"the token {_texts(alignment, role, old)}"
            else:
                del level[key]
                warnings.append(_lost("config.json", path, alignment, role, old))
            if role == "new_base" and level.get(key) != old:
                _put_post(level, path, key, configs["post"])
                changed.setdefault("config.json", {})[path] = [old, level.get(key)]
    role = next((r for r in ("post", "new_base") if GENERATION in checkpoints[r].side_files), alignment.role)
    generation = None
    if GENERATION in checkpoints[role].side_files:
        document = read_json(checkpoints[role].path, GENERATION, wrong)
        for level, path, key in _fields(document):
            old, new = level[key], _translated(alignment, role, key, level[key])
            if new is _LOST:
                del level[key]
                warnings.append(_lost(GENERATION, path, alignment, role, old))
            else:
                level[key] = new
            if level.get(key) != old:
                changed.setdefault(GENERATION, {})[path] = [old, level.get(key)]
        if GENERATION in changed:
            generation = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    return TokenIds(
        configs=configs, generation=generation, generation_role=role, changed=changed, warnings=tuple(warnings)
    )


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (object, path, key) of every field that holds ids."""
    for key in list(config):
        value = config[key]
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        elif _FIELD.search(key) or key in (*USE_FIELDS, *_SEQUENCES, *_PLACES):
            yield config, f"{prefix}{key}", key


def _put_post(level: dict[str, Any], path: str, key: str, post: dict[str, Any]) -> None:
    """Where new_base's value is gone, put post's in its place, if post's config has one there."""
    if key in level:
        return
    there: Any = post
    for part in path.split(".")[:-1]:
        there = there.get(part) if isinstance(there, dict) else None
    if isinstance(there, dict) and key in there:
        level[key] = there[key]


def _translated(alignment: Alignment, role: str, key: str, value: Any) -> Any:
    """Return a value with the output's ids, _LOST where nothing of it is left."""

    def one(number: Any) -> Any:
        if not isinstance(number, int) or isinstance(number, bool):
            return number
        found = alignment.translated(role, number)
        return _LOST if found is None else found

    if not isinstance(value, list):
        return one(value)
    if key in _PLACES:
        items = [[v[0], one(v[1])] if isinstance(v, list) and len(v) == 2 else v for v in value]
        kept: list[Any] = [v for v in items if not (isinstance(v, list) and _LOST in v)]
    elif key in _SEQUENCES:
        items = [[one(v) for v in text] if isinstance(text, list) else text for text in value]
        kept = [text for text in items if not (isinstance(text, list) and any(v is _LOST for v in text))]
    else:
        kept = [v for v in map(one, value) if v is not _LOST]
    return _LOST if value and not kept else kept


def _texts(alignment: Alignment, role: str, value: Any) -> str:
    numbers = value if isinstance(value, list) else [value]
    return ", ".join(shown(repr(alignment.text(role, v))) if isinstance(v, int) else shown(repr(v)) for v in numbers)


def _lost(file: str, path: str, alignment: Alignment, role: str, value: Any) -> str:
    return (
        f"{file}: {shown(path)} of {role} is {_texts(alignment, role, value)}, which the tokenizer of "
        f"{alignment.role} lacks: left out"
    )
