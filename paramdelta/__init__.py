"""Carry post-training over to another base: ``new_base + alpha · (post − base)`` over whole LLM checkpoints.

``merge`` writes a checkpoint folder, ``extract`` and ``apply`` do so in two steps with the delta as a folder between
them, ``recycle`` takes a delta from version to version of a base, ``stream`` yields merged tensors without writing,
``merge_into`` changes a model that is loaded, ``ops`` merges arrays and tensors in memory, ``reference`` states the
arithmetic in NumPy. Importing this package imports none of them, and nothing in it imports torch until a torch tensor
is passed in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from paramdelta.errors import (
    CheckpointError,
    Complaint,
    InputError,
    NonFiniteError,
    OperandError,
    OperandTypeError,
    ParamDeltaError,
    PartlyMergedError,
    PlanError,
    PrecisionError,
    StorageError,
)

if TYPE_CHECKING:
    from paramdelta import ops, reference
    from paramdelta.analysis import Analysis, analyze
    from paramdelta.deltas import apply, extract
    from paramdelta.gathering import finalize
    from paramdelta.loaded import merge_into
    from paramdelta.merging import merge
    from paramdelta.recycling import recycle
    from paramdelta.report import MergeReport, SweepReport
    from paramdelta.streaming import stream
    from paramdelta.sweeping import interpolate, sweep
    from paramdelta.verification import verify

__version__ = "0.1.0"
JSON_VERSION = 1  # of the documents that --json prints (docs/json.md)

_LAZY = {
    "analyze": "paramdelta.analysis",
    "Analysis": "paramdelta.analysis",
    "merge": "paramdelta.merging",
    "merge_into": "paramdelta.loaded",
    "stream": "paramdelta.streaming",
    "verify": "paramdelta.verification",
    "finalize": "paramdelta.gathering",
    "sweep": "paramdelta.sweeping",
    "interpolate": "paramdelta.sweeping",
    "extract": "paramdelta.deltas",
    "apply": "paramdelta.deltas",
    "recycle": "paramdelta.recycling",
    "MergeReport": "paramdelta.report",
    "SweepReport": "paramdelta.report",
    "ops": "",
    "reference": "",
}

__all__ = [
    "Analysis",
    "CheckpointError",
    "Complaint",
    "InputError",
    "MergeReport",
    "NonFiniteError",
    "OperandError",
    "OperandTypeError",
    "ParamDeltaError",
    "PartlyMergedError",
    "PlanError",
    "PrecisionError",
    "StorageError",
    "SweepReport",
    "__version__",
    "analyze",
    "apply",
    "extract",
    "finalize",
    "interpolate",
    "merge",
    "merge_into",
    "ops",
    "recycle",
    "reference",
    "stream",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'paramdelta' has no attribute {name!r}")
    value = (
        importlib.import_module(f"paramdelta.{name}") if not module else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
