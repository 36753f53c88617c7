"""A workshop for each test: checkpoints written once and copied, a place for the output, the injector."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from faulty_runs import ROLES, Workshop, build_injector, digests, write_checkpoints

import paramdelta


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Path]:
    """The checkpoints, digests of what they merge to, and the injector."""
    root = tmp_path_factory.mktemp("faults")
    write_checkpoints(root)
    paramdelta.merge(**{role: root / role for role in ROLES}, out=root / "whole")
    return root, digests(root / "whole"), build_injector(root)


@pytest.fixture
def workshop(made_once: tuple[Path, dict[str, str], Path], tmp_path: Path) -> Workshop:
    """Folders of the test's own: what it does to an input stays with it."""
    source, expected, injector = made_once
    for role in ROLES:
        shutil.copytree(source / role, tmp_path / role, copy_function=shutil.copy2)
    return Workshop(root=tmp_path, expected=expected, injector=injector)


@pytest.fixture
def root_only() -> None:
    """Skip where the test needs root: to mount a file system, or to become another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
