"""Pairs the tensors of the three checkpoints and decides what happens to each; finds everything that cannot be paired.

Headers are the truth: no list of known architectures is consulted, so no tensor can be dropped for being unknown.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paramdelta.errors import Complaint, shown
from paramdelta.plan.naming import EMBEDDINGS, Names, grouped, is_head, proposed_rename
from paramdelta.plan.request import ROLES, MergeRequest, matcher

NONE = -1  # a row that a checkpoint does not have
# Types whose tensors are tables and masks: new_base's are kept. Other types without arithmetic may hold weights.
_INTEGERS = frozenset(("bool", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"))


class Kind(enum.IntEnum):
    """What happens to an output tensor."""

    MERGED = 0
    EXTENDED = 1  # merged, with rows that one of the three lacks
    FROM_NEW_BASE = 2
    FROM_POST = 3


@dataclass
class Pairing:
    """Output tensors in order: what happens to each, and the rows of the three tables it is made of."""

    names: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    post: list[int] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    new_base: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    integers: list[tuple[str, int, int]] = field(default_factory=list)  # name, rows in post and base
    dropped: list[str] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)  # copied because --copy-from says so
    tied: list[str] = field(default_factory=list)
    extended: list[str] = field(default_factory=list)
    bridges: dict[int, Any] = field(default_factory=dict)

    def add(
        self, name: str, kind: Kind, shape: tuple[int, ...], new: int, post: int, base: int, alpha: float = 0.0
    ) -> None:
        """Append an output tensor."""
        self.names.append(name)
        self.kinds.append(kind)
        self.shapes.append(shape)
        self.new_base.append(new)
        self.post.append(post)
        self.base.append(base)
        self.alphas.append(alpha)


@dataclass
class _Problems:
    """Names that cannot be paired, by what is the matter."""

    missing: dict[str, list[str]] = field(default_factory=lambda: {role: [] for role in ROLES})
    extra: dict[str, list[str]] = field(default_factory=lambda: {role: [] for role in ROLES})
    shapes: list[str] = field(default_factory=list)
    vocab: list[str] = field(default_factory=list)
    quantised_vocab: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    no_donor: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)


class _Pairer:
    def __init__(self, request: MergeRequest, post: Names, base: Names, new_base: Names) -> None:
        self.request, self.post, self.base, self.new_base = request, post, base, new_base
        self.left_alone = _left_alone(request)
        self.alpha_of = _alpha_of(request)
        self.result = Pairing()
        self.problems = _Problems()

    def run(self) -> None:
        for name, row in self.new_base.rows.items():
            self.pair(name, row)
        self.leftovers()

    def pair(self, name: str, row: int) -> None:
        """Decide what happens to one tensor of new_base."""
        shape = self.new_base.shape(row)
        post, base = self.find(self.post, name), self.find(self.base, name)
        if self.left_alone(name):
            self.converted(self.new_base, name, row)
            self.result.add(name, Kind.FROM_NEW_BASE, shape, row, NONE, NONE)
            return
        if is_head(name) and self.new_base.checkpoint.tied is True and self.has_own_head(name):
            self.problems.untied.append(name)
            return
        if post == NONE or base == NONE:
            self.unpaired(name, row, post, [n.role for n, r in ((self.post, post), (self.base, base)) if r == NONE])
            return
        self.paired(name, row, post, base)

    def has_own_head(self, name: str) -> bool:
        """Whether post stores an output embedding that its config does not call a copy of the input embedding."""
        return name in self.post.rows and self.post.checkpoint.tied is False

    def converted(self, names: Names, name: str, row: int) -> None:
        """Note fp8 tensors that --dtype would turn into plain numbers although nothing is merged into them."""
        dtype = names.dtype(row)
        if row not in names.weights and dtype.merges and dtype.bits == 8 and self.request.dtype not in (None, dtype):
            self.note_unscaled(name)

    def note_unscaled(self, name: str) -> None:
        if not self.request.allow_unscaled:
            self.problems.unscaled.append(name)

    def find(self, names: Names, name: str) -> int:
        row = names.rows.get(name)
        if row is not None:
            return row
        tied = names.ties(name)
        if tied is None:
            return NONE
        self.result.tied.append(f"{name} of {names.role}")
        return tied

    def paired(self, name: str, row: int, post: int, base: int) -> None:
        operands = ((self.post, post), (self.base, base), (self.new_base, row))
        shapes = [names.shape(r) for names, r in operands]
        quantised = [r in names.weights for names, r in operands]
        dtypes = [names.dtype(r) for names, r in operands]
        if not all(d.merges or q for d, q in zip(dtypes, quantised, strict=True)):
            if any(quantised) or not all(d.name in _INTEGERS for d in dtypes):
                listed = ", ".join(
                    f"{'quantised' if q else d.name} in {role}"
                    for d, q, role in zip(dtypes, quantised, ROLES, strict=True)
                )
                self.problems.kinds.append(f"{shown(name)}: {listed}")
            elif shapes[0] == shapes[1] == shapes[2]:
                self.result.add(name, Kind.FROM_NEW_BASE, shapes[2], row, NONE, NONE)
                self.result.integers.append((name, post, base))
            else:
                self.differs(name, row, post, shapes)
            return
        if any(d.bits == 8 and not q for d, q in zip(dtypes, quantised, strict=True)):
            self.note_unscaled(name)
        alpha = self.alpha_of(name)
        if shapes[0] == shapes[1] == shapes[2]:
            self.result.add(name, Kind.MERGED, shapes[2], row, post, base, alpha)
        elif _same_but_rows(shapes) and self.is_vocabulary(name, shapes):
            if self.request.vocab == "extend" and any(quantised):
                self.problems.quantised_vocab.append(f"{shown(name)}: {_by_role(shapes)}")
            elif self.request.vocab == "extend":
                rows = max(shapes[0][0], shapes[2][0])
                self.result.extended.append(name)
                self.result.add(name, Kind.EXTENDED, (rows, *shapes[2][1:]), row, post, base, alpha)
            else:
                self.problems.vocab.append(f"{shown(name)}: {_by_role(shapes)}")
        else:
            self.differs(name, row, post, shapes)

    def differs(self, name: str, row: int, post: int, shapes: list[tuple[int, ...]]) -> None:
        if self.request.copy_from == "error":
            self.problems.shapes.append(f"{shown(name)}: {_by_role(shapes)}")
        else:
            self.copy(name, row, post)

    def is_vocabulary(self, name: str, shapes: list[tuple[int, ...]]) -> bool:
        """Whether rows are tokens: by the tensor's name, or because they are as many as each config's vocab_size."""
        if name.endswith(EMBEDDINGS) or is_head(name) or name.removesuffix(".bias").endswith("lm_head"):
            return True
        sizes = [n.checkpoint.text_config.get("vocab_size") for n in (self.post, self.base, self.new_base)]
        return sizes == [shape[0] for shape in shapes]

    def unpaired(self, name: str, row: int, post: int, lacking: list[str]) -> None:
        if self.request.copy_from == "error":
            for role in lacking:
                self.problems.missing[role].append(name)
        else:
            self.copy(name, row, post)

    def copy(self, name: str, row: int, post: int) -> None:
        """Take a tensor that cannot be merged from the donor."""
        self.result.unpaired.append(name)
        if self.request.copy_from == "new-base":
            self.converted(self.new_base, name, row)
            self.result.add(name, Kind.FROM_NEW_BASE, self.new_base.shape(row), row, NONE, NONE)
        elif post == NONE:
            self.problems.no_donor.append(name)
        else:
            self.converted(self.post, name, post)
            self.result.add(name, Kind.FROM_POST, self.post.shape(post), NONE, post, NONE)

    def leftovers(self) -> None:
        """Account for names that new_base lacks. The output keeps new_base's own names, from before any rename."""
        stored = self.new_base.checkpoint.tensors
        for names in (self.post, self.base):
            for name, row in names.rows.items():
                if name in self.new_base.rows or self.left_alone(name):
                    continue
                if self.new_base.ties(name) is not None:
                    self.tied_head(names, name)
                elif self.request.copy_from == "error":
                    self.problems.extra[names.role].append(name)
                elif names.role == "post" and self.request.copy_from == "post" and name in stored:
                    self.problems.taken.append(name)
                elif names.role == "post" and self.request.copy_from == "post":
                    self.converted(names, name, row)
                    self.result.unpaired.append(name)
                    self.result.add(name, Kind.FROM_POST, names.shape(row), NONE, row, NONE)
                else:
                    self.result.dropped.append(f"{name} of {names.role}")

    def tied_head(self, names: Names, name: str) -> None:
        """new_base ties its embeddings: a head elsewhere is a copy of the embedding, or the meaning would change."""
        if names.checkpoint.tied is True:
            self.result.dropped.append(f"{name} of {names.role} (tied)")
        elif names.role == "post":
            self.problems.untied.append(name)
        elif name not in self.post.rows:
            self.problems.extra["base"].append(name)


