"""mergekit's configuration for post - base + new_base, as fair to it as we know, and its command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from benchmarks.data import Folders

VARIABLE = "PARAMDELTA_MERGEKIT"
OURS = "paramdelta"  # the method that paramdelta.integrations.mergekit registers
METHODS = ("linear", "task_arithmetic", OURS)


def executable() -> str | None:
    """Return what PARAMDELTA_MERGEKIT names, if it can be run."""
    return shutil.which(os.environ.get(VARIABLE, ""))


def why_not() -> str | None:
    """Return None where mergekit can be run, else the reason and the way out."""
    if executable() is not None:
        return None
    named = os.environ.get(VARIABLE)
    state = f"{named} cannot be run" if named else f"{VARIABLE} is not set"
    return f"{state}; python -m benchmarks.peers.setup_mergekit DIR makes an environment and prints the line to set it"


def configuration(method: str, folders: Folders) -> str:
    """Return the configuration (YAML, of which JSON is a part) with float type bfloat16.

    ``linear`` takes all three with weights +1, +1, -1 and is the faster and the more exact; ``task_arithmetic`` is
    what people write: deltas against new_base with weights +1 and -1. ``paramdelta`` is ours, run by mergekit.
    """
    post, base, new_base = (str(folder) for folder in folders)
    if method == OURS:
        models = [{"model": post}, {"model": base, "parameters": {"role": "base"}}]
        return json.dumps(
            {"merge_method": OURS, "base_model": new_base, "models": models, "dtype": "bfloat16"}, indent=1
        )
    weighted = [
        {"model": post, "parameters": {"weight": 1.0}},
        {"model": base, "parameters": {"weight": -1.0}},
    ]
    if method == "linear":
        weighted.insert(0, {"model": new_base, "parameters": {"weight": 1.0}})
    content = {
        "merge_method": method,
        "base_model": new_base,
        "models": weighted,
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    return json.dumps(content, indent=1)


def command(method: str, config: Path, out: Path, threads: int) -> list[str]:
    """Return the command line, with every option that makes it faster."""
    start = [str(executable())]
    if method == OURS:
        start = [str(Path(start[0]).with_name("python")), "-m", "paramdelta.integrations.mergekit"]
    return [
        *start,
        str(config),
        str(out),
        "-j",
        str(threads),
        "--async-write",
        "--write-threads",
        "4",
        "--out-shard-size",
        "2B",
        "--quiet",
    ]


def environment(threads: int) -> dict[str, str]:
    """Return what is added to the environment: the threads torch may use, and no look at the network."""
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
