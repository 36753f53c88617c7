"""Builds paramdelta._cuda: nvcc compiles the kernels of csrc/cuda, the C++ compiler binds and links them.

PARAMDELTA_BUILD_CUDA says whether: ``auto`` (where nvcc is found; the default), ``1`` (or fail), ``0``.
PARAMDELTA_CUDA_TARGETS picks architectures, such as ``90`` or ``80,90``, for builds that are tried out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension, build_ext

# Machine code for A100, H100, B200 and RTX 50 (and what is binary compatible with each: a later minor release of its
# major one); every other device compiles the PTX of the last.
TARGETS = (80, 90, 100, 120)

# -fmad=false: as -ffp-contract=off. Division and square roots stay IEEE's, subnormals stay (nvcc's defaults). Machine
# code is not compressed, so that what the file holds can be read (tests/test_cuda_build.py).
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "--no-compress"]


def find_nvcc() -> str | None:
    """Return nvcc's path: that of CUDA_HOME, on PATH, or of the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else []
    return shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def wanted() -> bool:
    """Return whether to build; end with an error where it is asked for and cannot be."""
    asked = os.environ.get("PARAMDELTA_BUILD_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"PARAMDELTA_BUILD_CUDA is {asked!r}: expected auto, 0 or 1")
    if asked == "1" and find_nvcc() is None:
        raise SystemExit("PARAMDELTA_BUILD_CUDA=1, but there is no nvcc on PATH nor in CUDA_HOME/bin")
    return asked != "0" and find_nvcc() is not None


def targets() -> tuple[int, ...]:
    """Return the architectures to build for."""
    chosen = os.environ.get("PARAMDELTA_CUDA_TARGETS")
    return tuple(int(t) for t in chosen.split(",")) if chosen else TARGETS


def extension(flags: list[str]) -> Pybind11Extension:
    """Return the extension; its objects from nvcc come from ``Build``."""
    return Pybind11Extension(
        "paramdelta._cuda",
        ["csrc/python/bind_cuda.cpp"],
        include_dirs=["csrc"],
        depends=[*glob("csrc/**/*.hpp", recursive=True), *glob("csrc/cuda/*.cu")],
        extra_compile_args=flags,
        extra_link_args=["-pthread", "-Wl,--exclude-libs,ALL"],
        cxx_std=17,
    )


class Build(build_ext):  # type: ignore[misc]
    """Compiles csrc/cuda with nvcc before the extension that needs it."""

    def build_extension(self, ext: Any) -> None:
        """Build one extension."""
        if ext.name == "paramdelta._cuda":
            ext.extra_objects = [*self._objects(), str(self._runtime())]
            ext.libraries = ["dl", "rt"]
        super().build_extension(ext)

    def _objects(self) -> list[str]:
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        newest = max(Path(p).stat().st_mtime for p in (*glob("csrc/**/*.hpp", recursive=True), __file__))
        code = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets()]
        last = targets()[-1]
        code.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        names = ",".join(code)

        jobs = int(os.environ.get("PARAMDELTA_BUILD_JOBS", "0")) or os.cpu_count() or 1

        def compile_one(source: str) -> str:
            made = folder / (Path(source).stem + ".o")
            made_for = folder / (Path(source).stem + ".targets")
            fresh = made.exists() and made.stat().st_mtime > max(newest, Path(source).stat().st_mtime)
            if not (fresh and made_for.exists() and made_for.read_text() == names):
                nvcc = find_nvcc()
                assert nvcc is not None
                # One file takes longer than all others: its architectures are compiled side by side.
                subprocess.run([nvcc, *FLAGS, *code, f"--threads={jobs}", "-c", source, "-o", str(made)], check=True)
                made_for.write_text(names)
            return str(made)

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compile_one, sorted(glob("csrc/cuda/*.cu"))))

    @staticmethod
    def _runtime() -> Path:
        nvcc = find_nvcc()
        assert nvcc is not None
        # nvcc is often a link, or a script in a folder of its own: it knows best where its libraries are.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
        tops = [line.split("=", 1)[1].strip() for line in dry.splitlines() if line.startswith("#$ TOP=")]
        for top in [*tops, str(Path(nvcc).resolve().parents[1])]:
            for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
                found = Path(top) / folder / "libcudart_static.a"
                if found.exists():
                    return found
        raise SystemExit(f"there is no libcudart_static.a with {nvcc}")
