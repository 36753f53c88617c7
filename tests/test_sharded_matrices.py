"""Quantised matrices that are DTensors, in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")


def test_shards_of_two_processes() -> None:
    """DTensors over gloo: each rank merges what it holds, and the whole is as one process has it."""
    worker = Path(__file__).parent / "distributed_matrices.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("all equal") == 2
