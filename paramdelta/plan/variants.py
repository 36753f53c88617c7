"""Merges of the same checkpoints that differ in their alphas alone: which alphas a sweep asks for, where each folder
goes, and which of the merges one pass over the inputs can make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paramdelta.dtypes import BY_NAME, DTYPES
from paramdelta.errors import Complaint, InputError, PlanError, shown
from paramdelta.plan.deltas import OF_ONE, count_deltas
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.work import Rows, Work

if TYPE_CHECKING:
    from paramdelta.plan import Plan

_RAW = BY_NAME["u8"].code
_ITEMS = np.array([max(d.bits // 8, 1) for d in DTYPES], np.int64)
_ABOUT_INPUTS = ("spans", "terms", "regions", "region_terms", "views", "recipes", "extents")


@dataclass(frozen=True)
class Place:
    """Where the folders of a sweep go: ``parent`` / ``pattern``, with the alphas in place of ``{WORD}``."""

    parent: Path
    pattern: str
    word: str

    def folder(self, name: str) -> Path:
        """Return the folder of a variant whose alphas are spelled ``name``."""
        return self.parent / self.pattern.replace(f"{{{self.word}}}", name)


def read_place(out: str | Path, word: str) -> Place:
    """Read ``DIR``, in which the folders are called WORD-0.5 and so on, or a pattern such as ``DIR/run-{WORD}``.
    Raises PlanError."""
    path, mark = Path(out), f"{{{word}}}"
    if mark in str(path.parent):
        problem = f"{mark} is part of the name of the folders themselves, not of those above them"
        raise PlanError(Complaint("--out", f"{problem}: got {shown(str(path))}", f"--out 'DIR/run-{mark}'"))
    if mark in path.name:
        return Place(path.parent, path.name, word)
    return Place(path, f"{word}-{mark}", word)


def make_requests(
    values: Any, *, out: str | Path, word: str = "alpha", option: str = "--alphas", **options: Any
) -> list[MergeRequest]:
    """Return one request for each variant of a sweep, as :meth:`MergeRequest.build` does from ``options``.

    ``values`` are the alphas: numbers, which are for all deltas, or one list for each variant with a number for each
    delta; or strings as on the command line, ``0,0.5,1`` for all deltas and ``2:0,0.5,1`` for the second, of which
    several vary together. ``alphas`` among the options are further rules, for the tensors of a GLOB or for other
    deltas.
    Raises PlanError with all complaints.
    """
    wrong: list[Complaint] = []
    deltas = count_deltas(options.get("post"))
    variants = _read(values, deltas, option, wrong)
    place = Place(Path(), "", word)
    try:
        place = read_place(out, word)
    except PlanError as error:
        wrong += error.complaints
    rules = options.pop("alphas", ())
    rules = (rules,) if isinstance(rules, str) else tuple(rules)
    requests: list[MergeRequest] = []
    for variant in variants or [(None,) * deltas]:
        swept = [
            repr(value) if deltas == 1 else f"{number}:{value!r}"
            for number, value in enumerate(variant, 1)
            if value is not None
        ]
        name = "_".join(_spelled(value) for value in _told(variant))
        try:
            request = MergeRequest.build(**options, alphas=(*swept, *rules), out=place.folder(name))
        except InputError as error:
            wrong += [c for c in error.complaints if c not in wrong]
            continue
        requests.append(request)
        for number, value in enumerate(variant):
            if value is not None and request.sources[number].alphas[0].value != value:
                which = f"delta {number + 1} of {deltas}" if deltas > 1 else "the delta"
                problem = f"gives {which} one alpha for all tensors, and {option} varies it"
                complaint = Complaint("--alpha", problem, "name tensors, GLOB=A, or another delta, N:A")
                wrong += [complaint] if complaint not in wrong else []
    if wrong:
        raise PlanError(wrong)
    return requests


def _told(variant: tuple[float | None, ...]) -> list[float]:
    """Return the alphas that a folder's name tells: one where all are the same."""
    told = [value for value in variant if value is not None]
    return told[:1] if len(set(told)) == 1 else told


