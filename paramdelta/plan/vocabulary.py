"""``--vocab align``: rows of embeddings and heads are paired by token, not by number.

The text of a token is its key. The output has the tokenizer of post or of new_base, and as many rows as that
checkpoint's tensors. For each of its tokens

    acc = new_base's row
    acc = acc + alpha · (post's row − base's row)       for each delta whose post has the token

Where one of base and new_base lacks the token, the other's row stands for it, and zeros where both do: the delta leads
from there to post's row, so that with alpha = 1 the output has post's row (to one rounding). Of several bases it is the
first that has the token, of those whose post has it too. Rows without a token, which pad a vocabulary, are
paired by number with rows that have none either. A token whose id lies beyond the rows of a tensor is lacking there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.documents import read_json
from paramdelta.checkpoint.tokens import Tokens, read_tokens
from paramdelta.errors import CheckpointError, Complaint, shown
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.gathers import AS_START, IN_NEW_BASE, ZEROS, Column, Gather, extended
from paramdelta.plan.naming import Names, grouped
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.request import MergeRequest

# Tokenizers that share less of the smaller one's tokens are of different families: most rows would have no partner.
SMALLEST_SHARE = 0.5
MOST_LISTED = 100
_CONFIG = "tokenizer_config.json"


class Alignment:
    """Tokens of every checkpoint against those of the output. ``role`` is whose tokenizer the output has."""

    def __init__(self, role: str, tokens: dict[str, Tokens]) -> None:
        self.role, self.tokens = role, tokens
        self.out = tokens[role]
        self.texts = {r: _texts(t) for r, t in tokens.items()}
        self.ids = {r: self._ids(t) for r, t in tokens.items()}  # of each output token, NONE: lacking
        self.named = {r: _named(t) for r, t in tokens.items()}
        self._columns: dict[tuple[str, int, int], Column] = {}

    def _ids(self, tokens: Tokens) -> Column:
        found = np.full(self.out.end, NONE, np.int64)
        for text, number in self.out.ids.items():
            if found[number] == NONE:  # of several texts with one id, the first that is there
                found[number] = tokens.ids.get(text, NONE)
        return found

    def column(self, role: str, rows: int, have: int) -> Column:
        """Return the row of a tensor of ``have`` rows that goes with each of ``rows`` output rows, ZEROS for none."""
        if role == self.role:
            order = np.arange(rows)
            return np.where(order < have, order, ZEROS)
        key = (role, rows, have)
        if key not in self._columns:
            ids = _fitted(self.ids[role], rows, NONE)
            found = np.where(ids < have, ids, ZEROS)
            empty = ~_fitted(self.named[self.role], rows, False)
            empty &= ~_fitted(self.named[role], rows, False) & (np.arange(rows) < have)
            self._columns[key] = np.where(empty, np.arange(rows), found)
        return self._columns[key]

    def gather(self, rows: int, new_base: int, deltas: dict[int, tuple[int, int]]) -> Gather:
        """Return what is paired in a tensor of ``rows`` output rows, where new_base, and post and base of each delta,
        have so many."""
        start = self.column("new_base", rows, new_base)
        start_in = np.full(rows, IN_NEW_BASE)
        pairs = {}
        for number, (in_post, in_base) in deltas.items():
            post_role, base_role = roles_of(number)
            post, base = self.column(post_role, rows, in_post), self.column(base_role, rows, in_base)
            instead = (start == ZEROS) & (base != ZEROS) & (post != ZEROS)
            start, start_in = np.where(instead, base, start), np.where(instead, number, start_in)
            pairs[number] = (post, base)
        for number, (post, base) in pairs.items():
            base = np.where((base == ZEROS) & (start != ZEROS), AS_START, base)
            pairs[number] = (post, np.where(post == ZEROS, ZEROS, base))
        return Gather(start=start, start_in=start_in, deltas=pairs)

    def translated(self, role: str, number: int) -> int | None:
        """Return the output's id for an id of a checkpoint, None where its token is none of the output's. Numbers that
        no token has (−1 for none, say) stay what they are where the output has no token there either."""
        texts = self.texts[role].get(number)
        if texts is None:
            return None if number in self.texts[self.role] else number
        return next((self.out.ids[text] for text in texts if text in self.out.ids), None)

    def text(self, role: str, number: int) -> str:
        """Return the text of an id, or the id where it has none."""
        return next(iter(self.texts[role].get(number, ())), str(number))


def settle(
    request: MergeRequest, pairing: Pairing, names: dict[str, Names], wrong: list[Complaint]
) -> Alignment | None:
    """Find the rows of the operands for every tensor that is paired row by row; under ``--vocab align`` by token, and
    its shape. What has its rows in place in all operands is an ordinary tensor. Returns how tokens were aligned."""
    by_rows = [i for i, kind in enumerate(pairing.kinds) if kind == Kind.EXTENDED]
    if request.vocab != "align":
        for i in by_rows:
            new_base, deltas = _heights(pairing, names, i)
            pairing.gathers[i] = extended(pairing.shapes[i][0], new_base, deltas)
        return None
    pairing.extended = []
    alignment = _aligned(request, {role: n.checkpoint for role, n in names.items()}, wrong)
    if alignment is None:
        return None
    quantised, heightless = [], []
    paired_as = {row: name for name, row in names["new_base"].rows.items()}
    for i in by_rows:
        rows = _output_rows(pairing, i, paired_as[pairing.new_base[i]], names[alignment.role])
        if rows is None:
            heightless.append(pairing.names[i])
            continue
        new_base, deltas = _heights(pairing, names, i)
        gather = alignment.gather(rows, new_base, deltas)
        pairing.aligned.append(i)
        heights = {rows, new_base, *(height for pair in deltas.values() for height in pair)}
        if len(heights) == 1 and gather.in_place():
            pairing.kinds[i] = Kind.MERGED if pairing.post[i] != NONE or deltas else Kind.FROM_NEW_BASE
        elif _is_quantised(pairing, names, i):
            quantised.append(pairing.names[i])
        else:
            pairing.shapes[i] = (rows, *pairing.shapes[i][1:])
            pairing.gathers[i] = gather
    if quantised:
        text = "rows of quantised tensors cannot be moved one by one, because they share scales:"
        remedy = "dequantise them first; checkpoints whose tokenizers give every token one id need no --vocab align"
        wrong.append(Complaint("--vocab align", f"{text}{grouped(quantised)}", remedy))
    if heightless:
        text = f"{alignment.role} has the output's tokenizer, but lacks tensors whose rows are tokens:"
        other = "post" if alignment.role == "new_base" else "new-base"
        wrong.append(Complaint("--vocab align", f"{text}{grouped(heightless)}", f"--tokenizer {other}"))
    return alignment


def _aligned(request: MergeRequest, checkpoints: dict[str, Checkpoint], wrong: list[Complaint]) -> Alignment | None:
    """Read every tokenizer; None, and complaints, where one cannot be read or shares too little with the output's."""
    tokens: dict[str, Tokens] = {}
    found: list[Complaint] = []
    for role, checkpoint in checkpoints.items():
        try:
            tokens[role] = next(
                (t for r, t in tokens.items() if checkpoints[r].path == checkpoint.path), None
            ) or read_tokens(checkpoint.path)
        except CheckpointError as error:
            found += [c for c in error.complaints if c not in found]
    if found:
        wrong += found
        return None
    alignment = Alignment("post" if request.tokenizer == "post" else "new_base", tokens)
    for role, own in tokens.items():
        shared = sum(text in alignment.out.ids for text in own.ids)
        smaller = max(min(len(own.ids), len(alignment.out.ids)), 1)
        if shared < SMALLEST_SHARE * smaller:
            spelled = ""
            if own.alphabet != alignment.out.alphabet:
                spelled = f"; they spell text differently: {own.alphabet}, against {alignment.out.alphabet}"
            found.append(
                Complaint(
                    str(own.path),
                    f"only {shared:,} of {len(own.ids):,} tokens of {role} are among the {len(alignment.out.ids):,} of "
                    f"{alignment.role}, whose tokenizer the output is to have{spelled}",
                    f"--vocab align is for tokenizers that share at least {SMALLEST_SHARE:.0%} of the smaller one",
                )
            )
    wrong += found
    return None if found else alignment


