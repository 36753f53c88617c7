"""Pairs weights that checkpoints store in different structures: experts stacked or one by one, gate and up fused or
separate, stacks transposed. What belongs together is described as slices of stored matrices; nothing is copied.

The matrices meant are *parts*: q, k, v, gate, up and down of a layer or of one expert, each [out, in]. A stored matrix
holds one part, or several one below the other, or two in alternating rows (interleaved), or all of that transposed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from paramdelta.formats import GPT_OSS_SPELLING
from paramdelta.plan.naming import Names

_SINGLE = re.compile(r"(?:(.*\.experts)\.(\d+)|(.*))\.(gate_proj|up_proj|down_proj|w1|w2|w3|[qkv]_proj)\.weight")
_FUSED = re.compile(r"(.*)\.(gate_up_proj|qkv_proj|down_proj)(?:\.weight)?")
_PARTS = {"w1": "gate", "w3": "up", "w2": "down"} | {
    f"{part}_proj": part for part in ("gate", "up", "down", "q", "k", "v")
}
_HELD = {"gate_up_proj": ("gate", "up"), "qkv_proj": ("q", "k", "v"), "down_proj": ("down",)}


class Key(NamedTuple):
    """A part of a layer: what its name starts with, its expert (−1: none), and which part it is."""

    prefix: str
    expert: int
    part: str


class Slice(NamedTuple):
    """A part within a stored weight: rows ``first``, first + ``step``, … of matrix ``matrix`` of table row ``row``.

    Where ``transposed``, the matrix is stored the other way round, and these are its columns.
    """

    row: int
    matrix: int
    first: int
    step: int
    rows: int
    cols: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the part."""
        return self.rows, self.cols


class Piece(NamedTuple):
    """A part of an output tensor, and where post and base hold it; and new_base, where it does not lie there as in the
    output. ``more`` are post and base of further deltas."""

    out: Slice
    post: Slice
    base: Slice
    new_base: Slice | None = None
    more: tuple[tuple[Slice, Slice], ...] = ()

    def pair(self, number: int) -> tuple[Slice, Slice]:
        """Return where post and base of a delta hold the part."""
        return self.more[number - 1] if number else (self.post, self.base)


class Ambiguous(Exception):  # noqa: N818  (it never leaves the planner)
    """The shapes alone do not say which way round a stack is stored."""

    def __init__(self, role: str, name: str, shape: tuple[int, ...]) -> None:
        self.role, self.name, self.shape = role, name, shape
        super().__init__(name)


@dataclass(frozen=True)
class Structure:
    """The parts that one checkpoint's weights hold. ``stacking`` is what the user says about its stacks."""

    names: Names
    stacking: str | None

    @cached_property
    def singles(self) -> dict[Key, int]:
        """Rows of weights that hold one part."""
        found = {}
        for name, row in self.names.rows.items():
            match = _SINGLE.fullmatch(name)
            if match:
                prefix, expert, plain, part = match.groups()
                found[Key(prefix or plain, int(expert) if expert else -1, _PARTS[part])] = row
        return found

    @cached_property
    def several(self) -> dict[tuple[str, str], int]:
        """Rows of weights that hold a part of every expert, or several parts of a layer, by prefix and part."""
        found = {}
        for name, row in self.names.rows.items():
            match = _FUSED.fullmatch(name)
            if match and (len(self.names.shape(row)) == 3 or (match[2] != "down_proj")):
                for part in _HELD[match[2]]:
                    found[match[1], part] = row
        return found

    def own(self, row: int) -> list[Key] | None:
        """Return the parts that a weight holds, for the first expert of a stack; None where they are not known."""
        name = self.by_row[row]
        single = _SINGLE.fullmatch(name)
        if single:
            prefix, expert, plain, part = single.groups()
            return [Key(prefix or plain, int(expert) if expert else -1, _PARTS[part])]
        fused = _FUSED.fullmatch(name)
        if fused is None:
            return None
        first = 0 if len(self.names.shape(row)) == 3 else -1
        return [Key(fused[1], first, part) for part in _HELD[fused[2]]]

    @cached_property
    def by_row(self) -> dict[int, str]:
        """Names by row."""
        return {row: name for name, row in self.names.rows.items()}

    def shape_of(self, key: Key) -> tuple[int, int] | None:
        """Return a part's shape where a weight holds nothing else."""
        row = self.singles.get(key)
        if row is None or len(self.names.shape(row)) != 2:
            return None
        rows, cols = self.names.shape(row)
        return rows, cols

    def find(self, key: Key, shapes: dict[str, tuple[int, int]]) -> Slice | None:
        """Return where a part lies, None where it is missing or does not fit. ``shapes`` are those of all parts it may
        be stored with. Raises Ambiguous."""
        row = self.singles.get(key)
        if row is not None:
            shape = shapes[key.part]
            return Slice(row, 0, 0, 1, *shape, transposed=False) if self.names.shape(row) == shape else None
        row = self.several.get((key.prefix, key.part))
        if row is None:
            return None
        stored = self.names.shape(row)
        parts = next(p for p in _HELD.values() if key.part in p)
        if not all(part in shapes for part in parts) or (len(stored) == 3) != (key.expert >= 0):
            return None
        if key.expert >= 0 and key.expert >= stored[0]:
            return None
        transposed = self.transposed(row, [shapes[part] for part in parts])
        if transposed is None:
            return None
        before = sum(shapes[part][0] for part in parts[: parts.index(key.part)])
        step = 1
        if self.interleaved(row) and len(parts) == 2:
            before, step = parts.index(key.part), 2
        return Slice(row, max(key.expert, 0), before, step, *shapes[key.part], transposed=transposed)

    def interleaved(self, row: int) -> bool:
        """Whether parts alternate row by row: gpt-oss's blocks do."""
        return self.stacking == "interleaved" or self.blocks(row)

    def blocks(self, row: int) -> bool:
        """Whether a weight is stored as gpt-oss stores its experts."""
        weight = self.names.weights.get(row)
        return weight is not None and weight.format.spelling.stacked_codes == GPT_OSS_SPELLING.stacked_codes

    def transposed(self, row: int, shapes: list[tuple[int, int]]) -> bool | None:
        """Return whether a weight holds parts of these shapes transposed, None where it cannot hold them."""
        *_, rows, cols = self.names.shape(row)
        wanted = (sum(r for r, _ in shapes), shapes[0][1])
        straight, turned = (rows, cols) == wanted, (cols, rows) == wanted
        if not straight and not turned:
            return None
        if straight and turned and len(self.names.shape(row)) == 3:
            if self.blocks(row):
                return False
            if self.stacking is None:
                raise Ambiguous(self.names.role, self.by_row[row], self.names.shape(row))
            return self.stacking == "transposed"
        return not straight