def pair(request: MergeRequest, post: Names, base: Names, new_base: Names, wrong: list[Complaint]) -> Pairing:
    """Pair all tensors; what cannot be paired becomes a complaint that names the option which resolves it."""
    pairer = _Pairer(request, post, base, new_base)
    pairer.run()
    wrong += _complaints(pairer.problems, request, {"post": post, "base": base})
    wrong += _unmatched_globs(request, (post, base, new_base))
    if request.rename_new_base:  # renames are for pairing: the output is called what new_base calls it
        rows = new_base.rows
        pairer.result.names = [new_base.own_name(rows[n]) if n in rows else n for n in pairer.result.names]
    return pairer.result


def _left_alone(request: MergeRequest) -> Callable[[str], bool]:
    included = matcher(request.include)
    excluded = matcher(request.exclude)
    if request.include:
        return lambda name: not included(name) or excluded(name)
    return excluded


def _alpha_of(request: MergeRequest) -> Callable[[str], float]:
    everywhere, *special = request.alphas
    rules = [(matcher([rule.glob]), rule.value) for rule in reversed(special)]
    return lambda name: next((value for matches, value in rules if matches(name)), everywhere.value)


def _same_but_rows(shapes: list[tuple[int, ...]]) -> bool:
    return all(shapes) and len({shape[1:] for shape in shapes}) == 1


