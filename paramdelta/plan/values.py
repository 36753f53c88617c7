"""Reads what options say: sizes, globs, renames, choices. What is wrong is added to the complaints given, so that one
run shows everything."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from paramdelta.dtypes import MERGE_DTYPES, DType
from paramdelta.errors import Complaint, PlanError, shown

_BLOCK = re.compile(r"\s*(\d{1,18})\s*(?:[x×,]\s*(\d{1,18})\s*)?", re.ASCII)
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kKMGT])(i?))?[bB]?\s*", re.ASCII)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Rename:
    """``re.sub(pattern, replacement, name)``, applied to the names of one checkpoint before pairing."""

    pattern: str
    replacement: str


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes that ``5GB`` (5·10⁹), ``5GiB`` (5·2³⁰) or ``5000`` spell. Raises PlanError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise PlanError(Complaint(option, f"expected a size such as 5GB or 512MiB, got {shown(repr(text))}"))
    number, prefix, binary = match.groups()
    value = int(Fraction(number) * (1024 if binary else 1000) ** _POWERS[(prefix or "").upper()])
    if value < 1:
        raise PlanError(Complaint(option, f"expected at least one byte, got {shown(repr(text))}"))
    return value


def matcher(globs: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name matches one of ``globs`` (``*``, ``?``, ``[…]``; case counts)."""
    patterns = [fnmatch.translate(glob) for glob in globs]
    if not patterns:
        return lambda name: False
    compiled = re.compile("|".join(patterns))
    return lambda name: compiled.match(name) is not None


def read_renames(option: str, values: Any, wrong: list[Complaint]) -> tuple[Rename, ...]:
    """Read ``REGEX=REPLACEMENT`` texts, or pairs."""
    renames = []
    for value in [values] if isinstance(values, str) else values:
        if isinstance(value, str):
            pattern, equals, replacement = value.rpartition("=")  # a regex may hold "=", a name hardly
            if not equals:
                wrong.append(Complaint(option, f"expected REGEX=REPLACEMENT, got {shown(repr(value))}"))
                continue
        elif isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, str) for v in value):
            pattern, replacement = value
        else:
            wrong.append(Complaint(option, f"expected a pair (regex, replacement), got {shown(repr(value))}"))
            continue
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement, "")
        except (re.error, IndexError) as error:  # IndexError: a group name that the pattern lacks
            wrong.append(Complaint(option, f"{shown(repr(value))} is no regular expression: {error}"))
            continue
        renames.append(Rename(pattern, replacement))
    return tuple(renames)


def read_choice(option: str, value: str, choices: Sequence[str], wrong: list[Complaint]) -> str:
    """Return ``value``, which should be one of ``choices``."""
    if value not in choices:
        wrong.append(Complaint(option, f"expected one of {', '.join(choices)}, got {shown(repr(value))}"))
    return value


def read_dtype(value: str | DType | None, wrong: list[Complaint]) -> DType | None:
    """Read the name of a dtype that has arithmetic."""
    if value is None or isinstance(value, DType):
        return value
    found = next((d for d in MERGE_DTYPES if value in (d.name, d.safetensors)), None)
    if found is None:
        names = ", ".join(d.name for d in MERGE_DTYPES)
        wrong.append(Complaint("--dtype", f"expected one of {names}, got {shown(repr(value))}"))
    return found


def read_block(value: Any, wrong: list[Complaint]) -> tuple[int, int] | None:
    """Read ``128x128``, ``32`` (a group along K) or a pair."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = f"{value[0]}x{value[1]}"
    match = _BLOCK.fullmatch(str(value))
    if match is None or (sizes := [int(g) for g in match.groups() if g])[0] == 0:  # 1x0: scales of whole rows
        wrong.append(Complaint("--block-size", f"expected ROWSxCOLS or a group size, got {shown(repr(value))}"))
        return None
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def read_fraction(option: str, value: Any, wrong: list[Complaint]) -> float | None:
    """Read a number that is not negative."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number >= 0.0:
        wrong.append(Complaint(option, f"expected a number such as 0.05, got {shown(repr(value))}"))
        return None
    return number


def read_size(value: int | str | None, option: str) -> int | None:
    """Read a number of bytes, or a text that :func:`parse_size` reads."""
    return parse_size(str(value), option=option) if value is not None else None


def collected(make: Callable[[], int | None], wrong: list[Complaint]) -> int | None:
    """Return what ``make`` does; where it raises, None, and its complaints with the others."""
    try:
        return make()
    except PlanError as error:
        wrong += error.complaints
        return None


def read_strings(values: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text, or several, as a tuple."""
    strings = (values,) if isinstance(values, str) else tuple(values)
    for value in strings:
        if not isinstance(value, str):
            raise PlanError(Complaint("request", f"expected a string, got {shown(repr(value))}"))
    return strings
