"""Merges run as commands of their own, with faults made by the injector (injector.c says what a rule is), and the small
checkpoints they merge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import paramdelta

PACKAGE_ROOT = Path(paramdelta.__file__).parents[1]
ROLES = ("post", "base", "new_base")
SEGMENT = 1 << 20
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TIMEOUT = 60


@dataclass(frozen=True)
class Workshop:
    """A folder with three checkpoints of two shards (4 MiB and 2 MiB of bf16), what they merge to, and the injector."""

    root: Path
    expected: dict[str, str]
    injector: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def partial(self) -> Path:
        return self.root / ".out.partial"

    def command(self, *extra: str, out: Path | None = None) -> list[str]:
        inputs = [f"--{role.replace('_', '-')}={self.root / role}" for role in ROLES]
        return [sys.executable, "-m", "paramdelta", "merge", *inputs, f"--out={out or self.out}", *extra]

    def environment(self, *rules: str, segments: bool = True, log: Path | None = None) -> dict[str, str]:
        chosen = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        if segments:
            chosen["PARAMDELTA_SEGMENT_BYTES"] = str(SEGMENT)
        if rules or log:
            chosen |= {"LD_PRELOAD": str(self.injector), "FAULT_RULES": "\n".join(rules)}
        if log:
            chosen |= {"FAULT_LOG": str(log), "FAULT_LOG_PATH": str(self.root)}
        return chosen

    def merge(
        self,
        *rules: str,
        extra: Sequence[str] = (),
        segments: bool = True,
        log: Path | None = None,
        out: Path | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a merge that meets ``rules``; a hang is a failure."""
        defaults: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "env": self.environment(*rules, segments=segments, log=log),
        }
        command = self.command("--threads=2", *extra, out=out)
        return subprocess.run(command, text=True, timeout=TIMEOUT, **{**defaults, **options})

    def must_merge(self, *rules: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a merge that must succeed, with the bytes it has without faults."""
        done = self.merge(*rules, **options)
        assert done.returncode == 0, done.stderr
        assert digests(options.get("out") or self.out) == self.expected
        return done

    def must_fail(self, *rules: str, saying: Sequence[str], code: int = 1, **options: Any) -> str:
        """Run a merge that must end in one error of these words and with this code. Return what it said."""
        done = self.merge(*rules, **options)
        said = str(done.stderr)
        assert done.returncode == code, f"{done.returncode}: {said}"
        assert "Traceback" not in said, said
        assert said.count("error: ") == (code != 130), said
        for words in saying:
            assert words in said, said
        return said


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def write_checkpoints(root: Path) -> None:
    """Write post, base and new_base."""
    for i, role in enumerate(ROLES):
        rng = np.random.default_rng(i)
        folder = root / role
        folder.mkdir(parents=True)
        base = np.random.default_rng(9).standard_normal((3072, 1024))  # post is a child of base
        values = base + 0.1 * rng.standard_normal(base.shape)
        tensors = {"a.weight": values[:1536], "b.weight": values[1536:2048], "c.weight": values[2048:]}
        where = {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1]}
        for file in SHARDS:
            part = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items() if where[n] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "tie_word_embeddings": True}))


@cache
def why_no_injector() -> str:
    """Return why the injector cannot be built here, an empty string where it can."""
    if not sys.platform.startswith("linux"):
        return "the injector is for Linux"
    return "" if shutil.which("cc") else "there is no C compiler (cc) to build the injector with"


def build_injector(folder: Path) -> Path:
    """Compile the injector into ``folder``; skip the test, with the reason, where that is not possible."""
    if why_no_injector():
        pytest.skip(why_no_injector())
    library = folder / "injector.so"
    source = Path(__file__).with_name("injector.c")
    command = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([*command, str(source), "-o", str(library), "-ldl", "-lpthread"], check=True)
    return library


def program(path: Path, text: str) -> Path:
    """Write a shell script for a rule's ``run=``."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