def _spelled(value: float) -> str:
    return repr(value).removesuffix(".0")


Variant = tuple["float | None", ...]  # the alpha of each delta, None where it is not varied


def _read(values: Any, deltas: int, option: str, wrong: list[Complaint]) -> list[Variant]:
    values = [values] if isinstance(values, (str, int, float)) else list(values)
    if values and all(isinstance(value, str) for value in values):
        variants = _read_lists(values, deltas, option, wrong)
    else:
        variants = [variant for value in values if (variant := _read_variant(value, deltas, option, wrong))]
    if not values:
        wrong.append(Complaint(option, "a sweep needs at least one number", f"{option} 0.25,0.5,1"))
    seen: set[Variant] = set()
    for variant in variants:
        if variant in seen:
            told = ", ".join(_spelled(value) for value in _told(variant))
            wrong.append(Complaint(option, f"{told} is there twice", "name each once"))
        seen.add(variant)
    return variants


def _read_variant(value: Any, deltas: int, option: str, wrong: list[Complaint]) -> Variant | None:
    """Read a number for all deltas, or one for each."""
    if not isinstance(value, (list, tuple)):
        number = _number(value, option, wrong)
        return None if number is None else (number,) * deltas
    if len(value) != deltas:
        wrong.append(Complaint(option, f"expected a number for each of the {deltas} deltas, got {len(value)}"))
        return None
    numbers = [_number(v, option, wrong) for v in value]
    return None if None in numbers else tuple(numbers)


def _read_lists(texts: Sequence[str], deltas: int, option: str, wrong: list[Complaint]) -> list[Variant]:
    """Read ``0,0.5,1``, for all deltas, and ``2:0,0.5,1``, for one."""
    lists: dict[int | None, list[float | None]] = {}
    for text in texts:
        of_one = OF_ONE.fullmatch(text)
        delta = int(of_one[1]) - 1 if of_one else None
        if delta is not None and delta >= deltas:
            there = "there is one delta" if deltas == 1 else f"there are {deltas} deltas"
            wrong.append(Complaint(option, f"{delta + 1}: is for delta {delta + 1}, but {there}"))
            continue
        if delta in lists:
            whose = "all deltas" if delta is None else f"delta {delta + 1}"
            wrong.append(Complaint(option, f"there are two lists for {whose}", "give one, with all its numbers"))
        entries = (of_one[2] if of_one else text).split(",")
        lists[delta] = [_number(entry, option, wrong) for entry in entries]
    lengths = {len(numbers) for numbers in lists.values()}
    if len(lengths) > 1:
        told = " and ".join(str(length) for length in sorted(lengths))
        wrong.append(Complaint(option, f"lists vary together, and these have {told} numbers", "make them equally long"))
    if len(lengths) != 1 or any(None in numbers for numbers in lists.values()):
        return []
    columns = [lists.get(delta, lists.get(None, [None] * max(lengths))) for delta in range(deltas)]
    return list(zip(*columns, strict=True))