def _heights(pairing: Pairing, names: dict[str, Names], i: int) -> tuple[int, dict[int, tuple[int, int]]]:
    """Return the rows that a tensor has in new_base, and by delta in post and base."""
    deltas = {
        d.number: (names[d.post_role].shape(d.post)[0], names[d.base_role].shape(d.base)[0]) for d in pairing.deltas(i)
    }
    return names["new_base"].shape(pairing.new_base[i])[0], deltas


def _output_rows(pairing: Pairing, i: int, name: str, names: Names) -> int | None:
    """Return the rows that a tensor has in the checkpoint whose tokenizer the output has, None where it lacks it."""
    row = pairing.new_base[i] if names.role == "new_base" else pairing.post[i]
    if row == NONE:  # left alone: nothing was looked for in post
        row = names.rows.get(name, NONE)
    tied = names.ties(name) if row == NONE else row
    return None if tied is None else names.shape(tied)[0]


def _has_template(checkpoint: Checkpoint) -> bool:
    """Whether a folder has a chat template: a file of its own, or a field of the tokenizer's config."""
    if any(name.startswith("chat_template.") for name in checkpoint.side_files):
        return True
    return bool(_tokenizer_config(checkpoint).get("chat_template"))


def _unlisted(checkpoint: Checkpoint, tokens: Tokens) -> list[str]:
    """Return the texts of added tokens that only tokenizer_config.json knows."""
    added = _tokenizer_config(checkpoint).get("added_tokens_decoder")
    entries = added.values() if isinstance(added, dict) else []
    texts = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    return [text for text in texts if isinstance(text, str) and text not in tokens.ids]


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    there = _CONFIG in checkpoint.side_files
    return read_json(checkpoint.path, _CONFIG, []) if there else {}


