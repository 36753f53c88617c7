"""Runs the command that fine-tunes: in a process group of its own, its output into a log that is shown while it grows,
signals passed on to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from paramdelta.errors import StorageError, escaped, storage_errors

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_SECONDS = 0.1
_TAIL_BYTES = 1 << 14
_TAIL_LINES = 20


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (of a signal minus its number), how long it took, the last lines of its
    output, and whether this process was told to stop meanwhile."""

    exit_code: int
    seconds: float
    tail: tuple[str, ...]
    interrupted: bool

    @property
    def spelled(self) -> str:
        """The end in words: ``exit code 3``, ``signal 9 (SIGKILL)``."""
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        with contextlib.suppress(ValueError):
            return f"signal {-self.exit_code} ({signal.Signals(-self.exit_code).name})"
        return f"signal {-self.exit_code}"


def run(
    arguments: Sequence[str],
    *,
    workdir: Path,
    env: Mapping[str, str],
    log: Path,
    lock: int,
    on_output: Callable[[bytes], None] | None,
    on_start: Callable[[int], None],
) -> Ended:
    """Run a command to its end; its output is added to ``log``. ``lock`` is a descriptor for it to inherit, and
    ``on_start`` gets its number.

    A signal that tells this process to stop is passed on to the command's group, and the command waited for: it may
    have to save something. A second one becomes SIGTERM there, a third SIGKILL. Raises StorageError where the command
    cannot be started.
    """
    with storage_errors(log, "cannot be written"):
        output = open(log, "ab")  # noqa: SIM115
    with output, _Stopping() as stopping:
        begin = output.tell()
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                list(arguments),
                cwd=workdir,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            where = f" (in {workdir})" if error.filename == str(workdir) or not workdir.is_dir() else ""
            text = f"{escaped(str(error.filename or arguments[0]))}: cannot be started{where}: {error.strerror}"
            raise StorageError(error.errno, text, remedy="see `command` and `workdir` in the plan") from None
        stopping.group = process.pid
        stopping.pass_on()
        try:
            on_start(process.pid)
            code = _waited(process, log, begin, on_output)
        except BaseException:
            stopping.end()
            process.wait()
            raise
        return Ended(code, time.monotonic() - started, _tail(log, begin), bool(stopping.came))


def _waited(process: subprocess.Popen[bytes], log: Path, begin: int, on_output: Callable[[bytes], None] | None) -> int:
    """Wait for a process, showing what its log gets meanwhile; return its exit code."""
    with open(log, "rb") as shown:
        shown.seek(begin)
        while (code := process.poll()) is None:
            _show(shown.read(), on_output)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
        _show(shown.read(), on_output)
        return code


def _show(data: bytes, on_output: Callable[[bytes], None] | None) -> None:
    if data and on_output is not None:
        on_output(data)


def _tail(log: Path, begin: int) -> tuple[str, ...]:
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace").replace("\r", "\n")
    return tuple(line for line in text.split("\n") if line.strip())[-_TAIL_LINES:]


class _Stopping:
    """While this is entered, signals that end the process are noted, and passed on to ``group`` as soon as there is
    one. Outside the main thread, which alone gets signals, nothing is done."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.group: int | None = None
        self._passed = 0
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler != signal.SIG_IGN and handler is not None:  # as nohup leaves it; not Python's
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.came.append(number)
        self.pass_on()

    def end(self) -> None:
        """Have the group end, for a reason that is no signal."""
        self.came.append(signal.SIGTERM)
        self.pass_on()

    def pass_on(self) -> None:
        """Send the group what came and it has not been told."""
        if self.group is None:
            return
        for number in self._untold():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, number)

    def _untold(self) -> Iterator[int]:
        while self._passed < len(self.came):
            harder = (self.came[self._passed], signal.SIGTERM, signal.SIGKILL)
            self._passed += 1
            yield harder[min(self._passed, len(harder)) - 1]
