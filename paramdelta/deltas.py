"""Deltas as checkpoint folders: extracted once, kept, and applied to any base. Both are merges with zeros in place of
what is not there, so that plan, engine, journal, ranks, checksums and verification are those of a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta import engine
from paramdelta.errors import Complaint, InputError, shown
from paramdelta.merging import prepare, run_merge
from paramdelta.report import MergeReport

if TYPE_CHECKING:
    from paramdelta.plan import MergeRequest
    from paramdelta.plan.deltas import Folders

DTYPES = ("f32", "bf16", "f16", "f64", "f8")
_F8 = {"format": "fp8-block", "block_size": (128, 128), "scale_type": "f32"}
Deltas = str | Path | Mapping[str, float] | Sequence[str | Path | tuple[str | Path, float]]


def extract(
    *,
    post: str | Path,
    base: str | Path,
    out: str | Path,
    dtype: str | None = None,
    lossless: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "auto",
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **policies: Any,
) -> MergeReport:
    """Write ``delta = post − base`` as a checkpoint folder with the names, shapes and files of post.

    The difference is taken in binary64, of quantised weights between what they decode to, and rounded once to the type
    of the delta. Tensors without arithmetic (integers, booleans) are zeros, and so is what ``exclude`` names and what
    ``copy_from="new-base"`` lets pass although base lacks it or has it in another shape.

    Parameters
    ----------
    post, base : folders of safetensors checkpoints
    out : the folder to write; must not exist unless ``overwrite``
    dtype : type of the delta, ``f32`` by default; ``bf16``, ``f16``, ``f64``, or ``f8``: weights of linear layers in
        e4m3 with a scale in f32 for each block of 128 × 128 (recipe ``deepgemm``), all others in f32. What that loses
        is in the report and in ``paramdelta.json``
    lossless : store each tensor as f32 where that holds every difference, else as f64, and keep what else is needed to
        make post again, byte for byte, from base (docs/deltas.md). Post and base are read twice
    threads, memory, isa, io, restart, checksums, on_progress : as in :func:`paramdelta.merge`
    **policies : ``include``, ``exclude``, ``copy_from``, ``rename_post``, ``rename_base``, ``vocab``, ``stacks``,
        ``max_shard_size``, ``no_quantise``, ``allow_unscaled``, ``allow_nonfinite``, ``max_quant_error``, ``overwrite``
        as in :func:`paramdelta.merge`

    Returns
    -------
    MergeReport

    Raises
    ------
    InputError, NonFiniteError, PrecisionError, StorageError : as :func:`paramdelta.merge`

    Notes
    -----
    The diff vector of fine-tuning transfer (arXiv 2503.20110); the task vector of other work.
    """
    request = extract_request(post=post, base=base, out=out, dtype=dtype, lossless=lossless, **policies)
    options = engine.EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device)
    return run_merge(prepare(request), options=options, restart=restart, checksums=checksums, on_progress=on_progress)


def apply(
    *,
    new_base: str | Path,
    deltas: Deltas,
    out: str | Path,
    alpha: float | Mapping[str, float] = 1.0,
    rebuild: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    device: str = "auto",
    restart: bool = False,
    checksums: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **policies: Any,
) -> MergeReport:
    """Write ``new_base + Σ alpha_k · delta_k`` as a checkpoint folder, from deltas that :func:`extract` wrote.

    Of an f64 or a lossless delta this is bit for bit ``merge(post, base, new_base)``; of an f32 one wherever f32 holds
    the difference exactly (docs/deltas.md).

    Parameters
    ----------
    new_base : folder of a safetensors checkpoint, plain or quantised
    deltas : folders of deltas, added in this order; one, or a list of folders and of pairs (folder, alpha), or a
        mapping of folders to alphas
    out : the folder to write; must not exist unless ``overwrite``
    alpha : a number for the deltas that have none of their own, or a mapping of globs to numbers
    rebuild : new_base is the base that the delta was taken from: write post again, byte for byte. Takes one lossless
        delta, and no policies
    threads, memory, isa, io, restart, checksums, on_progress : as in :func:`paramdelta.merge`
    **policies : as in :func:`paramdelta.merge`; ``alphas`` are rules as on the command line, ``rename_post`` is for the
        deltas, ``copy_from="post"`` is refused, and ``activation_scales`` come from new_base by default

    Returns
    -------
    MergeReport

    Raises
    ------
    InputError, NonFiniteError, PrecisionError, StorageError : as :func:`paramdelta.merge`
    """
    request = apply_request(new_base=new_base, deltas=deltas, out=out, alpha=alpha, rebuild=rebuild, **policies)
    options = engine.EngineOptions(threads=threads, memory=memory, isa=isa, io=io, device=device)
    return run_merge(prepare(request), options=options, restart=restart, checksums=checksums, on_progress=on_progress)


def extract_request(
    *wrong: Complaint,
    post: Folders,
    base: Folders,
    dtype: str | None = None,
    lossless: bool = False,
    **policies: Any,
) -> MergeRequest:
    """Return the request of an extraction, as :func:`paramdelta.plan.make_request`. Raises PlanError."""
    from paramdelta.plan import make_request

    found = list(wrong)
    if dtype is not None and dtype not in DTYPES:
        found.append(Complaint("--dtype", f"expected one of {', '.join(DTYPES)}, got {shown(repr(dtype))}"))
        dtype = None
    typed: dict[str, Any] = {} if dtype is None else {"delta_dtype": dtype}
    if dtype == "f8":
        typed = {"delta_dtype": "f32", **_F8}
    return make_request(*found, post=post, base=base, kind="extract", lossless=lossless, **typed, **policies)


def apply_request(
    *wrong: Complaint,
    new_base: str | Path,
    deltas: Deltas,
    alpha: float | Mapping[str, float] = 1.0,
    rebuild: bool = False,
    **policies: Any,
) -> MergeRequest:
    """Return the request of an application, as :func:`paramdelta.plan.make_request`. Raises PlanError."""
    from paramdelta.plan import make_request

    listed = _listed(deltas)
    own = [given for _, given in listed]
    if any(given is not None for given in own):
        if isinstance(alpha, Mapping):
            raise InputError(
                Complaint(
                    "alpha", "a mapping of globs and alphas beside deltas are one too many", "give `alphas` rules"
                )
            )
        alphas: Any = [alpha if given is None else given for given in own]
    else:
        alphas = alpha
    if not rebuild:
        policies.setdefault("activation_scales", "new-base")
    folders = [folder for folder, _ in listed]
    kind = "rebuild" if rebuild else "apply"
    return make_request(*wrong, post=folders, new_base=new_base, alpha=alphas, kind=kind, **policies)


def _listed(deltas: Deltas) -> list[tuple[str | Path, float | None]]:
    if isinstance(deltas, (str, Path)):
        return [(deltas, None)]
    if isinstance(deltas, Mapping):
        return list(deltas.items())
    return [item if isinstance(item, tuple) else (item, None) for item in deltas]
