"""What a user asks for: three folders, where the result goes, and the policies that decide what it holds. Spellings
of the command line (globs, sizes, regular expressions) are read here, once, and complained about together."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from paramdelta.dtypes import MERGE_DTYPES, DType
from paramdelta.errors import Complaint, PlanError, shown
from paramdelta.plan.deltas import AlphaRule, Folders, Source, read_sources, roles_of, spelled_alphas

ROLES = ("post", "base", "new_base")
KINDS = ("merge", "extract", "apply", "rebuild")
STACKINGS = ("straight", "transposed", "interleaved")
COPY_FROM = ("error", "new-base", "post")
VOCAB = ("error", "extend", "align")
TOKENIZERS = ("post", "new-base")
PLAIN_FORMATS = ("bf16", "f16", "f32")
FORMATS = ("like-post", *PLAIN_FORMATS, "fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "mxfp4", "nvfp4", "int4")
SCALE_POLICIES = ("keep", "recompute")
SCALE_TYPES = ("f32", "bf16", "ue8m0", "e8m0")
ACTIVATION_SCALES = ("post", "new-base", "drop")
_BLOCK = re.compile(r"\s*(\d{1,18})\s*(?:[x×,]\s*(\d{1,18})\s*)?", re.ASCII)
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kKMGT])(i?))?[bB]?\s*", re.ASCII)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Rename:
    """``re.sub(pattern, replacement, name)``, applied to the names of one checkpoint before pairing."""

    pattern: str
    replacement: str


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """One merge, checked. Build it with :meth:`build`; every field is part of the result's identity except ``out``,
    ``overwrite``, ``allow_nonfinite`` and ``max_quant_error``. ``post``, ``base`` and ``alphas`` are the first delta's,
    and ``more`` are the others, added in this order; ``alphas`` starts with the rule for all, ``*``.

    ``kind`` is ``merge``; ``extract`` (post − base, added to zeros in place of a new_base; ``delta_dtype`` is the type
    of the delta, ``lossless`` keeps what gives post back); ``apply`` (deltas as post, zeros in place of their bases);
    or ``rebuild`` (post again, from a lossless delta and its own base as new_base)."""

    post: Path
    base: Path | None
    new_base: Path | None
    out: Path | None
    kind: str = "merge"
    delta_dtype: DType | None = None
    lossless: bool = False
    alphas: tuple[AlphaRule, ...] = (AlphaRule("*", 1.0),)
    more: tuple[Source, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    copy_from: str = "error"
    rename_post: tuple[Rename, ...] = ()
    rename_base: tuple[Rename, ...] = ()
    rename_new_base: tuple[Rename, ...] = ()
    vocab: str = "error"
    tokenizer: str | None = None
    dtype: DType | None = None
    stacks: tuple[tuple[str, str], ...] = ()
    format: str | None = None
    block_size: tuple[int, int] | None = None
    scale_type: str | None = None
    no_quantise: tuple[str, ...] = ()
    scale_policy: str = "keep"
    activation_scales: str = "post"
    max_shard_size: int | None = None
    allow_unscaled: bool = False
    allow_nonfinite: bool = False
    max_quant_error: float | None = None
    overwrite: bool = False

    @classmethod
    def build(
        cls,
        *,
        post: Folders,
        base: Folders | None = None,
        new_base: str | Path | None = None,
        out: str | Path | None = None,
        kind: str = "merge",
        delta_dtype: str | DType | None = None,
        lossless: bool = False,
        alpha: float | str | Mapping[str, float] | Sequence[Any] = 1.0,
        alphas: str | Sequence[str] = (),
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        copy_from: str = "error",
        rename_post: str | Sequence[str | tuple[str, str]] = (),
        rename_base: str | Sequence[str | tuple[str, str]] = (),
        rename_new_base: str | Sequence[str | tuple[str, str]] = (),
        vocab: str = "error",
        tokenizer: str | None = None,
        dtype: str | DType | None = None,
        stacks: str | Sequence[str] = (),
        format: str | None = None,
        block_size: str | int | Sequence[int] | None = None,
        scale_type: str | None = None,
        no_quantise: str | Sequence[str] = (),
        scale_policy: str = "keep",
        activation_scales: str = "post",
        max_shard_size: int | str | None = None,
        allow_unscaled: bool = False,
        allow_nonfinite: bool = False,
        max_quant_error: float | None = None,
        overwrite: bool = False,
    ) -> MergeRequest:
        """Check and build a request.

        ``alpha`` is a number, or a mapping of globs to numbers, the last match winning; ``alphas`` are rules as on the
        command line (``0.7``, ``GLOB=0.7``), added after it. For several deltas ``post`` and ``base`` are lists, and
        ``alpha`` may be one; rules for one of them begin with its number (``2:0.7``, ``2:GLOB=0.7``). Renames are
        ``REGEX=REPLACEMENT`` or pairs. Sizes are numbers of bytes or strings such as ``5GB`` (10⁹) and ``5GiB`` (2³⁰).
        Raises PlanError with all complaints.
        """
        wrong: list[Complaint] = []
        first, *more = read_sources(post, base, alpha, _strings(alphas), wrong)
        request = cls(
            post=first.post,
            base=first.base,
            new_base=None if new_base is None else Path(new_base),
            out=None if out is None else Path(out),
            kind=_choice("kind", kind, KINDS, wrong),
            delta_dtype=_dtype("f32" if kind == "extract" and not lossless else None, wrong)
            if delta_dtype is None
            else _dtype(delta_dtype, wrong),
            lossless=lossless,
            alphas=first.alphas,
            more=tuple(more),
            include=_strings(include),
            exclude=_strings(exclude),
            copy_from=_choice("--copy-from", copy_from, COPY_FROM, wrong),
            rename_post=_renames("--rename-post", rename_post, wrong),
            rename_base=_renames("--rename-base", rename_base, wrong),
            rename_new_base=_renames("--rename-new-base", rename_new_base, wrong),
            vocab=_choice("--vocab", vocab, VOCAB, wrong),
            tokenizer=_tokenizer(vocab, tokenizer, wrong),
            dtype=_dtype(dtype, wrong),
            stacks=_stacks(_strings(stacks), wrong),
            format=None if format is None else _choice("--format", format, FORMATS, wrong),
            block_size=_block(block_size, wrong),
            scale_type=None if scale_type is None else _choice("--scale-type", scale_type, SCALE_TYPES, wrong),
            no_quantise=_strings(no_quantise),
            scale_policy=_choice("--scale-policy", scale_policy, SCALE_POLICIES, wrong),
            activation_scales=_choice("--activation-scales", activation_scales, ACTIVATION_SCALES, wrong),
            max_shard_size=_collected(lambda: _size(max_shard_size, "--max-shard-size"), wrong),
            allow_unscaled=allow_unscaled,
            allow_nonfinite=allow_nonfinite,
            max_quant_error=_fraction("--max-quant-error", max_quant_error, wrong),
            overwrite=overwrite,
        )
        wrong += _format_complaints(request) + _kind_complaints(request)
        if request.dtype is not None and request.dtype.bits == 8 and not allow_unscaled:
            wrong.append(
                Complaint(
                    "--dtype",
                    f"{request.dtype} without scales loses most of what weights hold: it spans few powers of two",
                    "--allow-unscaled writes it all the same",
                )
            )
        if wrong:
            raise PlanError(wrong)
        return request

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every delta, in the order in which they are added."""
        return (Source(self.post, self.base, self.alphas), *self.more)

    @property
    def folders(self) -> dict[str, Path]:
        """Every folder by role: ``post``, ``base``, ``new_base``, then ``post_2``, ``base_2`` and so on; without those
        in whose place there are zeros."""
        found = {"post": self.post, "base": self.base, "new_base": self.new_base}
        for number, source in enumerate(self.more, 1):
            found |= dict(zip(roles_of(number), (source.post, source.base), strict=True))
        return {role: folder for role, folder in found.items() if folder is not None}

    @property
    def takes_deltas(self) -> bool:
        """Whether ``post`` names deltas, not models."""
        return self.kind in ("apply", "rebuild")

    def folder(self, role: str) -> Path:
        """Return the folder of a role."""
        return self.folders[role]

    def of_delta(self, number: int) -> MergeRequest:
        """Return the request of a merge that adds one of the deltas only."""
        source = self.sources[number]
        return replace(self, post=source.post, base=source.base, alphas=source.alphas, more=())

    def renames(self, role: str) -> tuple[Rename, ...]:
        """Return the renames of a role; those of post and base are for every delta."""
        renames: tuple[Rename, ...] = getattr(self, f"rename_{role.rstrip('_0123456789')}")
        return renames

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the result, without paths, as JSON-ready values that :meth:`build` takes back."""
        about_deltas = {
            "kind": self.kind,
            "delta_dtype": None if self.delta_dtype is None else self.delta_dtype.name,
            "lossless": self.lossless,
        }
        return {
            **(about_deltas if self.kind != "merge" else {}),
            "alphas": spelled_alphas(self.sources),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "copy_from": self.copy_from,
            **{f"rename_{role}": [[r.pattern, r.replacement] for r in self.renames(role)] for role in ROLES},
            "vocab": self.vocab,
            "tokenizer": self.tokenizer,
            "dtype": None if self.dtype is None else self.dtype.name,
            "stacks": [f"{role}={kind}" for role, kind in self.stacks],
            "format": self.format,
            "block_size": None if self.block_size is None else list(self.block_size),
            "scale_type": self.scale_type,
            "no_quantise": list(self.no_quantise),
            "scale_policy": self.scale_policy,
            "activation_scales": self.activation_scales,
            "max_shard_size": self.max_shard_size,
            "allow_unscaled": self.allow_unscaled,
        }


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes that ``5GB`` (5·10⁹), ``5GiB`` (5·2³⁰) or ``5000`` spell. Raises PlanError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise PlanError(Complaint(option, f"expected a size such as 5GB or 512MiB, got {shown(repr(text))}"))
    number, prefix, binary = match.groups()
    value = int(Fraction(number) * (1024 if binary else 1000) ** _POWERS[(prefix or "").upper()])
    if value < 1:
        raise PlanError(Complaint(option, f"expected at least one byte, got {shown(repr(text))}"))
    return value


def matcher(globs: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name matches one of ``globs`` (``*``, ``?``, ``[…]``; case counts)."""
    patterns = [fnmatch.translate(glob) for glob in globs]
    if not patterns:
        return lambda name: False
    compiled = re.compile("|".join(patterns))
    return lambda name: compiled.match(name) is not None


