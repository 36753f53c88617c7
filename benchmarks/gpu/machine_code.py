"""Machine code of kernels, read: instructions from nvcc and nvdisasm, basic blocks, and the path of the ordinary case.

No GPU takes part. Which way a branch goes cannot be read from code, so the *ordinary path* is a definition: from entry
to exit, with as few calls and global atomic operations as possible (what is rare is out of line), then with the most
bytes moved by wide accesses, then with the most instructions. So it is rather too long than too short.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]) )?\s*([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.?[A-Za-z_$][\w.$]*):")
_TARGET = re.compile(r"`\((\.L[\w.$]*)\)")
_WIDTHS = {"64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, guard (empty: none), opcode with modifiers, and operands as text."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """Return the opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def wide_bytes(self) -> int:
        """Return how many bytes of global memory a thread moves at once, where these are eight or more."""
        if self.name not in ("LDG", "STG", "LDGSTS"):
            return 0
        return max((_WIDTHS.get(part, 0) for part in self.opcode.split(".")), default=0)

    @property
    def is_rare(self) -> bool:
        """Return whether this belongs to what ordinary elements do without: a call or a global atomic operation."""
        return self.name in ("CALL", "ATOM", "ATOMG", "RED")


@dataclass
class Block:
    """A basic block, and the blocks that may follow it."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)


@dataclass
class Function:
    """A kernel's code: its basic blocks in order of addresses, and what it needs."""

    name: str
    blocks: list[Block]
    registers: int = 0
    spilled: int = 0


def find(program: str) -> str | None:
    """Return the path of a program of the CUDA toolkit: in CUDA_HOME, on PATH, in the usual place, or in Triton."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else []
    found = shutil.which(program, path=os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.submodule_search_locations:
        inside = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / program
        found = str(inside) if inside.exists() else None
    return found


def why_not() -> str | None:
    """Return why machine code cannot be made and read here, or None."""
    missing = [program for program in ("nvcc", "nvdisasm") if find(program) is None]
    if not missing:
        return None
    return f"there is no {' and no '.join(missing)} in CUDA_HOME/bin or on PATH (Triton brings nvdisasm, too)"


@functools.cache
def functions(source: str, target: int) -> dict[str, Function]:
    """Compile a file of csrc/cuda for one architecture, and return its kernels by their mangled names."""
    nvcc, nvdisasm = find("nvcc"), find("nvdisasm")
    if nvcc is None or nvdisasm is None:
        raise RuntimeError(why_not())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", f"-arch=sm_{target}", "-Xptxas", "-v"]
        built = subprocess.run(
            [nvcc, *flags, "-cubin", str(ROOT / "csrc" / "cuda" / source), "-o", str(cubin)],
            check=True,
            capture_output=True,
            text=True,
        )
        text = subprocess.run([nvdisasm, str(cubin)], check=True, capture_output=True, text=True).stdout
    found = parse(text)
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", built.stderr):
        name = re.search(r"Compiling entry function '(\S+)'", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if name and registers and name[1] in found:
            found[name[1]].registers = int(registers[1])
            found[name[1]].spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry))
    return found


def parse(text: str) -> dict[str, Function]:
    """Return the kernels in what nvdisasm printed."""
    found = {}
    for part in re.split(r"^\t?\.section\s+", text, flags=re.MULTILINE):
        if not part.startswith(".text."):
            continue
        name = part[len(".text.") : part.index(",")]
        found[name] = Function(name, _blocks(part.splitlines()))
    return found


def _blocks(lines: Sequence[str]) -> list[Block]:
    instructions: list[Instruction] = []
    places: dict[str, int] = {}  # label → number of the instruction that follows it
    for line in lines:
        if label := _LABEL.match(line):
            places[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    starts = {0, *places.values()}
    for i, instruction in enumerate(instructions):
        if instruction.name in ("BRA", "BRX", "EXIT", "RET"):
            starts.add(i + 1)
    order = sorted(start for start in starts if start < len(instructions))
    number = {start: i for i, start in enumerate(order)}
    blocks = [Block(instructions[a:b]) for a, b in zip(order, [*order[1:], len(instructions)], strict=True)]
    for i, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.name == "BRA" and (target := _TARGET.search(last.operands)):
            block.after.append(number[places[target[1]]])
        # A condition is a guard or the first operand; RET and EXIT with neither end here.
        conditional = bool(last.guard) or (last.name == "BRA" and re.match(r"!?U?P[0-9]", last.operands) is not None)
        ends = last.name in ("BRA", "EXIT", "RET", "BRX") and not conditional
        if not ends and i + 1 < len(blocks):
            block.after.append(i + 1)
    return blocks


def loops(function: Function) -> list[set[int]]:
    """Return the natural loops, as sets of numbers of blocks; those that share a head are one."""
    before: dict[int, set[int]] = {i: set() for i in range(len(function.blocks))}
    for i, block in enumerate(function.blocks):
        for j in block.after:
            before[j].add(i)
    found: dict[int, set[int]] = {}
    for i, block in enumerate(function.blocks):
        for head in block.after:
            if head > i:
                continue
            members, waiting = {head, i}, [i] if i != head else []
            while waiting:
                for j in before[waiting.pop()] - members:
                    members.add(j)
                    waiting.append(j)
            if 0 not in members or head == 0:  # else a jump back from code out of line, which is no loop
                found.setdefault(head, set()).update(members)
    return list(found.values())


def ordinary_path(function: Function, turns: int = 1, *, body: bool = False) -> list[tuple[Instruction, int]]:
    """Return the instructions of the ordinary path, each with how often a thread executes it.

    ``turns``: of loops that move data with wide accesses; other loops are passed once. Of loops inside each other, each
    of which moves data, only the inner ones turn. ``body``: of the largest such loop, one turn, and nothing else: for
    kernels whose thread blocks stay.
    """
    blocks = function.blocks
    moving = [m for m in loops(function) if any(x.wide_bytes for i in m for x in blocks[i].instructions)]
    if body and not moving:
        raise ValueError(f"{function.name} has no loop that moves data")
    whole = max(moving, key=len) if body else set(range(len(blocks)))
    inner = [m for m in moving if not any(other < m for other in moving)]
    times = [turns if not body and any(i in m for m in inner) else 1 for i in range(len(blocks))]

    def worth(i: int) -> tuple[int, int, int]:
        here = blocks[i].instructions
        return (
            -sum(x.is_rare for x in here),
            times[i] * sum(x.wide_bytes for x in here),
            times[i] * len(here),
        )

    # The best way from each block to the end; jumps back are not taken, but that to a body's head is its end.
    first = min(whole)
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    for i in sorted(whole, reverse=True):
        ways: list[tuple[tuple[int, int, int], int]] = [(best[j][0], j) for j in blocks[i].after if j > i and j in best]
        if first in blocks[i].after if body else blocks[i].instructions[-1].name == "EXIT":
            ways.append(((0, 0, 0), -1))
        if not ways:
            continue
        value, after = max(ways)
        mine = worth(i)
        best[i] = ((mine[0] + value[0], mine[1] + value[1], mine[2] + value[2]), after if after >= 0 else None)
    path: list[tuple[Instruction, int]] = []
    at: int | None = first
    while at is not None:
        path.extend((x, times[at]) for x in blocks[at].instructions)
        at = best[at][1]
    return path
