"""The files of the output that are not weights: tokenizer and templates from post, code and licences carried along, a
model card, and a record of what was done. No times, hosts or absolute paths: equal merges are equal folders."""

from __future__ import annotations

import filecmp
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramdelta
from paramdelta.checkpoint import Checkpoint, ShardFile
from paramdelta.errors import storage_errors
from paramdelta.plan.deltas import Source, roles_of
from paramdelta.plan.request import MergeRequest

RECORD = "paramdelta.json"
RECORD_VERSION = 1
CARD = "README.md"
BASE_CONFIG = "base_config.json"  # of a delta's folder, whose config.json is post's
REBUILD = "rebuild.paramdelta"  # of a lossless delta's folder: what makes post again
_SAMPLED_BYTES = 1 << 16

# One tokenizer, from one model: mixing two models' tokenizer files makes a third that nobody tested.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenization_*.py",
)
_USE = ("generation_config.json", "*processor_config.json")
_CODE = ("*.py",)
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")


@dataclass(frozen=True, kw_only=True)
class SideFile:
    """One file of the output: copied from ``source``, or written from ``data``; ``origin`` says where it comes from."""

    name: str
    source: Path | None
    data: bytes | None
    origin: str


def carried_files(checkpoints: Mapping[str, Checkpoint], tokenizer: str = "post") -> tuple[list[SideFile], list[str]]:
    """Return the files carried over from post and new_base, and the names of those left out.

    Tokenizer, chat template and generation config come from post (from new_base where post has none, and where
    ``tokenizer`` is the role of new_base, the generation config left aside); custom code
    from new_base; licences from both, post's under ``NAME.post`` where its text differs. Of the posts of further
    deltas only licences are carried, as ``NAME.post_2`` and so on.
    """
    post, new_base = checkpoints["post"], checkpoints["new_base"]
    posts = {role: c for role, c in checkpoints.items() if role.partition("_")[0] == "post"}
    files: dict[str, SideFile] = {}

    def carry(checkpoint: Checkpoint, patterns: Sequence[str], skip: Sequence[str] = ()) -> bool:
        names = [n for n in checkpoint.side_files if _matches(n, patterns) and not _matches(n, skip)]
        origin = "post" if checkpoint.zeros else checkpoint.role  # zeros that a delta is added to are shaped as post
        for name in names:
            files.setdefault(name, SideFile(name=name, source=checkpoint.path / name, data=None, origin=origin))
        return bool(names)

    first, other = (new_base, post) if tokenizer == "new_base" else (post, new_base)
    if not carry(first, _TOKENIZER):
        carry(other, _TOKENIZER)
    for pattern in _USE:
        if not carry(post, (pattern,)):
            carry(new_base, (pattern,))
    carry(new_base, _CODE, skip=_TOKENIZER)
    carry(new_base, _LEGAL)
    for role, checkpoint in posts.items():
        for name in checkpoint.side_files:
            if not _matches(name, _LEGAL) or any(
                _same_text(checkpoint, c, name) for c in (new_base, post) if c is not checkpoint
            ):
                continue
            kept, number = name, 1
            while kept in files:  # new_base may be a merge itself and hold a NAME.post already
                kept, number = f"{name}.{role}{number if number > 1 else ''}", number + 1
            files[kept] = SideFile(name=kept, source=checkpoint.path / name, data=None, origin=role)
    made_here = {CARD, RECORD, "config.json", BASE_CONFIG, REBUILD}
    everything = {n for c in (*posts.values(), new_base) for n in (*c.side_files, *_subfolders(c))}
    left_out = sorted(everything - set(files) - made_here)
    return [files[name] for name in sorted(files)], left_out


