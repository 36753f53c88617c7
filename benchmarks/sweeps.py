"""A sweep over alpha against a merge for each alpha: in memory, and on a disk whose files the page cache does not
have. The output is on disk when a turn ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import data
from benchmarks.machine import file_system_of
from benchmarks.results import OURS, Record
from benchmarks.whole import Contender, Log, take_turns
from paramdelta.demo import shape_for

ALPHAS = ("0.25", "0.5", "0.75", "1")
EACH = 'out=$1; shift; mkdir "$out"; for a in $ALPHAS; do "$@" --alpha $a --out "$out/alpha-$a" || exit; done'
ROUNDS = 5


def sweeps(size: str, *, threads: int, place: Path, log: Log = print) -> Iterator[Record]:
    """Sweep over three Llama-shaped folders of ``size`` each."""
    place.mkdir(parents=True, exist_ok=True)
    kind = file_system_of(place)
    memory = kind in ("tmpfs", "ramfs")
    with data.workspace(place, need=shape_for(size).nbytes * (4 + len(ALPHAS))) as scratch:
        folders, out = data.write_inputs(scratch / "in", size), scratch / "out"
        yield from take_turns(
            "sweeps",
            f"{size}, {'' if memory else 'cold, '}{kind}",
            contenders(folders, out, threads),
            out,
            rounds=ROUNDS,
            parameters={"size": size, "alphas": list(ALPHAS), "threads": threads, "synced": True},
            before=None if memory else lambda: data.forget(folders),
            sync=True,
            log=log,
        )


def contenders(folders: data.Folders, out: Path, threads: int) -> list[Contender]:
    """A sweep, and as many merges, one after the other."""
    roles = zip(("--post", "--base", "--new-base"), map(str, folders), strict=True)
    common = [part for pair in roles for part in pair] + ["--threads", str(threads), "--quiet"]
    ours = (sys.executable, "-m", "paramdelta")
    alphas = ",".join(ALPHAS)
    return [
        Contender(OURS, (*ours, "sweep", *common, "--alphas", alphas, "--out", str(out)), f"paramdelta sweep {alphas}"),
        Contender(
            f"{len(ALPHAS)} merges",
            ("sh", "-c", EACH, "sh", str(out), *ours, "merge", *common),
            "paramdelta merge --alpha A, one after the other",
            env={"ALPHAS": " ".join(ALPHAS)},
        ),
        Contender("one merge", ("sh", "-c", EACH, "sh", str(out), *ours, "merge", *common), env={"ALPHAS": "0.5"}),
    ]
