"""Builds the C++ extension paramdelta._cpu, and with setup_cuda.py, where nvcc is found, paramdelta._cuda.

One build of _cpu serves every instruction set (chosen at run time).
"""

import os
import sys
from glob import glob

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

# Files compile side by side; a change of any source or header rebuilds them all (`depends` below).
ParallelCompile("PARAMDELTA_BUILD_JOBS", default=0).install()

# The parts of the module in csrc/python, by name: bind_cuda.cpp beside them belongs to another module.
PARTS = [
    f"csrc/python/bind_{part}.cpp" for part in ("cpu", "checksums", "ops", "lists", "gram", "scaled", "engine", "stage")
]

MODULES = [
    Pybind11Extension(
        "paramdelta._cpu",
        sorted(glob("csrc/cpu/*.cpp") + glob("csrc/io/*.cpp") + PARTS),
        include_dirs=["csrc"],
        depends=glob("csrc/**/*.hpp", recursive=True),
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        cxx_std=17,
    )
]
if not SANITIZE and setup_cuda.wanted():
    MODULES.append(setup_cuda.extension(FLAGS))

setup(ext_modules=MODULES, cmdclass={"build_ext": setup_cuda.Build})
