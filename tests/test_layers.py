"""The house keeps its order: imports point downwards, heavy libraries stay out, C++ layers stay apart."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paramdelta

PACKAGE = Path(paramdelta.__file__).parent
SOURCES = PACKAGE.parent / "csrc"

# A module may import from its own layer and from those after it.
LAYERS = [
    ("__main__",),
    ("integrations",),
    ("cli",),
    ("demo",),
    ("recycling",),
    ("mapping", "loaded"),
    ("loaded_tensors",),
    ("verification", "streaming", "deltas", "analysis"),
    ("recompute", "integrity"),
    ("coordination",),
    ("gathering",),
    ("sweeping",),
    ("merging", "meeting"),
    ("resuming",),
    ("journal",),
    ("forecast",),
    ("shares",),
    ("segments", "publish", "report", "checksums", "devices"),
    ("engine",),
    ("plan",),
    ("checkpoint",),
    ("torch_ops",),
    ("sharded_matrices",),
    ("ops", "scaled"),
    ("device_norms",),
    ("device_tensors", "planes", "tensor_lists"),
    ("tensors",),
    ("storage", "stages"),
    ("backends",),
    ("reference_scaled",),
    ("reference_codes",),
    ("reference",),
    ("formats",),
    ("ranks",),
    ("dtypes", "errors", "memory", "_cpu", "_cuda"),
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}

# The engine reads the columns a plan hands over; that file is their common language.
ALLOWED = {("engine", "plan")}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def part_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "paramdelta" and len(parts) > 1 and parts[1] in RANK else None


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "kernels":
        return
    for module in imports_of(path):
        part = part_of(module)
        if part is None or part == own or (own, part) in ALLOWED:
            continue
        assert RANK[part] > RANK[own], f"{own} imports {module}, which lies above it or beside it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc
    assert len(doc) > 20


@pytest.mark.parametrize(
    "statement",
    ["import paramdelta", "import paramdelta.ops, paramdelta.reference, paramdelta.merging, paramdelta.cli.commands"],
    ids=["package", "everything"],
)
def test_import_brings_no_heavy_library(statement: str) -> None:
    heavy = "torch transformers triton matplotlib huggingface_hub"
    code = f"{statement}\nimport sys\nprint([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys\nfrom paramdelta.cli.commands import cli\n"
        "cli.main(['merge', '--help'], standalone_mode=False)\n"
        "sys.exit('numpy' in sys.modules or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(not SOURCES.is_dir(), reason="C++ sources are only in the source tree")
@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("core", {"core"}),
        ("cpu", {"core", "cpu"}),
        ("io", {"core", "cpu", "io"}),
        ("cuda", {"core", "cuda"}),
        ("python", {"core", "cpu", "cuda", "io", "python"}),
    ],
)
def test_cpp_layers_include_only_downwards(folder: str, allowed: set[str]) -> None:
    for path in (SOURCES / folder).iterdir():
        text = path.read_text()
        for target in re.findall(r'#include "([^"]+)"', text):
            assert target.split("/")[0] in allowed, f"{path.name} includes {target}"
        if folder != "python":
            assert "pybind11" not in text, f"{path.name} sees pybind11"
        assert not re.search(r"#include <(torch|ATen|c10)", text), f"{path.name} includes torch"
