"""Fixtures of the conformance suite: every backend, in every variant this machine runs, against the reference."""

from __future__ import annotations

import pytest

from paramdelta import backends

# Variants that a release must have been tested on; one that this machine lacks is reported, never passed
# over.
REQUIRED = {"cpu": ("scalar", "avx2", "avx512")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        present = backends.get("cpu").capabilities().variants
        metafunc.parametrize(
            "isa",
            [
                pytest.param(
                    name,
                    marks=()
                    if name in present
                    else pytest.mark.skip(reason=f"this machine does not run {name}: it runs {', '.join(present)}"),
                )
                for name in REQUIRED["cpu"]
            ],
        )
