"""Compares the vocabularies of tokenizers: rows of embeddings can be subtracted where they are the same tokens'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from paramdelta.analysis.findings import OTHER_TOKENS, Finding
from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.tokens import token_files, token_numbers
from paramdelta.plan.deltas import roles_of


def token_findings(checkpoints: Mapping[str, Checkpoint], deltas: int, *, drift: bool) -> Iterator[Finding]:
    """Yield what the tokenizers of post, base and new_base suggest."""
    known: dict[str, dict[str, int]] = {}

    def tokens(role: str) -> dict[str, int]:
        if role not in known:
            known[role] = token_numbers(token_files(checkpoints[role]))
        return known[role]

    for k in range(deltas):
        post, base = roles_of(k)
        for other, name in ((post, "post"), *([("new_base", "new_base")] if drift else [])):
            ours, theirs = tokens(base), tokens(other)
            if not ours or not theirs:
                continue
            differ = sum(theirs.get(token) != number for token, number in ours.items())
            if differ > OTHER_TOKENS * len(ours):
                yield Finding(
                    code="other-tokenizer",
                    weight="problem",
                    text=f"{name} has another tokenizer than base: {differ:,} of base's {len(ours):,} tokens have "
                    f"another number in it, or none (threshold {100 * OTHER_TOKENS:g} %); rows of the embeddings do "
                    "not belong together",
                    delta=k,
                    numbers={"differ": differ, "tokens": len(ours), "threshold": OTHER_TOKENS},
                )
