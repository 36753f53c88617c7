"""What a recycling is to do: versions, the command that fine-tunes, how deltas are taken and applied. Read from a plan
and checked, every complaint at once."""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paramdelta.deltas import apply_request, extract_request
from paramdelta.errors import Complaint, InputError, shown
from paramdelta.plan import MergeRequest
from paramdelta.recycling.reading import Document, Where, read

PLACES = ("start", "out", "version", "index")  # what a command is told
KEPT = ("starts", "outs")
UNFINISHED = ("remove", "keep")
_NOT_POLICIES = {"cls", "post", "base", "new_base", "out", "kind", "delta_dtype", "lossless", "alpha", "overwrite"}
_STANDS_FOR_A_FOLDER = "<"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)
_PLACE = re.compile(r"(?<![${])\{(\w+)\}(?!\})")
_TWICE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Version:
    """One version of the base model: its place in the order, from 1; a name for folders and for the command; and the
    folder or the identifier that the plan has."""

    index: int
    name: str
    model: str

    @property
    def label(self) -> str:
        """What its folders are called: ``2-v2``."""
        return f"{self.index}-{self.name}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What fine-tunes: arguments, or text for a shell; where it runs, and what it gets in its environment."""

    arguments: tuple[str, ...] | str
    workdir: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def filled(self, places: Mapping[str, str]) -> list[str]:
        """Return the arguments with what ``{start}`` and so on stand for; quoted where a shell reads them."""
        if isinstance(self.arguments, str):
            quoted = {name: shlex.quote(value) for name, value in places.items()}
            return ["/bin/sh", "-c", _fill(self.arguments, quoted)]
        return [_fill(argument, places) for argument in self.arguments]


@dataclass(frozen=True, kw_only=True)
class RecyclePlan:
    """A plan, checked. ``document`` is what it was read from; ``keep`` says which folders stay once their version is
    done; ``unfinished`` what becomes of the output of a command that did not end well."""

    document: Document
    versions: tuple[Version, ...]
    out: Path
    command: Command
    alpha: float | Mapping[str, float] = 1.0
    first_delta: str | None = None
    extract: Mapping[str, Any] = field(default_factory=dict)
    apply: Mapping[str, Any] = field(default_factory=dict)
    keep: tuple[str, ...] = ("outs",)
    unfinished: str = "remove"

    def settings(self, version: Version) -> dict[str, Any]:
        """Return what decides what a version becomes, beside its inputs, as JSON-ready values."""
        given = self.command.arguments
        return {
            "name": version.name,
            "model": version.model,
            "command": given if isinstance(given, str) else list(given),
            "shell": isinstance(given, str),
            "env": dict(self.command.env),
            "workdir": str(self.command.workdir),
            "alpha": dict(self.alpha) if isinstance(self.alpha, Mapping) else self.alpha,
            "first_delta": self.first_delta if version.index == 1 else None,
            "apply": dict(self.apply),
            "extract": dict(self.extract),
        }

    def path(self, text: str) -> Path:
        """Return a path of the plan; relative ones begin at the plan's folder."""
        return self.document.folder / text


def load(plan: str | Path | Mapping[str, Any], *, out: str | Path | None = None) -> RecyclePlan:
    """Read a plan and check it; ``out`` is in place of the plan's own. Raises InputError with every complaint."""
    document = read(plan)
    reader = _Reader(document)
    made = reader.plan(out)
    if made is None or reader.wrong:
        raise InputError(reader.wrong)
    return made


