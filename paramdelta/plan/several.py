"""Pairs the tensors of every delta of a merge with new_base's, and puts the pairings together: each output tensor is
new_base's and the sum of what the deltas add to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paramdelta.errors import Complaint, shown
from paramdelta.plan.bridges import Piece, Slice
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.naming import Names, grouped
from paramdelta.plan.outputs import matrix_shape
from paramdelta.plan.pairing import NONE, Further, Kind, Pairing, pair
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.values import matcher

_MERGED = (Kind.MERGED, Kind.EXTENDED)


def pair_all(request: MergeRequest, names: dict[str, Names], wrong: list[Complaint]) -> Pairing:
    """Pair all tensors of every delta; what cannot be paired becomes a complaint that names the option which resolves
    it. What a delta after the first cannot be paired for, ``--copy-from`` leaves without that delta."""
    new_base = names["new_base"]
    pairings = []
    for number in range(len(request.sources)):
        post_role, base_role = roles_of(number)
        own = request.of_delta(number)
        if number and own.copy_from == "post":
            own = replace(own, copy_from="new-base")
        found: list[Complaint] = []
        pairings.append(pair(own, names[post_role], names[base_role], new_base, found))
        if request.more:
            found = [replace(c, subject=f"delta {number + 1}: {c.subject}") for c in found]
        wrong += found
    result = (
        pairings[0] if len(pairings) == 1 else _Joiner(names, pairings, wrong, by_token=request.vocab == "align").run()
    )
    wrong += _unmatched_globs(request, names)
    if (
        request.rename_new_base or new_base.checkpoint.zeros
    ):  # renames are for pairing: the output is called what new_base calls it
        rows = new_base.rows
        result.names = [new_base.own_name(rows[n]) if n in rows else n for n in result.names]
    return result


class _Joiner:
    """Adds the pairings of further deltas to that of the first."""

    def __init__(
        self, names: dict[str, Names], pairings: list[Pairing], wrong: list[Complaint], *, by_token: bool
    ) -> None:
        self.names, self.wrong, self.by_token = names, wrong, by_token
        self.result, self.others = pairings[0], pairings[1:]
        self.numbers = [{name: j for j, name in enumerate(p.names)} for p in self.others]
        self.replaced: list[str] = []
        self.quantised: list[str] = []
        self.crossing: list[str] = []

    def run(self) -> Pairing:
        result = self.result
        result.unpaired = [f"{name} of delta 1" for name in result.unpaired]
        for number, other in enumerate(self.others, 2):
            nothing = len(result.names)
            result.more.append(Further([NONE] * nothing, [NONE] * nothing, [0.0] * nothing, other.integers))
            result.unpaired += [f"{name} of delta {number}" for name in other.unpaired]
            result.dropped += [f"{what}, delta {number}" for what in other.dropped]
            result.tied += [f"{what}, delta {number}" for what in other.tied]
        for i in range(len(result.names)):
            self.join(i)
        result.extended = [n for n, kind in zip(result.names, result.kinds, strict=True) if kind == Kind.EXTENDED]
        self.complain()
        return result

    def join(self, i: int) -> None:
        """Add to one tensor what the further deltas add to it."""
        result, name = self.result, self.result.names[i]
        found = [(number, numbers.get(name)) for number, numbers in enumerate(self.numbers)]
        merging = [(n, j) for n, j in found if j is not None and self.others[n].kinds[j] in _MERGED]
        if not merging:
            return
        if result.kinds[i] == Kind.FROM_POST:
            self.replaced.append(name)
            return
        shapes, kinds = [result.shapes[i]], [result.kinds[i]]
        pieces: dict[int, list[Piece] | None] = {}
        if result.kinds[i] in _MERGED:
            pieces[0] = result.bridges.get(i)
        for number, j in merging:
            other, further = self.others[number], result.more[number]
            further.post[i], further.base[i], further.alphas[i] = other.post[j], other.base[j], other.alphas[j]
            shapes.append(other.shapes[j])
            kinds.append(other.kinds[j])
            pieces[number + 1] = other.bridges.get(j)
        result.kinds[i] = Kind.EXTENDED if Kind.EXTENDED in kinds else Kind.MERGED
        result.shapes[i] = max(shapes)  # they differ in rows alone
        bridged = any(p is not None for p in pieces.values())
        by_number = result.kinds[i] == Kind.EXTENDED and not self.by_token
        if by_number and (bridged or self.is_quantised(i)):
            self.quantised.append(name)
        elif bridged:
            self.bridge(i, pieces)

    def is_quantised(self, i: int) -> bool:
        """Whether new_base, or a post or base that pairs with it, stores a tensor quantised."""
        rows = [("new_base", self.result.new_base[i]), ("post", self.result.post[i]), ("base", self.result.base[i])]
        for number, further in enumerate(self.result.more, 1):
            rows += zip(roles_of(number), (further.post[i], further.base[i]), strict=True)
        return any(row in self.names[role].weights for role, row in rows)

    def bridge(self, i: int, pieces: dict[int, list[Piece] | None]) -> None:
        """Cut a tensor so finely that every delta has each piece in one place."""
        result = self.result
        stack, rows, cols = matrix_shape(result.shapes[i])
        own = {n: self.whole(i, n, stack, rows, cols) if p is None else p for n, p in pieces.items()}
        cut = refined(list(own.values()))
        if cut is None:
            self.crossing.append(result.names[i])
            return
        by_delta = dict(zip(own, cut, strict=True))
        nowhere = [p.out._replace(row=NONE) for p in cut[0]]
        result.bridges[i] = []
        for at, piece in enumerate(cut[0]):
            held = [by_delta[n][at] if n in by_delta else None for n in range(len(result.more) + 1)]
            pairs = [(nowhere[at], nowhere[at]) if p is None else (p.post, p.base) for p in held]
            result.bridges[i].append(Piece(piece.out, *pairs[0], more=tuple(pairs[1:])))

    def whole(self, i: int, number: int, stack: int, rows: int, cols: int) -> list[Piece]:
        """Return the matrices of a tensor as pieces of a delta that stores it as new_base does."""
        result = self.result
        further = result.more[number - 1] if number else result

        def at(row: int, e: int) -> Slice:
            return Slice(row, e, 0, 1, rows, cols, False)

        new_base, post, base = result.new_base[i], further.post[i], further.base[i]
        return [Piece(at(new_base, e), at(post, e), at(base, e)) for e in range(stack)]

    def complain(self) -> None:
        if self.replaced:
            self.wrong.append(
                Complaint(
                    "--copy-from",
                    f"post would take the place of {len(self.replaced):,} tensors to which other deltas add:"
                    f"{grouped(self.replaced)}",
                    "--copy-from new-base leaves out only the delta that cannot be paired; --exclude GLOB all of them",
                )
            )
        if self.quantised:
            self.wrong.append(
                Complaint(
                    "vocabulary",
                    "rows of quantised tensors cannot be added one by one, because they share scales:"
                    f"{grouped(self.quantised)}",
                    "dequantise these checkpoints first, or --exclude GLOB copies them from new_base",
                )
            )
        if self.crossing:
            self.wrong.append(
                Complaint(
                    "structures",
                    f"{len(self.crossing):,} tensors lie one way round for one delta and the other for another:"
                    f"{grouped(self.crossing)}",
                    "--stacks says how post, base and new_base lie; --exclude GLOB copies them from new_base",
                )
            )


def refined(lists: Sequence[list[Piece]]) -> list[list[Piece]] | None:
    """Cut several divisions of the same tensor into pieces that are the same output in all; None where one lies the
    other way round and cannot be turned."""
    turned = any(piece.out.transposed for pieces in lists for piece in pieces)
    aligned = []
    for pieces in lists:
        lying = [piece if piece.out.transposed == turned else _turned(piece) for piece in pieces]
        if None in lying:
            return None
        aligned.append([piece for piece in lying if piece is not None])
    outs = [piece.out for piece in aligned[0]]
    for pieces in aligned[1:]:
        there: dict[int, list[Slice]] = {}
        for piece in pieces:
            there.setdefault(piece.out.matrix, []).append(piece.out)
        outs = [c for a in outs for b in there.get(a.matrix, []) if (c := _common(a, b)) is not None]
    return [_cut(pieces, outs) for pieces in aligned]


def _turned(piece: Piece) -> Piece | None:
    """Return a piece of whole matrices described the other way round, None where it is a part of one."""
    members = (piece.out, piece.post, piece.base)
    if any(at.first or at.step != 1 or at.shape != piece.out.shape for at in members):
        return None
    out, post, base = (at._replace(rows=at.cols, cols=at.rows, transposed=not at.transposed) for at in members)
    return Piece(out, post, base)


def _common(a: Slice, b: Slice) -> Slice | None:
    """Return the rows that two slices of a matrix share; of their steps, one divides the other."""
    fine, coarse = (a, b) if a.step <= b.step else (b, a)
    if (coarse.first - fine.first) % fine.step:
        return None
    low = max(a.first, b.first)
    first = coarse.first + -(-(low - coarse.first) // coarse.step) * coarse.step
    end = min(s.first + s.step * (s.rows - 1) for s in (a, b))
    if first > end:
        return None
    return a._replace(first=first, step=coarse.step, rows=(end - first) // coarse.step + 1)


def _cut(pieces: list[Piece], outs: list[Slice]) -> list[Piece]:
    """Return the parts of ``pieces`` that make the given slices of the output."""
    there: dict[int, list[Piece]] = {}
    for piece in pieces:
        there.setdefault(piece.out.matrix, []).append(piece)
    found = []
    for out in outs:
        piece = next(p for p in there[out.matrix] if _common(p.out, out) == out)
        skipped, step = divmod(out.first - piece.out.first, piece.out.step)[0], out.step // piece.out.step

        def part(at: Slice, skipped: int = skipped, step: int = step, rows: int = out.rows) -> Slice:
            return at._replace(first=at.first + skipped * at.step, step=at.step * step, rows=rows)

        found.append(Piece(out, part(piece.post), part(piece.base)))
    return found


def _unmatched_globs(request: MergeRequest, names: dict[str, Names]) -> list[Complaint]:
    everywhere = list(names)
    options = [("--include", g, everywhere) for g in request.include]
    options += [("--exclude", g, everywhere) for g in request.exclude]
    for number, source in enumerate(request.sources):
        options += [("--alpha", rule.glob, [*roles_of(number), "new_base"]) for rule in source.alphas[1:]]
    found = []
    for option, glob, roles in options:
        matches = matcher([glob])
        if not any(matches(name) for role in roles for name in names[role].rows):
            found.append(
                Complaint(option, f"{shown(repr(glob))} matches no tensor", "paramdelta inspect lists what there is")
            )
    return found