def bridge(out: Structure, row: int, post: Structure, base: Structure) -> list[Piece] | None:
    """Return the pieces of an output weight (new_base's ``row``) with where post and base hold them; None where they do
    not. Raises Ambiguous."""
    keys = out.own(row)
    if keys is None:
        return None
    stack = out.names.shape(row)[0] if keys[0].expert >= 0 and len(out.names.shape(row)) == 3 else 0
    shapes = _shapes(keys, out, row, (post, base))
    if shapes is None:
        return None
    pieces = []
    for expert in range(stack) if stack else [keys[0].expert]:
        for key in keys:
            wanted = key._replace(expert=expert)
            found = [structure.find(wanted, shapes) for structure in (out, post, base)]
            if any(piece is None for piece in found):
                return None
            held, in_post, in_base = (piece for piece in found if piece is not None)
            pieces.append(Piece(held, in_post, in_base))
    return pieces


def parts_of(out: Structure, row: int, other: Structure) -> set[int]:
    """Return the rows in which another checkpoint may hold parts of an output weight, whatever their shapes."""
    found: set[int] = set()
    for key in out.own(row) or []:
        stack = out.names.shape(row)[0] if key.expert >= 0 and len(out.names.shape(row)) == 3 else 0
        keys = [key._replace(expert=e) for e in range(stack)] if stack else [key]
        found.update(other.singles[k] for k in keys if k in other.singles)
        if (key.prefix, key.part) in other.several:
            found.add(other.several[key.prefix, key.part])
    return found


def _shapes(
    keys: list[Key], out: Structure, row: int, others: tuple[Structure, Structure]
) -> dict[str, tuple[int, int]] | None:
    """Return the shapes of the parts of an output weight, and of those that others may fuse them with."""
    shapes: dict[str, tuple[int, int]] = {}
    together = next((parts for parts in _HELD.values() if keys[0].part in parts), ())
    for part in together:
        for structure in (out, *others):
            found = structure.shape_of(keys[0]._replace(part=part))
            if found is not None:
                shapes[part] = found
                break
    if all(key.part in shapes for key in keys):
        return shapes
    return None


def turned(out: Structure, row: int, post: tuple[Structure, int], base: tuple[Structure, int]) -> list[Piece] | None:
    """Return the pieces of a stack that post or base store under the same name, but transposed, or with gate and up
    alternating; None where all three lie alike or do not fit.

    What neither the shapes nor the user say is taken to be alike, except that gpt-oss's blocks are transposed against
    its plain stacks.
    """
    shape = out.names.shape(row)
    if len(shape) != 3:
        return None
    members = ((out, row), post, base)
    blocks = [structure.blocks(at) for structure, at in members]
    lying = []
    for (structure, at), block in zip(members, blocks, strict=True):
        there = structure.names.shape(at)
        if there not in (shape, (shape[0], shape[2], shape[1])):
            return None
        square = shape[1] == shape[2]
        if not square:
            lying.append(there != shape)
        elif structure.stacking is not None:
            lying.append(structure.stacking == "transposed")
        else:
            lying.append(any(blocks) and not block)
    mixed = [structure.interleaved(at) for structure, at in members]
    known = [block or structure.stacking is not None for (structure, _), block in zip(members, blocks, strict=True)]
    mixed = [m if k else any(mixed) for m, k in zip(mixed, known, strict=True)]
    fused = _FUSED.fullmatch(out.by_row[row])
    halves = len(set(mixed)) > 1 and fused is not None and len(_HELD[fused[2]]) == 2
    if len(set(lying)) == 1 and not halves:
        return None
    rows, cols = (shape[2], shape[1]) if lying[0] else (shape[1], shape[2])
    parts = 2 if halves else 1

    def part_of(member: int, e: int, part: int) -> Slice:
        split = mixed[member] and halves
        first = part if split else part * (rows // parts)
        return Slice(members[member][1], e, first, 2 if split else 1, rows // parts, cols, lying[member])

    return [
        Piece(part_of(0, e, part), part_of(1, e, part), part_of(2, e, part))
        for e in range(shape[0])
        for part in range(parts)
    ]
