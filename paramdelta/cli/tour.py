"""``paramdelta demo``: three small checkpoints in the real layout, merged, verified and shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from paramdelta import merging, verification
from paramdelta.cli import present, render
from paramdelta.demo import write_demo
from paramdelta.errors import Complaint, InputError, ParamDeltaError
from paramdelta.plan import make_request

_MARK = "paramdelta-demo.txt"
_ROLES = ("post", "base", "new_base")


def run_demo(folder: Path, *, overwrite: bool, quiet: bool) -> dict[str, Any]:
    """Write the demo checkpoints below ``folder``, merge and verify them; return both reports as one JSON document.

    An existing folder is replaced only with ``overwrite``, and only if an earlier demo wrote it.
    """
    _clear(folder, overwrite)
    folder.mkdir(parents=True)
    (folder / _MARK).write_text("Written by `paramdelta demo`; safe to delete.\n")
    if not quiet:
        render.say("Writing three Llama-shaped checkpoints (bf16, sharded, with config and tokenizer):")
    post, base, new_base = write_demo(folder)
    if not quiet:
        for role, path in zip(_ROLES, (post, base, new_base), strict=True):
            size = sum(p.stat().st_size for p in path.iterdir())
            render.say(f"  {role:9}{path}  {render.human_bytes(size)}")
        render.say("\nmerged = new_base + 1.0 · (post − base)")
    request = make_request(post=post, base=base, new_base=new_base, out=folder / "merged")
    plan = merging.prepare(request)
    render.print_warnings(plan.warnings)
    report = merging.run_merge(plan)
    checked = verification.verify(folder / "merged", post=post, base=base, new_base=new_base)
    if not quiet:
        present.merge_report(report)
        present.verify_report(checked)
    if checked.problems:
        raise ParamDeltaError(f"the demo's merge is not what the reference computes: {checked.problems[0]}")
    return {**report.to_dict(), "kind": "demo", "merge": report.to_dict(), "verify": checked.to_dict()}


def _clear(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise InputError(Complaint(str(folder), "exists already", "--overwrite replaces an earlier demo"))
    if not (folder / _MARK).is_file():
        raise InputError(Complaint(str(folder), "was not written by `paramdelta demo`", "name another folder"))
    shutil.rmtree(folder)
