"""Three versions of a real model, made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recycled import HERE


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints v1, v2 and v3, saved by transformers in several shards."""
    pytest.importorskip("transformers", reason="the models of this test are made by transformers")
    root = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(HERE / "base_models.py"), str(root)], check=True, timeout=120)
    return root
