"""Translates PTX to C++ that does the same: a function for a kernel's thread, in which a register is a variable, a label a
label, an instruction a statement. ``machine.hpp`` has what the statements call.

Everything that is not known here is refused: instructions, and modifiers that would change a result, such as flushing
subnormals (``ftz``) and approximations (``approx``, ``full``).
"""

from __future__ import annotations

import re

from ptx import WIDTHS, Function, Instruction, Module, Variable

# Opcodes whose result is a function of their operands, all of the instruction's type.
PLAIN = {
    **{name: name for name in ("add", "sub", "mul", "mad", "fma", "div", "rem", "rcp", "min", "max", "neg", "abs")},
    **{"and": "and_", "or": "or_", "xor": "xor_", "not": "not_"},
}
# The opcodes whose operands are words of other types, in order; T is the instruction's own.
TYPED = {
    "shl": ("T", "b32"),
    "shr": ("T", "b32"),
    "bfe": ("T", "b32", "b32"),
    "bfi": ("T", "T", "b32", "b32"),
}
SPECIAL = {
    "%tid.x": "t.index",
    "%ntid.x": "t.threads()",
    "%ctaid.x": "t.block_index()",
    "%nctaid.x": "t.blocks()",
    "%laneid": "t.lane()",
    **{f"%{name}.{axis}": "0u" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "1u" for name in ("ntid", "nctaid") for axis in "yz"},
}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
SAME_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
# Modifiers that change no result here: nearest even is how C++ computes; caching and ordering are the hardware's.
QUIET = {"rn", "lo", "uni", "sync", "aligned", "to"}
MEMORY_QUIET = {"volatile", "relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys", "weak", "cs", "cg", "ca", "lu"}
SPACES = ("global", "shared", "local", "param", "const")


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
            parts.append(f'const Known known_{f.name}("{f.name}", &{_name(f.name)}, {{{inner}}});\n')
    return "".join([*parts, "}  // namespace\n"])


def _name(name: str) -> str:
    return "f_" + name.replace("$", "_S_")


def _head(function: Function) -> str:
    places = ["std::byte* parameters"]
    if not function.entry:
        places = [f"std::byte* {_name(v.name)}" for v in (*function.results, *function.parameters)]
    return f"void {_name(function.name)}({', '.join(['Thread& t', *places])})"


