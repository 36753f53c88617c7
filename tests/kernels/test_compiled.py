"""Every Triton kernel compiled to machine code for every architecture, without a GPU: what the code holds."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

for module in ("torch", "triton"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'paramdelta[triton]'", allow_module_level=True)

from compiled import JOBS, compile_job, disassemble, elements, spilled  # noqa: E402

ARCHITECTURES = (80, 90, 100)
WIDE = {"bf16", "f16", "f32", "bf16-each", "blocks", "blocks-to-bf16", "bf16-to-blocks"}  # accesses of 16 bytes
# Words of a thread's registers that are kept in memory for a while, for sm_90: the scheduler's, with 128 registers.
SPILLED = {"blocks": 4, "blocks-keep": 4, "bf16-to-blocks": 6}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set: there is no compiler in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


# Every kernel for every architecture; the forms of each, for one of them: a form takes seconds to compile.
KERNELS = {(job["module"], job["kernel"]): name for name, job in reversed(JOBS.items())}
# Forms that are compiled by `make emulate` only.
RARE = {"f16", "f32-each", "bf16-zeros", "blocks-keep", "blocks-two-deltas", "bf16-to-blocks"}
if os.environ.get("PARAMDELTA_EMULATE") != "all":
    JOBS = {name: job for name, job in JOBS.items() if name not in RARE}
CASES = [
    (name, architecture)
    for name in JOBS
    for architecture in ARCHITECTURES
    if architecture == 90 or name in KERNELS.values()
]


@pytest.mark.parametrize(("name", "architecture"), CASES, ids=lambda x: f"sm_{x}" if isinstance(x, int) else x)
def test_products_stay_products_and_registers_stay_registers(name: str, architecture: int, tmp_path: Path) -> None:
    job = JOBS[name]
    done = compile_job(job, architecture)
    ptx = done.asm["ptx"]
    assert f".target sm_{architecture}" in ptx
    # Divisions are one correctly rounded instruction in PTX, which the assembler makes of fused ones in binary32. The
    # other fused operations are those that kernels/words.py writes out, whose products are exact (code · scale: one for
    # every operand of an element, and a power of two, in what rounds to a code), or go to the sums of squares.
    of_codes, of_squares, pairs = (len(re.findall(rf"\bfma\.rn\.{kind}\b", ptx)) for kind in ("f64", "f32", "f32x2"))
    of_squares += 2 * pairs  # two in one instruction, from sm_100 on
    operands = 1 + 2 * job["constants"]["TERMS"]
    words = job["constants"].get("WORDS", False)
    scaled = words and job["constants"]["FORMS"][0][0] == "f8_e4m3"
    assert of_codes == (elements(job) * operands if scaled else 0)
    assert of_squares == (elements(job) * 4 if words else 0)
    assert not re.search(r"\bmad\.(rn|rz|rm|rp)\S*f(32|64)", ptx)
    assert not re.search(r"\bfma\.(rn\.(ftz|sat)|rz|rm|rp)", ptx)
    assert ".ftz" not in ptx, "subnormals would be lost"
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    code = disassemble(done.asm["cubin"], tmp_path)
    # The assembler may copy a piece of the program, but no product and no sum has gone into another instruction.
    written = {"DFMA": of_codes, "DMUL": len(re.findall(r"\bmul\.rn\.f64\b", ptx))}
    written["DADD"] = len(re.findall(r"\b(?:add|sub)\.rn\.f64\b", ptx))
    made = {name: len(re.findall(rf"\b{name}\b", code)) for name in written}
    assert all(made[name] >= count for name, count in written.items()), (made, written)
    assert made["DFMA"] == 0 or of_codes
    assert done.metadata.shared <= 48 << 10
    if architecture == 90:
        assert spilled(code) <= SPILLED.get(name, 0), "registers were spilled"
    if name in WIDE:
        assert re.search(r"LDG\.E\.128", code)
        assert re.search(r"STG\.E\.128", code)


def test_the_check_finds_fused_operations() -> None:
    """With fusion, which is the compiler's habit, there is what the test above looks for."""
    assert "fma.rn.f64" in compile_job(JOBS["bf16"], 90, fused=True).asm["ptx"]
