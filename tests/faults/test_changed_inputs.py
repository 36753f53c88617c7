"""An input that changes while a merge runs ends it: nothing is published, and nothing made of it counts as finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faulty_runs import ROLES, SHARDS, Workshop, digests, program

import paramdelta
from paramdelta.errors import StorageError

CHANGES = {
    "truncated": ("truncate -s 5000 {file}", "bytes and has 5,000"),
    "grown": ("printf x >> {file}", "it had 2,097,"),
    "modified": ("printf x | dd of={file} bs=1 seek=1500000 conv=notrunc status=none", "it was last written 2"),
    "replaced": ("cp -p {file} {file}.new && mv {file}.new {file}", "another file has taken its place"),
    "removed": ("rm {file}", "went away while the merge ran: No such file"),
}


@pytest.mark.parametrize("moment", ["planned", "while it runs", "at the end"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_an_error_that_names_the_file(workshop: Workshop, change: str, moment: str, tmp_path: Path) -> None:
    file = workshop.root / "base" / SHARDS[1]
    command, saying = CHANGES[change]
    script = program(tmp_path / "change", command.format(file=file))
    when = {
        "planned": "flock partial/lock 0 1",  # headers are read by then, data is not
        "while it runs": "sync partial/journal 3 1",
        "at the end": "create output/paramdelta.json 0 1",
    }[moment]
    saying = [f"{file}: ", saying, "while a merge runs"]
    if moment == "planned" and change == "removed":
        saying = [f"{file}: ", "No such file"]
    said = workshop.must_fail(f"{when} run={script}", saying=saying, segments=moment != "planned")
    assert not workshop.out.exists()
    assert workshop.partial.exists() == ("continues there" in said)


def test_no_segment_of_changed_inputs_is_continued(workshop: Workshop, tmp_path: Path) -> None:
    """The change lies in the middle of a file, where no fingerprint looks: the time of modification tells it."""
    file = workshop.root / "post" / SHARDS[0]
    script = program(tmp_path / "change", f"printf x | dd of={file} bs=1 seek=1500000 conv=notrunc status=none")
    workshop.must_fail(f"sync partial/journal 3 1 run={script}", saying=["changed while the merge ran"])
    done = workshop.merge()
    assert done.returncode == 2
    assert f"inputs.post.{SHARDS[0]}.modified" in done.stderr
    assert "--restart" in done.stderr
    assert workshop.merge(extra=["--restart"]).returncode == 0
    fresh = workshop.root / "fresh"
    assert workshop.merge(out=fresh).returncode == 0
    assert digests(workshop.out) == digests(fresh) != workshop.expected


def test_a_shard_that_becomes_a_pipe_does_not_hang(workshop: Workshop, tmp_path: Path) -> None:
    file = workshop.root / "base" / SHARDS[1]
    script = program(tmp_path / "change", f"rm {file} && mkfifo {file}")
    rule = f"flock partial/lock 0 1 run={script}"
    workshop.must_fail(rule, saying=[f"{file}: changed while the merge ran"])


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_streams_yield_nothing_made_of_changed_inputs(workshop: Workshop, framework: str) -> None:
    if framework == "pt":
        pytest.importorskip("torch", reason="torch is not installed")
    folders = {role: workshop.root / role for role in ROLES}
    stream = paramdelta.stream(**folders, framework=framework, batch_bytes=1 << 20)
    name, _ = next(stream)
    assert name == "a.weight"
    file = workshop.root / "base" / SHARDS[1]
    os.utime(file, ns=(1, 1))
    with pytest.raises(StorageError, match=r"model-00002.*: changed while the merge ran: it was last written"):
        list(stream)
