"""Plans a merge: opens the checkpoints, pairs their tensors, applies the policies and lays the output out, and finds
everything that is wrong on the way."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from paramdelta.checkpoint import Checkpoint, Quantisation, open_checkpoint
from paramdelta.errors import CheckpointError, Complaint, PlanError
from paramdelta.plan import lossless
from paramdelta.plan.choice import Stored, choose
from paramdelta.plan.config import MergedConfig, merge_config, structure_warnings
from paramdelta.plan.deltas import roles_of
from paramdelta.plan.layout import Tables, lay_out
from paramdelta.plan.naming import Names, rename_all
from paramdelta.plan.pairing import Kind, Pairing
from paramdelta.plan.planned import Plan
from paramdelta.plan.quantising import (
    HF_QUANT_CONFIG,
    QuantConfig,
    choose_config,
    choose_statistics,
    recognise_all,
)
from paramdelta.plan.rebuild import is_base_of, open_kept, rebuild
from paramdelta.plan.request import ROLES, MergeRequest
from paramdelta.plan.several import pair_all
from paramdelta.plan.sidefiles import BASE_CONFIG, CARD, REBUILD, RECORD, SideFile, carried_files, model_card, record
from paramdelta.plan.target import check_links, check_target
from paramdelta.plan.token_ids import GENERATION, TokenIds, token_ids
from paramdelta.plan.tokenizers import describe as describe_tokenizers
from paramdelta.plan.tokenizers import token_differences
from paramdelta.plan.tokenizers import warnings_of as tokenizer_warnings
from paramdelta.plan.turning import turn_stacks
from paramdelta.plan.vocabulary import Alignment, settle, warnings_of
from paramdelta.plan.vocabulary import describe as describe_alignment
from paramdelta.plan.zeros import checked_kinds, is_delta, with_zeros


def open_all(request: MergeRequest, *, held: str | None = None) -> tuple[Checkpoint, ...]:
    """Open the folders of a request, in their order, but for the role ``held``. Where one cannot be opened, or is a
    delta in place of a model or a model in place of a delta, raise PlanError with the complaints about all of them and
    about the output folder."""
    wrong: list[Complaint] = []
    opened: list[Checkpoint] = []
    folders = {role: folder for role, folder in request.folders.items() if role != held}
    for role, folder in folders.items():
        try:
            opened.append(open_checkpoint(folder, role=re.sub(r"_\d+$", "", role)))
        except CheckpointError as error:
            wrong += error.complaints
    if wrong:
        raise PlanError([*check_target(request), *wrong, *recognise_all(request, opened)[1]])
    wrong = checked_kinds(request, dict(zip(folders, opened, strict=True)))
    if wrong:
        raise PlanError([*check_target(request), *wrong])
    return tuple(opened)


def make_plan(request: MergeRequest, *opened: Checkpoint) -> Plan:
    """Plan a merge from open checkpoints, in the order of the request's folders. Raises PlanError with every complaint
    there is."""
    wrong = check_target(request) + check_links(request, opened)
    recognised, quantised_wrong = recognise_all(request, opened)
    if quantised_wrong:  # names would not pair, for a reason already given
        raise PlanError([*wrong, *quantised_wrong])
    checkpoints, quantisations = with_zeros(request, opened, recognised, wrong)
    if request.kind == "rebuild":
        return _rebuild(request, checkpoints, quantisations, wrong)
    post, base, new_base = (checkpoints[role] for role in ROLES)
    names = rename_all(request, checkpoints, quantisations, wrong)
    p, b, n = (names[role] for role in ("post", "base", "new_base"))
    pairing = pair_all(request, names, wrong)
    alignment = settle(request, pairing, names, wrong)
    ids = None if alignment is None else token_ids(alignment, checkpoints, wrong)
    stored = choose(request, pairing, p, b, n, wrong)
    turn_stacks(pairing, stored.formats, names)
    statistics = choose_statistics(request, pairing, stored, names, wrong)
    quant_config = choose_config(request, pairing, stored, names, statistics, wrong)
    if request.lossless:
        wrong += lossless.unlisted(post)
    if wrong:
        raise PlanError(wrong)
    found = lossless.survey(pairing, names) if request.lossless else None
    stored = stored if found is None else found.stored(stored)
    layout = lay_out(request, pairing, stored, Tables(names), statistics)
    if found is not None:
        layout = lossless.with_rebuild(layout, pairing, Tables(names), found)
    config = merge_config(
        post,
        base,
        new_base,
        vocab_size=_vocab_size(pairing, n, None if alignment is None else checkpoints[alignment.role]),
        dtype=request.delta_dtype if request.kind == "extract" else request.dtype,
        quant_config=quant_config,
        configs=None if ids is None else ids.configs,
    )
    carried, left_out = carried_files(checkpoints, "post" if alignment is None else alignment.role)
    if ids is not None:
        carried = [_with_ids(file, ids) for file in carried]
    policies = _policies(pairing, config, left_out, stored)
    if found is not None:
        policies["lossless"] = lossless.summary(layout, pairing, stored, found)
    policies |= _vocabulary_policy(alignment, ids, pairing)
    other_tokens = token_differences(request, pairing, checkpoints)
    made = [
        SideFile(name=CARD, source=None, data=model_card(request, checkpoints), origin="made"),
        SideFile(name=RECORD, source=None, data=record(request, checkpoints, policies), origin="made"),
    ]
    if config.data is not None:
        made.append(SideFile(name="config.json", source=None, data=config.data, origin="new_base"))
    if request.kind == "extract":
        made += _config_of_base(base)
    made += _quant_file(quant_config, new_base)
    left_out = [name for name in left_out if name != HF_QUANT_CONFIG]
    notes = [note for c in opened for note in c.notes]
    return Plan(
        request=request,
        checkpoints=checkpoints,
        names_by_role=names,
        pairing=pairing,
        stored=stored,
        layout=layout,
        side_files=(*carried, *made),
        policies=policies | describe_tokenizers(other_tokens),  # not in the record: no byte of the output follows them
        warnings=(
            *config.warnings,
            *_vocabulary_warnings(alignment, ids, pairing, checkpoints),
            *tokenizer_warnings(request, other_tokens),
            *_other_structures(checkpoints),
            *stored.notes,
            *notes,
            *_own_base(checkpoints),
        ),
    )


def _rebuild(
    request: MergeRequest, checkpoints: dict[str, Checkpoint], quantisations: list[Quantisation], wrong: list[Complaint]
) -> Plan:
    """Plan making the model again that a lossless delta was taken from."""
    delta, new_base = checkpoints["post"], checkpoints["new_base"]
    try:
        kept = open_kept(delta)
    except CheckpointError as error:
        wrong += error.complaints
    if wrong:
        raise PlanError(wrong)
    checkpoints["post"] = replace(delta, files=(*delta.files, kept.file))
    names = rename_all(request, checkpoints, quantisations, wrong)
    made = rebuild(names, kept)
    policies: dict[str, Any] = {"rebuilt": {"tensors": len(made.pairing.names), "base_and_delta": len(made.sums)}}
    own_record = SideFile(name=RECORD, source=None, data=record(request, checkpoints, policies), origin="made")
    return Plan(
        request=request,
        checkpoints=checkpoints,
        names_by_role=names,
        pairing=made.pairing,
        stored=Stored(formats=[None] * len(made.pairing.names), dtypes=[], like=None),
        layout=made.layout,
        side_files=(*made.side_files, own_record),
        policies=policies,
        warnings=tuple(note for c in (delta, new_base) for note in c.notes),
        sums=made.sums,
    )


def _own_base(checkpoints: dict[str, Checkpoint]) -> Iterator[str]:
    """Yield a note where a delta is added to the very base that it was taken from, on disk."""
    if checkpoints["new_base"].memory is not None:
        return
    for role, checkpoint in checkpoints.items():
        if is_delta(checkpoint) and not checkpoint.zeros and not is_base_of(checkpoint, checkpoints["new_base"]):
            again = " (--rebuild makes that byte for byte)" if (checkpoint.path / REBUILD).is_file() else ""
            which = "the delta" if role == "post" else f"delta {role.partition('_')[2]}"
            yield f"new_base is the base that {which} was taken from: at alpha 1 the result is what it led to{again}"


def _other_structures(checkpoints: dict[str, Checkpoint]) -> Iterator[str]:
    """Yield warnings about fields of structure in which post of a delta after the first differs from its base."""
    for number in range(1, (len(checkpoints) - 1) // 2):
        post, base = (checkpoints[role] for role in roles_of(number))
        for warning in structure_warnings(post, base, checkpoints["new_base"]):
            yield f"delta {number + 1}: {warning}"


def _config_of_base(base: Checkpoint) -> list[SideFile]:
    """Return base's config as a file of a delta's folder, by which a later merge knows what post changed."""
    source = base.path / "config.json"
    there = source.is_file()
    return [SideFile(name=BASE_CONFIG, source=source, data=None, origin="base")] if there else []


def _quant_file(quant_config: QuantConfig, new_base: Checkpoint) -> list[SideFile]:
    """Return hf_quant_config.json, new_base's or a new one, or nothing."""
    if quant_config.kept and HF_QUANT_CONFIG in new_base.side_files:
        source = new_base.path / HF_QUANT_CONFIG
        return [SideFile(name=HF_QUANT_CONFIG, source=source, data=None, origin="new_base")]
    if quant_config.document is None:
        return []
    data = (json.dumps(quant_config.document, indent=4) + "\n").encode()
    return [SideFile(name=HF_QUANT_CONFIG, source=None, data=data, origin="made")]


