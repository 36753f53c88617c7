"""The one exception family of the package, the complaints it carries, and the exit code each error ends in."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_PUBLISHED = 3


def escaped(text: str, *, keep: str = "") -> str:
    """Return ``text`` with control characters, marks that turn its direction and lone surrogates escaped, except those
    in ``keep``: a terminal shows it and obeys nothing in it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(name: object) -> str:
    """Return ``name`` fit for a terminal: escaped as :func:`escaped` does, long names cut."""
    text = str(name)
    text = escaped(text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}")
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong: what it is about, what is the matter, and the option that resolves it.

    ``subject`` names a file, a tensor or a field of a config; ``problem`` says what was expected and what came;
    ``remedy`` names an option or a step, and is empty only where nothing but another input helps.
    """

    subject: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{shown(self.subject)}: {self.problem}"
        return f"{text}\n    → {self.remedy}" if self.remedy else text


class ParamDeltaError(Exception):
    """Base of every error this package raises on purpose. ``exit_code`` is what the command line ends with; ``remedy``
    says what to do about it where the text does not."""

    exit_code = EXIT_FAILED
    remedy = ""


class OperandError(ParamDeltaError, ValueError):
    """Operands of a tensor operation do not fit together (shape, overlap, alpha, read-only output)."""

    exit_code = EXIT_BAD_INPUT


class OperandTypeError(ParamDeltaError, TypeError):
    """An operand of a tensor operation has a type or dtype that has no arithmetic here."""

    exit_code = EXIT_BAD_INPUT


class InputError(ParamDeltaError, ValueError):
    """Inputs or the request cannot be merged; nothing was written. Carries every complaint, not the first."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, complaints: Complaint | Iterable[Complaint]) -> None:
        self.complaints = (complaints,) if isinstance(complaints, Complaint) else tuple(complaints)
        super().__init__("\n".join(str(c) for c in self.complaints))


class CheckpointError(InputError):
    """A checkpoint folder or one of its files breaks the format's rules."""


class PlanError(InputError):
    """The three checkpoints and the request do not fit together."""


_REMEDIES = {
    errno.ENOSPC: "make room on that file system, then repeat the command",
    errno.EDQUOT: "a quota is used up: make room or have it raised, then repeat the command",
    errno.EIO: "the device or file system has a fault, its log (dmesg) says more: move or fetch the file, then repeat",
    errno.EACCES: "look at owner and permissions of the file and of the folders above it",
    errno.EPERM: "look at owner, permissions and attributes (lsattr) of the file and of the folders above it",
    errno.EROFS: "the file system is mounted read-only: name another --out",
    errno.EFBIG: "files may not be that large here (ulimit -f, the file system): --max-shard-size writes smaller ones",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system has too many open files: close some, or have the limit raised (fs.file-max)",
    errno.ENOENT: "it went away while the merge ran: put it back, then repeat the command",
    errno.ESTALE: "the file server has another file there: see that nothing replaces it, then repeat the command",
    errno.ENOLCK: "locks are needed: name an --out on a file system that has them",
    errno.ENOSYS: "the file system lacks a call that is needed: name an --out on another",
}


def remedy_of(error: OSError) -> str:
    """Return what to do about a failed call, by its errno; empty where nothing general can be said."""
    return _REMEDIES.get(error.errno or 0, "")


class StorageError(ParamDeltaError, OSError):
    """Reading or writing failed while the merge ran; nothing was published. ``errno`` is set where there is one, and
    the remedy is the one that goes with it where no other was given."""

    def __init__(self, *args: Any, remedy: str = "") -> None:
        super().__init__(*args)
        self._given = remedy

    @property
    def remedy(self) -> str:  # type: ignore[override]
        """What to do about it; empty where nothing general can be said."""
        return self._given or remedy_of(self)

    def __str__(self) -> str:
        return str(self.args[-1])


@contextlib.contextmanager
def storage_errors(path: Path, what: str, *, remedy: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a StorageError ``PATH: WHAT: CAUSE``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno, f"{path}: {what}: {error.strerror}", remedy=remedy) from error


class ResourceError(ParamDeltaError, RuntimeError):
    """The process may have no more memory or threads; nothing was published."""

    remedy = "raise the limit (ulimit -v, ulimit -u, the container's), or ask for less: --memory, --threads"


class DeviceError(ParamDeltaError, RuntimeError):
    """The device that computed failed: out of memory, lost, refused. Nothing was published."""

    remedy = "the same command continues where it stopped; --memory makes slots smaller, --device cpu needs no device"


class PartlyMergedError(ParamDeltaError, RuntimeError):
    """A merge into a loaded model failed on the way, and the model is neither what it was nor what it was to be.

    ``done``, ``in_part`` and ``untouched`` are the names of the tensors that are merged, that may be in part, and that
    are as they were; ``__cause__`` is what failed. A tensor must not be merged twice: load the model again.
    """

    remedy = "load the model again before it is used, or merged; rehearse=True finds what can be found beforehand"

    def __init__(
        self,
        text: str,
        *,
        done: tuple[str, ...] = (),
        in_part: tuple[str, ...] = (),
        untouched: tuple[str, ...] = (),
    ) -> None:
        self.done, self.in_part, self.untouched = done, in_part, untouched
        super().__init__(text)


class NotPublishedError(ParamDeltaError, ArithmeticError):
    """The merge finished, but its result is not what was asked for; nothing was published. ``report`` is the
    MergeReport."""

    exit_code = EXIT_NOT_PUBLISHED

    def __init__(self, text: str, report: Any = None) -> None:
        self.report = report
        super().__init__(text)


class NonFiniteError(NotPublishedError):
    """Results are NaN, infinite or overflowed. The report's ``nonfinite`` lists every tensor concerned."""


class PrecisionError(NotPublishedError):
    """Requantising lost more than ``max_quant_error``. The report's ``quantised`` lists the tensors that lost most."""


class BackendError(ParamDeltaError, RuntimeError):
    """A backend was asked for that this machine cannot run."""

    exit_code = EXIT_BAD_INPUT
