"""Everything that a machine with a GPU has to show, in one call: ``python -m benchmarks.gpu``, or ``make gpu``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _prefer_the_installed_package() -> None:
    """Let an installed paramdelta come before the source tree's where that one is not built.

    ``python -m`` puts the source tree first. Its package has no extension where the package was installed from it
    without ``-e``.
    """
    if not list((ROOT / "paramdelta").glob("_cpu*.so")):
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT] + [str(ROOT)]


_prefer_the_installed_package()

import paramdelta  # noqa: E402

if importlib.util.find_spec("paramdelta.kernels") is None:
    paramdelta.__path__.append(str(ROOT))  # an uninstalled source tree: there the folder of the kernels lies
