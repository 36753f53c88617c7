"""What PTX's instructions do, as statements of C++: those that ``machine.hpp`` has a function for by name, and a method
for each that has a form of its own.

Everything that is not known here is refused, with modifiers that would change a result: flushing subnormals (``ftz``),
approximations (``approx``, ``full``).
"""

from __future__ import annotations

from ptx import WIDTHS, Instruction

# Opcodes whose result is a function of their operands, all of the instruction's type.
PLAIN = {
    **{name: name for name in ("add", "sub", "mul", "mad", "fma", "div", "rem", "rcp", "neg", "abs")},
    "and": "and_",
    "or": "or_",
    "xor": "xor_",
    "not": "not_",
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
MEMORY_QUIET = {
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "gpu",
    "cta",
    "sys",
    "weak",
    "cs",
    "cg",
    "ca",
    "lu",
}
SPACES = ("global", "shared", "local", "param", "const")


class Instructions:
    """One function's instructions. What its operands stand for is said by ``translate.py``."""

    entry: bool

    def take(self, operand: str, kind: str) -> str:
        """Return the value of an operand, as a type."""
        raise NotImplementedError

    def give(self, register: str, kind: str, value: str) -> str:
        """Return the statement that puts a value of a type into a register."""
        raise NotImplementedError

    def address(self, operand: str) -> str:
        """Return the address that ``[register+offset]`` says."""
        raise NotImplementedError

    def statement(self, i: Instruction) -> str:
        method = getattr(self, f"_{i.opcode}", None)
        if method is not None:
            done: str = method(i)
            return done
        if i.opcode in PLAIN or i.opcode in TYPED:
            (kind,) = self.only(i, QUIET)
            kinds = TYPED.get(i.opcode, (kind,) * (len(i.operands) - 1))
            inner = ", ".join(self.take(o, kind if k == "T" else k) for o, k in zip(i.operands[1:], kinds, strict=True))
            return self.give(i.operands[0], kind, f"{PLAIN.get(i.opcode, i.opcode)}<{kind}>({inner})")
        raise ValueError("this instruction")

    def only(self, i: Instruction, quiet: set[str]) -> list[str]:
        """Return the types among the modifiers, all others being of no account."""
        kinds = [m for m in i.modifiers if m in WIDTHS]
        others = [m for m in i.modifiers if m not in WIDTHS and m not in quiet]
        if others:
            raise ValueError(f"modifiers {others}")
        return kinds

    # Instructions of a form of their own.

    def _mul(self, i: Instruction) -> str:
        return self._product(i, "mul")

    def _mad(self, i: Instruction) -> str:
        return self._product(i, "mad")

    def _product(self, i: Instruction, name: str) -> str:
        (kind,) = self.only(i, QUIET | {"wide", "hi"})
        result = kind
        if "wide" in i.modifiers:
            name, result = f"{name}_wide", f"{kind[0]}{2 * WIDTHS[kind]}"
        elif "hi" in i.modifiers:
            name = f"{name}_hi"
        kinds = [kind, kind, result]
        inner = ", ".join(self.take(o, k) for o, k in zip(i.operands[1:], kinds, strict=False))
        return self.give(i.operands[0], result, f"{name}<{kind}>({inner})")

    def _max(self, i: Instruction) -> str:
        return self._extreme(i)

    def _min(self, i: Instruction) -> str:
        return self._extreme(i)

    def _extreme(self, i: Instruction) -> str:
        (kind,) = self.only(i, {"NaN", "relu"})
        a, b = (self.take(o, kind) for o in i.operands[1:])
        value = f"{i.opcode}<{kind}>({a}, {b})"
        if "NaN" in i.modifiers:  # rather than the number
            value = f"unordered({a}, {b}) ? made({a} + {b}) : {value}"
        if "relu" in i.modifiers:
            value = f"max<{kind}>({value}, {kind}{{0}})"
        return self.give(i.operands[0], kind, value)

    def _mov(self, i: Instruction) -> str:
        (kind,) = self.only(i, set())
        to, source = i.operands
        if source.startswith("{"):
            inner = inside(source)
            width = WIDTHS[kind] // len(inner)
            words = [f"static_cast<b64>({self.take(o, f'b{width}')}) << {k * width}" for k, o in enumerate(inner)]
            return self.give(to, kind, " | ".join(words))
        if to.startswith("{"):
            inner = inside(to)
            width = WIDTHS[kind] // len(inner)
            gives = [self.give(o, f"b{width}", f"word >> {k * width}") for k, o in enumerate(inner)]
            return f"{{ const b64 word = {self.take(source, kind)}; {' '.join(gives)} }}"
        return self.give(to, kind, self.take(source, kind))

    def _cvt(self, i: Instruction) -> str:
        packed = self._packed(i)
        if packed:
            return packed
        to, source = self.only(i, {"rn", "rzi"})
        floats = (to[0] == "f", source[0] == "f")
        rounding = [m for m in i.modifiers if m in ("rn", "rzi")]
        if "b" in (to[0], source[0]) or "16" in (to[1:] if floats[0] else "", source[1:] if floats[1] else ""):
            raise ValueError("conversion")
        inexact = {(True, False): ["rn"], (False, True): ["rzi"], (True, True): ["rn"] if to == "f32" else []}
        if to != source and rounding != inexact.get(floats, []):
            raise ValueError(f"rounding {rounding}")
        return self.give(i.operands[0], to, f"cvt<{to}, {source}>({self.take(i.operands[1], source)})")

    def _packed(self, i: Instruction) -> str:
        """Conversions of types that C++ has none of, two to a register but for ``cvt.f32.f16``."""
        if i.modifiers in (("f32", "f16"), ("f64", "f16")):
            return self.give(i.operands[0], i.modifiers[0], f"f16_value({self.take(i.operands[1], 'b16')})")
        if i.modifiers == ("rn", "f16x2", "e4m3x2"):
            codes = self.take(i.operands[1], "b16")
            halves = [f"static_cast<b32>(f16(e4m3_value({codes} >> {shift} & 255))) << {2 * shift}" for shift in (0, 8)]
            return self.give(i.operands[0], "b32", " | ".join(halves))
        to = {
            ("rn", "f16x2", "f32"): "f16",
            ("rn", "bf16x2", "f32"): "bf16",
            ("rn", "satfinite", "e4m3x2", "f32"): "e4m3",
        }
        name = to.get(i.modifiers)
        if name is None:
            return ""
        width = 8 if name == "e4m3" else 16
        high, low = (f"static_cast<b32>({name}({self.take(o, 'f32')}))" for o in i.operands[1:])
        return self.give(i.operands[0], f"b{2 * width}", f"{high} << {width} | {low}")

    def _cvta(self, i: Instruction) -> str:
        (kind,) = self.only(i, {"to", *SPACES})
        value = self.take(i.operands[1], kind)
        if "shared" in i.modifiers:
            value = f"{value} {'-' if 'to' in i.modifiers else '+'} t.shared_base()"
        return self.give(i.operands[0], kind, value)

    def _setp(self, i: Instruction) -> str:
        compare, *rest = i.modifiers
        compare = SAME_COMPARE.get(compare, compare)
        kind = rest.pop()
        a, b = (self.take(o, kind) for o in i.operands[1:3])
        if compare in COMPARE:
            value = f"{a} {COMPARE[compare]} {b}"
            if compare == "ne":  # false of NaN, unlike C++'s
                value = f"{value} && !unordered({a}, {b})"
        elif compare in ("num", "nan"):
            value = f"{'!' if compare == 'num' else ''}unordered({a}, {b})"
        else:
            value = f"unordered({a}, {b}) || {a} {COMPARE[compare.removesuffix('u')]} {b}"
        if rest in (["and"], ["or"]):
            value = f"({value}) {'&&' if rest == ['and'] else '||'} {self.take(i.operands[3], 'pred')}"
        elif rest:
            raise ValueError(f"modifiers {rest}")
        return self.give(i.operands[0], "pred", value)

    def _selp(self, i: Instruction) -> str:
        (kind,) = self.only(i, set())
        a, b, p = i.operands[1:]
        chosen = f"{self.take(p, 'pred')} ? {self.take(a, kind)} : {self.take(b, kind)}"
        return self.give(i.operands[0], kind, chosen)

    def _prmt(self, i: Instruction) -> str:
        return self._words(i, "prmt")

    def _lop3(self, i: Instruction) -> str:
        return self._words(i, "lop3")

    def _shf(self, i: Instruction) -> str:
        if "wrap" not in i.modifiers:
            raise ValueError("clamped funnel shift")
        words = ", ".join(self.take(o, "b32") for o in i.operands[1:3])
        value = f"shf_{i.modifiers[0]}({words}, {self.take(i.operands[3], 'b32')} & 31)"
        return self.give(i.operands[0], "b32", value)

    def _popc(self, i: Instruction) -> str:
        return self._count(i)

    def _clz(self, i: Instruction) -> str:
        return self._count(i)

    def _words(self, i: Instruction, name: str) -> str:
        self.only(i, set())
        return self.give(i.operands[0], "b32", f"{name}({', '.join(self.take(o, 'b32') for o in i.operands[1:])})")

    def _count(self, i: Instruction) -> str:
        (kind,) = self.only(i, set())
        return self.give(i.operands[0], "b32", f"{i.opcode}<{kind}>({self.take(i.operands[1], kind)})")

    # Memory.

    def _memory(self, i: Instruction) -> tuple[str, int, str]:
        """Return the type of an access, how many of it, and an expression for the place of `bytes` bytes at `at`."""
        quiet = MEMORY_QUIET | {"v2", "v4", *SPACES}
        (kind,) = self.only(i, quiet | {m for m in i.modifiers if m.startswith(("L1::", "L2::"))})
        count = next((int(m[1]) for m in i.modifiers if m in ("v2", "v4")), 1)
        size = WIDTHS[kind] // 8 * count
        space = next((m for m in i.modifiers if m in SPACES), "")
        if space == "shared":
            return kind, count, f"t.shared(at, {size})"
        check = "" if space in ("param", "local") else f"t.check(at, {size}), "
        return kind, count, f"({check}reinterpret_cast<std::byte*>(at))"

    def _ld(self, i: Instruction) -> str:
        kind, count, place = self._memory(i)
        to = inside(i.operands[0]) if i.operands[0].startswith("{") else [i.operands[0]]
        gives = " ".join(self.give(o, kind, f"from[{k}]") for k, o in enumerate(to))
        return (
            f"{{ const b64 at = {self.address(i.operands[1])}; {kind} from[{count}]; "
            f"std::memcpy(from, {place}, sizeof(from)); {gives} }}"
        )

    def _st(self, i: Instruction) -> str:
        kind, _, place = self._memory(i)
        source = inside(i.operands[1]) if i.operands[1].startswith("{") else [i.operands[1]]
        words = ", ".join(self.take(o, kind) for o in source)
        return (
            f"{{ const b64 at = {self.address(i.operands[0])}; const {kind} from[] = {{{words}}}; "
            f"std::memcpy({place}, from, sizeof(from)); }}"
        )

    def _atom(self, i: Instruction) -> str:
        return self.give(i.operands[0], self._atomic_kind(i), self._atomic(i, i.operands[1:]))

    def _red(self, i: Instruction) -> str:
        return f"{self._atomic(i, i.operands)};"

    def _atomic_kind(self, i: Instruction) -> str:
        (kind,) = self.only(i, MEMORY_QUIET | {"global", "shared", "add", "or", "max", "min"})
        return kind

    def _atomic(self, i: Instruction, operands: tuple[str, ...]) -> str:
        kind = self._atomic_kind(i)
        (name,) = (m for m in i.modifiers if m in ("add", "or", "max", "min"))
        place = f"global<{kind}>(t, {self.address(operands[0])})"
        if "shared" in i.modifiers:
            place = f"reinterpret_cast<{kind}*>(t.shared({self.address(operands[0])}, sizeof({kind})))"
        return f"atomic_{name}<{kind}>({place}, {self.take(operands[1], kind)})"

    # Threads together.

    def _bar(self, i: Instruction) -> str:
        if i.modifiers == ("warp", "sync"):
            return f"t.exchange(0, {self.take(i.operands[0], 'b32')});"
        if i.modifiers[0] != "sync" or i.operands != ("0",):
            raise ValueError("barrier of some threads")
        return "t.barrier();"

    def _shfl(self, i: Instruction) -> str:
        self.only(i, {"sync", "bfly", "idx"})
        value, by, clamp, mask = (self.take(o, "b32") for o in i.operands[1:])
        source = f"t.lane() ^ {by}" if "bfly" in i.modifiers else by
        to, _, inside = i.operands[0].partition("|")
        told = self.give(inside, "pred", "true") if inside else ""
        exchanged = f"t.exchange({value}, {mask})[({source}) & t.whole_warp({clamp})]"
        return self.give(to, "b32", exchanged) + told

    def _redux(self, i: Instruction) -> str:
        (kind,) = self.only(i, {"sync", "add", "max", "min", "or", "and"})
        (name,) = (m for m in i.modifiers if m in ("add", "max", "min", "or", "and"))
        function = {"or": "or_", "and": "and_"}.get(name, name)
        value, mask = self.take(i.operands[1], "b32"), self.take(i.operands[2], "b32")
        return (
            f"{{ const b32* all = t.exchange({value}, {mask}); {kind} made = static_cast<{kind}>(all[0]); "
            f"for (int lane = 1; lane < 32; ++lane) made = {function}<{kind}>(made, static_cast<{kind}>(all[lane])); "
            f"{self.give(i.operands[0], kind, 'made')} }}"
        )

    # Copies that happen later.

    def _cp(self, i: Instruction) -> str:
        if i.modifiers == ("async", "commit_group"):
            return "t.end_copies();"
        if i.modifiers == ("async", "wait_group"):
            return f"t.await_copies({int(i.operands[0])});"
        if i.modifiers[0] != "async" or set(i.modifiers[1:]) - {"cg", "ca", "shared", "global"}:
            raise ValueError("copy")
        to, source = (self.address(o) for o in i.operands[:2])
        given = self.take(i.operands[3], "b32") if len(i.operands) > 3 else i.operands[2]
        return f"t.copy({to}, {source}, {int(i.operands[2])}, {given});"

    # Where it goes on.

    def _bra(self, i: Instruction) -> str:
        self.only(i, {"uni"})
        return f"goto {label_name(i.operands[0])};"

    def _ret(self, i: Instruction) -> str:
        return "return;"

    def _exit(self, i: Instruction) -> str:
        if not self.entry:
            raise ValueError("exit in a function")
        return "return;"

    def _trap(self, i: Instruction) -> str:
        return 'throw Fault(719, "trap");'

    def _call(self, i: Instruction) -> str:
        self.only(i, {"uni"})
        operands = list(i.operands)
        results = inside(operands.pop(0)) if operands[0].startswith("(") else []
        function, *given = operands
        inner = [function_name(o) for o in (*results, *(inside(given[0]) if given else ()))]
        return f"{function_name(function)}({', '.join(['t', *inner])});"


def function_name(name: str) -> str:
    return "f_" + name.replace("$", "_S_")


def inside(operand: str) -> list[str]:
    return [each.strip() for each in operand[1:-1].split(",") if each.strip()]


def register_name(name: str) -> str:
    return "v_" + name.lstrip("%")


def label_name(name: str) -> str:
    return "l_" + name.replace("$", "_S_")
