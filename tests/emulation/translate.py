"""Translates PTX to C++ that does the same: a function for a kernel's thread, in which a register is a variable, a
label a label, an instruction a statement (``instructions.py``). ``machine.hpp`` has what the statements call.

A file that has anything that is not known is refused as a whole, with all of it.
"""

from __future__ import annotations

import re

from instructions import SPECIAL, Instructions, function_name, label_name, register_name
from ptx import WIDTHS, Function, Instruction, Module, Variable


def translate(module: Module) -> str:
    """Return C++ that makes a module's kernels known by name. Raises ValueError with all that is not known."""
    parts = ['#include "machine.hpp"\n\nnamespace {\nusing namespace emulated;\n']
    unknown = [f"shared memory of a size of its own: {v.name}" for v in module.shared if v.bytes]
    bodies = [f for f in module.functions if f.body is not None]
    parts += [f"{_head(f)};\n" for f in bodies]
    for function in bodies:
        writer = _Writer(module, function)
        parts.append(writer.whole())
        unknown += writer.unknown
    if unknown:
        raise ValueError("PTX: not known:\n" + "\n".join(sorted(set(unknown))))
    for f in bodies:
        if f.entry:
            places = zip(_offsets(f.parameters)[0], f.parameters, strict=True)
            inner = ", ".join(f"{{{offset}, {v.bytes}}}" for offset, v in places)
            parts.append(f'const Known known_{f.name}("{f.name}", &{function_name(f.name)}, {{{inner}}});\n')
    return "".join([*parts, "}  // namespace\n"])


def _head(function: Function) -> str:
    places = ["std::byte* parameters"]
    if not function.entry:
        places = [f"std::byte* {function_name(v.name)}" for v in (*function.results, *function.parameters)]
    return f"void {function_name(function.name)}({', '.join(['Thread& t', *places])})"


def _offsets(variables: list[Variable]) -> tuple[list[int], int]:
    at, offsets = 0, []
    for variable in variables:
        at = -(-at // variable.align) * variable.align
        offsets.append(at)
        at += variable.bytes
    return offsets, at


class _Writer(Instructions):
    """One function's translation."""

    def __init__(self, module: Module, function: Function) -> None:
        self.function = function
        self.entry = function.entry
        self.kinds: dict[str, str] = {}
        self.shared = {v.name for v in module.shared}
        self.unknown: list[str] = []

    def whole(self) -> str:
        function = self.function
        lines = [f"{_head(function)} {{"]
        if function.entry:
            for variable, offset in zip(function.parameters, _offsets(function.parameters)[0], strict=True):
                lines.append(f"std::byte* const {function_name(variable.name)} = parameters + {offset};")
        lines += self._arrays()
        for statement in function.body or ():
            if isinstance(statement, str):
                lines.append(f"{label_name(statement)}:;")
            elif isinstance(statement, Instruction):
                lines.append(self._guarded(statement))
            elif isinstance(statement, tuple):
                lines.append(statement[0] if len(statement) == 1 else self._registers(*statement[1:]))
        return "\n".join([*lines, "}\n"])

    def _arrays(self) -> list[str]:
        """Declare arrays at the top, so that no jump passes a declaration; names are unique but for parameters of
        calls, of which the largest serves all."""
        largest: dict[str, Variable] = {}
        for each in self.function.body or ():
            if isinstance(each, Variable):
                before = largest.get(each.name)
                if before is None or before.bytes < each.bytes:
                    largest[each.name] = each
        return [f"alignas(16) std::byte {function_name(v.name)}[{max(v.bytes, 1)}];" for v in largest.values()]

    def _registers(self, kind: str, names: str) -> str:
        width = WIDTHS[kind]
        found = []
        for name in names.split(","):
            many = re.fullmatch(r"\s*(%\w+?)<(\d+)>", name)
            found += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        self.kinds |= dict.fromkeys(found, "pred" if width == 1 else f"b{width}")
        # Registers hold anything before they are written: the compiler may think what it likes of them.
        return f"{'pred' if width == 1 else f'b{width}'} {', '.join(register_name(n) for n in found)};"

    def _guarded(self, instruction: Instruction) -> str:
        try:
            done = self.statement(instruction)
        except (KeyError, ValueError, IndexError) as error:
            self.unknown.append(f"{instruction.text}   ({error!r})")
            return ""
        if not instruction.guard:
            return done
        opposite = instruction.guard.startswith("!")
        return f"if ({'!' if opposite else ''}{register_name(instruction.guard.lstrip('!'))}) {{ {done} }}"

    # What an operand stands for, and where a result goes.

    def take(self, operand: str, kind: str) -> str:
        if operand.startswith("!"):
            return f"!{self.take(operand[1:], kind)}"
        if operand in self.kinds or (operand.startswith("%") and operand not in SPECIAL):
            return f"get<{kind}>({self._known(operand)})"
        if operand in SPECIAL:
            return f"get<{kind}>({SPECIAL[operand]})"
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
            return f"get<{kind}>(static_cast<b{len(operand[2:]) * 4}>(0x{operand[2:]}ull))"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            word = int(operand.rstrip("U"), 0) & ((1 << WIDTHS[kind]) - 1)
            return f"get<{kind}>(static_cast<{'bool' if kind == 'pred' else f'b{WIDTHS[kind]}'}>({word}ull))"
        return f"get<{kind}>({self._symbol(operand)})"

    def _known(self, register: str) -> str:
        if register not in self.kinds:
            raise ValueError(f"register {register}")
        return register_name(register)

    def _symbol(self, name: str) -> str:
        """The address that a name stands for: of shared memory an offset, of all else where it lies."""
        if name in self.shared:
            return "b64{0}"
        return f"reinterpret_cast<b64>({function_name(name)})"

    def give(self, register: str, kind: str, value: str) -> str:
        return "" if register == "_" else f"put({self._known(register)}, static_cast<{kind}>({value}));"

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise ValueError(f"address {operand}")
        base = self._symbol(match[1]) if not match[1].startswith("%") else f"static_cast<b64>({self._known(match[1])})"
        offset = int(match[2], 0) if match[2] else 0
        return f"({base} + static_cast<b64>({offset}ll))"
