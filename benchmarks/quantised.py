"""Quantised formats: kernels against the roofline of their codes, and whole fp8 merges against bf16 merges of as many
elements and against torch doing the same steps.

The bound of a kernel counts codes alone (4 bytes an element for fp8 in, in, in and out); scales come on top, at most a
byte to 16 elements. Passes alternate as in kernels.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import paramdelta
from benchmarks import bound, data, kernels, whole
from benchmarks.machine import file_system_of, threads_allowed
from benchmarks.results import OURS, Metric, Record
from paramdelta import _cpu, scaled
from paramdelta.backends import cpu
from paramdelta.checkpoint.families import OUTPUT_FORMATS
from paramdelta.dtypes import BF16
from paramdelta.formats import CODEC_BITS, CODECS, RULES, Format

ROWS, COLS = 16384, 16384  # 256 MiB of fp8 codes a stream
QUICK_ROWS = 256
POOL_ROWS = 128
TORCH_SCRIPT = whole.TORCH_SCRIPT.with_name("torch_fp8.py")


@dataclass(frozen=True)
class Case:
    """Matrices of one format, or plain bf16 where it is None, merged into another."""

    name: str
    inputs: Format | None
    out: Format | None


_FP8 = OUTPUT_FORMATS["fp8-block"]
CASES = (
    Case("fp8 blocks to fp8 blocks", _FP8, _FP8),
    *(Case(f"{name} to {name}", f, f) for name, f in OUTPUT_FORMATS.items() if name not in ("fp8-block", "fp8-tensor")),
    Case("fp8 blocks to bf16", _FP8, None),
    Case("bf16 to fp8 blocks", None, _FP8),
)


class Bench:
    """One case with its memory: weight-like values in every input."""

    def __init__(self, case: Case, rows: int) -> None:
        self.case, self.rows = case, rows
        self.elements = rows * COLS
        bits = [CODEC_BITS["bf16" if f is None else f.codec] for f in (case.inputs,) * 3 + (case.out,)]
        self.pitches = [COLS * b // 8 for b in bits]
        self.buffers = bound.allocate([rows * pitch for pitch in self.pitches])
        self.scales = [self._fill(stream, i) for i, stream in enumerate(self.buffers.inputs)]
        grid = (0, 0) if case.out is None else scaled.Grid.of(case.out).shape(rows, COLS)
        self.out_scales = np.zeros((*grid, 0 if case.out is None else case.out.scale.itemsize), np.uint8)

    def _fill(self, stream: bound.Bytes, i: int) -> Any:
        """Fill a stream with N(0, 0.02²), moved a little in each; return the scales of the whole matrix, or None."""
        values = np.random.default_rng(0).standard_normal((POOL_ROWS, COLS), dtype=np.float32) * np.float32(0.02)
        values += np.random.default_rng(i + 1).standard_normal(values.shape, dtype=np.float32) * np.float32(1e-3)
        made = self.case.inputs
        if made is None:
            codes, scales = values.astype(BF16.to_numpy()).view(np.uint8), None
        else:
            second = 2688.0 / float(np.abs(values).max()) if made.second else None
            codes, scales = scaled.quantise(values, made.recipe, made.rows, made.cols, made.scale.name, second=second)
            codes = codes.view(np.uint8)
        pool = codes.reshape(-1)
        for start in range(0, stream.size, pool.size):
            stream[start : start + pool.size] = pool[: stream.size - start]
        if scales is None:
            return None
        times = -(-self.rows // POOL_ROWS)
        return np.ascontiguousarray(np.concatenate([scales] * times)).view(np.uint8)

    def _operand(self, i: int) -> tuple[Any, ...]:
        made = self.case.inputs
        address = self.buffers.inputs[i].ctypes.data
        if made is None:
            return (address, CODECS.index("bf16"), self.pitches[i], None)
        second = {"": 0, "multiply": 1, "divide": 2}[made.second]
        grid_cols = scaled.Grid.of(made).shape(self.rows, COLS)[1]
        value = 2688.0 / 0.1 if made.second else 1.0
        scales = (
            self.scales[i].ctypes.data, made.scale.code, grid_cols, made.rows, made.cols, 0, 0, second, value, 0, 0
        )  # fmt: skip
        return (address, CODECS.index(made.codec), self.pitches[i], scales)

    @property
    def nbytes(self) -> int:
        """Bytes of codes read and written by one merge."""
        return self.rows * sum(self.pitches)

    def merge(self, isa: str, threads: int) -> float:
        """Merge once and return the seconds that it took."""
        post, base, new_base = (self._operand(i) for i in range(3))
        out = self.case.out
        more: dict[str, Any] = {"out_dtype": BF16.code}
        if out is not None:
            r = out.recipe
            row = (
                CODECS.index(r.codec), out.scale.code, RULES.index(r.rule), r.reciprocal, r.values == "bf16",
                r.largest, r.floor, r.zero,
            )  # fmt: skip
            more = {
                "recipe": row,
                "grid": (out.rows, out.cols),
                "out_scales": (self.out_scales.ctypes.data, self.out_scales.shape[1]),
                "second": 2688.0 / 0.1 if out.second else 1.0,
            }
        # SAFETY: the buffers outlive the call.
        start = time.perf_counter()
        _cpu.merge_scaled(
            new_base=new_base,
            terms=[(post, base, 1.0)],
            rows=self.rows,
            cols=COLS,
            out=(self.buffers.out.ctypes.data, self.pitches[3]),
            isa=None if isa == kernels.CHOSEN else isa,
            threads=threads,
            **more,
        )
        return time.perf_counter() - start


def run(*, quick: bool, rounds: int, rows: int | None = None) -> Iterator[Record]:
    """Measure the kernels: every case with the best instruction set on all threads, fp8 blocks with every one.

    ``quick`` keeps the first case, the chosen instruction set, and one thread.
    """
    isas = cpu.capabilities().variants
    for case in CASES[:1] if quick else CASES:
        bench = Bench(case, rows or (QUICK_ROWS if quick else ROWS))
        full = case is CASES[0] and not quick
        for isa in (kernels.CHOSEN,) if quick else (kernels.CHOSEN, *reversed(isas)) if full else isas[-1:]:
            for threads in sorted({1, threads_allowed()}) if full else (1,) if quick else (threads_allowed(),):
                made = kernels.Measurement(isa, threads)
                made.take(bench, rounds, kernels.QUICK_PASSES if quick else kernels.PASSES)
                yield record_of(case, made)
        del bench


def record_of(case: Case, made: kernels.Measurement) -> Record:
    """Return the record of one case, with the elements per second beside the bytes."""
    bits = [CODEC_BITS["bf16" if f is None else f.codec] for f in (case.inputs,) * 3 + (case.out,)]
    per_element = sum(bits) / 8
    record = made.record(case.name, bytes_per_element=per_element)
    record.metrics["elements"] = Metric("1/s", tuple(rate / per_element for rate in made.rates))
    return record


def merges(
    size: str, *, quick: bool, threads: int, places: tuple[Path, ...], log: Callable[[str], None] = print
) -> Iterator[Record]:
    """Merge fp8 checkpoints whose bf16 form has ``size``, beside the bf16 merge and the torch script."""
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        kind = file_system_of(place)
        in_memory = kind == "tmpfs"
        case = f"fp8 blocks of {size} in bf16, {kind}, {threads} threads"
        try:
            with data.workspace(place, need=2 * data.bytes_needed(size)) as scratch:
                log(f"{case}: writing the inputs")
                plain = data.write_inputs(scratch / "in", size)
                folders = quantise_all(plain, scratch / "fp8")
                out = scratch / "out"

                def forget(*both: data.Folders) -> None:
                    for each in both:
                        data.forget(each)

                yield from whole.take_turns(
                    "quantised",
                    case,
                    [
                        whole.ours(folders, out, threads),
                        _renamed(whole.ours(plain, out, threads), "bf16 merge of as many elements"),
                        whole.copy(folders, out),
                        torch_fp8(folders, out, threads),
                    ],
                    out,
                    rounds=7 if in_memory and not quick else 5,
                    parameters={
                        "size": size,
                        "output_bytes": folders.nbytes,
                        "file_system": kind,
                        "inputs": "in memory" if in_memory else "dropped from the page cache before each run",
                        "synced": not in_memory,
                        "threads": threads,
                    },
                    before=None if in_memory else lambda f=folders, p=plain: forget(f, p),
                    sync=not in_memory,
                    log=log,
                )
        except data.NoRoomError as error:
            log(f"{case}: skipped: {error}")
            yield Record("quantised", case, OURS, {"size": size, "file_system": kind}, skipped=str(error))


def quantise_all(folders: data.Folders, target: Path) -> data.Folders:
    """Write each folder's weights as fp8 in blocks: a merge without a delta."""
    target.mkdir(parents=True)
    made = {}
    for role, folder in folders._asdict().items():
        made[role] = target / role
        paramdelta.merge(
            post=folder, base=folder, new_base=folder, out=made[role], format="fp8-block", exclude="*", threads=2
        )
    return data.Folders(**made)


def torch_fp8(folders: data.Folders, out: Path, threads: int) -> whole.Contender:
    """Torch doing the same steps: dequantise, add, requantise."""
    script = whole.torch_script(folders, out, threads)
    if script.skipped is not None:
        return script
    python = script.command[0]
    shown = "python benchmarks/peers/torch_fp8.py POST BASE NEW_BASE OUT"
    return whole.Contender(script.name, (python, str(TORCH_SCRIPT), *script.command[2:]), shown, script.env)


def _renamed(contender: whole.Contender, name: str) -> whole.Contender:
    return whole.Contender(name, contender.command, contender.shown, contender.env)


if __name__ == "__main__":
    for record in run(quick="--quick" in sys.argv, rounds=7):
        rate = record.metrics["elements"].median / 1e9
        print(f"{record.case}: {rate:.2f} G elements/s, {record.ratios['of_bound']:.3f} of the bound")
