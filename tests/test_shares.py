"""The split of a merge among ranks: every byte written once, no page by two ranks, units whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from paramdelta import engine
from paramdelta.plan import Plan, make_plan, make_request, open_all
from paramdelta.plan.work import Work
from paramdelta.shares import PAGE, Shares

ROLES = ("post", "base", "new_base")
# Odd sizes: tensors begin and end anywhere in a page.
SHAPES = {
    "model.layers.0.mlp.gate_proj.weight": (416, 544),
    "model.layers.0.mlp.up_proj.weight": (416, 544),
    "model.layers.0.mlp.down_proj.weight": (544, 416),
    "model.layers.0.norm.weight": (545,),
    "model.layers.1.mlp.gate_proj.weight": (256, 544),
    "model.layers.1.mlp.up_proj.weight": (256, 544),
    "model.layers.1.norm.weight": (3,),
    "model.embed_tokens.weight": (1001, 544),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": "f32", "max_shard_size": 700_000},
    {"format": "fp8-block"},
    {"format": "fp8-block", "block_size": "32x32"},
    {"format": "mxfp8"},
    {"format": "fp8-tensor"},
    {"format": "nvfp4", "alpha": 0.5},
]


def plan_of(root: Path, **options: Any) -> Plan:
    folders = {}
    for i, role in enumerate(ROLES):
        rng = np.random.default_rng(i)
        folders[role] = root / role
        folders[role].mkdir(exist_ok=True)
        tensors = {n: rng.standard_normal(s).astype(ml_dtypes.bfloat16) for n, s in SHAPES.items()}
        save_file(tensors, folders[role] / "model.safetensors", metadata={"format": "pt"})
        (folders[role] / "config.json").write_text('{"model_type": "x", "tie_word_embeddings": true}')
    request = make_request(**folders, **options)
    return make_plan(request, *open_all(request))


def carried_out(plan: Plan, work: Work, fill: int) -> list[np.ndarray[Any, Any]]:
    outputs = [np.full(size, fill, np.uint8) for _, size in work.outputs]
    engine.carry_out(work, outputs, tensors=len(plan.names))
    return outputs


def written(plan: Plan, work: Work) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Return what settled work writes, and which bytes: those that do not depend on what was there before."""
    once, again = carried_out(plan, work, 0), carried_out(plan, work, 255)
    return once, [a == b for a, b in zip(once, again, strict=True)]


@pytest.mark.parametrize("world", [2, 5, 40])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ranks_and_seam_are_the_whole(tmp_path: Path, options: dict[str, Any], world: int) -> None:
    plan = plan_of(tmp_path, **options)
    work, tensors = plan.work, len(plan.names)
    shares = Shares(work, world)
    measured = [(0.0, False)] * len(work.units)
    pages: dict[tuple[int, int], int] = {}
    times = [np.zeros(size, np.int64) for _, size in work.outputs]
    made = [np.zeros(size, np.uint8) for _, size in work.outputs]

    def put(part: Work) -> list[np.ndarray[Any, Any]]:
        outputs, where = written(plan, part)
        for file, mine in enumerate(where):
            made[file][mine] = outputs[file][mine]
            times[file] += mine
        return where

    for rank in range(world):
        part = shares.part(rank)
        if part.unsettled:
            found = engine.carry_out(shares.measured_by(rank), [], tensors=tensors).measured
            measured = [max(pair) for pair in zip(measured, found, strict=True)]
            part = part.settled(found)
        for file, mine in enumerate(put(part)):
            for page in np.unique(np.flatnonzero(mine) // PAGE).tolist():
                assert pages.setdefault((file, page), rank) == rank, f"page {page} has two writers"
    seam = shares.seam.settled(measured)
    put(seam)
    work, _ = engine.settle(work, tensors=tensors)
    whole = carried_out(plan, work, 0)
    for file, header in enumerate(plan.work.headers):
        assert (times[file][len(header) :] == 1).all()
        assert np.array_equal(made[file], whole[file])


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_the_split_is_balanced(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = plan_of(tmp_path, **options)
    *ranks, seam = Shares(plan.work, 4).describe()
    moved = [share.bytes_read + share.bytes_written for share in ranks]
    total = sum(moved) + seam.bytes_read + seam.bytes_written
    assert total == pytest.approx(plan.bytes_read + plan.bytes_written, rel=1e-6)
    assert max(moved) < total / 4 * 1.25
    assert [share.rank for share in ranks] == [0, 1, 2, 3]


def test_a_split_is_the_same_each_time(tmp_path: Path) -> None:
    plans = [plan_of(tmp_path, format="nvfp4") for _ in range(2)]
    a, b = (Shares(plan.work, 5) for plan in plans)
    for rank in range(6):
        one, other = a.part(rank), b.part(rank)
        for column in engine.COLUMNS:
            assert getattr(one, column).tobytes() == getattr(other, column).tobytes()


def test_one_rank_has_everything(tmp_path: Path) -> None:
    shares = Shares(plan_of(tmp_path).work, 1)
    assert len(shares.seam.spans) == 0
    assert len(shares.part(0).spans) == len(SHAPES)