def _renames(option: str, values: Any, wrong: list[Complaint]) -> tuple[Rename, ...]:
    renames = []
    for value in [values] if isinstance(values, str) else values:
        if isinstance(value, str):
            pattern, equals, replacement = value.rpartition("=")  # a regex may hold "=", a name hardly
            if not equals:
                wrong.append(Complaint(option, f"expected REGEX=REPLACEMENT, got {shown(repr(value))}"))
                continue
        elif isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, str) for v in value):
            pattern, replacement = value
        else:
            wrong.append(Complaint(option, f"expected a pair (regex, replacement), got {shown(repr(value))}"))
            continue
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement, "")
        except (re.error, IndexError) as error:  # IndexError: a group name that the pattern lacks
            wrong.append(Complaint(option, f"{shown(repr(value))} is no regular expression: {error}"))
            continue
        renames.append(Rename(pattern, replacement))
    return tuple(renames)


def _choice(option: str, value: str, choices: Sequence[str], wrong: list[Complaint]) -> str:
    if value not in choices:
        wrong.append(Complaint(option, f"expected one of {', '.join(choices)}, got {shown(repr(value))}"))
    return value


def _tokenizer(vocab: str, tokenizer: str | None, wrong: list[Complaint]) -> str | None:
    """Return whose tokenizer the output is to have, None where rows are not paired by token."""
    if vocab != "align" and tokenizer is not None:
        text = f"{shown(tokenizer)} chooses among tokenizers that give tokens other ids"
        wrong.append(Complaint("--tokenizer", text, "--vocab align pairs rows by token"))
        return None
    return _choice("--tokenizer", tokenizer or "post", TOKENIZERS, wrong) if vocab == "align" else None


