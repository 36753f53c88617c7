"""What is on disk when: synced before it is named, noted after it is synced, and never a moment without a whole
folder, whatever the call at which the process is killed."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest
from faulty_runs import Workshop, digests

CALLS = "sync,exchange,rename,unlink,mkdir"
NO_EXCHANGE = "exchange * 0 -1 errno=22"


def calls_of(log: Path) -> list[tuple[str, str]]:
    """Return the calls of a log that did not fail, as (call, path)."""
    rows = (line.split(" ") for line in log.read_text().splitlines())
    return [(row[0], row[1]) for row in rows if len(row) == 2]


@pytest.mark.parametrize("segments", [True, False], ids=["segments", "one segment"])
@pytest.mark.parametrize("way", ["new", "exchange", "two renames"])
def test_everything_is_synced_before_it_has_its_name(
    workshop: Workshop, tmp_path: Path, way: str, segments: bool
) -> None:
    log, output = tmp_path / "log", workshop.partial / "output"
    if way != "new":
        old_folder(workshop)
    rules = [NO_EXCHANGE] if way == "two renames" else []
    workshop.must_merge(*rules, log=log, segments=segments, extra=["--overwrite"])
    calls = calls_of(log)
    named = [i for i, (call, path) in enumerate(calls) if call in ("exchange", "rename") and path == str(workshop.out)]
    assert len(named) == 1
    before, after = calls[: named[0]], calls[named[0] + 1 :]
    for name in workshop.expected:
        last_write = max(i for i, c in enumerate(before) if c == ("write", f"{output}/{name}"))
        assert ("sync", f"{output}/{name}") in before[last_write:], f"{name} is not synced after its last write"
    last_created = max(i for i, (call, path) in enumerate(before) if call == "create" and path.startswith(f"{output}/"))
    assert ("sync", str(output)) in before[last_created:]
    assert ("sync", str(workshop.root)) in after
    removed = [i for i, (call, path) in enumerate(after) if call == "unlink"]
    assert not removed or after.index(("sync", str(workshop.root))) < removed[0]


def test_a_segment_is_noted_after_its_data_is_synced(workshop: Workshop, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workshop.must_merge(log=log)
    calls = calls_of(log)
    journal = str(workshop.partial / "journal")
    notes = [i for i, c in enumerate(calls) if c == ("write", journal)]
    assert len(notes) == 7  # what the merge is, and six segments
    for number, (start, end) in enumerate(pairwise(notes)):
        between = calls[start:end]
        data = [path for call, path in between if call == "sync" and "/output/model-" in path]
        assert data, f"segment {number} is noted before its data is synced"
        assert between.index(("sync", journal)) < between.index(("sync", data[0]))
    assert ("sync", journal) in calls[notes[-1] :]


def old_folder(workshop: Workshop) -> dict[str, str]:
    """Put a folder of an earlier merge where the output goes; return its digests."""
    workshop.out.mkdir()
    (workshop.out / "paramdelta.json").write_text("{}")
    (workshop.out / "old").write_text("old")
    return digests(workshop.out)


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_each_of_the_last_calls(workshop: Workshop, tmp_path: Path, way: str) -> None:
    """With --overwrite there is a whole folder at every moment: the old one or the new one. Where a file system cannot
    exchange folders, there is one call before which the old one lies in the temporary folder."""
    log = tmp_path / "log"
    rules = [NO_EXCHANGE] if way == "two renames" else []
    old_folder(workshop)
    workshop.must_merge(*rules, log=log, segments=False, extra=["--overwrite"])
    counted = [line.split()[0] in CALLS.split(",") for line in log.read_text().splitlines()]
    publishing = sum(counted)
    assert publishing > 8
    old = None
    seen: list[str] = []
    for number in range(publishing - 6, publishing + 6):  # unlinks by relative names are not in the log
        if old is None or digests(workshop.out) == workshop.expected:
            for file in workshop.out.iterdir():
                file.unlink()
            workshop.out.rmdir()
            old = old_folder(workshop)
        kill = f"{CALLS} * {number} 1 kill"
        done = workshop.merge(*rules, kill, segments=False, extra=["--overwrite"])
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        if workshop.out.exists():
            found = digests(workshop.out)
            assert found in (old, workshop.expected)
            seen.append("old" if found == old else "new")
            continue
        assert way == "two renames"
        assert digests(workshop.partial / "replaced") == old
        seen.append("between")
        kept = workshop.merge(segments=False)  # without --overwrite, the old folder is put back and stays
        assert kept.returncode == 1
        assert "which is there again as it was" in kept.stderr
        assert digests(workshop.out) == old
    assert "old" in seen
    assert "new" in seen
    assert seen == sorted(seen, key=["old", "between", "new"].index)
    assert seen.count("between") == (way == "two renames")
    workshop.must_merge(extra=["--overwrite"])
    assert not workshop.partial.exists()


def test_killed_between_two_renames_the_same_command_goes_on(workshop: Workshop) -> None:
    old_folder(workshop)
    done = workshop.merge(NO_EXCHANGE, f"rename {workshop.out} 0 1 kill", extra=["--overwrite"])
    assert done.returncode == -signal.SIGKILL
    assert not workshop.out.exists()
    workshop.must_merge(NO_EXCHANGE, extra=["--overwrite"])
    assert not workshop.partial.exists()
