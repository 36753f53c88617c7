"""Fixtures of the conformance suite: every backend, in every variant this machine runs, against the reference."""

from __future__ import annotations

import os

import cuda_calls
import pytest

from paramdelta import backends

# Variants that a release must have been tested on; one that this machine lacks is reported, never passed
# over.
REQUIRED = {"cpu": ("scalar", "avx2", "avx512")}

# Where nvcc's code can be emulated, these files and tests take it in place of the same bodies compiled for the host.
# Triton compiles a kernel anew for every form that it is called in, and the emulation what it makes of it, in seconds.
CUDA_PTX = ("test_fast_lanes", "test_norms", "test_ranges", "test_scaled_blocks", "test_alphas", "test_keep")
CUDA_PTX += ("test_mixed_operands", "test_any_grid", "test_units_larger_than_scratch_memory")
TRITON_PTX = ("test_known_results", "test_signed_zeros")


@pytest.hookimpl(trylast=True)  # after the tests' own parameters: all kernels of one case follow each other
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``isa``: the CPU's instruction sets. ``kernels``: these, and the CUDA kernels and Triton's, emulated and on a
    device. ``norm_kernels``: those of them that have norms."""
    for name in ("isa", "kernels", "norm_kernels"):
        if name in metafunc.fixturenames:
            devices = {"isa": (), "kernels": cuda_calls.KERNELS, "norm_kernels": cuda_calls.NORM_KERNELS}[name]
            devices = tuple(each for each in devices if is_wanted(each, metafunc))
            reasons = cpu_variants() | {each: cuda_calls.why_not(each) for each in devices}
            metafunc.parametrize(
                name,
                [
                    pytest.param(variant, marks=() if reason is None else pytest.mark.skip(reason=reason))
                    for variant, reason in reasons.items()
                ],
            )


def is_wanted(kernels: str, test: pytest.Metafunc) -> bool:
    """Return whether a test takes these kernels: all with PARAMDELTA_EMULATE=all, with none those not emulated."""
    emulate = os.environ.get("PARAMDELTA_EMULATE", "")
    if emulate not in ("", "all", "none"):
        raise pytest.UsageError(f"PARAMDELTA_EMULATE is {emulate!r}: expected all, none, or nothing")
    names = {test.module.__name__, test.function.__name__}
    if kernels == "triton-ptx":
        return emulate == "all" or (not emulate and bool(names & set(TRITON_PTX)))
    has_ptx = cuda_calls.why_not("cuda-ptx") is None and bool(names & set(CUDA_PTX))
    emulated = emulate == "all" or (not emulate and has_ptx)
    return emulated if kernels == "cuda-ptx" else kernels != "cuda-host" or not emulated


def cpu_variants() -> dict[str, str | None]:
    present = backends.get("cpu").capabilities().variants
    lacks = "this machine does not run {}: it runs " + ", ".join(present)
    return {name: None if name in present else lacks.format(name) for name in REQUIRED["cpu"]}
