"""Runs the command line on hostile folders in a process of its own, whose memory and time are bounded and measured."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_ADDRESS_SPACE = 4 << 30  # a read of a whole sparse terabyte must fail here, not fill the machine
_WALL_SECONDS = 60.0  # a process that waits for a pipe uses no processor time


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and output, the seconds of processor time and the most memory it took."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float

    def document(self) -> Any:
        """Return standard output as JSON, held to the standard: no NaN, no Infinity, escapes for all but ASCII."""
        assert self.out.isascii()
        return json.loads(self.out, parse_constant=_refuse)

    def check_terminal(self) -> None:
        """Check that nothing was printed that a terminal would obey, and that no error was let through."""
        for text in (self.out, self.err):
            assert text.replace("\n", "").isprintable(), repr(text[:2000])
            assert "Traceback" not in text, text


def run(*arguments: str | Path, seconds: float = 10.0, megabytes: float = 400.0) -> Outcome:
    """Run ``paramdelta`` and check that it kept within ``seconds`` of processor time and ``megabytes`` of memory."""
    with tempfile.TemporaryDirectory() as folder:
        peak, out, err = (Path(folder) / name for name in ("peak", "out", "err"))
        command = [sys.executable, __file__, str(peak), *map(os.fspath, arguments)]
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            process = subprocess.Popen(command, stdout=to_out, stderr=to_err, stdin=subprocess.DEVNULL)
            killer = threading.Timer(_WALL_SECONDS, process.kill)
            killer.start()
            _, status, usage = os.wait4(process.pid, 0)
            killer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = [file.read_bytes().decode("utf-8", "surrogateescape") for file in (out, err)]
        assert process.returncode >= 0, f"{command} was ended by signal {-process.returncode}: {texts[1][-2000:]}"
        outcome = Outcome(process.returncode, *texts, usage.ru_utime + usage.ru_stime, int(peak.read_text()) / 1024)
    assert outcome.seconds < seconds, f"{outcome.seconds:.1f} s of processor time"
    assert outcome.megabytes < megabytes, f"{outcome.megabytes:.0f} MB"
    return outcome


def _inside(peak: Path) -> None:
    """Run the command line with a bound on memory, and note the most it took. What wait4 says includes the memory of
    the process that started this one."""
    from paramdelta.cli import main

    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    try:
        main()
    finally:
        status = Path("/proc/self/status").read_text()
        peak.write_text(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def _refuse(text: str) -> NoReturn:
    raise AssertionError(f"{text} is no JSON")


if __name__ == "__main__":
    _peak = Path(sys.argv.pop(1))
    _inside(_peak)
