"""Compares the vocabularies of tokenizers: rows of embeddings can be subtracted where they are the same tokens'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paramdelta.analysis.findings import OTHER_TOKENS, Finding
from paramdelta.checkpoint import Checkpoint
from paramdelta.checkpoint.documents import read_json
from paramdelta.errors import Complaint
from paramdelta.plan.deltas import roles_of

TOKENIZER = "tokenizer.json"


def token_findings(checkpoints: Mapping[str, Checkpoint], deltas: int, *, drift: bool) -> Iterator[Finding]:
    """Yield what the tokenizer.json files of post, base and new_base suggest."""
    known: dict[str, dict[str, int]] = {}

    def tokens(role: str) -> dict[str, int]:
        if role not in known:
            known[role] = tokens_of(checkpoints[role])
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


def tokens_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of every token of a checkpoint's tokenizer.json; nothing where that cannot be read."""
    if TOKENIZER not in checkpoint.side_files:
        return {}
    wrong: list[Complaint] = []
    document = read_json(checkpoint.path, TOKENIZER, wrong)
    model = document.get("model")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        found |= {token: number for token, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        found |= {str(entry[0]): at for at, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = document.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and isinstance(entry.get("id"), int):
            found[entry["content"]] = entry["id"]
    return found
