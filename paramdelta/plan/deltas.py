"""The deltas that a merge adds up: pairs of folders, post and base, each with its alphas; and how both are spelled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramdelta.errors import Complaint, shown

Folders = str | Path | Sequence[str | Path]  # one, or one for each delta

OF_ONE = re.compile(r"([1-9]\d{0,3}):(.*)", re.ASCII | re.DOTALL)  # what is for one delta


@dataclass(frozen=True)
class AlphaRule:
    """The scale of the delta for tensors whose names match ``glob``; of several rules that match, the last holds."""

    glob: str
    value: float


@dataclass(frozen=True)
class Source:
    """The folders of one delta, and its alphas, which start with the rule for all, ``*``. Without a base, ``post`` is
    the delta itself."""

    post: Path
    base: Path | None
    alphas: tuple[AlphaRule, ...]


def roles_of(number: int) -> tuple[str, str]:
    """Return the roles of a delta's post and base: of the first (0) ``post``, ``base``, then ``post_2``, ``base_2``."""
    suffix = f"_{number + 1}" if number else ""
    return f"post{suffix}", f"base{suffix}"


def folder_options(folders: Mapping[str, str | Path]) -> dict[str, Any]:
    """Return folders by role as the options ``post``, ``base`` and ``new_base`` of a request."""
    options: dict[str, Any] = {}
    for role, folder in folders.items():
        options.setdefault("new_base" if role == "new_base" else role.partition("_")[0], []).append(folder)
    return {option: found if len(found) > 1 else found[0] for option, found in options.items()}


def read_sources(post: Any, base: Any, alpha: Any, alphas: Sequence[str], wrong: list[Complaint]) -> list[Source]:
    """Pair the folders, and give each pair its alphas; there is one pair at least.

    Without ``base`` each post is a delta itself. ``alpha`` is for all pairs, or a list with one for each. ``alphas``,
    and the globs of a mapping, may begin with the number of the pair that they are for: ``2:0.5``, ``2:GLOB=0.5``.
    """
    posts = _folders(post)
    bases: list[Any] = [None] * len(posts) if base is None else _folders(base)
    if len(posts) != len(bases) or not posts:
        wrong.append(
            Complaint(
                "--post, --base",
                f"each delta is one post − base, but there are {len(posts)} of post and {len(bases)} of base",
                "give --post and --base once for each delta, in the same order",
            )
        )
        posts, bases = posts or [Path()], bases or [Path()]
    pairs = list(zip(posts, bases, strict=False))
    each = list(alpha) if isinstance(alpha, (list, tuple)) else None
    if each is not None and len(each) != len(pairs):
        text = f"expected a number for each of the {len(pairs)} deltas, got {len(each)}"
        wrong.append(Complaint("--alpha", text, "one number alone is for all of them"))
        each = None
    common = [] if isinstance(alpha, (list, tuple)) else _rules(alpha, len(pairs), wrong)
    listed = [rule for text in alphas for rule in _rules(text, len(pairs), wrong)]
    sources = []
    for number, (p, b) in enumerate(pairs):
        own = [(None, rule) for _, rule in _rules(each[number], len(pairs), wrong)] if each is not None else common
        rules = [rule for pair, rule in (*own, *listed) if pair in (None, number)]
        sources.append(Source(p, b, _effective(rules)))
    return sources


def count_deltas(post: Any) -> int:
    """Return how many deltas there are, by their posts: one at least."""
    return max(len(_folders(post)), 1)


def _folders(value: Any) -> list[Path]:
    return [Path(v) for v in value] if isinstance(value, (list, tuple)) else [Path(value)]


def spelled_alphas(sources: Sequence[Source]) -> list[str]:
    """Return the alphas as :func:`read_sources` takes them: of a single delta without its number."""
    if len(sources) == 1:
        return [f"{rule.glob}={rule.value!r}" for rule in sources[0].alphas]
    return [f"{n}:{rule.glob}={rule.value!r}" for n, source in enumerate(sources, 1) for rule in source.alphas]


Numbered = tuple[int | None, AlphaRule]  # the pair, None: all


def _rules(alpha: Any, pairs: int, wrong: list[Complaint]) -> list[Numbered]:
    if isinstance(alpha, Mapping):
        return [r for glob, value in alpha.items() for r in _rule(str(glob), value, pairs, wrong)]
    if isinstance(alpha, str) and "=" in alpha:
        glob, _, value = alpha.rpartition("=")
        return _rule(glob, value, pairs, wrong)
    of_one = OF_ONE.fullmatch(alpha) if isinstance(alpha, str) else None
    if of_one is not None:
        return _rule(f"{of_one[1]}:*", of_one[2], pairs, wrong)
    return _rule("*", alpha, pairs, wrong)


def _rule(glob: str, value: Any, pairs: int, wrong: list[Complaint]) -> list[Numbered]:
    pair, of_one = None, OF_ONE.fullmatch(glob)
    if of_one is not None:
        pair, glob = int(of_one[1]) - 1, of_one[2]
        if pair >= pairs:
            there = "there is one delta" if pairs == 1 else f"there are {pairs} deltas"
            wrong.append(Complaint("--alpha", f"{pair + 1}: is for delta {pair + 1}, but {there}"))
            return []
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        wrong.append(Complaint("--alpha", f"expected a number or GLOB=number, got {shown(repr(value))}"))
        return []
    if not math.isfinite(number):
        wrong.append(Complaint("--alpha", f"expected a finite number, got {number}"))
        return []
    return [(pair, AlphaRule(glob, number))]


def _effective(rules: list[AlphaRule]) -> tuple[AlphaRule, ...]:
    """Drop the rules that a later rule for every tensor hides; the first of what is left is that rule."""
    rules = [AlphaRule("*", 1.0), *rules]
    last = max(i for i, rule in enumerate(rules) if rule.glob == "*")
    return tuple(rules[last:])
