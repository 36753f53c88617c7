"""Runs a command to its end and says what it took: time, peak resident memory, bytes read and written.

The command is started by this file run as a script of its own, whose 15 megabytes are the floor of what it can see
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


@dataclass(frozen=True)
class Usage:
    """What one run took, in seconds and bytes. Bytes read and written are those of read and write calls (mapped
    files do not count), None where the kernel does not tell. Children that the command waited for are included."""

    wall: float
    user: float
    sys: float
    peak_rss: int
    read: int | None
    written: int | None


class CommandError(Exception):
    """A measured command ended with another exit code than 0; carries the end of what it said."""


def measure(command: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> Usage:
    """Run ``command`` once, with ``env`` added to this process's environment; raise CommandError if it fails."""
    spec = json.dumps({"command": command, "env": env or {}, "cwd": str(cwd) if cwd else None})
    done = subprocess.run([sys.executable, "-I", __file__], input=spec, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    if answer["code"] != 0:
        raise CommandError(f"exit code {answer['code']}: {answer['said'].strip()[-2000:]}")
    return Usage(**answer["usage"])


def _bytes_moved(pid: int) -> tuple[int | None, int | None]:
    """Read what /proc says of an ended process that was not yet waited for."""
    try:
        with open(f"/proc/{pid}/io") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
    except OSError:
        return None, None
    return int(fields["rchar"]), int(fields["wchar"])


def _launch() -> None:
    spec = json.load(sys.stdin)
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
        read, written = _bytes_moved(child.pid)
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
                "read": read,
                "written": written,
            },
        }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _launch()
