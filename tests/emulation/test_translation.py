"""The emulated GPU itself: every instruction that a definition of its own can be written for, memory as it is checked,
threads that wait for each other. Definitions are Python's integers and NumPy's floating point."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulated_cuda
import ptx
import translate

pytestmark = pytest.mark.skipif(emulated_cuda.why_not() is not None, reason=str(emulated_cuda.why_not()))

PROGRAMS = (Path(__file__).parent / "programs.ptx").read_text()
HEAD = PROGRAMS[: PROGRAMS.index(".visible")]
THREADS = 256
INTEGERS = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 0x7F80, 0x8000, 0xFFFF, 0x12345678, 0x7FFFFFFF, 0x80000000]
INTEGERS += [0xFFFFFFFF, 0x0123456789ABCDEF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x5410, 0xBA98]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, 2.5, -2.5, 3e-39, -3e-39, 1e38, 3e38, -3e38, 2.0**-149, math.inf, -math.inf]
FLOATS += [
    447.0,
    448.0,
    464.0,
    465.0,
    1.0625,
    1.1875,
    2.0**-10,
    65504.0,
    65519.0,
    65520.0,
    6e-8,
    2.9e-8,
    3e-8,
    1.00390625,
]
FLOATS += [math.nan, 1 / 3, 0.1, 2147483647.0, 2147483648.0, -2147483649.0, 4294967296.0, 1e300, 5e-324, 1 + 2.0**-24]


def signed(x: int, width: int) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> (width - 1) else x


def bfe(a: int, position: int, length: int, width: int, sign: bool) -> int:
    position, length = position & 255, length & 255
    bits = [
        (a >> min(i, width - 1) if sign else a >> i if i < width else 0) & 1 for i in range(position, position + length)
    ]
    value = sum(bit << i for i, bit in enumerate(bits[:width]))
    return value | -(1 << min(length, width)) if sign and length and bits[min(length, width) - 1] else value


def prmt(a: int, b: int, c: int) -> int:
    source = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    picked = [(source[s & 7], s >> 3) for s in (c >> 4 * i & 15 for i in range(4))]
    return sum((byte if not spread else 255 * (byte >> 7)) << 8 * i for i, (byte, spread) in enumerate(picked))


def bfi(a: int, b: int, position: int, length: int) -> int:
    mask = ((1 << (length & 255)) - 1) << (position & 255) & 0xFFFFFFFF
    return ((a << (position & 255)) & mask) | (b & ~mask)


def to_integer(x: float, width: int) -> int:
    if math.isnan(x):
        return 0
    least, most = -(1 << (width - 1)), (1 << (width - 1)) - 1
    return max(least, min(most, int(x))) if math.isfinite(x) else least if x < 0 else most


def extreme(a: float, b: float, pick: Callable[[float, float], float]) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    if a == b:
        return a if (math.copysign(1, a) < 0) == (pick is min) else b
    return pick(a, b)


def two(a: Any, b: Any, kind: Any, nan: int) -> int:
    """Return the codes of two numbers, the first above the second; fp8 ends at its largest number."""
    width = np.dtype(kind).itemsize * 8
    most = 448.0 if width == 8 else math.inf
    codes = [nan if math.isnan(x) else int(np.clip(x, -most, most).astype(kind).view(f"u{width // 8}")) for x in (a, b)]
    return codes[0] << width | codes[1]


# The instruction, with %a, %b, %c for operands and %d for the result; the types of operands and result; what it does.
INSTRUCTIONS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "add.s32 %d, %a, %b": ("b32", "b32", lambda a, b, c: a + b),
    "sub.s64 %d, %a, %b": ("b64", "b64", lambda a, b, c: a - b),
    "mul.lo.s32 %d, %a, %b": ("b32", "b32", lambda a, b, c: a * b),
    "mul.hi.u32 %d, %a, %b": ("b32", "b32", lambda a, b, c: a * b >> 32),
    "mul.hi.s64 %d, %a, %b": ("b64", "b64", lambda a, b, c: signed(a, 64) * signed(b, 64) >> 64),
    "mul.wide.u32 %d, %a, %b": ("b32", "b64", lambda a, b, c: a * b),
    "mul.wide.s32 %d, %a, %b": ("b32", "b64", lambda a, b, c: signed(a, 32) * signed(b, 32)),
    "mad.lo.s32 %d, %a, %b, %c": ("b32", "b32", lambda a, b, c: a * b + c),
    "min.s32 %d, %a, %b": ("b32", "b32", lambda a, b, c: min(signed(a, 32), signed(b, 32))),
    "max.u64 %d, %a, %b": ("b64", "b64", lambda a, b, c: max(a, b)),
    "shl.b32 %d, %a, %b": ("b32", "b32", lambda a, b, c: a << b if b < 32 else 0),
    "shr.u32 %d, %a, %b": ("b32", "b32", lambda a, b, c: a >> b if b < 32 else 0),
    "shr.s32 %d, %a, %b": ("b32", "b32", lambda a, b, c: signed(a, 32) >> min(b, 31)),
    "bfe.u32 %d, %a, %b, %c": ("b32", "b32", lambda a, b, c: bfe(a, b, c, 32, False)),
    "bfe.s32 %d, %a, %b, %c": ("b32", "b32", lambda a, b, c: bfe(a, b, c, 32, True)),
    "bfi.b32 %d, %a, %b, %c, 5": ("b32", "b32", lambda a, b, c: bfi(a, b, c, 5)),
    "prmt.b32 %d, %a, %b, %c": ("b32", "b32", prmt),
    "lop3.b32 %d, %a, %b, %c, 0xEA": ("b32", "b32", lambda a, b, c: (a & b) | c),
    "shf.l.wrap.b32 %d, %a, %b, %c": ("b32", "b32", lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    "shf.r.wrap.b32 %d, %a, %b, %c": ("b32", "b32", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "popc.b32 %d, %a": ("b32", "b32", lambda a, b, c: a.bit_count()),
    "clz.b32 %d, %a": ("b32", "b32", lambda a, b, c: 32 - a.bit_length()),
    "not.b64 %d, %a": ("b64", "b64", lambda a, b, c: ~a),
    "div.s32 %d, %a, 7": ("b32", "b32", lambda a, b, c: int(signed(a, 32) / 7)),
    "rem.u32 %d, %a, 7": ("b32", "b32", lambda a, b, c: a % 7),
    "cvt.s64.s32 %d, %a": ("b32", "b64", lambda a, b, c: signed(a, 32)),
    "cvt.u64.u32 %d, %a": ("b32", "b64", lambda a, b, c: a),
    "cvt.rn.f32.s32 %d, %a": ("b32", "f32", lambda a, b, c: np.float32(signed(a, 32))),
    "cvt.rzi.s32.f32 %d, %a": ("f32", "b32", lambda a, b, c: to_integer(float(a), 32)),
    "cvt.rn.f32.f64 %d, %a": ("f64", "f32", lambda a, b, c: np.float32(a)),
    "cvt.f64.f32 %d, %a": ("f32", "f64", lambda a, b, c: np.float64(a)),
    "add.rn.f32 %d, %a, %b": ("f32", "f32", lambda a, b, c: a + b),
    "mul.rn.f64 %d, %a, %b": ("f64", "f64", lambda a, b, c: a * b),
    "div.rn.f32 %d, %a, %b": ("f32", "f32", lambda a, b, c: a / b),
    "min.f32 %d, %a, %b": ("f32", "f32", lambda a, b, c: np.float32(extreme(float(a), float(b), min))),
    "max.f64 %d, %a, %b": ("f64", "f64", lambda a, b, c: np.float64(extreme(float(a), float(b), max))),
    "cvt.rn.f16x2.f32 %d, %a, %b": ("f32", "b32", lambda a, b, c: two(a, b, np.float16, 0x7FFF)),
    "cvt.rn.bf16x2.f32 %d, %a, %b": ("f32", "b32", lambda a, b, c: two(a, b, ml_dtypes.bfloat16, 0x7FFF)),
    "cvt.rn.satfinite.e4m3x2.f32 %h, %a, %b; cvt.u32.u16 %d, %h": (
        "f32",
        "b32",
        lambda a, b, c: two(a, b, ml_dtypes.float8_e4m3fn, 0x7F),
    ),
    "cvt.u16.u32 %h, %a; cvt.rn.f16x2.e4m3x2 %d, %h": (
        "b32",
        "b32",
        lambda a, b, c: sum(
            (
                0x7FFF
                if code & 0x7F == 0x7F
                else int(np.uint8(code).view(ml_dtypes.float8_e4m3fn).astype(np.float16).view("u2"))
            )
            << shift
            for code, shift in ((a & 255, 0), (a >> 8 & 255, 16))
        ),
    ),
    "cvt.u16.u32 %h, %a; cvt.f32.f16 %d, %h": (
        "b32",
        "f32",
        lambda a, b, c: np.float32(np.uint16(a & 0xFFFF).view("f2")),
    ),
    "max.NaN.f32 %d, %a, %b": (
        "f32",
        "f32",
        lambda a, b, c: np.float32(math.nan if a != a or b != b else extreme(float(a), float(b), max)),
    ),
    "max.relu.s32 %d, %a, %b": ("b32", "b32", lambda a, b, c: max(signed(a, 32), signed(b, 32), 0)),
    "cvt.u16.u32 %h, %a; cvt.f64.f16 %d, %h": (
        "b32",
        "f64",
        lambda a, b, c: np.float64(np.uint16(a & 0xFFFF).view("f2")),
    ),
    "abs.f32 %d, %a": ("f32", "f32", lambda a, b, c: abs(a)),
    "neg.f64 %d, %a": ("f64", "f64", lambda a, b, c: -a),
}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a < b or a > b, "lt": lambda a, b: a < b, "ge": lambda a, b: a >= b,
    "equ": lambda a, b: not (a < b or a > b), "neu": lambda a, b: a != b, "ltu": lambda a, b: not a >= b,
    "gtu": lambda a, b: not a <= b, "leu": lambda a, b: not a > b, "geu": lambda a, b: not a < b,
    "num": lambda a, b: a == a and b == b, "nan": lambda a, b: a != a or b != b,
}  # fmt: skip
for name, holds in COMPARISONS.items():
    INSTRUCTIONS[f"setp.{name}.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p"] = (
        "f32",
        "b32",
        lambda a, b, c, h=holds: int(h(a, b)),
    )

TYPES = {"b32": np.uint32, "b64": np.uint64, "f32": np.float32, "f64": np.float64}
PREFIX = {"b32": "%r", "b64": "%rd", "f32": "%f", "f64": "%fd"}


def kernel(name: str, text: str, taken: str, given: str) -> str:
    """Return a kernel that does an instruction to the elements of its threads."""
    size, out = (np.dtype(TYPES[t]).itemsize for t in (taken, given))
    registers = {f"%{letter}": f"{PREFIX[taken]}{i}" for i, letter in enumerate("abc", 1)} | {"%d": f"{PREFIX[given]}9"}
    body = re.sub(r"%[abcd]\b", lambda match: registers[match[0]], text).replace("%p", "%p1").replace("%h", "%rs1")
    loads = "".join(f"ld.global.{taken} {PREFIX[taken]}{i}, [%rd3{i}];\n" for i in (1, 2, 3))
    places = "".join(
        f"ld.param.u64 %rd2{i}, [{name}_param_{i - 1}];\n"
        f"mad.wide.u32 %rd3{i}, %r20, {size if i < 4 else out}, %rd2{i};\n"
        for i in (1, 2, 3, 4)
    )
    parameters = ", ".join(f".param .u64 {name}_param_{i}" for i in range(4))
    return (
        f".visible .entry {name}({parameters}) {{\n"
        ".reg .pred %p<4>; .reg .b16 %rs<3>; .reg .b32 %r<40>; .reg .b64 %rd<40>;\n"
        ".reg .f32 %f<10>; .reg .f64 %fd<10>;\n"
        f"mov.u32 %r20, %tid.x;\n{places}{loads}{body};\nst.global.{given} [%rd34], {PREFIX[given]}9;\nret;\n}}\n"
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    text = PROGRAMS + "".join(kernel(f"k{i}", each, *types[:2]) for i, (each, types) in enumerate(INSTRUCTIONS.items()))
    emulated_cuda.library()
    target = tmp_path_factory.mktemp("kernels") / "instructions.so"
    emulated_cuda.compile_ptx(text, target)
    ctypes.CDLL(str(target))


def launch(name: str, *addresses: int, threads: int = THREADS, shared: int = 0) -> int:
    values = [ctypes.c_uint64(a) for a in addresses]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    code: int = emulated_cuda.library().emulated_launch(name.encode(), 1, threads, ctypes.c_size_t(shared), pointers)
    return code


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_instructions_do_what_they_are_defined_to_do(kernels: None, instruction: str) -> None:
    taken, given, definition = INSTRUCTIONS[instruction]
    rng = np.random.default_rng(7)
    if taken.startswith("f"):
        with np.errstate(over="ignore"):
            values = np.array(FLOATS).astype(TYPES[taken])
    else:
        width = int(taken[1:])
        values = np.array([x & ((1 << width) - 1) for x in INTEGERS], TYPES[taken])
    operands = [rng.choice(values, THREADS) for _ in range(3)]
    copies = [emulated_cuda.Copy(a.tobytes(), 0) for a in operands]
    out = emulated_cuda.Copy(bytes(THREADS * np.dtype(TYPES[given]).itemsize), 0)
    number = list(INSTRUCTIONS).index(instruction)
    assert launch(f"k{number}", *(c.address for c in (*copies, out))) == 0
    found = np.frombuffer(out.fetch(), TYPES[given])
    with np.errstate(all="ignore"):
        for *triple, value in zip(*operands, found, strict=True):
            expected = definition(*(x if taken.startswith("f") else int(x) for x in triple))
            if given.startswith("f"):
                same = value.tobytes() == TYPES[given](expected).tobytes() or (
                    math.isnan(value) and math.isnan(expected)
                )
            else:
                same = int(value) == int(expected) & ((1 << int(given[1:])) - 1)
            assert same, f"{instruction}: {triple} gives {value}, expected {expected}"


@pytest.fixture
def device(kernels: None) -> Iterator[Any]:
    yield emulated_cuda.library()
    emulated_cuda.library().emulated_reset()


def message(device: Any, code: int) -> str:
    return str(device.cudaGetErrorString(code).decode())


@pytest.mark.parametrize(("behind", "size", "text"), [(0, 16, ""), (8, 16, "misaligned"), (0, 15, "no allocation has")])
def test_accesses_are_of_allocated_memory_and_aligned(device: Any, behind: int, size: int, text: str) -> None:
    memory = emulated_cuda.Copy(bytes(range(size)), behind)
    code = launch("wide", memory.address, threads=1)
    assert (code != 0) == bool(text)
    assert text in message(device, code)
    assert (memory.fetch() == bytes(range(size))) == bool(text)


def test_memory_that_is_freed_is_nobodys(device: Any) -> None:
    memory = emulated_cuda.Copy(bytes(16), 0)
    address = memory.address
    assert launch("wide", address, threads=1) == 0
    del memory
    assert launch("wide", address, threads=1) == 700


def test_a_functions_own_memory(device: Any) -> None:
    out = emulated_cuda.Copy(bytes(4), 0)
    assert launch("local", out.address, threads=1) == 0
    assert out.fetch() == b"\x07\0\0\0"


def test_barriers_hold_and_their_absence_shows(device: Any) -> None:
    expected = np.arange(THREADS, dtype=np.uint32) ^ 255
    out = emulated_cuda.Copy(bytes(4 * THREADS), 0)
    assert launch("shared", out.address, shared=4 * THREADS) == 0
    assert np.array_equal(np.frombuffer(out.fetch(), np.uint32), expected)
    assert launch("racing", out.address, shared=4 * THREADS) == 0
    assert not np.array_equal(np.frombuffer(out.fetch(), np.uint32), expected)


def test_shared_memory_ends_where_a_launch_says(device: Any) -> None:
    out = emulated_cuda.Copy(bytes(4 * THREADS), 0)
    code = launch("shared", out.address, shared=4 * THREADS - 4)
    assert "of shared memory, of which there are 1020" in message(device, code)


def test_threads_that_wait_for_ever_are_told(device: Any) -> None:
    assert "for ever" in message(device, launch("waiting", 0, threads=64))


def test_copies_have_happened_when_they_were_waited_for(device: Any) -> None:
    memory = emulated_cuda.Copy(np.arange(1, 9, dtype=np.uint32).tobytes(), 0)
    assert launch("copying", memory.address, threads=1, shared=32) == 0
    assert np.frombuffer(memory.fetch(), np.uint32).tolist()[:5] == [5, 1, 0, 0xA5A5A5A5, 1]


def test_threads_together(device: Any) -> None:
    out = emulated_cuda.Copy(bytes(16), 0)
    assert launch("sums", out.address) == 0
    distances, largest = np.frombuffer(out.fetch()[:8], np.uint32)
    assert (distances, largest) == (16 * THREADS, sum(range(THREADS - 32, THREADS)))
    assert np.frombuffer(out.fetch()[8:], np.float64)[0] == sum(range(THREADS))


@pytest.mark.parametrize(
    "refused",
    ["add.ftz.f32 %f1, %f1, %f1", "div.full.f32 %f1, %f1, %f1", "ex2.approx.f32 %f1, %f1", "cvt.rz.f32.f64 %f1, %fd1",
     "bar.sync 1, 32", "wgmma.fence", "cvt.rz.f16x2.f32 %r1, %f1, %f2"],
)  # fmt: skip
def test_what_is_not_known_is_refused(refused: str) -> None:
    registers = ".reg .f32 %f<3>; .reg .f64 %fd<3>; .reg .b16 %rs<3>;"
    with pytest.raises(ValueError, match=re.escape(refused)):
        translate.translate(ptx.read(f"{HEAD}.visible .entry k() {{ {registers} {refused}; ret; }}"))