def _by_role(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(f"{list(shape)} in {role}" for shape, role in zip(shapes, ROLES, strict=True))


def _listing(lines: list[str]) -> str:
    text = "".join(f"\n      {line}" for line in lines[:20])
    return text + (f"\n      and {len(lines) - 20:,} more" if len(lines) > 20 else "")


def _complaints(problems: _Problems, request: MergeRequest, names: dict[str, Names]) -> list[Complaint]:
    found: list[Complaint] = []
    for role in ("post", "base"):
        missing, extra = problems.missing[role], problems.extra[role]
        if missing:
            remedy = "--copy-from new-base (or post) takes such tensors over; --exclude GLOB names them"
            rename = proposed_rename(missing, extra, role, names[role]) if extra else ""
            remedy = f"{rename} would pair them; otherwise {remedy}" if rename else remedy
            found.append(
                Complaint(
                    str(request.folder(role)),
                    f"{role} lacks {len(missing):,} tensors that new_base has:{grouped(missing)}",
                    remedy,
                )
            )
        if extra:
            found.append(
                Complaint(
                    str(request.folder(role)),
                    f"{role} has {len(extra):,} tensors that new_base lacks:{grouped(extra)}",
                    "--copy-from new-base drops them, --copy-from post adds post's to the output; "
                    "--exclude GLOB leaves them out",
                )
            )
    if problems.shapes:
        found.append(
            Complaint(
                "shapes",
                f"{len(problems.shapes):,} tensors differ in shape:{_listing(problems.shapes)}",
                "--copy-from new-base (or post) takes such tensors over; --exclude GLOB copies them from new_base",
            )
        )
    if problems.vocab:
        found.append(
            Complaint(
                "vocabulary",
                f"{len(problems.vocab):,} tensors differ in their number of tokens:{_listing(problems.vocab)}",
                "--vocab extend gives the output as many rows as the larger of post and new_base",
            )
        )
    if problems.quantised_vocab:
        found.append(
            Complaint(
                "vocabulary",
                "rows of quantised tensors cannot be added one by one, because they share scales:"
                f"{_listing(problems.quantised_vocab)}",
                "dequantise these checkpoints first, or --exclude GLOB copies them from new_base",
            )
        )
    if problems.kinds:
        found.append(
            Complaint(
                "dtypes",
                f"{len(problems.kinds):,} tensors have types that cannot be subtracted from each other:"
                f"{_listing(problems.kinds)}",
                "--exclude GLOB copies them from new_base",
            )
        )
    if problems.taken:
        found.append(
            Complaint(
                str(request.post),
                f"--copy-from post: {len(problems.taken):,} tensors of post would take the name of another tensor "
                f"of new_base:{grouped(problems.taken)}",
                "--rename-post gives them other names; --exclude GLOB leaves them out",
            )
        )
    if problems.no_donor:
        found.append(
            Complaint(
                str(request.post),
                f"--copy-from post: post lacks {len(problems.no_donor):,} of the tensors:{grouped(problems.no_donor)}",
                "--exclude GLOB copies them from new_base",
            )
        )
    if problems.untied:
        found.append(
            Complaint(
                "tied embeddings",
                "new_base ties its output embedding to the input embedding, post has one of its own "
                f"({shown(problems.untied[0])}): the result could not keep it",
                f"--exclude '{shown(problems.untied[0])}' ignores post's: the merged input embedding serves as both",
            )
        )
    if problems.unscaled:
        found.append(
            Complaint(
                "fp8",
                f"{len(problems.unscaled):,} tensors are fp8 without scales that could be found:"
                f"{grouped(problems.unscaled)}",
                "--allow-unscaled takes them for plain numbers",
            )
        )
    return found


def _unmatched_globs(request: MergeRequest, all_names: tuple[Names, ...]) -> list[Complaint]:
    options = [("--include", g) for g in request.include] + [("--exclude", g) for g in request.exclude]
    options += [("--alpha", rule.glob) for rule in request.alphas[1:]]
    found = []
    for option, glob in options:
        matches = matcher([glob])
        if not any(matches(name) for names in all_names for name in names.rows):
            found.append(
                Complaint(option, f"{shown(repr(glob))} matches no tensor", "paramdelta inspect lists what there is")
            )
    return found
