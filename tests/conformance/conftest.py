"""Fixtures of the conformance suite: every backend, in every variant this machine runs, against the reference."""

from __future__ import annotations

import os

import cuda_calls
import pytest

from paramdelta import backends

# Variants that a release must have been tested on; one that this machine lacks is reported, never passed
# over.
REQUIRED = {"cpu": ("scalar", "avx2", "avx512")}


@pytest.hookimpl(trylast=True)  # after the tests' own parameters: all kernels of one case follow each other
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``isa``: the CPU's instruction sets. ``kernels``: these, and the CUDA kernels and Triton's, emulated and on a
    device. ``norm_kernels``: those of them that have norms."""
    for name in ("isa", "kernels", "norm_kernels"):
        if name in metafunc.fixturenames:
            devices = {"isa": (), "kernels": cuda_calls.KERNELS, "norm_kernels": cuda_calls.NORM_KERNELS}[name]
            devices = tuple(each for each in devices if is_wanted(each))
            reasons = cpu_variants() | {each: cuda_calls.why_not(each) for each in devices}
            metafunc.parametrize(
                name,
                [
                    pytest.param(variant, marks=() if reason is None else pytest.mark.skip(reason=reason))
                    for variant, reason in reasons.items()
                ],
            )


def is_wanted(kernels: str) -> bool:
    """Return whether tests take these kernels. What is emulated takes minutes to compile and to run, so `make emulate`
    asks for it (PARAMDELTA_EMULATE=all); nvcc's PTX then takes the place of the same bodies compiled for the host."""
    emulate = os.environ.get("PARAMDELTA_EMULATE", "")
    if emulate not in ("", "all"):
        raise pytest.UsageError(f"PARAMDELTA_EMULATE is {emulate!r}: expected all, or nothing")
    return emulate == "all" if kernels.endswith("-ptx") else kernels != "cuda-host" or not emulate


def cpu_variants() -> dict[str, str | None]:
    present = backends.get("cpu").capabilities().variants
    lacks = "this machine does not run {}: it runs " + ", ".join(present)
    return {name: None if name in present else lacks.format(name) for name in REQUIRED["cpu"]}
