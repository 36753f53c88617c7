"""Ranks that torch.distributed coordinates without torchrun's agent, which would end them itself: rank 0 holds the
store."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
from rank_folders import merge_arguments, start, write

from paramdelta import coordination
from paramdelta.ranks import Rank

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def test_a_rank_that_is_refused_ends_the_others(tmp_path: Path) -> None:
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
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


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