def _policies(pairing: Pairing, config: MergedConfig, left_out: list[str], stored: Stored) -> dict[str, Any]:
    counts = {kind: sum(k == kind for k in pairing.kinds) for kind in Kind}
    moved = sum(pairing.posts(i) == 0 for i in pairing.gathers)  # new_base's rows in another order
    return {
        "tensors": {
            "merged": counts[Kind.MERGED] + counts[Kind.EXTENDED] - moved,
            "copied_from_new_base": counts[Kind.FROM_NEW_BASE] + moved,
            "copied_from_post": counts[Kind.FROM_POST],
        },
        "formats": dict(Counter(f.name for f in stored.formats if f is not None)),
        "vocabulary_extended": pairing.extended,
        "tied": pairing.tied,
        "unpaired": pairing.unpaired,
        "dropped": pairing.dropped,
        "config_from_post": list(config.taken),
        "config_new_base_differs": list(config.moved),
        "files_left_out": left_out,
    }


def _with_ids(file: SideFile, ids: TokenIds) -> SideFile:
    """Return a side file, the generation config with the output's ids."""
    if file.name != GENERATION or ids.generation is None:
        return file
    return replace(file, source=None, data=ids.generation)


def _vocabulary_policy(alignment: Alignment | None, ids: TokenIds | None, pairing: Pairing) -> dict[str, Any]:
    if alignment is None or ids is None:
        return {}
    return {"vocabulary": {**describe_alignment(alignment, pairing), "token_ids": ids.changed}}


def _vocabulary_warnings(
    alignment: Alignment | None, ids: TokenIds | None, pairing: Pairing, checkpoints: dict[str, Checkpoint]
) -> Iterator[str]:
    if alignment is not None and ids is not None:
        yield from warnings_of(alignment, pairing, checkpoints)
        yield from ids.warnings


def _vocab_size(pairing: Pairing, new_base: Names, tokenizer: Checkpoint | None) -> int | None:
    """Return the number of tokens that the output's config must state, None where no tensor has other rows than
    new_base's. ``tokenizer`` is the checkpoint whose tokens the rows are, where they were paired by token."""
    grown = [
        shape[0]
        for kind, shape, row in zip(pairing.kinds, pairing.shapes, pairing.new_base, strict=True)
        if kind == Kind.EXTENDED and shape != new_base.shape(row)
    ]
    stated = None if tokenizer is None else tokenizer.text_config.get("vocab_size")
    return stated if grown and isinstance(stated, int) else max(grown, default=None)
