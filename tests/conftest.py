"""Makes paramdelta.kernels importable where the package is used from its source tree without being installed, and lets
the longest tests begin first."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import paramdelta

# Their fixture trains for half a minute. Tests at the end are shared out among workers, each of which would train.
FIRST = "test_experiments.py"

if importlib.util.find_spec("paramdelta.kernels") is None:
    paramdelta.__path__.append(str(Path(__file__).parents[1]))  # where the folder kernels/ lies


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != FIRST)
