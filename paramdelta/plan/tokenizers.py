"""Whether rows that are paired by number are the same tokens' rows: embeddings of equal sizes say nothing of the
tokenizers they belong to, so the tokenizers' files are compared.

Every checkpoint is compared with post, whose tokenizer the output has. A token has *moved* where both know it under
different numbers; a number is *renamed* where each has a token there that the other lacks. Post-training renames a few
reserved tokens on purpose and trains their rows; a token that has moved is always added to another one's row.
"""

from __future__ import annotations

import filecmp
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.documents import MAX_BYTES
from paramdelta.checkpoint.tokens import token_files, token_numbers
from paramdelta.errors import shown
from paramdelta.plan.pairing import Pairing, has_rows_of_tokens
from paramdelta.plan.request import MergeRequest

# Of the numbers that both have: more of them renamed, and it is another vocabulary.
RENAMED_SHARE = 0.01
_LISTED = 5
_LONGEST = 60  # letters of a token that is listed


class Difference(NamedTuple):
    """How a tokenizer differs from post's. ``shared`` tokens are known to both; ``moved_examples`` are (token, number
    in post, number there), ``renamed_examples`` (number, token of post, token there)."""

    shared: int
    moved: int
    renamed: int
    moved_examples: tuple[tuple[str, int, int], ...]
    renamed_examples: tuple[tuple[int, str, str], ...]

    @property
    def surprises(self) -> bool:
        """Whether rows of different tokens are added to each other, beyond what post-training does on purpose."""
        return self.moved > 0 or self.renamed > RENAMED_SHARE * (self.shared + self.renamed)


def compare(post: dict[str, int], other: dict[str, int]) -> Difference | None:
    """Compare the numbers of tokens; None where no number has moved or been renamed."""
    shared = [text for text in post if text in other]
    moved = [(text, post[text], other[text]) for text in shared if post[text] != other[text]]
    theirs = {number: text for text, number in other.items() if text not in post}
    renamed = [(n, text, theirs[n]) for text, n in post.items() if text not in other and n in theirs]
    if not moved and not renamed:
        return None
    return Difference(
        len(shared), len(moved), len(renamed), tuple(sorted(moved)[:_LISTED]), tuple(sorted(renamed)[:_LISTED])
    )


def token_differences(
    request: MergeRequest, pairing: Pairing, checkpoints: Mapping[str, Checkpoint]
) -> dict[str, Difference]:
    """Return, by role, how tokenizers differ from post's, where rows of tokens are added up by number.

    Files that are byte for byte alike are not parsed; of others JSON of some 10 MB is, in a few tenths of a second.
    """
    by_number = request.vocab != "align" and any(
        has_rows_of_tokens(name) and pairing.deltas(i) for i, name in enumerate(pairing.names)
    )
    if not by_number:
        return {}
    files = {role: _signed(token_files(c)) for role, c in checkpoints.items() if not c.zeros}
    post = files.pop("post", ())
    others = {role: signed for role, signed in files.items() if post and signed}
    found = zip(others, _compared(post, tuple(others.values())), strict=True)
    return {role: difference for role, difference in found if difference is not None}


def describe(differences: Mapping[str, Difference]) -> dict[str, Any]:
    """Return differences as JSON-ready values, ``tokenizers`` by role; nothing where there are none."""
    described = {
        role: {
            "shared": d.shared,
            "moved": d.moved,
            "renamed": d.renamed,
            "moved_examples": [{"token": _cut(text), "post": a, role: b} for text, a, b in d.moved_examples],
            "renamed_examples": [
                {"number": n, "post": _cut(ours), role: _cut(theirs)} for n, ours, theirs in d.renamed_examples
            ],
        }
        for role, d in differences.items()
    }
    return {"tokenizers": described} if described else {}


def warnings_of(request: MergeRequest, differences: Mapping[str, Difference]) -> list[str]:
    """Return a warning for all checkpoints whose tokenizers differ from post's in the same way."""
    roles: dict[Difference, list[str]] = {}
    for role, difference in differences.items():
        if difference.surprises:
            roles.setdefault(difference, []).append(role)
    command = "--vocab align" if request.kind == "merge" else "paramdelta merge --vocab align, of the whole models,"
    return [
        f"tokenizers: {' and '.join(alike)} {'have' if len(alike) > 1 else 'has'} {_said(difference)}; rows of "
        f"embeddings are paired by number: {command} pairs them by token"
        for difference, alike in roles.items()
    ]


def _said(difference: Difference) -> str:
    parts = []
    if difference.moved:
        listed = ", ".join(
            f"{shown(repr(_cut(t)))} {theirs}, not {ours}" for t, ours, theirs in difference.moved_examples
        )
        parts.append(
            f"{difference.moved:,} of {difference.shared:,} tokens shared with post under other numbers ({listed}"
            f"{', …' if difference.moved > _LISTED else ''})"
        )
    if difference.renamed:
        listed = ", ".join(
            f"{n} {shown(repr(_cut(theirs)))}, not {shown(repr(_cut(ours)))}"
            for n, ours, theirs in difference.renamed_examples
        )
        parts.append(
            f"{difference.renamed:,} numbers whose token post lacks ({listed}"
            f"{', …' if difference.renamed > _LISTED else ''})"
        )
    return " and ".join(parts)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


_Signed = tuple[tuple[Path, int, int], ...]


def _signed(files: tuple[Path, ...]) -> _Signed:
    """Return files with sizes and times, by which a comparison is remembered; nothing where one cannot be read, or is
    larger than any document that is."""
    found = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:  # gone since the folder was listed: nothing can be read of it
            return ()
        if status.st_size > MAX_BYTES:
            return ()
        found.append((file, status.st_size, status.st_mtime_ns))
    return tuple(found)


@functools.lru_cache(maxsize=16)  # a sweep plans every variant, and compares the same files each time
def _compared(post: _Signed, others: tuple[_Signed, ...]) -> tuple[Difference | None, ...]:
    """Return how each of the others differs from post's; what has the bytes of one before is parsed with it, once."""
    known: list[tuple[_Signed, Difference | None]] = [(post, None)]
    numbers: dict[str, int] | None = None
    for other in others:
        alike = next((found for found in known if _same_bytes(other, found[0])), None)
        if alike is None and numbers is None:
            numbers = token_numbers(_paths(post))
        known.append((other, alike[1] if alike else compare(numbers or {}, token_numbers(_paths(other)))))
    return tuple(difference for _, difference in known[1:])


def _paths(files: _Signed) -> tuple[Path, ...]:
    return tuple(path for path, *_ in files)


def _same_bytes(ours: _Signed, theirs: _Signed) -> bool:
    """Whether two checkpoints list their tokens in files of the same names and bytes."""
    pairs = list(zip(_paths(ours), _paths(theirs), strict=False))
    if len(ours) != len(theirs) or any(a.name != b.name for a, b in pairs):
        return False
    try:
        return ours == theirs or all(filecmp.cmp(a, b, shallow=False) for a, b in pairs)
    except OSError:
        return False
