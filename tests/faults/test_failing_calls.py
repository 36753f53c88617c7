"""A call that fails ends the merge in one error that names the file, the place, the cause and what to do. Nothing is
published, nothing that was there is lost, and the same command finishes the work once the fault is gone."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_runs import ROLES, SHARDS, Workshop, digests

OUTPUT = f".out.partial/output/{SHARDS[0]}"


@dataclass(frozen=True)
class Fault:
    """A rule of the injector, and the words that must be in the error."""

    name: str
    rule: str
    saying: tuple[str, ...]
    code: int = 1


FAULTS = [
    Fault(
        "EIO reading data",
        f"read post/{SHARDS[0]} b:4000000 1 errno=5",
        (SHARDS[0], "at byte", "Input/output", "dmesg"),
    ),
    Fault(
        "EIO reading a header", "read base/model-00002 0 1 errno=5", ("base/model-00002", "Input/output", "dmesg"), 2
    ),
    Fault("EIO reading a config", "read post/config.json 0 1 errno=5", ("post/config.json", "Input/output"), 2),
    Fault("EIO copying a config", "read new_base/config.json 2 1 errno=5", ("new_base/config.json", "Input/output")),
    Fault(
        "EACCES on a shard", "open new_base/model-00001 0 -1 errno=13", ("model-00001", "Permission denied", "owner"), 2
    ),
    Fault("EACCES on a shard later", "open base/model-00001 4 -1 errno=13", ("model-00001", "Permission", "owner")),
    Fault("EMFILE", "open base/model-00001 4 -1 errno=24", ("model-00001", "Too many open files", "ulimit -n")),
    Fault("ENOSPC writing data", f"write {OUTPUT} b:2500000 -1 errno=28", (OUTPUT, "at byte", "No space", "make room")),
    Fault("EDQUOT writing data", f"write {OUTPUT} b:2500000 -1 errno=122", (OUTPUT, "at byte", "quota exceeded")),
    Fault("EIO writing data", f"write {OUTPUT} b:2500000 1 errno=5", (OUTPUT, "at byte", "Input/output", "dmesg")),
    Fault("EFBIG sizing a file", f"truncate {OUTPUT} 0 1 errno=27", (OUTPUT, "File too large", "--max-shard-size")),
    Fault("ENOSPC creating a file", f"create {OUTPUT} 0 1 errno=28", (OUTPUT, "cannot be created", "No space")),
    Fault("EIO closing a file", f"close {OUTPUT} 0 1 errno=5", (OUTPUT, "cannot be created", "Input/output")),
    Fault("EIO syncing a segment", f"sync {OUTPUT} 1 1 errno=5", (OUTPUT, "cannot be synced", "Input/output")),
    Fault(
        "EIO syncing all", "sync output/config.json 0 1 errno=5", ("config.json", "cannot be synced", "Input/output")
    ),
    Fault(
        "EIO syncing the folder", "sync =.out.partial/output 0 1 errno=5", ("output: cannot be synced", "Input/output")
    ),
    Fault("ENOSPC in the journal", "write partial/journal 2 1 errno=28", ("journal", "No space", "make room")),
    Fault("EIO in the journal", "sync partial/journal 3 1 errno=5", ("journal", "cannot be written", "Input/output")),
    Fault("EDQUOT writing a small file", "write output/README 0 1 errno=122", ("README.md", "quota exceeded", "quota")),
    Fault("EROFS making the folder", "mkdir .out.partial 0 1 errno=30", (".out.partial", "Read-only", "--out")),
    Fault("ENOSPC making the folder", "mkdir partial/output 0 1 errno=28", (".out.partial", "No space", "make room")),
    Fault("ENOSPC making the lock", "create partial/lock 0 1 errno=28", (".out.partial", "No space", "make room")),
    Fault("no locks", "flock partial/lock 0 1 errno=37", (".out.partial", "No locks available", "file system")),
    Fault("EACCES publishing", "rename /out 0 1 errno=13", ("/out: cannot be published: Permission denied", "owner")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_ends_in_one_error_and_the_command_repeats(workshop: Workshop, fault: Fault) -> None:
    said = workshop.must_fail(fault.rule, saying=fault.saying, code=fault.code)
    assert not workshop.out.exists()
    kept = "the same command continues there" in said
    assert workshop.partial.exists() == kept  # what is left is told, what is told is left
    if kept:
        assert (workshop.partial / "journal").exists()
        workshop.must_merge()
        assert not workshop.partial.exists()
    assert sorted(p.name for p in workshop.root.iterdir()) == sorted([*ROLES, *(["out"] if kept else [])])


@pytest.mark.parametrize("fault", [f for f in FAULTS if "writing" in f.name], ids=lambda f: f.name)
def test_without_segments_nothing_stays(workshop: Workshop, fault: Fault) -> None:
    workshop.must_fail(fault.rule, saying=fault.saying, segments=False)
    assert not workshop.partial.exists()
    assert not workshop.out.exists()


@pytest.mark.parametrize(
    "rule",
    [
        f"write {OUTPUT} b:2500000 -1 errno=28",
        "sync output/config.json 0 1 errno=5",
        "exchange /out 0 1 errno=13",
    ],
)
def test_overwrite_keeps_the_old_folder_until_the_new_one_is_there(workshop: Workshop, rule: str) -> None:
    workshop.out.mkdir()
    (workshop.out / "paramdelta.json").write_text("{}")
    before = digests(workshop.out)
    said = workshop.must_fail(rule, saying=[os.strerror(int(rule.split("=")[1]))], extra=["--overwrite"])
    assert digests(workshop.out) == before
    assert "the same command continues there" in said
    journal = (workshop.partial / "journal").read_text().count("segment")
    done = workshop.must_merge(extra=["--overwrite", "--json"])
    assert json.loads(done.stdout)["resumed_bytes"] == journal * (1 << 20)


def test_an_unsynced_parent_is_told_from_a_failed_merge(workshop: Workshop, tmp_path: Path) -> None:
    """The last call of all: the folder is there and complete, but a power cut could take it away."""
    log = tmp_path / "log"
    workshop.must_merge(log=log)
    parent = f"sync {workshop.root}\n"
    text = log.read_text()
    assert text.count(parent) == 1  # it is the last sync
    before = text[: text.index(parent)].count("sync ")
    rules = f"sync {workshop.root} {before} -1 errno={errno.EIO}"
    saying = ["/b: is complete, but may be gone after a power cut", "sync -f"]
    workshop.must_fail(rules, saying=saying, out=workshop.root / "b")
    assert digests(workshop.root / "b") == workshop.expected


def test_errors_are_documents_with_json(workshop: Workshop) -> None:
    done = workshop.merge(f"write {OUTPUT} b:2500000 -1 errno=28", extra=["--json"])
    document = json.loads(done.stdout)
    assert (document["kind"], document["error"], document["exit_code"]) == ("error", "StorageError", 1)
    (complaint,) = document["complaints"]
    assert "No space left" in complaint["problem"]
    assert "make room" in complaint["remedy"]
    assert document["left"] == [str(workshop.partial)]
