"""How many threads a call may use: what affinity and cgroup quota allow, shared among the processes of this node."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_VERSION_1: tuple[str, ...] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
_VERSION_2: tuple[str, ...] = ("cpu.max",)


def default_threads() -> int:
    """Return the number of CPUs this process may use, divided by ``LOCAL_WORLD_SIZE``, at least 1.

    The CPUs are those of the affinity mask, or of the cgroup's CPU quota (version 1 or 2) where that is less.
    ``LOCAL_WORLD_SIZE`` is the number of processes on this node, as ``torchrun`` sets it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    if quota is not None:
        cpus = min(cpus, int(quota))
    return max(1, cpus // local_world_size())


def local_world_size() -> int:
    """Return ``LOCAL_WORLD_SIZE`` where it is a positive number, else 1."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


@lru_cache(maxsize=1)
def cgroup_quota() -> float | None:
    """Return the CPUs that the process's cgroup and its parents allow, or None where no quota is set."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    return read_quota(lines, _CGROUPS)


def read_quota(lines: list[str], root: Path) -> float | None:
    """Return the least quota along the paths in ``lines`` (of ``/proc/self/cgroup``) below ``root``, or None."""
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hierarchy, files = root, _VERSION_2
        elif "cpu" in controllers.split(","):
            hierarchy = next((root / d for d in (controllers, "cpu") if (root / d).is_dir()), root)
            files = _VERSION_1
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            quota = _quota_in(hierarchy / folder, files)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_in(folder: Path, files: tuple[str, ...]) -> float | None:
    try:
        # Version 2 writes both numbers into one file, version 1 has a file for each: "max" or -1 mean no
        # quota.
        quota, period = " ".join((folder / file).read_text() for file in files).split()
    except (OSError, ValueError):
        return None
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)
