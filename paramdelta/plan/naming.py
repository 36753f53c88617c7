"""Names of tensors: renames before pairing, tied embeddings, and lists of names a person can read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.weights import Quantisation, QuantisedWeight
from paramdelta.dtypes import DType
from paramdelta.errors import Complaint, shown
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.values import Rename

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_MOST_SHOWN = 20
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Names:
    """The weights of one checkpoint by the names they are paired under, in the checkpoint's order.

    ``rows`` are rows of the checkpoint's table: a tensor's own, or that of the codes of a quantised weight. Scales and
    calibration statistics have no names here.
    """

    checkpoint: Checkpoint
    quantisation: Quantisation
    rows: dict[str, int]

    @cached_property
    def weights(self) -> dict[int, QuantisedWeight]:
        """Quantised weights by the row of their codes."""
        return {weight.codes: weight for weight in self.quantisation.weights.values()}

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of a weight in elements, however they are stored."""
        weight = self.weights.get(row)
        return self.checkpoint.tensors.shapes[row] if weight is None else weight.shape

    def dtype(self, row: int) -> DType:
        """Return the dtype that a tensor has in the file."""
        return self.checkpoint.tensors.dtype_of(row)

    def own_name(self, row: int) -> str:
        """Return what the checkpoint itself calls a weight."""
        weight = self.weights.get(row)
        return self.checkpoint.tensors.names[row] if weight is None else weight.name

    @property
    def role(self) -> str:
        """post, base or new_base."""
        return self.checkpoint.role

    def embedding(self) -> str | None:
        """Return the name of the input embedding, None where there is none or more than one."""
        found = [name for name in self.rows if name.endswith(EMBEDDINGS)]
        return found[0] if len(found) == 1 else None

    def ties(self, name: str) -> int | None:
        """Return the embedding's row where ``name`` is an output embedding that this checkpoint leaves out because it
        is tied. A config that says nothing counts as tied: a head that is neither stored nor tied would be random."""
        if name in self.rows or not is_head(name) or self.checkpoint.tied is False:
            return None
        embedding = self.embedding()
        return None if embedding is None else self.rows[embedding]


def is_head(name: str) -> bool:
    """Whether a tensor is an output embedding, by its name."""
    return any(name == head or name.endswith(f".{head}") for head in HEADS)


def renamed(
    checkpoint: Checkpoint,
    quantisation: Quantisation,
    renames: Sequence[Rename],
    wrong: list[Complaint],
    unused: list[set[int]],
) -> Names:
    """Apply ``--rename-*`` to a checkpoint's names; two tensors that end up with one name are a complaint. The numbers
    of the renames that changed nothing are added to ``unused``."""
    own = _own_names(checkpoint, quantisation)
    if not renames:
        return Names(checkpoint, quantisation, own)
    compiled = [(re.compile(r.pattern), r.replacement) for r in renames]
    rows: dict[str, int] = {}
    used = [False] * len(compiled)
    option = f"--rename-{checkpoint.role.replace('_', '-')}"
    for name, row in own.items():
        new = name
        for i, (pattern, replacement) in enumerate(compiled):
            new, count = pattern.subn(replacement, new)
            used[i] |= count > 0
        if new in rows:
            first = next(n for n, r in own.items() if r == rows[new])
            wrong.append(Complaint(option, f"{shown(first)} and {shown(name)} would both be called {shown(new)}"))
        rows.setdefault(new, row)
    unused.append({i for i, hit in enumerate(used) if not hit})
    return Names(checkpoint, quantisation, rows)


