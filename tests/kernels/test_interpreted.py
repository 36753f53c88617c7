"""Runs the tests of the Triton kernels in its interpreter: in processes of their own, which triton reads once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"

for module in ("torch", "triton"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'paramdelta[triton]'", allow_module_level=True)


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("check_*.py")))
def test_in_the_interpreter(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
