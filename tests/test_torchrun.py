"""Ranks under torchrun: it starts them, rank 0 publishes, and what is killed or fails ends neither in a hang nor in
other bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rank_folders import SEGMENT, digests, merge_arguments, run, start, write

import paramdelta

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
PARTIAL = ".out.partial"


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))


def torchrun(arguments: list[str], *, ranks: int = 4, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return start(*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *arguments)


def test_one_of_four_is_killed(tmp_path: Path) -> None:
    folders, out = write(tmp_path, rows=4096), tmp_path / "out"
    paramdelta.merge(**folders, out=tmp_path / "whole")
    process = torchrun(merge_arguments(folders, out, "--json"), restarts=3)
    deadline = time.monotonic() + 60
    rank_2: int | None = None
    while not begun(tmp_path / PARTIAL / "journal-2-of-4"):
        rank_2 = rank_2 or find(b"RANK=2", process.pid)
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert rank_2
    os.kill(rank_2, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)  # one document, of rank 0
    assert report["kind"] == "merge"
    assert report["resumed_bytes"] > 0
    assert digests(out) == digests(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def begun(journal: Path) -> bool:
    """Whether a rank has noted a segment; its last one it must not have noted."""
    try:
        lines = journal.read_bytes().splitlines()
    except FileNotFoundError:
        return False
    assert not any(line.startswith(b'{"totals"') for line in lines), "done before it could be killed"
    return any(line.startswith(b'{"segment"') for line in lines)


def find(variable: bytes, parent: int) -> int | None:
    """Return the child process that has a variable in its environment."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            of = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and variable in status.read_bytes().split(b"\0"):
                return int(status.parent.name)
        except OSError:
            continue
    return None


def test_what_is_not_published_ends_all_ranks_alike(tmp_path: Path) -> None:
    folders, out = write(tmp_path, inf=True), tmp_path / "out"
    process = torchrun(merge_arguments(folders, out), ranks=2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's own
    assert stderr.count("results that are not finite") == 1
    assert "exitcode  : 3" in stderr or "exitcode: 3" in stderr
    assert not out.exists()
    report = paramdelta.finalize(out, allow_nonfinite=True)  # nothing is lost
    assert [row.inf for row in report.nonfinite] == [1]


def test_restart_discards_before_any_rank_begins(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    first = run(*merge_arguments(folders, out, "--rank=0", "--world-size=3", "--alpha=2"))
    assert first.returncode == 0, first.stderr
    process = torchrun(merge_arguments(folders, out, "--restart", "--json"), ranks=2)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["resumed_bytes"] == 0
    paramdelta.merge(**folders, out=tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")
