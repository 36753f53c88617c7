"""Builds the C++ extension paramdelta._cpu, and with setup_cuda.py, where nvcc is found, paramdelta._cuda.

One build of _cpu serves every instruction set (chosen at run time).
"""

import hashlib
import os
import sys
import sysconfig
from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # build front ends leave it out
import setup_cuda

# -ffp-contract=off: a fused multiply-add rounds once where the contract rounds twice.
# -fno-math-errno / -fno-trapping-math change no value; they let loops vectorise.
FLAGS = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
]

# `make sanitize`: PARAMDELTA_SANITIZE=address,undefined or =thread. -O1 keeps the lines of a report true.
SANITIZE = os.environ.get("PARAMDELTA_SANITIZE")
if SANITIZE:
    FLAGS += [
        f"-fsanitize={SANITIZE}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-O1",
        "-g1",
        "-Wno-maybe-uninitialized",
    ]
LINK_FLAGS = ["-pthread"] + ([f"-fsanitize={SANITIZE}"] if SANITIZE else [])

HEADERS = glob("csrc/**/*.hpp", recursive=True)


def stale(made: str, source: str) -> bool:
    """Return whether an object has to be compiled: it is not there, or older than its source, a header or this file."""
    read = (source, __file__, *HEADERS)
    return not os.path.exists(made) or os.path.getmtime(made) <= max(map(os.path.getmtime, read))


# Files compile side by side.
ParallelCompile("PARAMDELTA_BUILD_JOBS", default=0, needs_recompile=stale).install()


class Build(setup_cuda.Build):
    """Keeps objects in build/, also when pip builds in a folder of its own: an editable installation and a wheel, which
    differ in how they are linked, share them. What else tells objects apart is in the folder's name."""

    def finalize_options(self) -> None:
        """Choose the folder of objects, unless one was given."""
        if self.build_temp is None:
            asked = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS")]
            told = [*FLAGS, *asked, sysconfig.get_config_var("EXT_SUFFIX"), pybind11.__version__]
            self.build_temp = f"build/objects-{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"
        super().finalize_options()


# The parts of the module in csrc/python, by name: bind_cuda.cpp beside them belongs to another module.
PARTS = [
    f"csrc/python/bind_{part}.cpp" for part in ("cpu", "checksums", "ops", "lists", "gram", "scaled", "engine", "stage")
]

MODULES = [
    Pybind11Extension(
        "paramdelta._cpu",
        sorted(glob("csrc/cpu/*.cpp") + glob("csrc/io/*.cpp") + PARTS),
        include_dirs=["csrc"],
        depends=HEADERS,
        extra_compile_args=list(FLAGS),  # an extension adds to its own
        extra_link_args=LINK_FLAGS,
        cxx_std=17,
    )
]
if not SANITIZE and setup_cuda.wanted():
    MODULES.append(setup_cuda.extension(list(FLAGS)))

setup(ext_modules=MODULES, cmdclass={"build_ext": Build})
