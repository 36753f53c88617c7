"""Checkpoints on the Hugging Face Hub: ``org/name`` or ``org/name@revision`` where a folder is expected, fetched by
huggingface_hub into its own cache. A folder that is there wins; the network is asked for nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from paramdelta.checkpoint.documents import read_json
from paramdelta.checkpoint.folder import INDEX, SINGLE
from paramdelta.errors import CheckpointError, Complaint, escaped, shown

Place = str | Path  # a folder; text may also be an identifier

_IDENTIFIER = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What a merge reads or carries along besides weights; nothing of it lies in a subfolder.
_SMALL = (
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "COPYING*",
)
_SUBFOLDERS = "*/*"


def is_identifier(place: object) -> bool:
    """Return whether ``place`` is text that names a repository, and no file or folder is there of that name."""
    return isinstance(place, str) and _IDENTIFIER.fullmatch(place) is not None and not os.path.lexists(place)


def located(place: Place, role: str = "checkpoint") -> Path:
    """Return the folder of a place: itself, or the snapshot in the Hub's cache, fetched where it is not there yet.

    Environment: ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and all else that
    huggingface_hub looks at. Raises CheckpointError.
    """
    return _snapshot(str(place), role) if is_identifier(place) else Path(place)


def located_inputs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a request with folders for the places of ``post``, ``base`` (each may be a list) and
    ``new_base``; a repository that has several roles is fetched once. Raises CheckpointError with all complaints."""
    found: dict[str, Path] = {}
    wrong: list[Complaint] = []

    def folder(place: Any, role: str) -> Any:
        if not is_identifier(place) or place in wrong_places:
            return place
        try:
            found[place] = found.get(place) or located(place, role)
        except CheckpointError as error:
            wrong_places.add(place)
            wrong.extend(error.complaints)
            return place
        return found[place]

    wrong_places: set[str] = set()
    made = {
        role: [folder(p, role) for p in places] if isinstance(places, (list, tuple)) else folder(places, role)
        for role, places in options.items()
        if role in ("post", "base", "new_base")
    }
    if wrong:
        raise CheckpointError(wrong)
    return {**options, **made}


def identifiers(options: Mapping[str, Any]) -> set[str]:
    """Return the places among the inputs of a request that name repositories."""
    places: Iterable[Any] = (options.get(role) for role in ("post", "base", "new_base"))
    return {p for place in places for p in (place if isinstance(place, (list, tuple)) else [place]) if is_identifier(p)}


def _snapshot(identifier: str, role: str) -> Path:
    match = _IDENTIFIER.fullmatch(identifier)
    assert match is not None
    repository, revision = match[1], match[2]
    try:
        import huggingface_hub
    except ImportError:
        _fail(
            identifier,
            f"{role}: there is no such folder, and models on the Hub need huggingface_hub",
            "pip install 'paramdelta[hub]'",
        )
    fetch = huggingface_hub.snapshot_download
    folder: Path | None = None
    try:
        folder = Path(fetch(repository, revision=revision, allow_patterns=[*_SMALL], ignore_patterns=[_SUBFOLDERS]))
        weights = _weights(folder)
        commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
        # The commit, not the revision again: a branch may have moved meanwhile.
        fetch(repository, revision=commit, allow_patterns=[*_SMALL, *weights], ignore_patterns=[_SUBFOLDERS])
    except Exception as error:
        _explain(error, identifier, role, folder)
    if not any((folder / name).exists() for name in weights):
        _without_weights(identifier, weights, role)
    return folder


def _weights(folder: Path) -> list[str]:
    """Return the files that hold the weights: those of the index, else the single one. What is wrong with an index is
    complained about when the folder is opened."""
    if not (folder / INDEX).exists():
        return [SINGLE]
    weight_map = read_json(folder, INDEX, []).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    # These become patterns: a name with a wildcard in it would fetch others, too.
    return sorted({file for file in files if isinstance(file, str) and not set(file) & set("*?[/")}) or [SINGLE]


def _without_weights(identifier: str, weights: list[str], role: str) -> NoReturn:
    if _offline():
        _fail(
            identifier,
            f"{role}: the Hub may not be asked (HF_HUB_OFFLINE), and its cache lacks {shown(weights[0])} of this model",
            f"with the network, this fetches what is needed: paramdelta inspect {identifier}",
        )
    _fail(
        identifier,
        f"{role}: this repository has neither {SINGLE} nor an index; only safetensors are read",
        "convert: AutoModelForCausalLM.from_pretrained(NAME, dtype='auto').save_pretrained(DIR), then name DIR",
    )


def _explain(error: Exception, identifier: str, role: str, folder: Path | None) -> NoReturn:
    """Raise CheckpointError that says what a failed download means, and what to do. ``folder`` is there where the
    small files came and the weights did not."""
    from huggingface_hub import errors

    repository, _, revision = identifier.partition("@")
    shown_name = f"{repository} at {revision}" if revision else repository
    login = "if it is private: hf auth login, or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        _fail(
            identifier,
            f"{role}: {shown_name} is gated, and this account has no access",
            f"ask for it on the model's page ({repository}), then hf auth login, or HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        _fail(identifier, f"{role}: {repository} has no revision {revision or 'main'}", "name a branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        _fail(
            identifier,
            f"{role}: there is no such folder, and no model of this name on the Hub that this account may see",
            f"look at the spelling; {login}",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        cached = getattr(error, "snapshot_path", folder)
        why = "may not be asked (HF_HUB_OFFLINE)" if _offline() else f"cannot be reached ({_cause(error)})"
        what = "only a part of this model" if cached else "no copy of it"
        _fail(
            identifier,
            f"{role}: there is no such folder, the Hub {why}, and its cache has {what}",
            f"with the network, this fetches what is needed: paramdelta inspect {identifier}"
            + (f"; or, if nothing is missed, name the folder itself: {cached}" if cached else ""),
        )
    if isinstance(error, (OSError, ValueError, errors.HfHubHTTPError)) or _of_network(error):
        _fail(
            identifier, f"{role}: {shown_name} cannot be fetched: {_cause(error)}", "repeat the command: it continues"
        )
    raise error


def _of_network(error: BaseException) -> bool:
    """Errors of the HTTP library, whichever huggingface_hub is built on."""
    return type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "requests",
        "hf_xet",
    )


def _cause(error: BaseException) -> str:
    """Return one line of what went wrong at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return escaped((str(error).strip().splitlines() or [type(error).__name__])[0][:200])


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fail(subject: str, problem: str, remedy: str = "") -> NoReturn:
    raise CheckpointError(Complaint(subject, problem, remedy))
