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
from paramdelta import coordination
from paramdelta.ranks import Rank

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
    journal = tmp_path / PARTIAL / "journal-2-of-4"
    deadline = time.monotonic() + 60
    while not killed(journal, process.pid):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)  # one document, of rank 0
    assert report["kind"] == "merge"
    assert report["resumed_bytes"] > 0
    assert digests(out) == digests(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def killed(journal: Path, agent: int) -> bool:
    """Kill the rank of a journal once it has noted a segment and has not noted its last one."""
    try:
        lines = journal.read_bytes().splitlines()
    except FileNotFoundError:
        return False
    segments = sum(line.startswith(b'{"segment"') for line in lines)
    if not segments:
        return False
    assert not any(line.startswith(b'{"totals"') for line in lines), "done before it could be killed"
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = status.read_bytes().split(b"\0")
            parent = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"RANK=2" in variables and parent == agent:
            os.kill(int(status.parent.name), signal.SIGKILL)
            return True
    return False


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


def test_a_rank_that_is_refused_ends_the_others(tmp_path: Path) -> None:
    """Without torchrun's agent, which would end them itself: rank 0 has the store."""
    folders = write(tmp_path)
    port = str(free_port())
    ranks = []
    for number in range(2):
        alpha = f"--alpha={1 + number}"
        arguments = merge_arguments(folders, tmp_path / "out", alpha)
        place = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks.append(start(*arguments, **place))
    ended = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], ended
    assert sum("request.alphas" in text for text in ended) == 1
    assert not (tmp_path / "out").exists()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


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


SILENT = """
import sys, time
from paramdelta import coordination
from paramdelta.ranks import Rank
from paramdelta.errors import StorageError
coordination.PULSE_SECONDS, coordination.SILENCE_SECONDS = 0.2, 2.0
rank = Rank(number=int(sys.argv[1]), world=2)
try:
    with coordination.Company(rank, lambda error: {"error": str(error)}) as company:
        if rank.number:
            company._ended.set()  # no sign of life from here on
            time.sleep(30)
        company.finished(lambda: None, None)
except StorageError as error:
    print(error)
"""


def test_a_rank_that_is_silent_is_not_waited_for(tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [start("-c", SILENT, str(number), RANK=str(number), **place) for number in range(2)]
    stdout, stderr = ranks[0].communicate(timeout=25)
    ranks[1].kill()
    ranks[1].communicate()
    assert "rank 1 has given no sign of life" in stdout, stderr


def test_torch_coordinates_only_where_a_launcher_says_how() -> None:
    found = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    rank = Rank(number=0, world=2, source="RANK, WORLD_SIZE")
    assert coordination.coordinated(rank, found)
    assert not coordination.coordinated(rank, {"RANK": "0", "WORLD_SIZE": "2"})
    assert not coordination.coordinated(Rank(number=0, world=2), found)
    assert not coordination.coordinated(None, found)