class _Reader:
    """Reads the fields of one plan and gathers what is wrong with them."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.wrong: list[Complaint] = []

    def plan(self, out: str | Path | None) -> RecyclePlan | None:
        """Return the plan, or None where something is wrong; what that is, is in ``wrong``."""
        value = self.document.value
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            self._expected((), "fields with names: versions, out, command", value)
            return None
        self._known((), value, list(_FIELDS))
        found: dict[str, Any] = {}
        for name, (required, read_field) in _FIELDS.items():
            if name in value and value[name] is not None:
                found[name] = read_field(self, (name,), value[name])
            elif required and not (name == "out" and out is not None):
                self.wrong.append(self.document.complaint((name,), f"is missing: {required}"))
        folder = self.document.folder
        arguments = self._arguments(found.get("command"), found.pop("shell", False))
        self._policies(found)
        if self.wrong:
            return None
        work = found.pop("workdir", None)
        found["command"] = Command(
            arguments=arguments,
            workdir=folder.absolute() if work is None else (folder / work).absolute(),
            env=found.pop("env", {}),
        )
        found["out"] = (folder / found["out"] if out is None else Path(out)).absolute()
        return RecyclePlan(document=self.document, **found)

    def _expected(self, where: Where, expected: str, got: Any, remedy: str = "") -> None:
        text = shown(repr(got)) if not isinstance(got, Mapping) else "a mapping"
        self.wrong.append(self.document.complaint(where, f"expected {expected}, got {text}", remedy))

    def _known(self, where: Where, given: Mapping[Any, Any], names: list[str]) -> None:
        for key in given:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1)
                remedy = f"perhaps {near[0]} is meant" if near else f"there are: {', '.join(names)}"
                self.wrong.append(self.document.complaint((*where, str(key)), "there is no such field", remedy))

    def text(self, where: Where, value: Any) -> str:
        """Read text that is not empty and no path or argument would end at."""
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, str) and value and "\0" not in value:
            return value
        remedy = "" if isinstance(value, str | list | Mapping) else "put it in quotes"
        self._expected(where, "text", value, remedy)
        return ""

    def written(self, where: Where, value: Any) -> str:
        """Read text, or a number that stands for its spelling."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return value if value == "" else self.text(where, value)

    def flag(self, where: Where, value: Any) -> bool:
        """Read true or false."""
        if not isinstance(value, bool):
            self._expected(where, "true or false", value)
        return value is True

    def fields(self, where: Where, value: Any) -> Mapping[str, Any]:
        """Read a mapping."""
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return value
        self._expected(where, "names and values", value)
        return {}

    def versions(self, where: Where, value: Any) -> tuple[Version, ...]:
        """Read the list of versions, each a model or a mapping of ``model`` and ``name``."""
        if not isinstance(value, list | tuple) or not value:
            self._expected(where, "a list of models, the oldest first", value)
            return ()
        made = []
        for number, entry in enumerate(value):
            here = (*where, number)
            name = None
            if isinstance(entry, Mapping):
                self._known(here, entry, ["model", "name"])
                if "model" not in entry:
                    self.wrong.append(self.document.complaint(here, "has no model: a folder, or org/name[@revision]"))
                    continue
                if "name" in entry:
                    name = self.written((*here, "name"), entry["name"])
                    if name and not _NAME.fullmatch(name):
                        self._expected((*here, "name"), "letters, digits and . _ + - (at most 100)", name)
                here, entry = (*here, "model"), entry["model"]
            model = self.text(here, entry)
            made.append(Version(number + 1, name or _name_of(model), model))
        return tuple(made)

    def command(self, where: Where, value: Any) -> Any:
        """Read a list of arguments, or text."""
        if isinstance(value, str):
            self._places(where, self.text(where, value))
            return value
        if not isinstance(value, list | tuple) or not value:
            self._expected(where, "a list: the program and its arguments", value)
            return ()
        found = []
        for number, argument in enumerate(value):
            here = (*where, number)
            found.append(self.written(here, argument))
            self._places(here, found[-1])
        return tuple(found)

    def _places(self, where: Where, text: str) -> None:
        for match in _PLACE.finditer(text):
            if match[1] not in PLACES:
                known = ", ".join(f"{{{place}}}" for place in PLACES)
                remedy = f"for the text {match[0]} itself, write {{{match[0]}}}"
                self._expected(where, f"one of {known}", match[0], remedy)

    def _arguments(self, command: Any, shell: bool) -> Any:
        if isinstance(command, str) and command and not shell:
            remedy = "make it a list, or have a shell read it with shell: true"
            self.wrong.append(self.document.complaint(("command",), "is text, which needs a shell", remedy))
        if isinstance(command, tuple) and command and shell:
            self.wrong.append(self.document.complaint(("shell",), "a shell reads text, and command is a list"))
        return command

    def environment(self, where: Where, value: Any) -> dict[str, str]:
        """Read variables for the command."""
        found = {}
        for name, given in self.fields(where, value).items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                self.wrong.append(self.document.complaint((*where, name), "is no name of a variable"))
            found[name] = self.written((*where, name), given)
        return found

    def alpha(self, where: Where, value: Any) -> Any:
        """Read a number, or numbers by glob; whether they will do, the request says."""
        values = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int | float | str) for v in values):
            self._expected(where, "a number, or globs and numbers", value)
            return 1.0
        return value

    def kept(self, where: Where, value: Any) -> tuple[str, ...]:
        """Read which folders stay."""
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or any(v not in KEPT for v in listed):
            self._expected(where, f"a list of {' and '.join(KEPT)}, or []", value)
            return ()
        return tuple(listed)

    def unfinished(self, where: Where, value: Any) -> str:
        """Read what becomes of what a command left that did not end well."""
        if value not in UNFINISHED:
            self._expected(where, " or ".join(UNFINISHED), value)
        return str(value)

    def _policies(self, found: dict[str, Any]) -> None:
        """Have the requests checked as they will be made; their complaints name options of the command line."""
        policies = sorted(set(inspect.signature(MergeRequest.build).parameters) - _NOT_POLICIES)
        extract, apply = found.get("extract", {}), found.get("apply", {})
        alpha = found.get("alpha", 1.0)
        self._checked("extract", extract, [*policies, "lossless"], extract_request, post="<post>", base="<base>")
        self._checked("apply", apply, policies, apply_request, new_base="<new_base>", deltas="<delta>", alpha=alpha)

    def _checked(
        self, name: str, given: Mapping[str, Any], names: list[str], check: Callable[..., object], **stand_ins: Any
    ) -> None:
        before = len(self.wrong)
        self._known((name,), given, names)
        if len(self.wrong) > before:
            return
        try:
            check(**stand_ins, **given)
        except InputError as error:
            for complaint in error.complaints:
                if complaint.subject.startswith(_STANDS_FOR_A_FOLDER):
                    continue
                option = complaint.subject.removeprefix("--").replace("-", "_")
                where = (name, option) if option in given else (option,) if option in _FIELDS else (name,)
                self.wrong.append(self.document.complaint(where, complaint.problem, complaint.remedy))
        except (TypeError, AttributeError, ValueError) as error:
            self.wrong.append(self.document.complaint((name,), f"has a value of the wrong kind: {error}"))


def _name_of(model: str) -> str:
    """Return a name for folders: the last part of a path or an identifier, with its revision."""
    last = Path(model).name or "version"
    return re.sub(r"[^\w.+-]+", "-", last, flags=re.ASCII).strip("-.")[:100] or "version"


def _fill(text: str, places: Mapping[str, str]) -> str:
    filled = _PLACE.sub(lambda match: places.get(match[1], match[0]), text)
    return _TWICE.sub(r"{\1}", filled)


# Of each field: what it is, where it must be there; and how it is read.
_FIELDS: dict[str, tuple[str, Callable[[_Reader, Where, Any], Any]]] = {
    "versions": ("the models to go through, the oldest first", _Reader.versions),
    "out": ("the folder to work in", _Reader.text),
    "command": ("the program that fine-tunes, and its arguments", _Reader.command),
    "shell": ("", _Reader.flag),
    "workdir": ("", _Reader.text),
    "env": ("", _Reader.environment),
    "alpha": ("", _Reader.alpha),
    "first_delta": ("", _Reader.text),
    "extract": ("", _Reader.fields),
    "apply": ("", _Reader.fields),
    "keep": ("", _Reader.kept),
    "unfinished": ("", _Reader.unfinished),
}
