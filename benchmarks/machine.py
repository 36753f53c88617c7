"""What a result depends on beside the code: the machine, the versions and the commit. No host names, no paths."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import bound, counters

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("paramdelta", "numpy", "ml_dtypes", "safetensors", "torch", "transformers", "pytest-benchmark")
# The names of x86-64, then those of aarch64.
ISA_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    *("avx512_vbmi", "avx512_fp16", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
)


def threads_allowed() -> int:
    """Return how many threads this process may run at once (affinity)."""
    return len(os.sched_getaffinity(0))


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpuinfo(*keys: str) -> str | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def _caches() -> list[dict[str, str | None]]:
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    parts = ("level", "type", "size", "shared_cpu_list")
    return [{part: _text(folder / part) for part in parts} for folder in folders]


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_machine() -> dict[str, Any]:
    """Return the processor, its caches and instruction sets, the memory and the kernel."""
    flags = set((_cpuinfo("flags", "Features") or "").split())
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads_allowed": threads_allowed(),
        "isa_flags": [flag for flag in ISA_FLAGS if flag in flags],
        "virtual": "hypervisor" in flags,
        "caches": _caches(),
        "memory_bytes": _memory_bytes(),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "instructions": counters.why_not() or "counted",
        "load_at_start": os.getloadavg()[0],
    }


def mergekit_python(executable: str) -> Path:
    """Return the interpreter of the environment that ``mergekit-yaml`` lies in."""
    return Path(executable).parent / "python"


def describe_versions() -> dict[str, str | None]:
    """Return the versions of what runs: interpreter, packages, compiler, coreutils, and mergekit's packages."""
    found: dict[str, str | None] = {"python": platform.python_version(), "libc": " ".join(platform.libc_ver())}
    found |= versions_of(PACKAGES)
    compiler = bound.compiler()
    for name, command in (("compiler", compiler), ("cp", "cp")):
        found[name] = ((_output(command, "--version") if command else None) or "").partition("\n")[0] or None
    mergekit = os.environ.get("PARAMDELTA_MERGEKIT")
    if mergekit:
        code = (
            "import importlib.metadata as m, json;"
            "print(json.dumps({p: m.version(p) for p in ('mergekit', 'torch', 'transformers', 'safetensors')}))"
        )
        answer = _output(str(mergekit_python(mergekit)), "-c", code)
        packages = json.loads(answer) if answer else {}
        found |= {f"mergekit: {name}": version for name, version in packages.items()}
    return found


def versions_of(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Return the versions of packages, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def cuda_versions() -> dict[str, str | None]:
    """Return the versions of nvcc and of the driver, None where there is none."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release [\d.]+, V([\d.]+)", _output(nvcc, "--version") or "")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"nvcc": release[1] if release else None, "driver": driver.splitlines()[0] if driver else None}


def describe_commit() -> dict[str, Any]:
    """Return the commit, and whether tracked files differ from it. Both are None outside a git checkout."""
    commit = _output("git", "rev-parse", "HEAD", cwd=ROOT)
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=ROOT)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds ``path`` (``tmpfs``, ``ext4``)."""
    told = _output("df", "--output=fstype", str(path)) or "Type\nunknown"
    return told.splitlines()[-1]
