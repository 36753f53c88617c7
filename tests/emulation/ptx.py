"""Reads PTX, the assembly that nvcc and Triton make: functions, their parameters, and statements in order.

Source: NVIDIA, PTX ISA 9.0. What a statement does is said in ``translate.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# What a register or a place in memory holds: the width in bits.
WIDTHS = {
    **{f"{kind}{width}": width for kind in "bus" for width in (8, 16, 32, 64)},
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "pred": 1,
}


@dataclass(frozen=True)
class Variable:
    """Memory with a name: a parameter, or an array of a function's own."""

    name: str
    bytes: int
    align: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard`` (with ``!`` for its opposite), ``opcode.modifiers``, operands as they are written."""

    guard: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


# A label, an opened or closed scope, declarations of registers or of memory, or an instruction.
Statement = str | tuple[str, ...] | Variable | Instruction


@dataclass
class Function:
    """A function: ``entry`` where it is a kernel. ``body`` is None of a declaration."""

    name: str
    entry: bool
    results: list[Variable]
    parameters: list[Variable]
    threads: int = 0
    body: list[Statement] | None = None
    registers: dict[str, str] = field(default_factory=dict)


@dataclass
class Module:
    """A file of PTX."""

    functions: list[Function]
    shared: list[Variable]  # .extern ones have size 0: they begin where what a launch asks for does


def read(text: str) -> Module:
    """Return what a file of PTX says. Raises ValueError where it says what is not known here."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    lines = []
    for line in text.splitlines():
        line = line.split("//", 1)[0].rstrip()
        if re.match(r"\s*\.section", line):
            break  # of debuggers: nothing follows
        if line and not re.match(r"\s*\.(loc|file|version|target|address_size|pragma)\b", line):
            lines.append(line)
    return _Reader("\n".join(lines)).module()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def module(self) -> Module:
        functions, shared = [], []
        while self._skip_space():
            start = self.at
            match = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func|shared)\b").match(
                self.text, start
            )
            if match is None:
                raise ValueError(f"PTX: not known: {self.text[start : start + 80]!r}")
            self.at = match.end()
            if match[1] == "shared":
                shared.append(_variable(self._until(";")))
            else:
                functions.append(self._function(match[1] == "entry"))
        return Module(functions, shared)

    def _function(self, entry: bool) -> Function:
        results = [] if entry else self._variables()
        self._skip_space()
        match = re.compile(r"[\w$]+").match(self.text, self.at)
        assert match is not None, self.text[self.at : self.at + 80]
        self.at = match.end()
        function = Function(match[0], entry, results, self._variables())
        head = re.compile(r"[^;{]*").match(self.text, self.at)
        assert head is not None
        self.at = head.end()
        threads = re.search(r"\.(?:max|req)ntid\s+(\d+)", head[0])
        function.threads = int(threads[1]) if threads else 0
        if self.text[self.at] == ";":
            self.at += 1
        else:
            function.body = list(self._body())
        return function

    def _variables(self) -> list[Variable]:
        """Read ``( .param …, .param … )`` where it is there."""
        self._skip_space()
        if self.text[self.at] != "(":
            return []
        end = self.text.index(")", self.at)
        inner = self.text[self.at + 1 : end]
        self.at = end + 1
        return [_variable(each) for each in inner.split(",") if each.strip()]

    def _body(self) -> list[Statement]:
        body: list[Statement] = []
        depth = 0
        while True:
            self._skip_space()
            label = re.compile(r"([\w$]+):").match(self.text, self.at)
            if label:
                body.append(label[1])
                self.at = label.end()
            elif self.text[self.at] in "{}":
                depth += 1 if self.text[self.at] == "{" else -1
                if not (depth == 1 and not body) and depth > 0:
                    body.append((self.text[self.at],))
                self.at += 1
                if depth == 0:
                    return body
            else:
                body.append(_statement(" ".join(self._until(";").split())))

    def _until(self, end: str) -> str:
        stop = self.text.index(end, self.at)
        found = self.text[self.at : stop]
        self.at = stop + 1
        return found

    def _skip_space(self) -> bool:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at < len(self.text)


def _statement(text: str) -> Statement:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        return (".reg", kind[1:], names.strip())
    if text.startswith((".local", ".param", ".shared")):
        return _variable(text)
    match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][a-z0-9]*)((?:\.[\w:]+)*)\s*(.*)", text)
    if match is None:
        raise ValueError(f"PTX: not known: {text!r}")
    return Instruction(match[1] or "", match[2], tuple(match[3].split(".")[1:]), tuple(_split(match[4])), text)


def _split(operands: str) -> list[str]:
    """Cut at the commas that stand in no bracket."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(operands):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            found.append(operands[start:i].strip())
            start = i + 1
    found.append(operands[start:].strip())
    return [each for each in found if each]


def _variable(text: str) -> Variable:
    """Read ``.param .align 8 .b8 name[16]``."""
    name = re.search(r"([\w$]+)\s*(?:\[(\d*)\])?\s*$", text)
    kinds = [kind for kind in re.findall(r"\.(\w+)", text[: name.start()]) if kind in WIDTHS] if name else []
    if name is None or not kinds:
        raise ValueError(f"PTX: not known: {text!r}")
    size = WIDTHS[kinds[0]] // 8
    align = re.search(r"\.align\s+(\d+)", text)
    pointer = ".ptr" in text  # there .align speaks of what is pointed to
    count = 1 if name[2] is None else int(name[2] or 0)
    return Variable(name[1], size * count, int(align[1]) if align and not pointer else size)
