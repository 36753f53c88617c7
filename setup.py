"""Builds paramdelta._cpu, the C++ extension: one build serves every instruction set (chosen at run time)."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

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

HEADERS = glob("csrc/**/*.hpp", recursive=True)


def is_stale(obj: str, source: str) -> bool:
    """Whether an object file is older than its source, or than any header (all include most of them)."""
    if not os.path.exists(obj):
        return True
    return os.path.getmtime(obj) < max(os.path.getmtime(path) for path in [source, *HEADERS])


ParallelCompile("PARAMDELTA_BUILD_JOBS", default=0, needs_recompile=is_stale).install()

# The parts of the module in csrc/python, by name: bind_cuda.cpp beside them belongs to another module.
PARTS = [f"csrc/python/bind_{part}.cpp" for part in ("cpu", "ops", "engine")]
HAS_ENGINE = os.path.exists("csrc/python/bind_engine.cpp")

setup(
    ext_modules=[
        Pybind11Extension(
            "paramdelta._cpu",
            sorted(glob("csrc/cpu/*.cpp") + glob("csrc/io/*.cpp") + [p for p in PARTS if os.path.exists(p)]),
            include_dirs=["csrc"],
            depends=HEADERS,
            define_macros=[("PARAMDELTA_HAS_ENGINE", str(int(HAS_ENGINE)))],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            cxx_std=17,
        )
    ]
)
