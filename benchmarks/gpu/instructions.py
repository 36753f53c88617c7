"""What the CUDA kernels should reach, by their machine code: ``python -m benchmarks.gpu.instructions``. Needs no GPU.

For each kernel the instructions of its ordinary path (benchmarks/gpu/machine_code.py), for each element and by the unit
of the processor that executes them; how long each unit takes, beside how long memory takes, at a copy's speed, for the
bytes that an element moves; and how many bytes are under way. The slowest is what binds. This is a *prediction*: a unit
can rarely be used to the full, so it is given for 100 and for 75 % of every unit, and a run on a GPU
(``benchmarks.gpu``) decides.

Rates are results for each clock and processor after the table "Throughput of Native Arithmetic Instructions" of the
CUDA C++ Programming Guide (section Arithmetic Instructions), for compute capabilities 8.0, 9.0 and 10.0. It has no row
for conversions from and to types of eight bits: they are counted at the rate of those of 64 bits, the lowest there is.
Clocks (the boost of the data sheets), processors and bandwidths are those of A100 SXM 80 GB, H100 SXM and B200.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.machine_code import Function, Instruction, functions, ordinary_path, why_not

ISSUE, FP64, CONVERT64, CONVERT, FP32, INTEGER, MEMORY = (
    "issue", "binary64", "64-bit conversions", "other conversions", "binary32", "integers", "load and store",
)  # fmt: skip
UNITS = (ISSUE, FP64, CONVERT64, CONVERT, FP32, INTEGER, MEMORY)
ATTAINABLE = 0.75

# Opcodes without modifiers. What is in no list (branches, barriers, the uniform datapath, constants) is issued only.
_BY_NAME = {
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"), FP64),
    **dict.fromkeys(("F2FP", "F2F", "F2I", "I2F", "I2FP", "FRND", "MUFU", "POPC"), CONVERT),
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "IMAD", "FSWZADD"), FP32),
    **dict.fromkeys(
        (
            "LOP3", "IADD3", "IADD", "VIADD", "SHF", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "FMNMX", "IMNMX",
            "VIMNMX", "VIADDMNMX", "LEA", "PLOP3", "MOV", "BMSK", "SGXT", "IABS", "P2R", "R2P", "FMNMX3", "VIMNMX3",
        ),
        INTEGER,
    ),
    **dict.fromkeys(
        ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "ATOMS", "SHFL", "REDUX", "ATOM", "ATOMG", "RED"), MEMORY
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """A device: what one of its processors does in a clock, and what the whole of it reads and writes."""

    name: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second, of the data sheet
    shared_bytes: int  # of a processor
    rates: Mapping[str, float]
    copy: float = 0.90  # of that bandwidth, by a copy: an assumption until a run measures it
    latency: float = 700e-9  # seconds from a load to its data while memory is busy: an assumption, too

    @property
    def bytes_per_clock(self) -> float:
        """Return the bytes that one processor moves in a clock at a copy's speed."""
        return self.bandwidth * self.copy / self.processors / self.clock

    @property
    def bytes_needed(self) -> float:
        """Return the bytes that a processor must have under way for that (Little's law)."""
        return self.bandwidth * self.copy * self.latency / self.processors


def _rates(convert64: float, convert: float, fp64: float, fp32: float) -> dict[str, float]:
    return {ISSUE: 128, FP64: fp64, CONVERT64: convert64, CONVERT: convert, FP32: fp32, INTEGER: 64, MEMORY: 32}


CHIPS = {
    80: Chip("A100", 108, 1.41e9, 2.04e12, 164 << 10, _rates(16, 16, 32, 64)),
    90: Chip("H100", 132, 1.755e9, 3.35e12, 228 << 10, _rates(16, 16, 64, 128)),
    100: Chip("B200", 148, 1.85e9, 7.7e12, 228 << 10, _rates(16, 16, 64, 128)),
}


@dataclass(frozen=True)
class Case:
    """A kernel at work: where its code is, and what a thread does along its ordinary path."""

    name: str
    source: str
    kernel: str  # a regular expression for the mangled name
    threads: int
    elements: int  # of a thread, along the path
    bytes: float  # read and written for an element
    aim: float  # of a copy's bandwidth
    turns: int = 1  # of the loop that moves data
    body: bool = False  # thread blocks stay: the path is one turn of their loop
    tile_bytes: int = 0  # copied asynchronously to shared memory, tile by tile


CASES = (
    Case("bf16 three-way", "merge.cu", "ThreeWayILNS_5DTypeE0", 256, 8, 8, 0.93),
    Case("f16 three-way", "merge.cu", "ThreeWayILNS_5DTypeE1", 256, 8, 8, 0.93),
    Case("f32 three-way", "merge.cu", "UniformILNS_5DTypeE2", 256, 4, 16, 0.93),
    Case("bf16, alpha 0.7", "merge.cu", "UniformILNS_5DTypeE0", 256, 8, 8, 0.90),
    Case("bf16, 4 deltas", "merge.cu", "UniformILNS_5DTypeE0", 256, 8, 20, 0.90, turns=4),
    Case("fp8 blocks to fp8 blocks", "scaled.cu", "BlocksKernelILb1", 256, 64, 4, 0.85, body=True, tile_bytes=3 << 14),
    Case("the same, alpha 0.7", "scaled.cu", "BlocksKernelILb0", 256, 64, 4, 0.75, body=True, tile_bytes=3 << 14),
)


