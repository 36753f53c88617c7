"""Calls that are interrupted or come back short are no faults: they are continued, and no output byte differs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from faulty_runs import Workshop


@pytest.mark.parametrize(
    "rule",
    [
        "read safetensors 0 -1 short=4099",
        "write .out.partial/output 0 -1 short=7919",
        "read * 0 400 short=1",
        "write .out.partial 0 60 short=1",
    ],
    ids=["short reads", "short writes", "reads of one byte", "writes of one byte"],
)
def test_short_calls_are_continued(workshop: Workshop, rule: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workshop.must_merge(rule, log=log)
    kind = rule.split()[0]
    assert sum(line.startswith(kind) for line in log.read_text().splitlines()) > 60


@pytest.mark.parametrize("calls", ["read", "write", "open,create", "sync", "truncate,flock"])
def test_interrupted_calls_are_made_again(workshop: Workshop, calls: str, tmp_path: Path) -> None:
    """A storm of EINTR: a hundred in a row, somewhere in the middle and at the start."""
    log = tmp_path / "log"
    rules = [f"{calls} {workshop.root} {skip} 100 errno={errno.EINTR}" for skip in (0, 40)]
    workshop.must_merge(*rules, log=log)
    assert log.read_text().count(f"={errno.EINTR}\n") >= 100
