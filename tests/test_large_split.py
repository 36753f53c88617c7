"""The split of a merge of 671 billion parameters, laid out like DeepSeek-V3, and what ``plan --ranks`` says of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_folders import write_deepseek

from paramdelta import forecast, merging
from paramdelta.errors import InputError
from paramdelta.forecast import Speeds
from paramdelta.plan import Plan, make_request
from paramdelta.plan.work import Work
from paramdelta.shares import PAGE, Shares

ITEMS = {"f8": 1, "u8": 1, "bf16": 2, "f32": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deepseek")
    made = {role: root / role for role in ("post", "base", "new_base")}
    assert {write_deepseek(folder) for folder in made.values()} == {671_026_419_200}
    return made


@pytest.fixture(scope="module")
def plan(folders: dict[str, Path]) -> Plan:
    started = time.perf_counter()
    made = merging.prepare(make_request(**folders))
    print(f"\nplanned {made.parameters:,} parameters in {time.perf_counter() - started:.1f} s")
    return made


def extents(plan: Plan, work: Work) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return (file, begin, end) of what work writes, from its columns alone. Matrices here are stored row by row, codes
    of one byte, scales of four."""
    spans, regions = work.spans, work.regions
    items = np.array(
        [1 if d.bits == 8 else d.bits // 8 for d in map(plan_dtype, spans["out_dtype"].tolist())], np.int64
    )
    assert (regions["out_pitch"] == regions["cols"]).all()
    assert ((regions["grid_rows"] == 128) & (regions["grid_cols"] == 128)).all()
    blocks = -(-regions["cols"] // 128)
    assert (regions["scale_out_row_stride"] == 4 * blocks).all()
    assert (regions["first_row"] % 128 == 0).all()
    rows = [
        (spans["out_file"], spans["out_offset"], spans["out_offset"] + spans["count"] * items),
        (
            regions["out_file"],
            regions["out_offset"] + regions["first_row"] * regions["cols"],
            regions["out_offset"] + regions["end_row"] * regions["cols"],
        ),
        (
            regions["scale_out_file"],
            regions["scale_out_offset"] + regions["first_row"] // 128 * 4 * blocks,
            regions["scale_out_offset"] + -(-regions["end_row"] // 128) * 4 * blocks,
        ),
    ]
    return np.concatenate([np.stack([np.asarray(c, np.int64) for c in row], 1) for row in rows])


def plan_dtype(code: int) -> Any:
    from paramdelta.dtypes import DTYPES

    return DTYPES[code]


@pytest.mark.parametrize("world", [8, 61, 512])
def test_every_byte_once_and_no_page_twice(plan: Plan, world: int) -> None:
    shares = Shares(plan.work, world)
    parts = [extents(plan, shares.part(rank)) for rank in range(world)]
    everything = np.concatenate([*parts, extents(plan, shares.seam)])
    everything = everything[np.lexsort((everything[:, 1], everything[:, 0]))]
    for file, (_, size) in enumerate(plan.work.outputs):
        mine = everything[everything[:, 0] == file]
        assert mine[0, 1] == len(plan.work.headers[file])
        assert np.array_equal(mine[1:, 1], mine[:-1, 2])  # each begins where the one before ends
        assert mine[-1, 2] == size
    # The pages at the ends of each rank's extents; those between are of one rank, as no byte is written twice.
    ends = [np.concatenate([p[:, [0, 1]] // [1, PAGE], (p[:, [0, 2]] - [0, 1]) // [1, PAGE]]) for p in parts]
    pages = np.concatenate([np.unique(pair, axis=0) for pair in ends])
    assert len(np.unique(pages, axis=0)) == len(pages)


@pytest.mark.parametrize(("world", "within"), [(8, 0.001), (61, 0.03), (512, 0.03)])
def test_the_parts_are_alike(plan: Plan, world: int, within: float) -> None:
    found = forecast.forecast(plan, world)
    moved = np.array([s.bytes_read + s.bytes_written for s in found.shares])
    total = moved.sum() + found.seam.bytes_read + found.seam.bytes_written
    assert total == pytest.approx(plan.bytes_read + plan.bytes_written, rel=1e-9)
    assert moved.max() / moved.mean() < 1 + within
    assert moved.min() / moved.mean() > 1 - within
    assert found.seam.bytes_written < 0.001 * plan.bytes_written


def test_bounds_follow_from_speeds(plan: Plan) -> None:
    speeds = Speeds(read=200 * 10**9, write=10**11, link=25 * 10**9, memory=10**11, ranks_per_node=8)
    found = forecast.forecast(plan, 64, speeds)
    assert found.bounds["read"] == pytest.approx(plan.bytes_read / 200e9)
    assert found.bounds["write"] == pytest.approx(plan.bytes_written / 1e11)
    assert found.bounds["link"] == pytest.approx(plan.bytes_read / 8 / 25e9, rel=0.01)
    assert found.bounds["memory"] == pytest.approx((plan.bytes_read + plan.bytes_written) / 8 / 1e11, rel=0.01)
    assert found.seconds == max(found.bounds.values())
    assert forecast.forecast(plan, 64).seconds is None
    with pytest.raises(InputError, match=r"--ranks"):
        forecast.forecast(plan, 0)


def test_plan_shows_the_split(folders: dict[str, Path]) -> None:
    inputs = [f"--{role.replace('_', '-')}={folder}" for role, folder in folders.items()]
    command = [sys.executable, "-m", "paramdelta", "plan", *inputs, "--ranks=16", "--read-speed=50GB/s", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    split = json.loads(done.stdout)["split"]
    assert [part["rank"] for part in split["parts"]] == list(range(16))
    assert split["at_least_seconds"] == split["bounds"]["read"] == pytest.approx(2.0e12 / 50e9, rel=0.05)
    assert split["parts"][0]["files"][0] == "model-00001-of-00158.safetensors"
