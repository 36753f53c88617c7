"""Makes the helpers of the neighbouring test folders importable from here."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(_TESTS), str(_TESTS / "plan")]