def _is_quantised(pairing: Pairing, names: dict[str, Names], i: int) -> bool:
    rows = [("new_base", pairing.new_base[i])]
    for d in pairing.deltas(i):
        rows += [(d.post_role, d.post), (d.base_role, d.base)]
    return any(row in names[role].weights for role, row in rows)


def _texts(tokens: Tokens) -> dict[int, list[str]]:
    texts: dict[int, list[str]] = {}
    for text, number in tokens.ids.items():
        texts.setdefault(number, []).append(text)
    return texts


def _named(tokens: Tokens) -> Any:
    """Return which ids are tokens."""
    named = np.zeros(tokens.end, bool)
    named[list(tokens.ids.values())] = True
    return named


def _fitted(column: Any, rows: int, filler: Any) -> Any:
    """Return a column cut, or filled up, to so many rows."""
    return np.concatenate([column[:rows], np.full(max(rows - len(column), 0), filler, column.dtype)])


def describe(alignment: Alignment, pairing: Pairing) -> dict[str, Any]:
    """Return what was paired, as JSON-ready values: counts, and the first tokens of each kind."""
    own = alignment.ids[alignment.role] != NONE
    new_base = alignment.ids["new_base"]
    deltas = []
    for number in range(len(pairing.more) + 1):
        post_role, base_role = roles_of(number)
        post, base = alignment.ids[post_role], alignment.ids[base_role]
        everywhere = own & (post != NONE) & (base != NONE) & (new_base != NONE)
        order = np.arange(len(own))
        moved = everywhere & ((post != order) | (base != order) | (new_base != order))
        deltas.append(
            {
                "in_all": int(everywhere.sum()),
                "moved": int(moved.sum()),
                "not_in_post": _listed(alignment, own & (post == NONE)),
                "not_in_base": _listed(alignment, own & (post != NONE) & (base == NONE) & (new_base != NONE)),
                "not_in_new_base": _listed(alignment, own & (post != NONE) & (base != NONE) & (new_base == NONE)),
                "only_in_post": _listed(alignment, own & (post != NONE) & (base == NONE) & (new_base == NONE)),
            }
        )
    specials = {
        role: sorted(t for t in (tokens.special ^ alignment.out.special) if t in tokens.ids and t in alignment.out.ids)
        for role, tokens in alignment.tokens.items()
    }
    return {
        "tokenizer": alignment.role,
        "tokens": len(alignment.out.ids),
        "alphabets": {role: tokens.alphabet for role, tokens in alignment.tokens.items()},
        "tensors": {pairing.names[i]: pairing.shapes[i][0] for i in pairing.aligned},
        "deltas": deltas,
        "left_out": {
            role: _counted(text for text in tokens.ids if text not in alignment.out.ids)
            for role, tokens in alignment.tokens.items()
            if role != alignment.role
        },
        "special_only_in_one": {role: _counted(texts) for role, texts in specials.items() if texts},
    }


def _listed(alignment: Alignment, chosen: Any) -> dict[str, Any]:
    texts = [alignment.text(alignment.role, number) for number in np.flatnonzero(chosen).tolist()]
    return _counted(sorted(texts, key=lambda text: text not in alignment.out.special))  # special ones matter most


def _counted(texts: Iterable[str]) -> dict[str, Any]:
    found = list(texts)
    return {"count": len(found), "tokens": found[:MOST_LISTED]}


def warnings_of(alignment: Alignment, pairing: Pairing, checkpoints: dict[str, Checkpoint]) -> Iterator[str]:
    """Yield what may surprise: other spellings, other normalisation, a lost chat template, tokens without a row, rows
    of zeros."""
    out = alignment.out
    if (
        alignment.role == "new_base"
        and _has_template(checkpoints["post"])
        and not _has_template(checkpoints["new_base"])
    ):
        yield "post has a chat template, but the output has new_base's tokenizer files, which have none"
    for role, tokens in alignment.tokens.items():
        unlisted = _unlisted(checkpoints[role], tokens)
        if unlisted:
            yield (
                f"{role}: tokenizer_config.json adds {len(unlisted):,} tokens that tokenizer.json lacks; their rows "
                f"count as rows without a token: {', '.join(shown(repr(text)) for text in unlisted[:5])}"
            )
        if tokens.alphabet != out.alphabet:
            yield f"tokenizers spell text differently: {role}: {tokens.alphabet}; {alignment.role}: {out.alphabet}"
        if tokens.normaliser != out.normaliser:
            yield f"the tokenizers of {role} and {alignment.role} normalise text differently before they split it"
    for i, gather in pairing.gathers.items():
        rows, name = len(gather.start), shown(pairing.names[i])
        beyond = sum(number >= rows for number in out.ids.values())
        if beyond:
            yield f"{name} has {rows:,} rows, and none for {beyond:,} tokens of {alignment.role}'s tokenizer"
        nothing = gather.start == ZEROS
        for post, _ in gather.deltas.values():
            nothing &= post == ZEROS
        count = int((nothing & _fitted(alignment.named[alignment.role], rows, False)).sum())
        if count:
            yield (
                f"{name}: {count:,} tokens that new_base lacks get rows of zeros, because no delta is added there: "
                "an alpha of 0, --exclude or --copy-from says so"
            )
