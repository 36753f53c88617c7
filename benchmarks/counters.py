"""Counts instructions by the processor's own counter, for the kernels in this process and for whole processes.

``perf_event_open(2)`` through ctypes: instructions of user mode, of a thread and of all threads and processes that it
starts afterwards. They depend on the code and its input, not on how busy the machine is. Many virtual machines show no
such counter and some containers forbid the call: ``why_not`` tells which.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from functools import cache
from pathlib import Path

NUMBERS = {"x86_64": 298, "aarch64": 241}  # of the system call
HARDWARE, SOFTWARE = 0, 1  # types of events
INSTRUCTIONS = 1  # of HARDWARE
PAGE_FAULTS = 2  # of SOFTWARE
DISABLED, INHERIT, EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR, ENABLE_ON_EXEC = (1 << bit for bit in (0, 1, 5, 6, 12))
TIME_ENABLED, TIME_RUNNING = 1, 2
IOC_ENABLE, IOC_DISABLE, IOC_RESET = 0x2400, 0x2401, 0x2403
CLOSE_ON_EXEC = 8
ATTRIBUTES = struct.Struct("=IIQQQQQIIQ")  # the first published size of struct perf_event_attr, 64 bytes


class CounterError(Exception):
    """There is no such counter; says why."""


class Counter:
    """One counter over this thread and whatever it starts from here on.

    With ``on_exec`` it rests here and counts in children alone, from the program that they turn into.
    """

    def __init__(self, *, on_exec: bool = False, kind: int = HARDWARE, event: int = INSTRUCTIONS) -> None:
        number = NUMBERS.get(platform.machine())
        if number is None:
            raise CounterError(f"perf_event_open is not known for {platform.machine()}")
        flags = DISABLED | INHERIT | EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR | (ENABLE_ON_EXEC if on_exec else 0)
        packed = ATTRIBUTES.pack(kind, ATTRIBUTES.size, event, 0, 0, TIME_ENABLED | TIME_RUNNING, flags, 0, 0, 0)
        attributes = ctypes.create_string_buffer(packed, len(packed))
        call = ctypes.CDLL(None, use_errno=True).syscall
        call.restype = ctypes.c_long
        fd = call(ctypes.c_long(number), attributes, 0, -1, -1, ctypes.c_ulong(CLOSE_ON_EXEC))
        if fd < 0:
            raise CounterError(_reason(ctypes.get_errno()))
        self._fd = int(fd)

    def start(self) -> None:
        """Count from zero."""
        fcntl.ioctl(self._fd, IOC_RESET)
        fcntl.ioctl(self._fd, IOC_ENABLE)

    def stop(self) -> int | None:
        """Stop and return the count; None where the counter was lent to others for a part of the time."""
        fcntl.ioctl(self._fd, IOC_DISABLE)
        count, enabled, running = struct.unpack("=QQQ", os.read(self._fd, 24))
        return int(count) if running == enabled else None

    def close(self) -> None:
        os.close(self._fd)


def _reason(code: int) -> str:
    if code in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return "this machine shows no instruction counter, as is usual in virtual machines"
    if code in (errno.EACCES, errno.EPERM):
        level = Path("/proc/sys/kernel/perf_event_paranoid")
        found = level.read_text().strip() if level.exists() else "unknown"
        return f"not permitted: kernel.perf_event_paranoid is {found} (2 is enough), or the container forbids the call"
    return os.strerror(code)


@cache
def why_not() -> str | None:
    """Return None where instructions can be counted, else the reason."""
    try:
        Counter().close()
    except (CounterError, OSError) as error:
        return str(error)
    return None
