"""Where kernels run: a registry of backends, each imported only when asked for, each able to say why it cannot run.

``names()`` lists them all, ``available()`` those that run here, ``why_not(name)`` gives the reason for any
other, and ``get(name).capabilities()`` what a backend supports. ``choose`` picks the one for an operation. All
compute the same bits; they differ in where the memory is.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from paramdelta.dtypes import DType
from paramdelta.errors import BackendError

# In the order of preference among those that take the same memory.
_MODULES = {
    "cpu": "paramdelta.backends.cpu",
    "cuda": "paramdelta.backends.cuda",
    "triton": "paramdelta.backends.triton",
}

VARIABLE = "PARAMDELTA_BACKEND"


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
class Matrices:
    """Matrices of codes and scales: what one merge of them is made of, or all that a backend takes.

    ``codes`` are the codecs of operands (``formats.CODECS``), ``scales`` the dtypes of their scales, ``outputs`` the
    codecs of the output, ``output_scales`` the dtypes of its scales, and ``rules`` how those are chosen
    (``formats.RULES``). ``seconds``: scales have a second one, of the whole tensor.
    """

    codes: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    output_scales: frozenset[str] = frozenset()
    rules: frozenset[str] = frozenset()
    seconds: bool = False

    def missing(self, wanted: Matrices) -> list[str]:
        """Return what a merge is made of that is not among these, in words."""
        found = [
            f"{what} {', '.join(sorted(lacking))}"
            for what, lacking in (
                ("operands of", wanted.codes - self.codes),
                ("operands' scales of", wanted.scales - self.scales),
                ("output of", wanted.outputs - self.outputs),
                ("output's scales of", wanted.output_scales - self.output_scales),
                ("the rule", wanted.rules - self.rules),
            )
            if lacking
        ]
        return found + ["second scales"] * (wanted.seconds and not self.seconds)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend supports.

    ``devices`` are the torch device types whose memory it takes, ``inputs`` and ``outputs`` the dtypes,
    ``variants`` the instruction sets or architectures present here, slowest first, ``operations`` what it
    computes: ``merge``, ``norms``, ``merge_scaled``, and ``foreach``, merges of many tensors at once. ``one_type``:
    the dtypes of a call must all be the same, but for ``merge_scaled``, for which ``matrices`` says what it takes
    (None: all there is).
    """

    devices: tuple[str, ...]
    inputs: tuple[DType, ...]
    outputs: tuple[DType, ...]
    variants: tuple[str, ...]
    operations: tuple[str, ...]
    one_type: bool = False
    matrices: Matrices | None = None

    def supports(
        self,
        operation: str,
        *,
        device: str = "",
        inputs: Sequence[DType] = (),
        output: DType | None = None,
        matrices: Matrices | None = None,
    ) -> bool:
        """Return whether an operation runs on memory of a device, for these dtypes; what is not named is not asked."""
        return (
            operation in self.operations
            and (not device or device in self.devices)
            and all(dtype in self.inputs for dtype in inputs)
            and (output is None or output in self.outputs)
            and not (self.one_type and len({*inputs, *_given(output)}) > 1)
            and not self.missing(matrices)
        )

    def missing(self, matrices: Matrices | None) -> list[str]:
        """Return what a merge of matrices is made of that the backend does not take, in words."""
        return [] if matrices is None or self.matrices is None else self.matrices.missing(matrices)

    def __str__(self) -> str:
        """What it has, for errors."""
        types = ", ".join(dtype.name for dtype in self.inputs)
        return (
            f"has {', '.join(self.operations)} on {', '.join(self.devices)} memory, of "
            + ("one type of " if self.one_type else "")
            + types
        )


class Backend(Protocol):
    """What every backend's module provides. How it is called depends on where its memory is: see the modules."""

    def why_not(self) -> str | None:
        """Return None where the backend runs, else the reason and the way out."""

    def capabilities(self) -> Capabilities:
        """Return what the backend supports on this machine."""


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
        raise BackendError(f"backend {name}: {reason}" if name in _MODULES else reason)
    return _load(name)


def choose(
    operation: str,
    *,
    device: str,
    inputs: Sequence[DType] = (),
    output: DType | None = None,
    matrices: Matrices | None = None,
    name: str | None = None,
) -> str:
    """Return the backend for an operation on memory of a torch device type, ``cpu`` or ``cuda``, and on these dtypes.

    ``matrices`` is what a ``merge_scaled`` is made of.
    ``name``, or else the environment variable PARAMDELTA_BACKEND, picks one; without them it is the first that
    supports the operation there and runs. Raises BackendError, with every backend's reason, where there is none.
    """

    def fits(candidate: str) -> bool:
        able = _load(candidate).capabilities()
        return able.supports(operation, device=device, inputs=inputs, output=output, matrices=matrices)

    def state(candidate: str) -> str:
        reason = why_not(candidate)
        if reason is not None:
            return reason
        if fits(candidate):
            return "has it"
        able = _load(candidate).capabilities()
        lacking = able.missing(matrices) if able.supports(operation, device=device) else []
        return f"has {operation}, but not with {' or '.join(lacking)}" if lacking else str(able)

    wanted = name or os.environ.get(VARIABLE)
    if wanted:
        get(wanted)
        if fits(wanted):
            return wanted
    else:
        for candidate in _MODULES:
            if why_not(candidate) is None and fits(candidate):
                return candidate
    types = " and ".join(sorted({dtype.name for dtype in (*inputs, *_given(output))}))
    what = f"{operation} on {device} memory" + (f" of {types}" if types else "")
    reasons = "; ".join(f"{candidate}: {state(candidate)}" for candidate in _MODULES)
    if not wanted:
        raise BackendError(f"no backend has {what}: {reasons}")
    source = f"backend '{wanted}'" if name else f"{VARIABLE}={wanted}"
    raise BackendError(f"{source} has no {what}; {reasons}")


def _given(output: DType | None) -> tuple[DType, ...]:
    return () if output is None else (output,)


def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name]))
