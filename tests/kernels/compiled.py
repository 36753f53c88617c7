"""The Triton kernels compiled to machine code without a GPU, and what that holds: for test_compiled.py, and to look at.

    python tests/kernels/compiled.py [kernel …]

prints, for sm_90, what one element costs: see `Code`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import paramdelta

if importlib.util.find_spec("paramdelta.kernels") is None:  # where this file is run
    paramdelta.__path__.append(str(Path(__file__).parents[2]))

ARCHITECTURES = (80, 90, 100)
ALIGNED = [["tt.divisibility", 16]]
DEEPGEMM = ("ceil2", 448.0, 1e-4, 1.0, True, "f32")
BLOCK_FORM = ("f8_e4m3", "f32", 128, 128, False, False)
ROW_FORM = ("f8_e4m3", "f32", 1, 0, True, False)
BF16_FORM = ("bf16", "", 0, 0, False, False)


def plain(terms: int, format: str, align: int = 16, rank: int = 0, zeros: bool = False) -> dict[str, Any]:
    constants = {"TERMS": terms, "FORMAT": format, "RANK": rank, "ALIGN": align, "BLOCK": 1024}
    signature = {
        "operands": (*("i64",) * (1 + 2 * terms), "constexpr" if zeros else "i64"), "alphas": ("i64",) * terms,
        "shape": ("i32",) * rank,
        "strides": ("i32",) * (rank * (2 + 2 * terms)),
    }  # fmt: skip
    return {
        "module": "plain",
        "kernel": "merge",
        "signature": signature,
        "constants": constants,
        "options": {"num_warps": 4},
    }


def each(terms: int, format: str) -> dict[str, Any]:
    constants = {"TERMS": terms, "FORMAT": format, "ALIGN": 16, "BLOCK": 1024}
    signature = {"table": "i64", "chunks": "i64", "alphas": ("i64",) * terms}
    return {
        "module": "plain",
        "kernel": "merge_each",
        "signature": signature,
        "constants": constants,
        "options": {"num_warps": 4},
    }


def blocks(kernel: str, form: tuple[Any, ...], terms: int = 1, ones: bool = False, **constants: Any) -> dict[str, Any]:
    from paramdelta.kernels import launch_blocks

    scales = "i64" if form[1] else "constexpr"
    planes = 1 + 2 * terms
    signature = {"planes": (("i64", "i64", scales, "i64", "i64", "i64"),) * planes}
    signature["alphas"] = ("constexpr" if ones else "i64",) * terms
    tile, options = launch_blocks.TILE, {"num_warps": 8}
    if kernel == "merge_units":
        tile = (128, 128)
        options = launch_blocks.shape(tile, terms)
        constants = {"WORDS": True, "KIND": "f32", "KEEP": False, "ROWS": 128, "COLS": 128} | constants
        constants |= {name: options.pop(name) for name in ("PARTS", "STRIP")}
    constants |= {"TERMS": terms, "FORMS": (form,) * planes, "ALIGN": 16, "TILE_ROWS": tile[0], "TILE_COLS": tile[1]}
    return {"module": "blocks", "kernel": kernel, "signature": signature, "constants": constants, "options": options}


JOBS = {
    "bf16": plain(1, "bf16"),
    "f16": plain(1, "f16"),
    "f32": plain(1, "f32"),
    "bf16-four-deltas": plain(4, "bf16"),
    "bf16-unaligned": plain(1, "bf16", 2),
    "bf16-strided": plain(2, "bf16", 2, 3),
    "bf16-zeros": plain(1, "bf16", zeros=True),
    "bf16-each": each(1, "bf16"),
    "f32-each": each(2, "f32"),
    "blocks": blocks("merge_units", BLOCK_FORM, RECIPE=DEEPGEMM),
    "blocks-alpha-1": blocks("merge_units", BLOCK_FORM, ones=True, RECIPE=DEEPGEMM),
    "blocks-keep": blocks("merge_units", BLOCK_FORM, RECIPE=DEEPGEMM, KEEP=True),
    "blocks-two-deltas": blocks("merge_units", BLOCK_FORM, 2, RECIPE=DEEPGEMM),
    "blocks-general": blocks("merge_units", BLOCK_FORM, RECIPE=DEEPGEMM, WORDS=False),
    "bf16-to-blocks": blocks("merge_units", BF16_FORM, RECIPE=DEEPGEMM),
    "rows-measure": blocks("measure_units", ROW_FORM, RECIPE=DEEPGEMM, ROWS=1, COLS=0),
    "rows-encode": blocks(
        "encode_units", ROW_FORM, RECIPE=DEEPGEMM, KIND="f32", KEEP=False, GIVEN=False, ROWS=1, COLS=0
    ),
    "blocks-to-bf16": blocks("merge_plain", BLOCK_FORM, FORMAT="bf16", OWN=False),
}


def compile_job(job: dict[str, Any], architecture: int, fused: bool = False) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"paramdelta.kernels.{job['module']}"), job["kernel"])
    signature = dict.fromkeys(kernel.arg_names, "i64") | job["signature"]
    signature |= dict.fromkeys(job["constants"], "constexpr")
    constants: dict[Any, Any] = {(kernel.arg_names.index(k),): v for k, v in job["constants"].items()}
    attributes: dict[Any, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        for path, kind in walk((i,), signature[name]):
            if kind == "constexpr" and path not in constants:  # None: no memory
                constants[path] = None
            if kind == "i64" and name != "alphas" and job["constants"]["ALIGN"] == 16:
                attributes[path] = ALIGNED
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = job["options"] | {"enable_fp_fusion": fused}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def walk(path: tuple[int, ...], kind: Any) -> Any:
    if isinstance(kind, tuple):
        for i, inner in enumerate(kind):
            yield from walk((*path, i), inner)
    else:
        yield path, kind


def disassemble(code: bytes, folder: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    (folder / "kernel.cubin").write_bytes(code)
    return subprocess.run(
        [tool, "-sass", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip


def elements(job: dict[str, Any]) -> int:
    """Return how many elements a thread has."""
    constants = job["constants"]
    count = constants.get("BLOCK") or constants["TILE_ROWS"] * constants["TILE_COLS"]
    return int(count // (32 * job["options"]["num_warps"]))


def spilled(code: str) -> int:
    """Return how many instructions write registers to a thread's own memory."""
    return len(re.findall(r"\bSTL\b", code))


