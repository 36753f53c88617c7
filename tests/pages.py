"""README.md and the pages of docs/ as data: their blocks of code with what is noted in front of them, the calls of
paramdelta in these, the checkpoints they name, their headings and links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHELL, PYTHON, CONSOLE = ("bash", "sh"), ("python",), ("console",)
# What is shown, not run: output, data, declarations.
SHOWN = ("text", "json", "yaml", "pyi", "csv")

_NOTE = re.compile(r"<!--\s*(not run|needs|given|lacks|file):\s*(.*?)\s*-->", re.DOTALL)
_FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_ENDS_A_COMMAND = re.compile(r"[;&|()<>]+")
# By option or keyword: the part that the named checkpoint plays.
ROLES = {"post": "post", "base": "base", "new_base": "new_base", "delta": "delta", "deltas": "delta"}
# By function: the parts of its positional arguments; by command likewise.
POSITIONAL = {
    "stream": ("post", "base", "new_base"),
    "open": ("post", "base", "new_base"),
    "analyze": ("post", "base", "new_base"),
    "interpolate": ("base", "new_base"),
    "verify": ("merged",),
    "inspect": ("merged",),
}


@dataclass(frozen=True)
class Call:
    """One call of the command line: the command's name, and its arguments."""

    command: str
    arguments: tuple[str, ...]

    def values(self, option: str) -> list[str]:
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return [value for name, value in pairs if name == option]

    @property
    def options(self) -> list[str]:
        return [a.partition("=")[0] for a in self.arguments if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", a)]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins in, and the notes in front of it by kind."""

    language: str
    code: str
    line: int
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Of a console block, each command with the output that is shown below it."""
        found: list[tuple[str, str]] = []
        for part in re.split(r"^\$ ", self.code, flags=re.MULTILINE)[1:]:
            lines = part.splitlines(keepends=True)
            n = next(i for i, line in enumerate(lines, 1) if not line.endswith("\\\n"))
            found.append(("".join(lines[:n]), "".join(lines[n:])))
        return found

    @property
    def script(self) -> str:
        """What a shell would run."""
        return "".join(c for c, _ in self.commands) if self.language in CONSOLE else self.code

    @property
    def calls(self) -> list[Call]:
        """The calls of paramdelta in a shell's block."""
        return list(_calls(self.script)) if self.language in SHELL + CONSOLE else []

    @property
    def outputs(self) -> set[str]:
        """Folders that the block writes."""
        if self.language in PYTHON:
            return {value for name, value in _named_in_python(self.code) if name == "out"}
        return {value for call in self.calls for value in call.values("--out")}

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """Checkpoints that the block reads: (role, name), in the order in which they are named."""
        if self.language in PYTHON:
            return [(ROLES.get(n, n), v) for n, v in _named_in_python(self.code) if n != "out"]
        return [pair for call in self.calls for pair in _named_in_call(call)]


def pages() -> list[Path]:
    """Return README.md and every page of docs/, wherever it lies."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page. A note is a comment of HTML directly in front of the fence; several may
    follow each other."""
    found = []
    for match in _FENCE.finditer(text):
        before = re.search(r"((?:<!--(?:(?!-->).)*-->\s*)*)\Z", text[: match.start()], re.DOTALL)
        notes = dict(_NOTE.findall(before[1])) if before else {}
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Block(match[2], code, text[: match.start()].count("\n") + 1, notes))
    return found


def prose_of(text: str) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", text)


def anchors_of(text: str) -> set[str]:
    """Return what links to a page may name behind ``#``, as GitHub makes it of headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", prose_of(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        n = sum(a == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", a) is not None for a in found)
        found.add(f"{anchor}-{n}" if n else anchor)
    return found


def links_of(text: str) -> list[str]:
    """Return the targets of a page's links and pictures."""
    prose = re.sub(r"`[^`\n]*`", "", prose_of(text))
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", prose)


def _calls(script: str) -> Iterator[Call]:
    script = re.sub(r"(^|\s)#.*$", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(script, posix=True, punctuation_chars=True)
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    words: list[str] = []
    for token in [*lexer, "\n"]:
        for word in re.split(r"(\n)", token):
            if word == "\n" or _ENDS_A_COMMAND.fullmatch(word):
                if "paramdelta" in words:
                    rest = words[words.index("paramdelta") + 1 :]
                    yield Call(rest[0] if rest else "", tuple(rest[1:]))
                words = []
            elif word:
                words.append(word)


def _named_in_call(call: Call) -> Iterator[tuple[str, str]]:
    for option in ("post", "base", "new-base", "delta"):
        for value in call.values(f"--{option}"):
            yield ROLES[option.replace("-", "_")], value.partition("=")[0]
    for role, value in zip(POSITIONAL.get(call.command, ()), call.arguments, strict=False):
        if value.startswith("-"):
            break
        yield role, value


def _named_in_python(code: str) -> Iterator[tuple[str, str]]:
    """Texts given as post, base, new_base, deltas or out, one by one or in lists."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = [(k.arg, k.value) for k in node.keywords if k.arg in ROLES or k.arg == "out"]
        given += list(zip(POSITIONAL.get(function, ()), node.args, strict=False))
        for name, value in given:
            for text in _texts(value):
                yield str(name), text


def _texts(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.List):
        for element in value.elts:
            yield from _texts(element)
    elif isinstance(value, ast.Tuple):  # a folder and its alpha
        yield from _texts(value.elts[0])
