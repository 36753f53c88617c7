"""Stacks of experts that the output stores the other way round than new_base: gpt-oss has blocks and scales as
[experts, out, in], but stacks without quantisation as [experts, in, out], and loaders expect each as it is."""

from __future__ import annotations

from paramdelta.formats import GPT_OSS_SPELLING, Format
from paramdelta.plan.naming import Names
from paramdelta.plan.pairing import NONE, Kind, Pairing


def turn_stacks(pairing: Pairing, formats: list[Format | None], names: dict[str, Names]) -> None:
    """Give stacks that go from blocks to plain, or from plain to blocks, the output's shape, and say with pieces where
    new_base has what."""
    for i, shape in enumerate(pairing.shapes):
        if len(shape) == 3 and _turns(pairing, i, formats[i], names):
            experts, rows, cols = shape
            pieces = pairing.pieces(i, experts, rows, cols)
            pairing.bridges[i] = [
                p._replace(out=p.out._replace(transposed=not p.out.transposed), new_base=p.out) for p in pieces
            ]
            pairing.shapes[i] = (experts, cols, rows)


def _turns(pairing: Pairing, i: int, wanted: Format | None, names: dict[str, Names]) -> bool:
    donor = "post" if pairing.kinds[i] == Kind.FROM_POST else "new_base"
    rows = {"post": pairing.post[i], "base": pairing.base[i], "new_base": pairing.new_base[i]}
    if _blocks(names[donor], rows[donor]):
        return wanted is None
    if wanted is None or wanted.spelling.stacked_codes != GPT_OSS_SPELLING.stacked_codes:
        return False
    # Blocks in place of a plain stack: as they lie in the checkpoint that has them.
    shape = pairing.shapes[i]
    for role in ("post", "base"):
        row = rows[role] if rows[role] != NONE else names[role].rows.get(pairing.names[i], NONE)
        if _blocks(names[role], row):
            if shape[1] != shape[2]:
                return names[role].shape(row) != shape
            if i in pairing.bridges:
                piece = pairing.bridges[i][0]
                return (piece.post if role == "post" else piece.base).transposed != piece.out.transposed
            return pairing.kinds[i] != Kind.MERGED
    return False


def _blocks(names: Names, row: int) -> bool:
    weight = names.weights.get(row)
    return weight is not None and weight.format.spelling.stacked_codes == GPT_OSS_SPELLING.stacked_codes