class Cost(NamedTuple):
    """Instructions for an element, up to where the first program ends: one of whole tiles, with nothing to count."""

    instructions: float
    conversions: float
    wide_loads: int
    registers: int
    spilled: int

    @classmethod
    def of(cls, job: dict[str, Any], architecture: int) -> Cost:
        """Compile a kernel and count: all instructions, and those that convert to or from 64 bits."""
        import triton

        done = compile_job(job, architecture)
        with tempfile.TemporaryDirectory() as folder:
            code = disassemble(done.asm["cubin"], Path(folder))
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            used = subprocess.run(
                [tool, "-res-usage", Path(folder) / "kernel.cubin"], capture_output=True, text=True, check=True
            )
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][\w.]*)", code)
        last = next(i for i, (guard, name) in enumerate(lines) if name == "EXIT" and not guard)
        hot = [name for _, name in lines[: last + 1]]
        registers = re.search(r"REG:(\d+)", used.stdout + used.stderr)
        return cls(
            len(hot) / elements(job),
            sum(bool(re.match(r"F2F\..*64", name)) for name in hot) / elements(job),
            sum(name.startswith("LDG.E.128") for name in hot),
            int(registers[1]) if registers else 0,
            spilled(code),
        )


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    for name in sys.argv[1:] or JOBS:
        found = Cost.of(JOBS[name], 90)
        print(f"{name:20} {found.instructions:6.1f} {found.conversions:5.1f}", *found[2:], flush=True)