def _dtype(value: str | DType | None, wrong: list[Complaint]) -> DType | None:
    if value is None or isinstance(value, DType):
        return value
    found = next((d for d in MERGE_DTYPES if value in (d.name, d.safetensors)), None)
    if found is None:
        names = ", ".join(d.name for d in MERGE_DTYPES)
        wrong.append(Complaint("--dtype", f"expected one of {names}, got {shown(repr(value))}"))
    return found


def _stacks(values: tuple[str, ...], wrong: list[Complaint]) -> tuple[tuple[str, str], ...]:
    """Read ``ROLE=straight``, ``ROLE=transposed`` or ``ROLE=interleaved``."""
    pairs = []
    for value in values:
        role, _, kind = value.partition("=")
        role = role.replace("-", "_")
        if role in ROLES and kind in STACKINGS:
            pairs.append((role, kind))
        else:
            expected = f"ROLE={'|'.join(STACKINGS)} with a role of post, base, new-base"
            wrong.append(Complaint("--stacks", f"expected {expected}, got {shown(repr(value))}"))
    return tuple(pairs)


def _block(value: Any, wrong: list[Complaint]) -> tuple[int, int] | None:
    """Read ``128x128``, ``32`` (a group along K) or a pair."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = f"{value[0]}x{value[1]}"
    match = _BLOCK.fullmatch(str(value))
    if match is None or (sizes := [int(g) for g in match.groups() if g])[0] == 0:  # 1x0: scales of whole rows
        wrong.append(Complaint("--block-size", f"expected ROWSxCOLS or a group size, got {shown(repr(value))}"))
        return None
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _fraction(option: str, value: Any, wrong: list[Complaint]) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number >= 0.0:
        wrong.append(Complaint(option, f"expected a number such as 0.05, got {shown(repr(value))}"))
        return None
    return number


def _format_complaints(request: MergeRequest) -> list[Complaint]:
    """Options that only an output format gives a meaning."""
    scaled = request.format not in (None, "like-post", *PLAIN_FORMATS)
    twice = Complaint("--dtype", f"says how every tensor is stored, and so does --format {request.format}", "give one")
    given = {
        "--block-size": request.block_size is not None,
        "--scale-type": request.scale_type is not None,
        "--no-quantise": bool(request.no_quantise),
    }
    return [
        Complaint(option, "says how --format quantises, and no such format is given", "--format fp8-block, for example")
        for option, present in given.items()
        if present and not scaled
    ] + ([twice] if request.dtype is not None and request.format is not None and not scaled else [])


def _kind_complaints(request: MergeRequest) -> list[Complaint]:
    """What a kind of request needs, and what has no meaning there."""
    wanted = {"merge": ("base", "new_base"), "extract": ("base",)}.get(request.kind, ("new_base",))
    found = [
        Complaint(
            f"--{role.replace('_', '-')}", "is missing" if role in wanted else f"is nothing that {request.kind} takes"
        )
        for role in ("base", "new_base")
        if (getattr(request, role) is not None) != (role in wanted)
    ]
    if request.kind != "merge" and request.copy_from == "post":
        found.append(
            Complaint(
                "--copy-from", "post: a delta is no weight that could be copied", "--copy-from new-base, or error"
            )
        )
    if request.kind != "merge" and request.vocab == "align":
        text = "align needs the tokenizers of post, base and new_base, and a delta comes with post's alone"
        found.append(Complaint("--vocab", text, "paramdelta merge pairs rows by token"))
    if request.kind == "rebuild":
        bare = MergeRequest(post=request.post, base=None, new_base=None, out=None, kind="rebuild").to_dict()
        given = [name for name, value in request.to_dict().items() if value != bare[name]]
        if request.more or given:
            text = f"what is made again is what one delta was taken from, so that {', '.join(given)} cannot change it"
            found.append(Complaint("--rebuild", text, "leave these options out, or leave out --rebuild"))
    if request.kind == "extract" and request.alphas != (AlphaRule("*", 1.0),):
        found.append(Complaint("--alpha", "a delta is extracted as it is", "paramdelta apply scales it"))
    if request.kind == "extract" and request.lossless and (request.delta_dtype or request.format):
        found.append(Complaint("--dtype", "a lossless delta is f32 or f64, as each tensor needs", "leave it out"))
    return found


def _size(value: int | str | None, option: str) -> int | None:
    return parse_size(str(value), option=option) if value is not None else None


def _collected(make: Callable[[], int | None], wrong: list[Complaint]) -> int | None:
    try:
        return make()
    except PlanError as error:
        wrong += error.complaints
        return None


def _strings(values: str | Sequence[str]) -> tuple[str, ...]:
    strings = (values,) if isinstance(values, str) else tuple(values)
    for value in strings:
        if not isinstance(value, str):
            raise PlanError(Complaint("request", f"expected a string, got {shown(repr(value))}"))
    return strings