def _number(value: Any, option: str, wrong: list[Complaint]) -> float | None:
    try:
        number = float(value) + 0.0  # -0 is 0
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        wrong.append(Complaint(option, f"expected finite numbers such as 0.25,0.5,1, got {shown(repr(value))}"))
        return None
    return number


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Plans that one pass over the inputs carries out: variant v of ``work`` is plan number ``members[v]`` of the
    sweep. ``copied`` are the tensors whose bytes it copies, in which nothing is counted."""

    members: tuple[int, ...]
    work: Work
    copied: tuple[frozenset[int], ...]


def passes_of(plans: Sequence[Plan]) -> list[Pass]:
    """Return as few passes as make all plans, which differ in their alphas alone.

    Plans share one where they compute the same spans and regions: always, but for an alpha of 0, which is no term.
    Plain spans without it fill the same bytes, and share. With quantised weights, which may be copied where nothing is
    added, and with vocabularies of different sizes, such a plan has a pass of its own, which reads new_base.
    """
    left = list(range(len(plans)))
    passes = []
    while left:
        leader = max(left, key=lambda i: (len(plans[i].work.terms) + len(plans[i].work.region_terms), -i))
        found = {i: shared for i in left if (shared := _shared(plans[leader].work, plans[i].work)) is not None}
        others = [i for i in found if i != leader]
        work = plans[leader].work
        if others:
            alphas = np.stack([found[i].alphas for i in others], axis=1)
            work = work.with_variants(alphas, np.stack([found[i].region_alphas for i in others], axis=1))
        copied = tuple(found[i].copied for i in (leader, *others))
        passes.append(Pass(members=(leader, *others), work=work, copied=copied))
        left = [i for i in left if i not in found]
    return passes


class Shared(NamedTuple):
    """What another plan makes of the leader's work: its alpha for each term and region term, and the tensors that it
    copies."""

    alphas: NDArray[np.float64]
    region_alphas: NDArray[np.float64]
    copied: frozenset[int]


def _shared(leader: Work, other: Work) -> Shared | None:
    """Return what makes ``other`` of the leader's work; None where it is another computation."""
    same = (leader.inputs, leader.outputs, leader.headers, leader.units) == (
        other.inputs,
        other.outputs,
        other.headers,
        other.units,
    )
    if not same or leader.extents.tobytes() != other.extents.tobytes():
        return None
    if all(_bytes(leader, column) == _bytes(other, column) for column in _ABOUT_INPUTS):
        return Shared(other.terms["alpha"], other.region_terms["alpha"], frozenset())
    if len(leader.regions) or len(other.regions) or not _same_places(leader.spans, other.spans):
        return None
    there = dict(zip(_keys(other), other.terms["alpha"][_listed(other.spans)].tolist(), strict=True))
    alphas = np.zeros(len(leader.terms))
    for at, key in zip(_listed(leader.spans).tolist(), _keys(leader), strict=True):
        alphas[at] = there.pop(key, 0.0)
    raw = (other.spans["out_dtype"] == _RAW) & (leader.spans["out_dtype"] != _RAW)
    return None if there else Shared(alphas, np.zeros(0), frozenset(other.spans["tensor"][raw].tolist()))


def _bytes(work: Work, column: str) -> bytes:
    """Return the bytes of a column without alphas."""
    rows = getattr(work, column)
    if column in ("terms", "region_terms"):
        rows = rows.copy()
        rows["alpha"] = 0.0
    return bytes(rows.tobytes())


def _same_places(leader: Rows, other: Rows) -> bool:
    """Whether spans fill the same bytes from the same places of new_base, up to what is added to them."""
    if len(leader) != len(other):
        return False
    raw = (other["out_dtype"] == _RAW) & (leader["out_dtype"] == leader["new_dtype"]) & (other["n_terms"] == 0)
    alike = (other["out_dtype"] == leader["out_dtype"]) & (other["new_dtype"] == leader["new_dtype"])
    sizes = [spans["count"] * _ITEMS[spans["out_dtype"]] for spans in (leader, other)]
    places = all(
        np.array_equal(leader[column], other[column])
        for column in ("tensor", "out_file", "out_offset", "new_file", "new_offset")
    )
    return places and bool((raw | alike).all()) and np.array_equal(*sizes)


def _listed(spans: Rows) -> NDArray[np.int64]:
    """Return the numbers of the terms of all spans, in order."""
    counts = spans["n_terms"].astype(np.int64)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(spans["first_term"].astype(np.int64), counts) + within


def _keys(work: Work) -> list[tuple[int, bytes]]:
    """Return, for every term of every span, the span and what the term refers to."""
    rows = work.terms[_listed(work.spans)]
    rows["alpha"] = 0.0
    owners = np.repeat(np.arange(len(work.spans)), work.spans["n_terms"])
    return [(owner, row.tobytes()) for owner, row in zip(owners.tolist(), rows, strict=True)]
