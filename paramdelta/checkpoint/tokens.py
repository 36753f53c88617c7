"""The tokens of a checkpoint: which text has which id, read from tokenizer.json through the tokenizers library, and
what else decides whether a token of one tokenizer is the same thing in another (how spaces are spelled, how text is
normalised). Without the library, the ids alone, as the files of common tokenizers list them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from paramdelta.checkpoint.documents import read_document, read_json
from paramdelta.checkpoint.folder import Checkpoint
from paramdelta.errors import CheckpointError, Complaint, remedy_of, shown

TOKENIZER = "tokenizer.json"
_VOCABULARY = ("vocab.json", "added_tokens.json")  # where there is no tokenizer.json
_LINES = "vocab.txt"  # where there is neither: a token to a line
_MOST_TOKENS = 1 << 24  # sixty times the largest vocabularies there are; arrays are made as long as the largest id


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one tokenizer. ``ids`` gives the id of each text, added tokens first; ``special`` are those that
    are marked so. ``alphabet`` says in words how the model spells text, ``normaliser`` is the JSON of what happens to
    text before it is split."""

    path: Path
    ids: dict[str, int]
    special: frozenset[str]
    alphabet: str
    normaliser: str

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def read_tokens(folder: Path) -> Tokens:
    """Read ``folder/tokenizer.json``: the vocabulary of the model and the added tokens.

    Raises CheckpointError where the file is missing, cannot be read by the library or gives ids beyond 2²⁴, and where
    the library is not installed.
    """
    path = folder / TOKENIZER
    try:
        from tokenizers import Tokenizer
    except ImportError:
        _fail(
            "--vocab align", "reads tokenizers through the tokenizers library", "pip install 'paramdelta[tokenizers]'"
        )
    try:
        tokenizer = Tokenizer.from_buffer(read_document(path))
    except FileNotFoundError:
        _fail(
            str(path),
            "is missing: tokens are paired by it",
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) writes it",
        )
    except OSError as error:
        _fail(str(path), f"cannot be read: {error.strerror}", remedy_of(error))
    except BaseException as error:  # a panic of the library is no Exception
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        _fail(str(path), f"is no tokenizer that the tokenizers library reads: {shown(str(error))}")
    added = tokenizer.get_added_tokens_decoder()
    ids = {token.content: number for number, token in sorted(added.items())}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)  # in an order that differs from process to process
    ids |= {text: number for number, text in sorted((n, t) for t, n in vocabulary.items()) if text not in ids}
    end = max(ids.values(), default=0)
    if end >= _MOST_TOKENS:
        _fail(str(path), f"has a token with the id {end:,}; the most allowed is {_MOST_TOKENS - 1:,}")
    return Tokens(
        path=path,
        ids=ids,
        special=frozenset(token.content for token in added.values() if token.special),
        alphabet=_alphabet(tokenizer),
        normaliser=json.dumps(_state(tokenizer.normalizer), sort_keys=True),
    )


def token_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the files of a checkpoint that list its tokens and can be read without a library, none where it has none:
    tokenizer.json, else vocab.json with added_tokens.json, else vocab.txt."""
    there = checkpoint.side_files
    for names in ((TOKENIZER,), _VOCABULARY, (_LINES,)):
        if names[0] in there:
            return tuple(checkpoint.path / name for name in names if name in there)
    return ()


def token_numbers(files: tuple[Path, ...]) -> dict[str, int]:
    """Return the number of every token in ``token_files``, as they are written; nothing where they cannot be read."""
    if files and files[0].name == _LINES:
        try:
            return {line: number for number, line in enumerate(read_document(files[0]).decode().splitlines())}
        except (OSError, ValueError):
            return {}
    wrong: list[Complaint] = []
    found: dict[str, int] = {}
    for file in files:
        document = read_json(file.parent, file.name, wrong)
        if file.name != TOKENIZER:
            found |= _numbered(document)
            continue
        model = document.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            found |= _numbered(vocabulary)
        elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
            found |= {str(entry[0]): at for at, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
        added = document.get("added_tokens")
        for entry in added if isinstance(added, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                found |= _numbered({entry["content"]: entry.get("id")})
    return found


def _numbered(entries: dict[str, Any]) -> dict[str, int]:
    whole = {text: n for text, n in entries.items() if isinstance(n, int) and not isinstance(n, bool)}
    return {text: n for text, n in whole.items() if 0 <= n < _MOST_TOKENS}


def _alphabet(tokenizer: Any) -> str:
    """Return how a model spells text: the kind of model, and what stands for spaces and bytes."""
    model = type(tokenizer.model).__name__
    states = [_state(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)]
    kinds = {kind for state in states for kind in _kinds(state)}
    text = json.dumps(states, ensure_ascii=False)
    if "ByteLevel" in kinds:
        spelled = "bytes as letters, Ġ for a space"
    elif "Metaspace" in kinds or "▁" in text:
        spelled = "▁ for a space"
    elif "WordPiece" in kinds or model == "WordPiece":
        spelled = "## within a word"
    else:
        spelled = "as it is"
    return f"{model}, {spelled}{', bytes as <0xNN>' if getattr(tokenizer.model, 'byte_fallback', False) else ''}"


def _state(part: Any) -> Any:
    """Return the JSON of a part of a tokenizer, None where it has none."""
    return None if part is None else json.loads(part.__getstate__())


def _kinds(state: Any) -> list[str]:
    """Return the types of a part and of the parts it is a sequence of."""
    if isinstance(state, dict):
        own = [state["type"]] if isinstance(state.get("type"), str) else []
        return own + [kind for value in state.values() for kind in _kinds(value)]
    return [kind for value in state for kind in _kinds(value)] if isinstance(state, list) else []


def _fail(subject: str, problem: str, remedy: str = "") -> NoReturn:
    raise CheckpointError(Complaint(subject, problem, remedy))
