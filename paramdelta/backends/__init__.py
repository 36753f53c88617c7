"""Where kernels run: a registry of backends, each imported only when asked for, each able to say why it cannot run.

``names()`` lists them all, ``available()`` those that run here, ``why_not(name)`` gives the reason for any
other, and ``get(name).capabilities()`` what a backend supports. All compute the same bits; they differ in
where the memory is.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from paramdelta.dtypes import DType
from paramdelta.errors import BackendError

_MODULES = {"cpu": "paramdelta.backends.cpu", "triton": "paramdelta.backends.triton"}


class Operand(NamedTuple):
    """Consecutive elements in memory that the caller keeps alive during a call. Address 0 stands for zeros."""

    address: int
    dtype: DType


class Term(NamedTuple):
    """One summand, alpha · (post − base)."""

    post: Operand
    base: Operand
    alpha: float


class Counts(NamedTuple):
    """Results that a user should know of.

    ``nan``: outputs that are NaN. ``inf``: outputs for which the binary64 result is infinite. ``overflow``:
    finite results whose rounding exceeds the largest finite value of the output type; for f8_e4m3, which has
    no Inf, infinite results too.
    """

    nan: int = 0
    inf: int = 0
    overflow: int = 0

    @property
    def clean(self) -> bool:
        """Whether all counts are zero."""
        return not any(self)


class Norms(NamedTuple):
    """‖post − base‖², ‖new_base − base‖², ⟨post − base, new_base − base⟩ and max |post − base|."""

    delta_squared: float
    drift_squared: float
    inner: float
    largest_delta: float


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend supports.

    ``devices`` are the torch device types whose memory it takes, ``inputs`` and ``outputs`` the dtypes,
    ``variants`` the instruction sets or architectures present here, slowest first, ``norms`` whether it
    computes them.
    """

    devices: tuple[str, ...]
    inputs: tuple[DType, ...]
    outputs: tuple[DType, ...]
    variants: tuple[str, ...]
    norms: bool


class Backend(Protocol):
    """What a backend's module provides."""

    def why_not(self) -> str | None:
        """Return None where the backend runs, else the reason and the way out."""

    def capabilities(self) -> Capabilities:
        """Return what the backend supports on this machine."""

    def merge(self, new_base: Operand, terms: Sequence[Term], out: Operand, count: int, *, threads: int) -> Counts:
        """Write encode(new_base + Σ alpha · (post − base)) to ``out``, for ``count`` elements."""

    def norms(self, post: Operand, base: Operand, new_base: Operand, count: int, *, threads: int) -> Norms:
        """Return the norms of ``count`` elements, which are the whole tensor, as ``ops.norms`` defines them."""


def names() -> tuple[str, ...]:
    """Return the name of every backend this version has, whether it runs here or not."""
    return tuple(_MODULES)


def why_not(name: str) -> str | None:
    """Return None where backend ``name`` runs on this machine, else the reason and the way out."""
    if name not in _MODULES:
        return f"there is no backend '{name}'; there are: {', '.join(_MODULES)}"
    return _load(name).why_not()


def available() -> tuple[str, ...]:
    """Return the names of the backends that run on this machine."""
    return tuple(name for name in _MODULES if why_not(name) is None)


def get(name: str) -> Backend:
    """Return backend ``name``, or raise BackendError with the reason why it cannot run."""
    reason = why_not(name)
    if reason is not None:
        raise BackendError(reason)
    return _load(name)


def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name]))
