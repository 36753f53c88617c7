"""What nvcc built: every kernel for every architecture, no fused multiply-add, and a module that needs no driver."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cubins import kernels

from paramdelta import backends

TARGETS = {80, 90, 100, 120}
# DType 0, 1 and 2 are bf16, f16 and f32; 0 and 1 of the scaled ones: any codec, or f8_e4m3 throughout; of blocks: any
# alpha, or a power of two.
KERNELS = {
    "MergeKernel ThreeWay 0",
    "MergeKernel ThreeWay 1",
    "MergeKernel Uniform 0",
    "MergeKernel Uniform 1",
    "MergeKernel Uniform 2",
    "MergeKernel Mixed",
    "NormsKernel Uniform 0",
    "NormsKernel Uniform 1",
    "NormsKernel Uniform 2",
    "NormsKernel Mixed",
    "UnitsKernel 0",
    "UnitsKernel 1",
    "TilesKernel 0",
    "TilesKernel 1",
    "BlocksKernel 0",
    "BlocksKernel 1",
    "ChooseKernel",
}


@pytest.fixture(scope="module")
def built() -> Path:
    """The extension's file: it must be there where nvcc is, unless the build was told to leave it out."""
    spec = importlib.util.find_spec("paramdelta._cuda")
    if spec is None or spec.origin is None:
        nvcc = shutil.which("nvcc")
        reason = (
            "there is no nvcc" if nvcc is None else f"PARAMDELTA_BUILD_CUDA={os.environ.get('PARAMDELTA_BUILD_CUDA')}"
        )
        if nvcc is None or os.environ.get("PARAMDELTA_BUILD_CUDA") == "0":
            pytest.skip(f"paramdelta._cuda is not built: {reason}")
        pytest.fail(f"{nvcc} is there, but paramdelta._cuda is not built")
    return Path(spec.origin)


def plain(mangled: str) -> str:
    """Return what a mangled instance of run<Kernel> names, without punctuation: ``MergeKernel Uniform 0``."""
    names = r"(?<=\d)[A-Z][A-Za-z]*?(?:Kernel|Way)|Uniform|Mixed|(?<=DTypeE)\d|(?<=Lb)\d"
    return " ".join(re.findall(names, mangled))


def test_every_kernel_for_every_target(built: Path) -> None:
    found = kernels(built)
    if "PARAMDELTA_CUDA_TARGETS" in os.environ:
        assert set(found) == {int(t) for t in os.environ["PARAMDELTA_CUDA_TARGETS"].split(",")}
    else:
        assert set(found) == TARGETS
    for target, names in found.items():
        assert {plain(name) for name in names} == KERNELS, f"sm_{target}"


def operations(code: bytes) -> set[bytes]:
    """Return the arithmetic of PTX on binary32 and binary64."""
    return set(re.findall(rb"(?<![.\w])(?:fma|mad|div|sqrt|add|sub|mul)\.[a-z.0-9]*f(?:32|64)\b", code))


def test_no_fused_multiply_add(built: Path) -> None:
    """In the PTX of the last target. Division is correctly rounded, whatever its instructions are.

    The kernel for blocks says where it fuses: products that are exact, in binary64; sums for a report, in binary32.
    """
    entries = re.findall(rb"\.version .*?\0", built.read_bytes(), re.DOTALL)
    kernels_of = [entry for code in entries for entry in re.split(rb"(?=\.visible \.entry)", code)[1:]]
    assert len(kernels_of) == len(KERNELS)
    apart = {f"{name}.rn.{kind}".encode() for name in ("add", "sub", "mul", "div") for kind in ("f32", "f64")}
    fused = [code for code in kernels_of if b"BlocksKernel" in code.split(b"(", 1)[0]]
    assert len(fused) == 2
    for code in fused:
        assert operations(code) <= apart | {b"fma.rn.f64", b"fma.rn.f32"}
    rest = b"\n".join(code for code in kernels_of if code not in fused)
    rest += b"\n".join(code.split(b".visible .entry", 1)[0] for code in entries)
    assert b"mul.rn.f64" in rest
    assert b"add.rn.f64" in rest
    assert operations(rest) <= apart, operations(rest)


def test_importing_needs_no_driver(built: Path) -> None:
    code = (
        "import sys\nimport paramdelta._cuda as c\n"
        "maps = open('/proc/self/maps').read()\nassert 'libcuda.so' not in maps, 'the driver was loaded'\n"
        "print(c.targets(), c.on_host())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")


def test_why_not_says_what_is_missing() -> None:
    reason = backends.why_not("cuda")
    if reason is None:
        assert "cuda" in backends.available()
    else:
        assert len(reason) > 20