def unit_of(instruction: Instruction) -> str:
    """Return the unit that executes an instruction, apart from being issued."""
    name, parts = instruction.name, instruction.opcode.split(".")[1:]
    if name in ("F2F", "F2I", "I2F", "FRND") and any(part in ("F64", "S64", "U64") for part in parts):
        return CONVERT64
    return _BY_NAME.get(name, ISSUE)


def slots(instruction: Instruction) -> float:
    """Return how many results of its unit an instruction stands for: an access of 16 bytes is four words."""
    widths = {"64": 2, "128": 4}
    if unit_of(instruction) != MEMORY:
        return 1
    return max((widths.get(part, 1) for part in instruction.opcode.split(".")[1:]), default=1)


def counts(path: list[tuple[Instruction, int]], elements: int) -> dict[str, float]:
    """Return what an element costs: instructions issued, and results asked of each unit."""
    total = dict.fromkeys(UNITS, 0.0)
    for instruction, times in path:
        total[ISSUE] += times / elements
        unit = unit_of(instruction)
        if unit != ISSUE:
            total[unit] += times * slots(instruction) / elements
    return total


def bytes_under_way(path: list[tuple[Instruction, int]]) -> int:
    """Return the most bytes that wide loads of a thread have asked for before one of them is waited for."""
    most = now = 0
    pending: set[int] = set()
    for instruction, _ in path:
        registers = [int(r) for r in re.findall(r"(?<![A-Z])R(\d+)", instruction.operands)]
        is_load = instruction.name == "LDG" and instruction.wide_bytes
        read = registers[1:] if is_load else registers
        if pending.intersection(read):
            now, pending = 0, set()
        if is_load:
            now += instruction.wide_bytes
            pending.update(range(registers[0], registers[0] + instruction.wide_bytes // 4))
        most = max(most, now)
    return most


@dataclass(frozen=True)
class Prediction:
    """What a kernel should reach on a chip."""

    case: Case
    chip: Chip
    registers: int
    spilled: int
    blocks: int  # resident on a processor
    counts: Mapping[str, float]
    under_way: float  # bytes, on a processor

    @property
    def binding(self) -> tuple[str, float]:
        """Return the unit that takes longest, and how long, as a share of the time that memory takes."""
        memory = self.case.bytes / self.chip.bytes_per_clock
        return max(((u, self.counts[u] / self.chip.rates[u] / memory) for u in UNITS), key=lambda pair: pair[1])

    def of_copy(self, attainable: float = 1.0) -> float:
        """Return the predicted share of a copy's bandwidth, where units reach this share of their rates."""
        return min(1.0, attainable / self.binding[1], self.under_way / self.chip.bytes_needed)


def predict(case: Case, target: int) -> Prediction:
    """Compile a case's kernel for an architecture and predict."""
    chip = CHIPS[target]
    function = next(f for name, f in functions(case.source, target).items() if re.search(case.kernel, name))
    path = ordinary_path(function, case.turns, body=case.body)
    moved = sum(instruction.wide_bytes * times for instruction, times in path) / case.elements
    if moved < case.bytes / 2:
        raise ValueError(
            f"{case.name}, sm_{target}: the path found moves {moved:.1f} bytes an element by wide accesses, not about"
            f" {case.bytes:g}: it is not the ordinary one"
        )
    blocks = resident_blocks(function, case, chip)
    ahead = 1
    if case.tile_bytes:
        ahead = 2 if 2 * (2 * case.tile_bytes + 2048) <= chip.shared_bytes else 1
        blocks = min(blocks, chip.shared_bytes // (ahead * case.tile_bytes + 1536))
    # Tiles on their way count half: a part of each has come.
    under_way = blocks * (ahead * case.tile_bytes / 2 if case.tile_bytes else case.threads * bytes_under_way(path))
    spent = counts(path, case.elements)
    return Prediction(case, chip, function.registers, function.spilled, blocks, spent, under_way)


def resident_blocks(function: Function, case: Case, chip: Chip) -> int:
    """Return how many thread blocks registers and threads leave room for on a processor."""
    registers = -(-function.registers // 8) * 8
    return min(65536 // (registers * case.threads), 2048 // case.threads)


def table(targets: Sequence[int]) -> str:
    """Return the table of docs/performance.md."""
    lines = [
        "| merge | on | instructions | binary64 | 64-bit conv. | integers | registers | KB under way (needed) | binds"
        " | of a copy, units at 100 % | at 75 % | aim |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for case in CASES:
        for target in targets:
            p = predict(case, target)
            unit, share = p.binding
            cells = [case.name, p.chip.name]
            cells += [f"{p.counts[u]:.1f}" for u in (ISSUE, FP64, CONVERT64, INTEGER)]
            cells += [str(p.registers), f"{p.under_way / 1024:.0f} ({p.chip.bytes_needed / 1024:.0f})"]
            cells.append(f"{'memory' if share <= 1 else unit}; {unit} {share:.2f}")
            cells += [f"{p.of_copy():.2f}", f"{p.of_copy(ATTAINABLE):.2f}", f"{case.aim:.2f}" if case.aim else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--targets", default="90", help="architectures: 80, 90, 100, divided by commas")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    print(table([int(target) for target in arguments.targets.split(",")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