def rename_all(
    request: MergeRequest, checkpoints: dict[str, Checkpoint], found: Sequence[Quantisation], wrong: list[Complaint]
) -> dict[str, Names]:
    """Return every checkpoint's names by role. A rename that matches no tensor, of no delta, is a complaint."""
    names: dict[str, Names] = {}
    unused: dict[str, list[set[int]]] = {}
    for (role, checkpoint), quantisation in zip(checkpoints.items(), found, strict=True):
        if checkpoint.zeros:  # named as the post that they mirror; what is wrong there is said of it
            names[role] = renamed(checkpoint, quantisation, request.renames("post"), [], [])
            continue
        left = unused.setdefault(checkpoint.role, [])
        names[role] = renamed(checkpoint, quantisation, request.renames(role), wrong, left)
    for role, sets in unused.items():
        for i in sorted(set.intersection(*sets)) if sets else ():
            option, pattern = f"--rename-{role.replace('_', '-')}", request.renames(role)[i].pattern
            wrong.append(Complaint(option, f"{shown(repr(pattern))} matches no tensor of {role}"))
    return names


def _own_names(checkpoint: Checkpoint, quantisation: Quantisation) -> dict[str, int]:
    """Return the names of a checkpoint's weights and plain tensors, without the planes they are stored in."""
    if not quantisation.parts and not quantisation.statistics:
        return checkpoint.tensors.rows
    logical = {weight.codes: weight.name for weight in quantisation.weights.values()}
    hidden = quantisation.parts.union(quantisation.statistics).difference(logical)
    return {logical.get(row, name): row for row, name in enumerate(checkpoint.tensors.names) if row not in hidden}


def grouped(names: Iterable[str]) -> str:
    """Return names as a list a person can read: those that differ only in numbers on one line, at most 20 lines."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_NUMBER.sub("{}", name)].append(name)
    lines = []
    for members in list(groups.values())[:_MOST_SHOWN]:
        if len(members) == 1:
            lines.append(shown(members[0]))
        else:
            lines.append(f"{shown(_pattern(members))} ({len(members):,} tensors)")
    if len(groups) > _MOST_SHOWN:
        rest = sum(len(m) for m in list(groups.values())[_MOST_SHOWN:])
        lines.append(f"and {rest:,} more")
    return "".join(f"\n      {line}" for line in lines)


def _pattern(members: list[str]) -> str:
    """Write names that differ only in numbers as one, each number as the set it takes: ``layers.{0..31}.q.bias``."""
    columns = list(zip(*(_NUMBER.findall(name) for name in members), strict=True))
    sets = iter([_numbers(column) for column in columns])
    return _NUMBER.sub(lambda _: next(sets), members[0])


def _numbers(column: Sequence[str]) -> str:
    values = sorted({int(v) for v in column})
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    text = ",".join(map(str, values[:6]))
    return f"{{{text}{',…' if len(values) > 6 else ''}}}"


def proposed_rename(missing: Sequence[str], extra: Sequence[str], role: str, names: Names) -> str:
    """Return the ``--rename`` option that would turn most of ``extra`` (names only ``role`` has) into ``missing`` ones,
    by replacing a common prefix; an empty string where no such option is plain to see.

    Names of the checkpoint that already pair must not change: where the prefix alone would reach them too, the option
    spells out what may follow it.
    """
    wanted = set(missing)
    tried: set[tuple[str, str]] = set()
    for name in missing[:50]:
        for candidate in [e for e in extra if e.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:50]:
            old, new = _prefixes(candidate, name)
            if (old, new) in tried:
                continue
            tried.add((old, new))
            tails = [e[len(old) :] for e in extra if e.startswith(old)]
            hits = [tail for tail in tails if new + tail in wanted]
            if 2 * len(hits) >= len(wanted):
                option = f"--rename-{role.replace('_', '-')}"
                if sum(other.startswith(old) for other in names.rows) == len(hits):
                    return f"{option} '^{re.escape(old)}={new}'"
                follows = "|".join(sorted({re.escape(tail.split(".")[0]) for tail in hits}))
                return f"{option} '^{re.escape(old)}({follows})\\.={new}\\1.'"
    return ""


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """Return what two names start with before their longest common run of parts at the end."""
    a, b = old.split("."), new.split(".")
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1

    def head(parts: list[str]) -> str:
        kept = parts[: len(parts) - common]
        return "".join(f"{part}." for part in kept)

    return head(a), head(b)
