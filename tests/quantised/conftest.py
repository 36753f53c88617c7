"""Makes the helpers of the neighbouring test folders importable from here, and keeps the folders of cases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

_TESTS = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(_TESTS / folder) for folder in ("", "checkpoint", "oracles")]

if TYPE_CHECKING:
    from quantised_merges import Case, Folders


@pytest.fixture(scope="session")
def folders_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Folders]:
    """Return a function that gives the three folders of a case, written once: no merge may change them."""
    from quantised_merges import make_folders

    made: dict[int, tuple[Case, Folders]] = {}

    def folders(case: Case) -> Folders:
        if id(case) not in made:
            made[id(case)] = case, make_folders(tmp_path_factory.mktemp("case"), case)
        return made[id(case)][1]

    return folders
