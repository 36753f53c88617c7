"""Real file systems that fill up or are read-only, mounted in a mount namespace of the test's own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from faulty_runs import ROLES, TIMEOUT, Workshop, digests, program

MIB = 1 << 20
KINDS = {
    "tmpfs": "mount -t tmpfs -o size={size} tmpfs {disk}",
    "ext4": "truncate -s {size} {disk}.img && mkfs.ext4 -q -m 0 {disk}.img && mount -o loop {disk}.img {disk}",
}


@cache
def why_not(kind: str, folder: Path) -> str:
    """Return why such a file system cannot be mounted here, an empty string where it can."""
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    disk = folder / "probe"
    disk.mkdir()
    command = ["unshare", "--mount", "sh", "-c", KINDS[kind].format(size=32 * MIB, disk=disk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    return "" if done.returncode == 0 else f"{kind} cannot be mounted: {done.stderr.strip()}"


def on_disk(workshop: Workshop, kind: str, size: int, *steps: str) -> list[str]:
    """Run shell steps where ``disk`` is a file system of ``size`` bytes of its own; return what they print. ``MERGE``
    stands for a merge into disk/out; its exit code is printed."""
    reason = why_not(kind, workshop.root)
    if reason:
        pytest.skip(reason)
    disk = workshop.root / "disk"
    disk.mkdir()
    merge = f"{shlex.join(workshop.command(out=disk / 'out'))} 2>&1; echo code=$?"
    filler = program(workshop.root / "fill", f"head -c 1G /dev/zero > {disk}/filler 2>/dev/null")
    faults = {"LD_PRELOAD": workshop.injector, "FAULT_RULES": f"write partial/output b:1500000 1 run={filler}"}
    filled = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in faults.items()) + f" {merge}"
    script = "\n".join([KINDS[kind].format(size=size, disk=disk), f"cd {disk}", *steps])
    script = script.replace("FILLED_MERGE", filled).replace("MERGE", merge)
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, env=workshop.environment(), capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_too_small_from_the_start(workshop: Workshop, kind: str) -> None:
    lines = on_disk(workshop, kind, 16 * MIB, "MERGE", "ls -A | grep -v lost+found")
    error, remedy, code = lines
    assert "/disk: the output needs 23," in error
    assert "are free" in error
    assert remedy == "    → make room on that file system, then repeat the command"
    assert code == "code=1"


@pytest.mark.parametrize("kind", KINDS)
def test_space_that_vanishes_while_it_runs(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    """Another writer fills the disk in the middle. Once there is room, the same command continues."""
    result = tmp_path / "result"
    steps = ["FILLED_MERGE", "ls -A | grep -v lost", "rm filler", "MERGE", f"cp -r out {result}", "ls -A"]
    lines = on_disk(workshop, kind, 48 * MIB, *steps)
    first, rest = lines[: lines.index("code=1")], lines[lines.index("code=1") + 1 :]
    text = "\n".join(first)
    assert "No space left on device" in text
    assert "make room on that file system" in text
    assert ".out.partial: the same command continues there" in text
    assert text.count("error: ") == 1
    assert rest[:2] == [".out.partial", "filler"]
    assert "code=0" in rest
    assert any("continued" in line for line in rest)
    assert rest[-1] == "out"
    assert digests(result) == workshop.expected


def test_a_read_only_file_system(workshop: Workshop) -> None:
    lines = on_disk(workshop, "tmpfs", 48 * MIB, f"mount -o remount,ro {workshop.root / 'disk'}", "MERGE", "ls -A")
    assert any("/disk cannot be written to: it lies on a file system that is mounted read-only" in x for x in lines)
    assert lines[-1] == "code=2"


def test_inputs_on_a_read_only_file_system(workshop: Workshop) -> None:
    reason = why_not("tmpfs", workshop.root)
    if reason:
        pytest.skip(reason)
    disk = workshop.root / "disk"
    disk.mkdir()
    inputs = [part.replace(str(workshop.root), str(disk), 1) for part in workshop.command()[:-1] if part != "merge"]
    folders = " ".join(str(workshop.root / role) for role in ROLES)
    merge = shlex.join([*inputs[:3], "merge", *inputs[3:], f"--out={workshop.out}", "--json"])
    script = f"mount -t tmpfs tmpfs {disk} && cp -r {folders} {disk} && mount -o remount,ro {disk} && {merge}"
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, env=workshop.environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(workshop.out)
    assert digests(workshop.out) == workshop.expected
