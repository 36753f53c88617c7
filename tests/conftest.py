"""Makes paramdelta.kernels importable where the package is used from its source tree without being installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import paramdelta

if importlib.util.find_spec("paramdelta.kernels") is None:
    paramdelta.__path__.append(str(Path(__file__).parents[1]))  # where the folder kernels/ lies