def _subfolders(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.memory is not None:
        return []
    return [f"{p.name}/" for p in checkpoint.path.iterdir() if p.is_dir() and not p.name.startswith(".")]


def record(request: MergeRequest, checkpoints: Mapping[str, Checkpoint], policies: dict[str, Any]) -> bytes:
    """Return ``paramdelta.json``: enough to verify the folder and to do the merge again."""
    document = {
        "version": RECORD_VERSION,
        **({"kind": "delta"} if request.kind == "extract" else {}),
        "tool": {"name": "paramdelta", "version": paramdelta.__version__},
        "formula": _formula(request),
        "arithmetic": "binary64, one rounding to the output type, nearest even",
        "request": request.to_dict(),
        "inputs": {
            role: {
                "name": c.label,
                **({"revision": c.revision} if c.revision else {}),
                "files": [fingerprint(f, sampled=request.kind == "extract") for f in c.files],
            }
            for role, c in checkpoints.items()
            if not c.zeros
        },
        "policies": policies,
    }
    return _written(document)


def _formula(request: MergeRequest) -> str:
    if request.kind == "extract":
        return "post - base"
    if request.kind == "rebuild":
        return "new_base + post, and what that lacks of the model the delta was taken from"
    alphas = [f"alpha{'' if n == 0 else f'_{n + 1}'}" for n in range(len(request.sources))]
    difference = "{} * {}" if request.kind == "apply" else "{} * ({} - {})"
    terms = [difference.format(alpha, *roles_of(n)) for n, alpha in enumerate(alphas)]
    return " + ".join(["new_base", *terms])


def fingerprint(file: ShardFile, *, sampled: bool) -> dict[str, Any]:
    """Return what tells a file with weights from others: size, digest of the header, and, where it is to be known again
    whatever its headers say, a digest of the first and the last 64 KiB. Raises StorageError."""
    found = {"name": file.name, "bytes": file.size, "header_sha256": file.digest}
    if not sampled:
        return found
    with storage_errors(file.path, "cannot be read"), open(file.path, "rb") as stream:
        stream.seek(max(0, min(file.size - _SAMPLED_BYTES, file.data_start)))
        digest = hashlib.sha256(stream.read(_SAMPLED_BYTES))
        stream.seek(max(0, file.size - _SAMPLED_BYTES))
        digest.update(stream.read(_SAMPLED_BYTES))
    return {**found, "sample_sha256": digest.hexdigest()}


def with_losses(record: bytes, losses: list[Any]) -> bytes:
    """Return a record that says what quantising lost."""
    return _written({**json.loads(record), "lost": losses}) if losses else record


def with_checksums(record: bytes, checksums: dict[str, Any]) -> bytes:
    """Return a record that ends with the checksums of the files and tensors (:func:`paramdelta.checksums.document`)."""
    return _written({**json.loads(record), "checksums": checksums})


def _written(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def model_card(request: MergeRequest, checkpoints: Mapping[str, Checkpoint]) -> bytes:
    """Return the model card: metadata that the Hub reads, and what was done, in words."""
    if request.kind == "extract":
        return _card_of_delta(request, checkpoints)
    if request.kind == "apply":
        return _card_of_applied(request, checkpoints)
    if request.more:
        return _card_of_several(request, checkpoints)
    post, base, new_base = (checkpoints[role] for role in ("post", "base", "new_base"))
    scale = _scale(request.sources[0])
    lines = [
        *_front_matter((new_base.label, post.label)),
        f"# {new_base.label} with the post-training of {post.label}",
        "",
        f"The weights are `{new_base.label} + alpha · ({post.label} − {base.label})` with alpha = {scale}, computed in",
        f"binary64 and rounded once. {_tokenizer_of(request, post.label, new_base.label)}",
        f"`{RECORD}` says in detail what was done; `paramdelta verify` checks it.",
        "",
        "The method is ParamΔ ([arXiv 2504.21023](https://arxiv.org/abs/2504.21023)). Licences and terms of all three",
        "models apply.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _card_of_delta(request: MergeRequest, checkpoints: Mapping[str, Checkpoint]) -> bytes:
    post, base = (checkpoints[role].label for role in ("post", "base"))
    stored = "f32 or f64, so that nothing is lost," if request.lossless else str(request.format or request.delta_dtype)
    lines = [
        *_front_matter((base, post), tag="delta"),
        f"# The difference between {post} and {base}",
        "",
        "**This is no model.** It is a delta, to be added to a base model:",
        "",
        f"    paramdelta apply --new-base {base} --delta THIS-FOLDER --out DIR",
        "",
        f"The weights are `{post} − {base}`, computed in binary64 and stored as {stored or 'f32'} under the names that",
        f"{post} has. Tokenizer, chat template and configs are those of {post}; `{BASE_CONFIG}` is the config of",
        f"{base}. `{RECORD}` says in detail what was done; `paramdelta verify` checks it.",
        "",
        "Licences and terms of both models apply.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _card_of_applied(request: MergeRequest, checkpoints: Mapping[str, Checkpoint]) -> bytes:
    new_base = checkpoints["new_base"].label
    deltas = [checkpoints[roles_of(n)[0]].label for n in range(len(request.sources))]
    lines = [
        *_front_matter((new_base,)),
        f"# {new_base} with {' and '.join(deltas)}",
        "",
        f"The weights are those of {new_base} plus these deltas, added in this order in binary64 and rounded once:",
        "",
        *(f"- `alpha · {d}` with alpha = {_scale(s)}" for d, s in zip(deltas, request.sources, strict=True)),
        "",
        f"Tokenizer, chat template and generation config came with {deltas[0]}. `{RECORD}` says in detail what was",
        "done; `paramdelta verify` checks it.",
        "",
        "The method is ParamΔ ([arXiv 2504.21023](https://arxiv.org/abs/2504.21023)). Licences and terms of all these",
        "models, and of those the deltas were taken from, apply.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _front_matter(models: Iterable[str], *, tag: str = "merge") -> list[str]:
    """Return the lines at the head of a card that the Hub reads, and an empty one."""
    return [
        "---",
        "base_model:",
        *(f"- {json.dumps(model)}" for model in models),
        *(["base_model_relation: merge", "library_name: transformers"] if tag == "merge" else []),
        "tags:",
        f"- {tag}",
        "- paramdelta",
        "---",
        "",
    ]


def _card_of_several(request: MergeRequest, checkpoints: Mapping[str, Checkpoint]) -> bytes:
    new_base = checkpoints["new_base"]
    pairs = [tuple(checkpoints[role] for role in roles_of(n)) for n in range(len(request.sources))]
    posts = [post.label for post, _ in pairs]
    lines = [
        *_front_matter(dict.fromkeys((new_base.label, *posts))),
        f"# {new_base.label} with the post-training of {' and of '.join(posts)}",
        "",
        f"The weights are those of {new_base.label} plus these differences, added in this order in binary64 and",
        "rounded once:",
        "",
        *(
            f"- `alpha · ({post.label} − {base.label})` with alpha = {_scale(source)}"
            for (post, base), source in zip(pairs, request.sources, strict=True)
        ),
        "",
        _tokenizer_of(request, posts[0], new_base.label),
        f"`{RECORD}` says in detail what was",
        "done; `paramdelta verify` checks it.",
        "",
        "The method is ParamΔ ([arXiv 2504.21023](https://arxiv.org/abs/2504.21023)). Licences and terms of all these",
        "models apply.",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _tokenizer_of(request: MergeRequest, post: str, new_base: str) -> str:
    """Return whose tokenizer and settings the output has, in words."""
    if request.tokenizer == "new-base":
        return f"Tokenizer and chat template are those of {new_base}, the generation config is that of {post}."
    return f"Tokenizer, chat template and generation config are those of {post}."


def _scale(source: Source) -> str:
    """Return alpha in words."""
    everywhere, *special = source.alphas
    return ", ".join([f"{everywhere.value:g}", *(f"{r.value:g} for `{r.glob}`" for r in special)])


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _same_text(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    if name not in b.side_files:
        return False
    with storage_errors(a.path / name, f"cannot be compared with {b.path / name}"):
        return filecmp.cmp(a.path / name, b.path / name, shallow=False)
