"""What a user asks for: three folders, where the result goes, and the policies that decide what it holds. What is
wrong with it is complained about together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paramdelta.dtypes import DType
from paramdelta.errors import Complaint, PlanError, shown
from paramdelta.plan.deltas import AlphaRule, Folders, Source, read_sources, roles_of, spelled_alphas
from paramdelta.plan.values import (
    Rename,
    collected,
    read_block,
    read_choice,
    read_dtype,
    read_fraction,
    read_renames,
    read_size,
    read_strings,
)

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
        first, *more = read_sources(post, base, alpha, read_strings(alphas), wrong)
        request = cls(
            post=first.post,
            base=first.base,
            new_base=None if new_base is None else Path(new_base),
            out=None if out is None else Path(out),
            kind=read_choice("kind", kind, KINDS, wrong),
            delta_dtype=read_dtype("f32" if kind == "extract" and not lossless else None, wrong)
            if delta_dtype is None
            else read_dtype(delta_dtype, wrong),
            lossless=lossless,
            alphas=first.alphas,
            more=tuple(more),
            include=read_strings(include),
            exclude=read_strings(exclude),
            copy_from=read_choice("--copy-from", copy_from, COPY_FROM, wrong),
            rename_post=read_renames("--rename-post", rename_post, wrong),
            rename_base=read_renames("--rename-base", rename_base, wrong),
            rename_new_base=read_renames("--rename-new-base", rename_new_base, wrong),
            vocab=read_choice("--vocab", vocab, VOCAB, wrong),
            tokenizer=_tokenizer(vocab, tokenizer, wrong),
            dtype=read_dtype(dtype, wrong),
            stacks=_stacks(read_strings(stacks), wrong),
            format=None if format is None else read_choice("--format", format, FORMATS, wrong),
            block_size=read_block(block_size, wrong),
            scale_type=None if scale_type is None else read_choice("--scale-type", scale_type, SCALE_TYPES, wrong),
            no_quantise=read_strings(no_quantise),
            scale_policy=read_choice("--scale-policy", scale_policy, SCALE_POLICIES, wrong),
            activation_scales=read_choice("--activation-scales", activation_scales, ACTIVATION_SCALES, wrong),
            max_shard_size=collected(lambda: read_size(max_shard_size, "--max-shard-size"), wrong),
            allow_unscaled=allow_unscaled,
            allow_nonfinite=allow_nonfinite,
            max_quant_error=read_fraction("--max-quant-error", max_quant_error, wrong),
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


def _tokenizer(vocab: str, tokenizer: str | None, wrong: list[Complaint]) -> str | None:
    """Return whose tokenizer the output is to have, None where rows are not paired by token."""
    if vocab != "align" and tokenizer is not None:
        text = f"{shown(tokenizer)} chooses among tokenizers that give tokens other ids"
        wrong.append(Complaint("--tokenizer", text, "--vocab align pairs rows by token"))
        return None
    return read_choice("--tokenizer", tokenizer or "post", TOKENIZERS, wrong) if vocab == "align" else None


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
