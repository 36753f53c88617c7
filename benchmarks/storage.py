"""Merges on a disk, cold and hot, against a loop with the same reads and writes and no arithmetic.

The bound is ``plain_io.cpp``: what the page cache gives at one request per processor, and what O_DIRECT gives at the
depth of a merge. All contenders take turns; each ends with its output on disk.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks import bound, data
from benchmarks.machine import file_system_of
from benchmarks.results import OURS, Record
from benchmarks.whole import Contender, Log, ours, take_turns

SOURCE = Path(__file__).with_name("plain_io.cpp")
FLAGS = ("-std=c++17", "-O2", "-pthread")
TENSORS = 8
ROUNDS = 7
# As a merge that waits for storage has it (paramdelta.storage).
DEEP_THREADS, DEEP_REQUEST = 16, 2 << 20
REQUEST = 1 << 20
_BUFFER = bytearray(1 << 20)


def write_single(folder: Path, nbytes: int) -> data.Folders:
    """Write three folders of one file each: float16 tensors, so that a loop over three files is the same work."""
    rng = np.random.default_rng(0)
    roles = {}
    for role in ("post", "base", "new_base"):
        roles[role] = folder / role
        roles[role].mkdir(parents=True)
        count = nbytes // 2 // TENSORS
        tensors = {f"layers.{i}.weight": rng.standard_normal(count, np.float32).astype("<f2") for i in range(TENSORS)}
        save_file(tensors, roles[role] / "model.safetensors")
        (roles[role] / "config.json").write_text(json.dumps({"model_type": "synthetic"}) + "\n")
    return data.Folders(**roles)


def plain_program() -> Path:
    """Compile the loop, once."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    program = bound.CACHE / f"plain_io-{key}"
    if not program.exists():
        bound.CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(bound.compiler()), *FLAGS, str(SOURCE), "-o", str(program)], check=True)
    return program


def plain(program: Path, mode: str, threads: int, request: int, folders: data.Folders, out: Path) -> Contender:
    """The loop in one of its modes; it writes one file into a folder."""
    files = [str(folder / "model.safetensors") for folder in folders]
    loop = [str(program), mode, str(threads), str(request), *files]
    name = f"plain loop, {mode}"
    shown = f"plain_io {mode} {threads} {request} POST BASE NEW_BASE OUT"
    return Contender(name, ("sh", "-c", 'mkdir "$0" && "$@" "$0"/out', str(out), *loop), shown)


def merges(size: int, *, threads: int, place: Path, log: Log = print) -> Iterator[Record]:
    """Merge three single files of ``size`` bytes, which the page cache does not have, and then has."""
    place.mkdir(parents=True, exist_ok=True)
    kind = file_system_of(place)
    reason = bound.why_not()
    if reason:
        yield Record("storage", kind, OURS, {}, skipped=reason)
        return
    with data.workspace(place, need=5 * size) as scratch:
        log(f"{size / 1e9:.1f}GB, {kind}: writing the inputs")
        folders = write_single(scratch / "in", size)
        out = scratch / "out"
        contenders = [
            *_ways(ours(folders, out, threads), ("auto", "buffered", "direct")),
            plain(plain_program(), "buffered", threads, REQUEST, folders, out),
            plain(plain_program(), "direct", DEEP_THREADS, DEEP_REQUEST, folders, out),
        ]
        states = {
            "cold": ("dropped from the page cache before each run", data.forget),
            "hot": ("in the page cache", _read_all),
        }
        for state, (told, before) in states.items():
            yield from take_turns(
                "storage",
                f"{size / 1e9:.1f}GB, {state}, {kind}",
                contenders,
                out,
                rounds=ROUNDS,
                parameters={"bytes": size, "inputs": told, "synced": True},
                before=lambda prepare=before: prepare(folders),  # type: ignore[misc]
                sync=True,
                log=log,
            )


def _ways(merge: Contender, modes: tuple[str, ...]) -> list[Contender]:
    """A merge by each ``--io``, the first under our name alone, with as many workers as each takes by itself."""
    at = merge.command.index("--threads")
    command = (*merge.command[:at], *merge.command[at + 2 :])
    shown = merge.shown.replace(f" --threads {merge.command[at + 1]}", "")
    first, *rest = modes
    return [
        Contender(merge.name, (*command, "--io", first), f"{shown} --io {first}"),
        *(Contender(f"{merge.name} --io {io}", (*command, "--io", io), f"{shown} --io {io}") for io in rest),
    ]


def _read_all(folders: data.Folders) -> None:
    """Bring the files into the page cache."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(_BUFFER):
                    pass
