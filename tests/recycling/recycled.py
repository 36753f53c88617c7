"""Plans over small models, recyclings run in processes that may be killed, and what came of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import paramdelta

HERE = Path(__file__).parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("SLEEP", "FAIL", "SPOIL", "ON_SIGNAL")} | {
    "PYTHONPATH": str(Path(paramdelta.__file__).parents[1])
}


def make_plan(models: Path, out: Path, **changed: Any) -> dict[str, Any]:
    """Return a plan for three versions, with the quick command."""
    return {
        "versions": [str(models / name) for name in ("v1", "v2", "v3")],
        "out": str(out),
        "command": [sys.executable, "-S", str(HERE / "perturb.py"), "{start}", "{out}", "{index}"],
        **changed,
    }


def command(*arguments: str | Path, **environment: str) -> list[str]:
    """Return the command line of a recycling."""
    return [sys.executable, "-m", "paramdelta", "recycle", *map(str, arguments)]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a recycling from the command line."""
    whole = command(*arguments)
    return subprocess.run(whole, capture_output=True, text=True, timeout=60, env=ENVIRONMENT | environment)


def digests(out: Path) -> dict[str, str]:
    """Return the digest of every file in the folders of a recycling, without logs and state, which have times."""
    found = {}
    for kind in ("starts", "outs", "deltas"):
        for path in sorted((out / kind).rglob("*")):
            name = str(path.relative_to(out))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found
