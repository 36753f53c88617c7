"""Tests of the Triton kernels in its interpreter, which must be asked for before triton is imported.

They are run by tests/kernels/test_interpreted.py, in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "conformance"))


@pytest.fixture(autouse=True)
def _quiet() -> object:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it, or run tests/kernels/test_interpreted.py, which does"
    # The interpreter computes with NumPy, which warns where a GPU gives Inf and NaN.
    with np.errstate(all="ignore"):
        yield
