"""Pairs the tensors of the three checkpoints and decides what happens to each; finds everything that cannot be paired.

Headers are the truth: no list of known architectures is consulted, so no tensor can be dropped for being unknown.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from paramdelta.errors import Complaint, shown
from paramdelta.plan.bridges import Ambiguous, Piece, Slice, Structure, bridge, parts_of, turned
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.gathers import Gather
from paramdelta.plan.naming import EMBEDDINGS, Names, is_head
from paramdelta.plan.problems import Problems, by_role, complaints
from paramdelta.plan.request import ROLES, MergeRequest
from paramdelta.plan.values import matcher

# Tables with a row for each token, by name: input embeddings, per-layer ones too, output embeddings and their biases.
_ROWS_OF_TOKENS = re.compile(
    r"(^|\.)(embed_tokens\w*|wte|word_embeddings|embed_in|tok_embeddings)\.weight$|(^|\.)(lm_head|embed_out)\.(weight|bias)$"
)
NONE = -1  # a row that a checkpoint does not have
# Types whose tensors are tables and masks: new_base's are kept. Other types without arithmetic may hold weights.
_INTEGERS = frozenset(("bool", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"))


def has_rows_of_tokens(name: str) -> bool:
    """Whether a tensor is a table with a row for each token, by its name."""
    return _ROWS_OF_TOKENS.search(name) is not None


class Kind(enum.IntEnum):
    """What happens to an output tensor."""

    MERGED = 0
    EXTENDED = 1  # merged row by row: rows lie elsewhere, or nowhere, in some of the three
    FROM_NEW_BASE = 2
    FROM_POST = 3


class Delta(NamedTuple):
    """A delta that is added to a tensor: its number, and the rows of post and base in the tables of their roles."""

    number: int
    post_role: str
    post: int
    base_role: str
    base: int
    alpha: float


@dataclass
class Further:
    """Of each output tensor, the rows in post and base of a delta after the first one, and its alpha: 0 for nothing."""

    post: list[int]
    base: list[int]
    alphas: list[float]
    integers: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass
class Pairing:
    """Output tensors in order: what happens to each, and the rows of the tables it is made of. ``post``, ``base`` and
    ``alphas`` are those of the first delta, ``more`` those of the others."""

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
    bridges: dict[int, list[Piece]] = field(
        default_factory=dict
    )  # of tensors whose parts lie elsewhere in post or base
    more: list[Further] = field(default_factory=list)
    gathers: dict[int, Gather] = field(default_factory=dict)  # of extended tensors: which rows go together
    aligned: list[int] = field(default_factory=list)  # tensors whose rows were paired by token

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

    def adds(self, i: int) -> bool:
        """Whether any delta is added to a tensor."""
        if self.kinds[i] in (Kind.FROM_NEW_BASE, Kind.FROM_POST):
            return False
        return self.alphas[i] != 0.0 or any(further.alphas[i] != 0.0 for further in self.more)

    def posts(self, i: int) -> int:
        """Return how many deltas a tensor was paired for, whatever their alphas."""
        return sum(rows[i] != NONE for rows in (self.post, *(further.post for further in self.more)))

    def deltas(self, i: int) -> list[Delta]:
        """Return what is added to a tensor, in order."""
        if not self.adds(i):
            return []
        columns = [(self.post[i], self.base[i], self.alphas[i])]
        columns += [(further.post[i], further.base[i], further.alphas[i]) for further in self.more]
        found = []
        for number, (post, base, alpha) in enumerate(columns):
            post_role, base_role = roles_of(number)
            if alpha != 0.0:
                found.append(Delta(number, post_role, post, base_role, base, alpha))
        return found

    def pieces(self, i: int, stack: int, rows: int, cols: int) -> list[Piece]:
        """Return the pieces of a weight, its matrices where all checkpoints store it alike."""
        if i in self.bridges:
            return self.bridges[i]

        def whole(row: int, e: int) -> Slice:
            return Slice(row, e, 0, 1, rows, cols, False)

        return [
            Piece(
                whole(self.new_base[i], e),
                whole(self.post[i], e),
                whole(self.base[i], e),
                more=tuple((whole(further.post[i], e), whole(further.base[i], e)) for further in self.more),
            )
            for e in range(stack)
        ]


class _Pairer:
    def __init__(self, request: MergeRequest, post: Names, base: Names, new_base: Names) -> None:
        self.request, self.post, self.base, self.new_base = request, post, base, new_base
        self.left_alone = _left_alone(request)
        self.alpha_of = _alpha_of(request)
        self.result = Pairing()
        self.problems = Problems()
        stackings = dict(request.stacks)
        lies = {n.role: stackings.get("post" if n.checkpoint.zeros else n.role) for n in (post, base, new_base)}
        self.structures = {n.role: Structure(n, lies[n.role]) for n in (post, base, new_base)}
        self.bridged_rows: dict[str, set[int]] = {"post": set(), "base": set()}

    def run(self) -> None:
        for name, row in self.new_base.rows.items():
            self.pair(name, row)
        self.leftovers()

    def pair(self, name: str, row: int) -> None:
        """Decide what happens to one tensor of new_base."""
        post, base = self.find(self.post, name), self.find(self.base, name)
        if self.left_alone(name):
            self.from_new_base(name, row)
            for role in ("post", "base"):  # its parts there are left alone with it
                self.bridged_rows[role] |= parts_of(self.structures["new_base"], row, self.structures[role])
            return
        if is_head(name) and self.new_base.checkpoint.tied is True and self.has_own_head(name):
            self.problems.untied.append(name)
            return
        if (post == NONE or base == NONE) and self.bridged(name, row):
            return
        if post == NONE or base == NONE:
            self.unpaired(name, row, post, [n.role for n, r in ((self.post, post), (self.base, base)) if r == NONE])
            return
        self.paired(name, row, post, base)

    def bridged(self, name: str, row: int) -> bool:
        """Pair a weight whose parts post or base store in another structure; False where they do not."""
        try:
            pieces = bridge(self.structures["new_base"], row, self.structures["post"], self.structures["base"])
        except Ambiguous as found:
            self.problems.ambiguous.append(f"{shown(found.name)} {list(found.shape)} in {found.role}")
            return True
        if pieces is None:
            return False
        for role, names in (("post", self.post), ("base", self.base)):
            rows = {getattr(piece, role).row for piece in pieces}
            self.bridged_rows[role] |= rows
            for other in rows:
                if not names.dtype(other).merges and other not in names.weights:
                    self.problems.kinds.append(f"{shown(name)}: {names.dtype(other).name} in {role}")
                    return True
        self.result.bridges[len(self.result.names)] = pieces
        first = pieces[0]
        shape = self.new_base.shape(row)
        self.result.add(name, Kind.MERGED, shape, row, first.post.row, first.base.row, self.alpha_of(name))
        return True

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
        pieces = turned(
            self.structures["new_base"], row, (self.structures["post"], post), (self.structures["base"], base)
        )
        if pieces is not None:
            self.result.bridges[len(self.result.names)] = pieces
            self.result.add(name, Kind.MERGED, shapes[2], row, post, base, alpha)
        elif self.request.vocab == "align" and _same_but_rows(shapes) and self.is_token_table(name, shapes):
            self.result.add(name, Kind.EXTENDED, shapes[2], row, post, base, alpha)  # its rows: plan/vocabulary.py
        elif shapes[0] == shapes[1] == shapes[2]:
            self.result.add(name, Kind.MERGED, shapes[2], row, post, base, alpha)
        elif _same_but_rows(shapes) and self.is_vocabulary(name, shapes):
            if self.request.vocab == "extend" and any(quantised):
                self.problems.quantised_vocab.append(f"{shown(name)}: {by_role(shapes)}")
            elif self.request.vocab == "extend":
                rows = max(shapes[0][0], shapes[2][0])
                self.result.extended.append(name)
                self.result.add(name, Kind.EXTENDED, (rows, *shapes[2][1:]), row, post, base, alpha)
            else:
                self.problems.vocab.append(f"{shown(name)}: {by_role(shapes)}")
        else:
            self.differs(name, row, post, shapes)

    def differs(self, name: str, row: int, post: int, shapes: list[tuple[int, ...]]) -> None:
        if self.request.copy_from == "error":
            self.problems.shapes.append(f"{shown(name)}: {by_role(shapes)}")
        else:
            self.copy(name, row, post)

    def is_vocabulary(self, name: str, shapes: list[tuple[int, ...]]) -> bool:
        """Whether rows are tokens: by the tensor's name, or because they are as many as each config's vocab_size."""
        if name.endswith(EMBEDDINGS) or is_head(name) or name.removesuffix(".bias").endswith("lm_head"):
            return True
        sizes = [n.checkpoint.text_config.get("vocab_size") for n in (self.post, self.base, self.new_base)]
        return sizes == [shape[0] for shape in shapes]

    def is_token_table(self, name: str, shapes: list[tuple[int, ...]]) -> bool:
        """Whether rows are tokens that another tokenizer would put elsewhere. Sizes tell that only where vocab_size is
        no other size of the same config: the rows of a square matrix must not be moved."""
        if has_rows_of_tokens(name):
            return True
        configs = [n.checkpoint.text_config for n in (self.post, self.base, self.new_base)][-len(shapes) :]
        for config, shape in zip(configs, shapes, strict=True):
            sizes = [v for v in config.values() if isinstance(v, int) and not isinstance(v, bool)]
            size = config.get("vocab_size")
            if not shape or shape[0] != size or sizes.count(size) > 1:
                return False
        return True

    def from_new_base(self, name: str, row: int) -> None:
        """Take new_base's tensor; where rows are paired by token, its rows in the order of the output's tokens."""
        self.converted(self.new_base, name, row)
        shape = self.new_base.shape(row)
        by_token = self.request.vocab == "align" and self.is_token_table(name, [shape])
        kind = Kind.EXTENDED if by_token else Kind.FROM_NEW_BASE
        self.result.add(name, kind, shape, row, NONE, NONE)

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
            self.from_new_base(name, row)
        elif post == NONE:
            self.problems.no_donor.append(name)
        else:
            self.converted(self.post, name, post)
            self.copied_tokens(name, self.post.shape(post))
            self.result.add(name, Kind.FROM_POST, self.post.shape(post), NONE, post, NONE)

    def copied_tokens(self, name: str, shape: tuple[int, ...]) -> None:
        """Note what is copied from post and has rows in the order of post's tokens, where new_base's are wanted."""
        if self.request.vocab == "align" and self.request.tokenizer != "post" and has_rows_of_tokens(name):
            self.problems.other_tokens.append(f"{shown(name)}: {list(shape)} in post")

    def leftovers(self) -> None:
        """Account for names that new_base lacks. The output keeps new_base's own names, from before any rename."""
        stored = self.new_base.checkpoint.tensors
        for names in (self.post, self.base):
            for name, row in names.rows.items():
                if name in self.new_base.rows or self.left_alone(name) or row in self.bridged_rows[names.role]:
                    continue
                if self.new_base.ties(name) is not None:
                    self.tied_head(names, name)
                elif self.request.copy_from == "error":
                    self.problems.extra[names.role].append(name)
                elif names.role == "post" and self.request.copy_from == "post" and name in stored:
                    self.problems.taken.append(name)
                elif names.role == "post" and self.request.copy_from == "post":
                    self.converted(names, name, row)
                    self.copied_tokens(name, names.shape(row))
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
    """Pair all tensors of the first delta, under the names that new_base's renames give them; what cannot be paired
    becomes a complaint that names the option which resolves it."""
    pairer = _Pairer(request, post, base, new_base)
    pairer.run()
    wrong += complaints(pairer.problems, request, {"post": post, "base": base})
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
