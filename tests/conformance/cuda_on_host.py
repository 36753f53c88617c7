"""The CUDA kernels compiled for the host: the same bodies, with a loop over threads in place of a launch.

``module()`` compiles csrc/cuda and its binding with the C++ compiler into build/cuda-host/, when a source is newer than
what lies there, and imports it. "Device memory" is then the host's.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
FOLDER = ROOT / "build" / "cuda-host"
NAME = "_cuda_host"
# As setup.py's, but for speed of compilation.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", "-Werror"]


def why_not() -> str | None:
    """Return why the kernels cannot be compiled for the host here, or None."""
    if not SOURCES.is_dir():
        return "the C++ sources are only in the source tree"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None if _compiler() else "there is no C++ compiler"


@functools.lru_cache(maxsize=1)
def module() -> ModuleType:
    """Return the module, compiled where need be."""
    target = FOLDER / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    parts = [*sorted((SOURCES / "cuda").glob("*.cu")), SOURCES / "python" / "bind_cuda.cpp"]
    newest = max(path.stat().st_mtime for path in (*SOURCES.rglob("*.hpp"), *parts, Path(__file__)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers that come here at once, one compiles
        if not target.exists() or target.stat().st_mtime < newest:
            _compile(parts, target)
    return load(NAME, target)


def load(name: str, target: Path) -> ModuleType:
    """Import an extension module from its file."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(target))
    spec = importlib.util.spec_from_file_location(name, target, loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    sys.modules[name] = loaded
    return loaded


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _compile(parts: list[Path], target: Path) -> None:
    import pybind11

    compiler = _compiler()
    assert compiler is not None
    includes = [f"-I{SOURCES}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    made = [FOLDER / f"{path.stem}.o" for path in parts]

    def one(path: Path, to: Path) -> None:
        command = [compiler, "-x", "c++", *FLAGS, f"-DPARAMDELTA_CUDA_MODULE={NAME}", *includes, "-c", path, "-o", to]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(int(os.environ.get("PARAMDELTA_BUILD_JOBS", "2"))) as pool:
        list(pool.map(one, parts, made))
    linked = target.with_name(target.name + ".linked")  # a compilation that is ended leaves no half of a module
    subprocess.run([compiler, "-shared", *made, "-o", linked], check=True)
    linked.replace(target)
    for path in made:
        path.unlink()
