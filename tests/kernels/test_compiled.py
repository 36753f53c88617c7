"""Every Triton kernel compiled to machine code for every architecture, without a GPU: what the code holds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

for module in ("torch", "triton"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'paramdelta[triton]'", allow_module_level=True)

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
    return {"module": "plain", "kernel": "merge", "signature": signature, "constants": constants, "warps": 4}


def each(terms: int, format: str) -> dict[str, Any]:
    constants = {"TERMS": terms, "FORMAT": format, "ALIGN": 16, "BLOCK": 1024}
    signature = {"table": "i64", "chunks": "i64", "alphas": ("i64",) * terms}
    return {"module": "plain", "kernel": "merge_each", "signature": signature, "constants": constants, "warps": 4}


def blocks(kernel: str, form: tuple[Any, ...], terms: int = 1, **constants: Any) -> dict[str, Any]:
    scales = "i64" if form[1] else "constexpr"
    planes = 1 + 2 * terms
    signature = {"planes": (("i64", "i64", scales, "i64", "i64", "i64"),) * planes, "alphas": ("i64",) * terms}
    constants |= {"TERMS": terms, "FORMS": (form,) * planes, "ALIGN": 16, "TILE_ROWS": 128, "TILE_COLS": 128}
    return {"module": "blocks", "kernel": kernel, "signature": signature, "constants": constants, "warps": 16}


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
    "blocks": blocks("merge_units", BLOCK_FORM, RECIPE=DEEPGEMM, KIND="f32", KEEP=False, ROWS=128, COLS=128),
    "blocks-keep": blocks("merge_units", BLOCK_FORM, RECIPE=DEEPGEMM, KIND="f32", KEEP=True, ROWS=128, COLS=128),
    "blocks-two-deltas": blocks(
        "merge_units", BLOCK_FORM, 2, RECIPE=DEEPGEMM, KIND="f32", KEEP=False, ROWS=128, COLS=128
    ),
    "bf16-to-blocks": blocks("merge_units", BF16_FORM, RECIPE=DEEPGEMM, KIND="f32", KEEP=False, ROWS=128, COLS=128),
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
    options = {"num_warps": job["warps"], "enable_fp_fusion": fused}
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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set: there is no compiler in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("name", JOBS)
def test_no_product_is_fused_with_a_sum(name: str, architecture: int, tmp_path: Path) -> None:
    done = compile_job(JOBS[name], architecture)
    ptx = done.asm["ptx"]
    assert f".target sm_{architecture}" in ptx
    # Divisions are one correctly rounded instruction in PTX, which the assembler makes of fused ones in binary32: the
    # only fused operations there may be. In binary64 there is no division, so none at all.
    assert not re.search(r"\b(fma|mad)\.(rn|rz|rm|rp)\S*f(32|64)", ptx)
    assert ".ftz" not in ptx, "subnormals would be lost"
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert "DFMA" not in disassemble(done.asm["cubin"], tmp_path)
    assert done.metadata.shared <= 48 << 10


@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "bf16-each", "blocks"])
def test_accesses_are_of_sixteen_bytes(name: str, tmp_path: Path) -> None:
    code = disassemble(compile_job(JOBS[name], 90).asm["cubin"], tmp_path)
    assert re.search(r"LDG\.E\.128", code)
    assert re.search(r"STG\.E\.128", code)
    assert name == "blocks" or not re.search(r"\b(LDL|STL)\b", code), "registers were spilled"


def test_the_check_finds_fused_operations() -> None:
    """With fusion, which is the compiler's habit, there is what the test above looks for."""
    assert "fma.rn.f64" in compile_job(JOBS["bf16"], 90, fused=True).asm["ptx"]
