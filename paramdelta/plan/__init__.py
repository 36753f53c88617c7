"""The plan: every byte of the output accounted for, and everything that is wrong found, before one is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta import JSON_VERSION
from paramdelta.checkpoint import INDEX, Checkpoint, open_checkpoint, quantisation_complaint
from paramdelta.dtypes import DTYPES, DType
from paramdelta.errors import CheckpointError, Complaint, PlanError
from paramdelta.plan.config import MergedConfig, merge_config
from paramdelta.plan.layout import Layout, Tables, lay_out
from paramdelta.plan.naming import renamed
from paramdelta.plan.pairing import Kind, Pairing, pair
from paramdelta.plan.request import ROLES, MergeRequest
from paramdelta.plan.sidefiles import CARD, RECORD, SideFile, carried_files, model_card, record
from paramdelta.plan.target import check_links, check_target
from paramdelta.plan.work import Work

__all__ = ["Kind", "MergeRequest", "Plan", "SideFile", "Work", "make_plan", "make_request", "open_all"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge, ready to run. Tensors are numbered in the order of the output files.

    ``work`` fills the output files; ``index`` and ``side_files`` are the rest of the folder. ``policies`` is the
    JSON-ready summary of what happens to which tensors. ``integer_pairs`` are integer tensors (name, row in post,
    row in base) whose data a merge compares before it starts.
    """

    request: MergeRequest
    post: Checkpoint
    base: Checkpoint
    new_base: Checkpoint
    pairing: Pairing
    layout: Layout
    side_files: tuple[SideFile, ...]
    policies: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def work(self) -> Work:
        """The spans and terms for the engine."""
        return self.layout.work

    @property
    def index(self) -> bytes | None:
        """The bytes of the index, None for a single file."""
        return self.layout.index

    @property
    def integer_pairs(self) -> list[tuple[str, int, int]]:
        """Integer tensors as (name, row in post, row in base)."""
        return self.pairing.integers

    @cached_property
    def names(self) -> list[str]:
        """Names of the output tensors."""
        return [self.pairing.names[i] for i in self.layout.order]

    @property
    def out_files(self) -> NDArray[np.int64]:
        """The output file of each tensor."""
        return self.layout.files

    def dtype_of(self, tensor: int) -> DType:
        """Return the dtype of an output tensor."""
        return DTYPES[int(self.layout.dtypes[tensor])]

    def shape_of(self, tensor: int) -> tuple[int, ...]:
        """Return the shape of an output tensor."""
        return self.pairing.shapes[int(self.layout.order[tensor])]

    def nbytes_of(self, tensor: int) -> int:
        """Return the bytes of an output tensor."""
        return int(self.layout.nbytes[tensor])

    def elements_of(self, tensor: int) -> int:
        """Return the number of elements of an output tensor."""
        return self.nbytes_of(tensor) * 8 // self.dtype_of(tensor).bits

    @cached_property
    def parameters(self) -> int:
        """The number of elements of all output tensors."""
        bits = np.array([d.bits for d in DTYPES])[self.layout.dtypes]
        return int((self.layout.nbytes * 8 // bits).sum())

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data the merge writes."""
        return int(self.layout.nbytes.sum())

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of tensor data the merge reads."""
        items = np.array([d.bits for d in DTYPES]) // 8
        spans, terms = self.work.spans, self.work.terms
        total = int((spans["count"] * items[spans["new_dtype"]] * (spans["new_file"] >= 0)).sum())
        counts = np.repeat(spans["count"], spans["n_terms"])
        rows = terms[np.repeat(spans["first_term"], spans["n_terms"]) + _within(spans["n_terms"])]
        for role in ("post", "base"):
            total += int((counts * items[rows[f"{role}_dtype"]] * (rows[f"{role}_file"] >= 0)).sum())
        return total

    def written_files(self) -> Iterator[tuple[str, bytes | Path]]:
        """Yield the files of the output that are not weights, as (name, bytes or the file to copy)."""
        if self.index is not None:
            yield INDEX, self.index
        for file in self.side_files:
            content = file.data if file.data is not None else file.source
            assert content is not None
            yield file.name, content

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        return {
            "version": JSON_VERSION,
            "kind": "plan",
            "parameters": self.parameters,
            "tensors": len(self.names),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "files": [{"name": name, "bytes": size} for name, size in self.work.outputs],
            "side_files": [{"name": f.name, "origin": f.origin} for f in self.side_files],
            "policies": self.policies,
            "warnings": list(self.warnings),
        }


def make_request(*wrong: Complaint, **options: Any) -> MergeRequest:
    """Build a request as :meth:`MergeRequest.build` does. Where it is wrong, or ``wrong`` names what the caller found,
    the folders are looked at too, so that one run shows everything. Raises PlanError."""
    found = list(wrong)
    try:
        request = MergeRequest.build(**options)
    except PlanError as error:
        found += error.complaints
    else:
        if not found:
            return request
    folders = {key: options[key] for key in (*ROLES, "out", "overwrite") if key in options}
    try:
        open_all(MergeRequest.build(**folders))
    except PlanError as error:
        found += error.complaints
    raise PlanError(found)


def open_all(request: MergeRequest) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
    """Open post, base and new_base. Where one cannot be opened, raise PlanError with the complaints about all three and
    about the output folder."""
    wrong: list[Complaint] = []
    opened: list[Checkpoint] = []
    for role in ROLES:
        try:
            opened.append(open_checkpoint(request.folder(role), role=role))
        except CheckpointError as error:
            wrong += error.complaints
    if wrong:
        raise PlanError([*check_target(request), *wrong, *_quantised(opened)])
    post, base, new_base = opened
    return post, base, new_base


def _quantised(checkpoints: Sequence[Checkpoint]) -> list[Complaint]:
    return [complaint for c in checkpoints for complaint in quantisation_complaint(c)]


def make_plan(request: MergeRequest, post: Checkpoint, base: Checkpoint, new_base: Checkpoint) -> Plan:
    """Plan a merge from three open checkpoints. Raises PlanError with every complaint there is."""
    wrong = check_target(request) + check_links(request, (post, base, new_base))
    quantised = _quantised((post, base, new_base))
    if quantised:  # their names would not pair, for a reason already given
        raise PlanError([*wrong, *quantised])
    p, b, n = (renamed(c, request.renames(c.role), wrong) for c in (post, base, new_base))
    pairing = pair(request, p, b, n, wrong)
    if wrong:
        raise PlanError(wrong)
    layout = lay_out(request, pairing, Tables(post, base, new_base))
    config = merge_config(post, base, new_base, vocab_size=_vocab_size(pairing, new_base), dtype=request.dtype)
    carried, left_out = carried_files(post, base, new_base)
    policies = _policies(pairing, config, left_out)
    made = [
        SideFile(name=CARD, source=None, data=model_card(request, post, base, new_base), origin="made"),
        SideFile(name=RECORD, source=None, data=record(request, (post, base, new_base), policies), origin="made"),
    ]
    if config.data is not None:
        made.append(SideFile(name="config.json", source=None, data=config.data, origin="new_base"))
    notes = [note for c in (post, base, new_base) for note in c.notes]
    return Plan(
        request=request,
        post=post,
        base=base,
        new_base=new_base,
        pairing=pairing,
        layout=layout,
        side_files=(*carried, *made),
        policies=policies,
        warnings=(*config.warnings, *notes),
    )


def _policies(pairing: Pairing, config: MergedConfig, left_out: list[str]) -> dict[str, Any]:
    counts = {kind: sum(k == kind for k in pairing.kinds) for kind in Kind}
    return {
        "tensors": {
            "merged": counts[Kind.MERGED] + counts[Kind.EXTENDED],
            "copied_from_new_base": counts[Kind.FROM_NEW_BASE],
            "copied_from_post": counts[Kind.FROM_POST],
        },
        "vocabulary_extended": pairing.extended,
        "tied": pairing.tied,
        "unpaired": pairing.unpaired,
        "dropped": pairing.dropped,
        "config_from_post": list(config.taken),
        "config_new_base_differs": list(config.moved),
        "files_left_out": left_out,
    }


def _vocab_size(pairing: Pairing, new_base: Checkpoint) -> int | None:
    """Return the number of tokens that the output's config must state, None where no tensor has other rows than
    new_base's."""
    grown = [
        shape[0]
        for kind, shape, row in zip(pairing.kinds, pairing.shapes, pairing.new_base, strict=True)
        if kind == Kind.EXTENDED and shape != new_base.tensors.shapes[row]
    ]
    return max(grown, default=None)


def _within(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return 0 … n − 1 for each n in ``counts``, joined."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
