"""Runs a command to its end and says what it took: time, peak resident memory, and counts that do not depend on how
busy the machine is: bytes and calls of input and output, page faults, instructions.

The command is started by a small process that runs ``launch``, whose 15 megabytes are the floor of what it can see
as peak memory: a child inherits the peak of the process that forked it, and the benchmark's own is large.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import counters

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = "import sys; sys.path.insert(0, sys.argv[1]); from benchmarks import process; process.launch()"
# Names here, and in /proc/PID/io.
IO_FIELDS = {
    "read": "rchar",
    "written": "wchar",
    "read_calls": "syscr",
    "write_calls": "syscw",
    "storage_read": "read_bytes",
    "storage_written": "write_bytes",
}


@dataclass(frozen=True)
class Usage:
    """What one run took, in seconds, bytes and counts. Children that the command waited for are included.

    ``read`` and ``written`` are the bytes of read and write calls (mapped files do not count), ``read_calls`` and
    ``write_calls`` how many there were, ``storage_*`` the bytes that storage was asked for; None where the kernel does
    not tell. ``instructions`` are those of user mode, None where they cannot be counted.
    """

    wall: float
    user: float
    sys: float
    peak_rss: int
    read: int | None
    written: int | None
    read_calls: int | None
    write_calls: int | None
    storage_read: int | None
    storage_written: int | None
    minor_faults: int
    major_faults: int
    instructions: int | None


class CommandError(Exception):
    """A measured command ended with another exit code than 0; carries the end of what it said."""


def measure(command: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> Usage:
    """Run ``command`` once, with ``env`` added to this process's environment; raise CommandError if it fails."""
    spec = json.dumps({"command": command, "env": env or {}, "cwd": str(cwd) if cwd else None})
    launcher = [sys.executable, "-I", "-c", LAUNCHER, str(ROOT)]
    done = subprocess.run(launcher, input=spec, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    if answer["code"] != 0:
        raise CommandError(f"exit code {answer['code']}: {answer['said'].strip()[-2000:]}")
    return Usage(**answer["usage"])


def _io(pid: int) -> dict[str, int | None]:
    """Read what /proc says of an ended process that was not yet waited for."""
    try:
        with open(f"/proc/{pid}/io") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
    except OSError:
        fields = {}
    return {name: int(fields[field]) if field in fields else None for name, field in IO_FIELDS.items()}


def launch() -> None:
    """Run the command that standard input describes; print what it took."""
    spec = json.load(sys.stdin)
    counter = None if counters.why_not() else counters.Counter(on_exec=True)
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        child = subprocess.Popen(
            spec["command"],
            cwd=spec["cwd"],
            env=os.environ | spec["env"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - start
        moved = _io(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        answer = {
            "code": child.returncode,
            "said": said.read().decode(errors="replace"),
            "usage": {
                "wall": wall,
                "user": usage.ru_utime,
                "sys": usage.ru_stime,
                "peak_rss": usage.ru_maxrss * 1024,
                **moved,
                "minor_faults": usage.ru_minflt,
                "major_faults": usage.ru_majflt,
                "instructions": counter.stop() if counter else None,
            },
        }
    json.dump(answer, sys.stdout)
