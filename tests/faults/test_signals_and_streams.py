"""Signals in the middle of a merge, and standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from faulty_runs import SHARDS, TIMEOUT, Workshop, digests, program

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
MIDDLE = f"write output/{SHARDS[0]} b:2500000 1"


@pytest.mark.parametrize("segments", [True, False], ids=["segments", "one segment"])
@pytest.mark.parametrize("sent", SIGNALS, ids=lambda s: s.name)
def test_a_signal_ends_the_merge(workshop: Workshop, sent: signal.Signals, segments: bool) -> None:
    rule = f"{MIDDLE} signal={sent}"
    said = workshop.must_fail(rule, saying=["interrupted: nothing was published; "], code=130, segments=segments)
    assert not workshop.out.exists()
    assert workshop.partial.exists() == segments
    assert ("the same command continues there" if segments else "the temporary folder is removed") in said
    if segments:
        assert json.loads(workshop.must_merge(extra=["--json"]).stdout)["resumed_bytes"] > 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_while_publishing_waits_for_its_end(workshop: Workshop, overwrite: bool) -> None:
    if overwrite:
        workshop.out.mkdir()
        (workshop.out / "paramdelta.json").write_text("{}")
    rule = f"exchange,rename {workshop.out} 0 1 signal={signal.SIGTERM}"
    extra = ["--overwrite"] if overwrite else []
    workshop.must_fail(rule, saying=[f"interrupted: {workshop.out} is published, complete"], code=130, extra=extra)
    assert digests(workshop.out) == workshop.expected
    assert not workshop.partial.exists()


def test_nohup_is_heeded(workshop: Workshop) -> None:
    command = ["nohup", *workshop.command()]
    environment = workshop.environment(f"{MIDDLE} signal={signal.SIGHUP}")
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert digests(workshop.out) == workshop.expected


def shell(workshop: Workshop, redirection: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run a merge in a shell with a redirection; return its own exit code and what it said."""
    line = f'"$@" {redirection}'
    command = ["bash", "-c", f"set -o pipefail; {line}", "bash", *workshop.command(*extra)]
    return subprocess.run(command, env=workshop.environment(), capture_output=True, text=True, timeout=TIMEOUT)


@pytest.mark.parametrize("extra", [(), ("--json",), ("--quiet",)], ids=["text", "json", "quiet"])
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", "</dev/null", "| head -1"])
def test_closed_streams_harm_nothing(workshop: Workshop, redirection: str, extra: tuple[str, ...]) -> None:
    """A stream that is closed leaves its number to the next file opened: nothing may be printed into that."""
    done = shell(workshop, redirection, *extra)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert digests(workshop.out) == workshop.expected


def test_no_file_takes_the_number_of_a_closed_stream(workshop: Workshop, tmp_path: Path) -> None:
    """Looked at from outside, while data is written: what lies at descriptors 0, 1 and 2."""
    seen = tmp_path / "seen"
    look = program(tmp_path / "look", f"for n in 0 1 2; do readlink /proc/$PPID/fd/$n; done > {seen}")
    environment = workshop.environment(f"{MIDDLE} run={look}")
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *workshop.command()]
    assert subprocess.run(command, env=environment, timeout=TIMEOUT).returncode == 0
    assert seen.read_text().split() == ["/dev/null"] * 3


@pytest.mark.parametrize("extra", [(), ("--json",)], ids=["text", "json"])
def test_a_full_disk_under_standard_output_is_told(workshop: Workshop, extra: tuple[str, ...]) -> None:
    done = shell(workshop, "> /dev/full", *extra)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert f"standard output: No space left on device; {workshop.out} is published, complete" in done.stderr
    assert digests(workshop.out) == workshop.expected


def test_a_reader_that_went_away_takes_the_document_with_it(workshop: Workshop, tmp_path: Path) -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        assert reader.stdin is not None
        done = workshop.merge(extra=["--json"], stdout=reader.stdin)
        text = workshop.merge(stdout=reader.stdin, out=tmp_path / "text")
    assert done.returncode == 1
    assert done.stderr == f"error: standard output: Broken pipe; {workshop.out} is published, complete\n"
    assert (text.returncode, text.stderr) == (0, "")
    assert digests(workshop.out) == digests(tmp_path / "text") == workshop.expected


def test_messages_that_cannot_be_shown_change_nothing(workshop: Workshop) -> None:
    done = shell(workshop, "2>/dev/full")
    assert done.returncode == 0
    (workshop.root / "post" / SHARDS[1]).unlink()
    assert shell(workshop, "2>/dev/full", "--overwrite").returncode == 2
