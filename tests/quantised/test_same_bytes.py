"""Nothing but the inputs and the request decides the bytes: not threads, memory, instruction set or sharding, and a
stream yields what a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families_low_bit import ALL
from quantised_merges import ROLES, Case, Folders, Layout, check_same, expected, folder_bytes, read
from recorded_sums import check_sums

import paramdelta
from paramdelta.backends import cpu
from paramdelta.checkpoint import INDEX

FoldersOf = Callable[[Case], Folders]
SMALL, LARGE = 128 << 10, 64 << 20
VARIANTS = cpu.capabilities().variants
# Every instruction set takes part, and the best one in more than one way.
RUNS = [
    {"threads": 3, "memory": LARGE},
    {"threads": 1, "memory": SMALL, "isa": "scalar"},
    {"threads": 3, "memory": 3 * SMALL, "isa": VARIANTS[len(VARIANTS) // 2]},
]


def wide(case: Case) -> Case:
    """Return a case with a matrix, and a stack where it has one, that do not fit the smallest memory: they take the
    place of all weights that somewhere are quantised."""
    layouts = [case.layout(role) for role in ROLES]
    quantised = {n: len(shape) for lay in layouts for n, (shape, form) in lay.weights.items() if form.recipe}
    kept = {rank: name for name, rank in quantised.items()}
    shapes = {kept[rank]: shape for rank, shape in ((2, (260, 1056)), (3, (2, 264, 544))) if rank in kept}
    modules = tuple(name.removesuffix("weight") for name in shapes)

    def widened(layout: Layout) -> Layout:
        left = {n: (shapes.get(n, shape), form) for n, (shape, form) in layout.weights.items()}
        left = {n: weight for n, weight in left.items() if n in shapes or n not in quantised}
        statistics = {n: value for n, value in layout.statistics.items() if n.startswith(modules)}
        return replace(layout, weights=left, statistics=statistics)

    return replace(case, **{role: widened(layout) for role, layout in zip(ROLES, layouts, strict=True)})


WIDE = {name: wide(case) for name, case in ALL.items()}


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_runs(case: Case, folders_of: FoldersOf, tmp_path: Path) -> None:
    """Large matrices, in every way they can be cut: the same folders, which are right."""
    folders, made = folders_of(case), []
    for number, run in enumerate(RUNS):
        out = tmp_path / str(number)
        paramdelta.merge(**folders.sources(), out=out, **case.options, **run)
        made.append(folder_bytes(out))
        assert made[-1] == made[0], run
    check_same(read(tmp_path / "0"), expected(case, folders, "keep"))
    check_sums(tmp_path / "0")


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_shards_and_streams(case: Case, folders_of: FoldersOf, tmp_path: Path) -> None:
    """Shards of another size hold the same tensors; so do streams, in batches of a few tensors or of one."""
    sources = folders_of(case).sources()
    paramdelta.merge(**sources, out=tmp_path / "out", **case.options)
    wanted = read(tmp_path / "out")
    paramdelta.merge(**sources, out=tmp_path / "shards", max_shard_size="50KB", **case.options)
    assert (tmp_path / "shards" / INDEX).exists()
    check_same(read(tmp_path / "shards"), wanted)
    check_sums(tmp_path / "shards")
    for batch in (1, 100_000):
        streamed = {}
        for name, value in paramdelta.stream(**sources, batch_bytes=batch, **case.options):
            assert isinstance(value, np.ndarray)
            assert value.shape == wanted[name].shape
            streamed[name] = wanted[name]._replace(data=value.tobytes())
        check_same(streamed, wanted)


@pytest.mark.parametrize("name", ["deepseek-v4-base-on-post", "modelopt-nvfp4", "compressed-int4", "minimax-m3"])
def test_streams_of_torch(name: str, folders_of: FoldersOf, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    case = ALL[name]
    sources = folders_of(case).sources()
    paramdelta.merge(**sources, out=tmp_path / "out", **case.options)
    wanted, streamed = read(tmp_path / "out"), {}
    for tensor, value in paramdelta.stream(**sources, framework="pt", **case.options):
        assert tuple(value.shape) == wanted[tensor].shape
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        streamed[tensor] = wanted[tensor]._replace(data=data)
    check_same(streamed, wanted)
