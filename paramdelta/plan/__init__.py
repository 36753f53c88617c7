"""The plan: every byte of the output accounted for, and everything that is wrong found, before one is written."""

from __future__ import annotations

from typing import Any

from paramdelta.checkpoint import hub
from paramdelta.errors import Complaint, InputError, PlanError
from paramdelta.plan.making import make_plan, open_all
from paramdelta.plan.pairing import Kind
from paramdelta.plan.planned import Plan
from paramdelta.plan.request import MergeRequest
from paramdelta.plan.sidefiles import SideFile
from paramdelta.plan.work import Work

__all__ = ["Kind", "MergeRequest", "Plan", "SideFile", "Work", "make_plan", "make_request", "open_all"]


def make_request(*wrong: Complaint, held: str | None = None, **options: Any) -> MergeRequest:
    """Build a request as :meth:`MergeRequest.build` does; text that names no folder may name a model on the Hub, which
    is fetched once the rest is right. Where it is wrong, or ``wrong`` names what the caller found, the folders are
    looked at too, so that one run shows everything. ``held`` is
    the role of a checkpoint in memory, whose folder is a name only. Raises PlanError."""
    found = list(wrong)
    remote = hub.identifiers(options)
    try:
        request = MergeRequest.build(**options)
        if not found:
            return MergeRequest.build(**hub.located_inputs(options)) if remote else request
    except InputError as error:
        found += error.complaints
    kept = ("post", "base", "new_base", "out", "overwrite", "kind")
    folders = {key: options[key] for key in kept if key in options}
    try:
        open_all(MergeRequest.build(**folders), held=held)
    except PlanError as error:
        found += [c for c in error.complaints if c not in found and c.subject not in remote]
    raise PlanError(found)