def _offsets(variables: list[Variable]) -> tuple[list[int], int]:
    at, offsets = 0, []
    for variable in variables:
        at = -(-at // variable.align) * variable.align
        offsets.append(at)
        at += variable.bytes
    return offsets, at


class _Writer:
    """One function's translation."""

    def __init__(self, module: Module, function: Function) -> None:
        self.function = function
        self.kinds: dict[str, str] = {}
        self.shared = {v.name for v in module.shared}
        self.unknown: list[str] = []

    def whole(self) -> str:
        function = self.function
        lines = [f"{_head(function)} {{"]
        if function.entry:
            for variable, offset in zip(function.parameters, _offsets(function.parameters)[0], strict=True):
                lines.append(f"std::byte* const {_name(variable.name)} = parameters + {offset};")
        lines += self._arrays()
        for statement in function.body or ():
            if isinstance(statement, str):
                lines.append(f"{_label(statement)}:;")
            elif isinstance(statement, Instruction):
                lines.append(self._guarded(statement))
            elif isinstance(statement, tuple):
                lines.append(statement[0] if len(statement) == 1 else self._registers(*statement[1:]))
        return "\n".join([*lines, "}\n"])

    def _arrays(self) -> list[str]:
        """Declare arrays at the top, so that no jump passes a declaration; names are unique but for parameters of calls,
        of which the largest serves all."""
        largest: dict[str, Variable] = {}
        for each in self.function.body or ():
            if isinstance(each, Variable):
                before = largest.get(each.name)
                if before is None or before.bytes < each.bytes:
                    largest[each.name] = each
        return [f"alignas(16) std::byte {_name(v.name)}[{max(v.bytes, 1)}];" for v in largest.values()]

    def _registers(self, kind: str, names: str) -> str:
        width = WIDTHS[kind]
        found = []
        for name in names.split(","):
            many = re.fullmatch(r"\s*(%\w+?)<(\d+)>", name)
            found += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        self.kinds |= dict.fromkeys(found, "pred" if width == 1 else f"b{width}")
        # Registers hold anything before they are written: the compiler may think what it likes of them.
        return f"{'pred' if width == 1 else f'b{width}'} {', '.join(_register(n) for n in found)};"

    def _guarded(self, instruction: Instruction) -> str:
        try:
            done = self._instruction(instruction)
        except (KeyError, ValueError, IndexError) as error:
            self.unknown.append(f"{instruction.text}   ({error!r})")
            return ""
        if not instruction.guard:
            return done
        opposite = instruction.guard.startswith("!")
        return f"if ({'!' if opposite else ''}{_register(instruction.guard.lstrip('!'))}) {{ {done} }}"

    def _instruction(self, i: Instruction) -> str:
        method = getattr(self, f"_{i.opcode}", None)
        if method is not None:
            done: str = method(i)
            return done
        if i.opcode in PLAIN or i.opcode in TYPED:
            (kind,) = self._only(i, QUIET)
            kinds = TYPED.get(i.opcode, (kind,) * (len(i.operands) - 1))
            inner = ", ".join(self._take(o, kind if k == "T" else k) for o, k in zip(i.operands[1:], kinds, strict=True))
            return self._give(i.operands[0], kind, f"{PLAIN.get(i.opcode, i.opcode)}<{kind}>({inner})")
        raise ValueError("this instruction")

    def _only(self, i: Instruction, quiet: set[str]) -> list[str]:
        """Return the types among the modifiers, all others being of no account."""
        kinds = [m for m in i.modifiers if m in WIDTHS]
        others = [m for m in i.modifiers if m not in WIDTHS and m not in quiet]
        if others:
            raise ValueError(f"modifiers {others}")
        return kinds

    # What an operand stands for, and where a result goes.

    def _take(self, operand: str, kind: str) -> str:
        if operand.startswith("!"):
            return f"!{self._take(operand[1:], kind)}"
        if operand.startswith("%") and operand not in SPECIAL:
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
        return _register(register)

    def _symbol(self, name: str) -> str:
        """The address that a name stands for: of shared memory an offset, of all else where it lies."""
        if name in self.shared:
            return "b64{0}"
        return f"reinterpret_cast<b64>({_name(name)})"

    def _give(self, register: str, kind: str, value: str) -> str:
        return "" if register == "_" else f"put({self._known(register)}, static_cast<{kind}>({value}));"

    def _address(self, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise ValueError(f"address {operand}")
        base = self._symbol(match[1]) if not match[1].startswith("%") else f"static_cast<b64>({self._known(match[1])})"
        offset = int(match[2], 0) if match[2] else 0
        return f"({base} + static_cast<b64>({offset}ll))"

    # Instructions of a form of their own.

    def _mul(self, i: Instruction) -> str:
        return self._product(i, "mul")

    def _mad(self, i: Instruction) -> str:
        return self._product(i, "mad")

    def _product(self, i: Instruction, name: str) -> str:
        (kind,) = self._only(i, QUIET | {"wide", "hi"})
        result = kind
        if "wide" in i.modifiers:
            name, result = f"{name}_wide", f"{kind[0]}{2 * WIDTHS[kind]}"
        elif "hi" in i.modifiers:
            name = f"{name}_hi"
        kinds = [kind, kind, result]
        inner = ", ".join(self._take(o, k) for o, k in zip(i.operands[1:], kinds, strict=False))
        return self._give(i.operands[0], result, f"{name}<{kind}>({inner})")

    def _mov(self, i: Instruction) -> str:
        (kind,) = self._only(i, set())
        to, source = i.operands
        if source.startswith("{"):
            inner = _inside(source)
            width = WIDTHS[kind] // len(inner)
            words = [f"static_cast<b64>({self._take(o, f'b{width}')}) << {k * width}" for k, o in enumerate(inner)]
            return self._give(to, kind, " | ".join(words))
        if to.startswith("{"):
            inner = _inside(to)
            width = WIDTHS[kind] // len(inner)
            gives = [self._give(o, f"b{width}", f"word >> {k * width}") for k, o in enumerate(inner)]
            return f"{{ const b64 word = {self._take(source, kind)}; {' '.join(gives)} }}"
        return self._give(to, kind, self._take(source, kind))

    def _cvt(self, i: Instruction) -> str:
        packed = self._packed(i)
        if packed:
            return packed
        to, source = self._only(i, {"rn", "rzi"})
        floats = (to[0] == "f", source[0] == "f")
        rounding = [m for m in i.modifiers if m in ("rn", "rzi")]
        if "b" in (to[0], source[0]) or "16" in (to[1:] if floats[0] else "", source[1:] if floats[1] else ""):
            raise ValueError("conversion")
        inexact = {(True, False): ["rn"], (False, True): ["rzi"], (True, True): ["rn"] if to == "f32" else []}
        if to != source and rounding != inexact.get(floats, []):
            raise ValueError(f"rounding {rounding}")
        return self._give(i.operands[0], to, f"cvt<{to}, {source}>({self._take(i.operands[1], source)})")

    def _packed(self, i: Instruction) -> str:
        """Conversions of types that C++ has none of, two to a register but for ``cvt.f32.f16``."""
        if i.modifiers == ("f32", "f16"):
            return self._give(i.operands[0], "f32", f"f16_value({self._take(i.operands[1], 'b16')})")
        if i.modifiers == ("rn", "f16x2", "e4m3x2"):
            codes = self._take(i.operands[1], "b16")
            halves = [f"static_cast<b32>(f16(e4m3_value({codes} >> {shift} & 255))) << {2 * shift}" for shift in (0, 8)]
            return self._give(i.operands[0], "b32", " | ".join(halves))
        to = {("rn", "f16x2", "f32"): "f16", ("rn", "bf16x2", "f32"): "bf16", ("rn", "satfinite", "e4m3x2", "f32"): "e4m3"}
        name = to.get(i.modifiers)
        if name is None:
            return ""
        width = 8 if name == "e4m3" else 16
        high, low = (f"static_cast<b32>({name}({self._take(o, 'f32')}))" for o in i.operands[1:])
        return self._give(i.operands[0], f"b{2 * width}", f"{high} << {width} | {low}")

    def _cvta(self, i: Instruction) -> str:
        (kind,) = self._only(i, {"to", *SPACES})
        value = self._take(i.operands[1], kind)
        if "shared" in i.modifiers:
            value = f"{value} {'-' if 'to' in i.modifiers else '+'} t.shared_base()"
        return self._give(i.operands[0], kind, value)

    def _setp(self, i: Instruction) -> str:
        compare, *rest = i.modifiers
        compare = SAME_COMPARE.get(compare, compare)
        kind = rest.pop()
        a, b = (self._take(o, kind) for o in i.operands[1:3])
        if compare in COMPARE:
            value = f"{a} {COMPARE[compare]} {b}"
            if compare == "ne":  # false of NaN, unlike C++'s
                value = f"{value} && !unordered({a}, {b})"
        elif compare in ("num", "nan"):
            value = f"{'!' if compare == 'num' else ''}unordered({a}, {b})"
        else:
            value = f"unordered({a}, {b}) || {a} {COMPARE[compare.removesuffix('u')]} {b}"
        if rest in (["and"], ["or"]):
            value = f"({value}) {'&&' if rest == ['and'] else '||'} {self._take(i.operands[3], 'pred')}"
        elif rest:
            raise ValueError(f"modifiers {rest}")
        return self._give(i.operands[0], "pred", value)

    def _selp(self, i: Instruction) -> str:
        (kind,) = self._only(i, set())
        a, b, p = i.operands[1:]
        chosen = f"{self._take(p, 'pred')} ? {self._take(a, kind)} : {self._take(b, kind)}"
        return self._give(i.operands[0], kind, chosen)

    def _prmt(self, i: Instruction) -> str:
        return self._words(i, "prmt")

    def _lop3(self, i: Instruction) -> str:
        return self._words(i, "lop3")

    def _shf(self, i: Instruction) -> str:
        if "wrap" not in i.modifiers:
            raise ValueError("clamped funnel shift")
        words = ", ".join(self._take(o, "b32") for o in i.operands[1:3])
        value = f"shf_{i.modifiers[0]}({words}, {self._take(i.operands[3], 'b32')} & 31)"
        return self._give(i.operands[0], "b32", value)

    def _popc(self, i: Instruction) -> str:
        return self._count(i)

    def _clz(self, i: Instruction) -> str:
        return self._count(i)

    def _words(self, i: Instruction, name: str) -> str:
        self._only(i, set())
        return self._give(i.operands[0], "b32", f"{name}({', '.join(self._take(o, 'b32') for o in i.operands[1:])})")

    def _count(self, i: Instruction) -> str:
        (kind,) = self._only(i, set())
        return self._give(i.operands[0], "b32", f"{i.opcode}<{kind}>({self._take(i.operands[1], kind)})")

    # Memory.

    def _memory(self, i: Instruction) -> tuple[str, int, str]:
        """Return the type of an access, how many of it, and an expression for the place of `bytes` bytes at `at`."""
        quiet = MEMORY_QUIET | {"v2", "v4", *SPACES}
        (kind,) = self._only(i, quiet | {m for m in i.modifiers if m.startswith(("L1::", "L2::"))})
        count = next((int(m[1]) for m in i.modifiers if m in ("v2", "v4")), 1)
        size = WIDTHS[kind] // 8 * count
        space = next((m for m in i.modifiers if m in SPACES), "")
        if space == "shared":
            return kind, count, f"t.shared(at, {size})"
        check = "" if space in ("param", "local") else f"t.check(at, {size}), "
        return kind, count, f"({check}reinterpret_cast<std::byte*>(at))"

    def _ld(self, i: Instruction) -> str:
        kind, count, place = self._memory(i)
        to = _inside(i.operands[0]) if i.operands[0].startswith("{") else [i.operands[0]]
        gives = " ".join(self._give(o, kind, f"from[{k}]") for k, o in enumerate(to))
        return (
            f"{{ const b64 at = {self._address(i.operands[1])}; {kind} from[{count}]; "
            f"std::memcpy(from, {place}, sizeof(from)); {gives} }}"
        )

    def _st(self, i: Instruction) -> str:
        kind, _, place = self._memory(i)
        source = _inside(i.operands[1]) if i.operands[1].startswith("{") else [i.operands[1]]
        words = ", ".join(self._take(o, kind) for o in source)
        return (
            f"{{ const b64 at = {self._address(i.operands[0])}; const {kind} from[] = {{{words}}}; "
            f"std::memcpy({place}, from, sizeof(from)); }}"
        )

    def _atom(self, i: Instruction) -> str:
        return self._give(i.operands[0], self._atomic_kind(i), self._atomic(i, i.operands[1:]))

    def _red(self, i: Instruction) -> str:
        return f"{self._atomic(i, i.operands)};"

    def _atomic_kind(self, i: Instruction) -> str:
        (kind,) = self._only(i, MEMORY_QUIET | {"global", "shared", "add", "or", "max", "min"})
        return kind

    def _atomic(self, i: Instruction, operands: tuple[str, ...]) -> str:
        kind = self._atomic_kind(i)
        (name,) = (m for m in i.modifiers if m in ("add", "or", "max", "min"))
        place = f"global<{kind}>(t, {self._address(operands[0])})"
        if "shared" in i.modifiers:
            place = f"reinterpret_cast<{kind}*>(t.shared({self._address(operands[0])}, sizeof({kind})))"
        return f"atomic_{name}<{kind}>({place}, {self._take(operands[1], kind)})"

    # Threads together.

    def _bar(self, i: Instruction) -> str:
        if i.modifiers == ("warp", "sync"):
            return f"t.exchange(0, {self._take(i.operands[0], 'b32')});"
        if i.modifiers[0] != "sync" or i.operands != ("0",):
            raise ValueError("barrier of some threads")
        return "t.barrier();"

    def _shfl(self, i: Instruction) -> str:
        self._only(i, {"sync", "bfly", "idx"})
        value, by, clamp, mask = (self._take(o, "b32") for o in i.operands[1:])
        source = f"t.lane() ^ {by}" if "bfly" in i.modifiers else by
        to, _, inside = i.operands[0].partition("|")
        told = self._give(inside, "pred", "true") if inside else ""
        exchanged = f"t.exchange({value}, {mask})[({source}) & t.whole_warp({clamp})]"
        return self._give(to, "b32", exchanged) + told

    def _redux(self, i: Instruction) -> str:
        (kind,) = self._only(i, {"sync", "add", "max", "min", "or", "and"})
        (name,) = (m for m in i.modifiers if m in ("add", "max", "min", "or", "and"))
        function = {"or": "or_", "and": "and_"}.get(name, name)
        value, mask = self._take(i.operands[1], "b32"), self._take(i.operands[2], "b32")
        return (
            f"{{ const b32* all = t.exchange({value}, {mask}); {kind} made = static_cast<{kind}>(all[0]); "
            f"for (int lane = 1; lane < 32; ++lane) made = {function}<{kind}>(made, static_cast<{kind}>(all[lane])); "
            f"{self._give(i.operands[0], kind, 'made')} }}"
        )

    # Copies that happen later.

    def _cp(self, i: Instruction) -> str:
        if i.modifiers == ("async", "commit_group"):
            return "t.end_copies();"
        if i.modifiers == ("async", "wait_group"):
            return f"t.await_copies({int(i.operands[0])});"
        if i.modifiers[0] != "async" or set(i.modifiers[1:]) - {"cg", "ca", "shared", "global"}:
            raise ValueError("copy")
        to, source = (self._address(o) for o in i.operands[:2])
        given = self._take(i.operands[3], "b32") if len(i.operands) > 3 else i.operands[2]
        return f"t.copy({to}, {source}, {int(i.operands[2])}, {given});"

    # Where it goes on.

    def _bra(self, i: Instruction) -> str:
        self._only(i, {"uni"})
        return f"goto {_label(i.operands[0])};"

    def _ret(self, i: Instruction) -> str:
        return "return;"

    def _exit(self, i: Instruction) -> str:
        if not self.function.entry:
            raise ValueError("exit in a function")
        return "return;"

    def _trap(self, i: Instruction) -> str:
        return 'throw Fault(719, "trap");'

    def _call(self, i: Instruction) -> str:
        self._only(i, {"uni"})
        operands = list(i.operands)
        results = _inside(operands.pop(0)) if operands[0].startswith("(") else []
        function, *given = operands
        inner = [_name(o) for o in (*results, *(_inside(given[0]) if given else ()))]
        return f"{_name(function)}({', '.join(['t', *inner])});"


def _inside(operand: str) -> list[str]:
    return [each.strip() for each in operand[1:-1].split(",") if each.strip()]


def _register(name: str) -> str:
    return "v_" + name.lstrip("%")


def _label(name: str) -> str:
    return "l_" + name.replace("$", "_S_")
