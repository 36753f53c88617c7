"""Whole processes: merges in tmpfs and on disk against the peers, start-up time, and the case of very many tensors.

Contenders of a case run in turn, round after round, each round beginning with another one, so that a ratio never
compares two moods of the machine. The first contender runs once more beforehand, untimed: memory that a virtual
machine never used is slow once. Each run starts from the same state: no output folder, and inputs in the page cache
(tmpfs) or dropped from it (disk).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import data, process
from benchmarks.machine import ROOT, file_system_of, mergekit_python
from benchmarks.peers import mergekit
from benchmarks.results import OURS, Metric, Record, compare_within_cases

TMPFS = Path("/dev/shm")
DISK = ROOT / "build" / "benchmarks"
TORCH_SCRIPT = Path(__file__).parent / "peers" / "torch_script.py"
COPY = 'cat "$1"/* "$2"/* >/dev/null; cp -r "$3" "$4"'
UNITS = {
    **dict.fromkeys(("wall", "user", "sys"), "s"),
    **dict.fromkeys(("peak_rss", "read", "written", "storage_read", "storage_written"), "B"),
    **dict.fromkeys(("read_calls", "write_calls", "minor_faults", "major_faults", "instructions"), "1"),
}

Log = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One way to do the work: a command, what it adds to the environment, or the reason why it cannot run.

    ``shown`` is the command as a result file tells it, without the folders of this machine.
    """

    name: str
    command: tuple[str, ...] = ()
    shown: str = ""
    env: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None


def ours(folders: data.Folders, out: Path, threads: int) -> Contender:
    """Our command line."""
    post, base, new_base = map(str, folders)
    inputs = ("--post", post, "--base", base, "--new-base", new_base)
    command = (sys.executable, "-m", "paramdelta", "merge", *inputs, "--out", str(out))
    shown = f"paramdelta merge --post POST --base BASE --new-base NEW_BASE --out OUT --threads {threads} --quiet"
    return Contender(OURS, (*command, "--threads", str(threads), "--quiet"), shown)


def copy(folders: data.Folders, out: Path) -> Contender:
    """Read two folders and copy the third: the least that any merge has to do, by the tools of the system."""
    command = ("sh", "-c", COPY, "sh", *map(str, folders), str(out))
    return Contender("cat, cat, cp", command, "cat POST/* BASE/* >/dev/null; cp -r NEW_BASE OUT")


def torch_script(folders: data.Folders, out: Path, threads: int) -> Contender:
    """The obvious torch script, by this interpreter or by that of mergekit's environment."""
    name = "torch script"
    python = sys.executable if importlib.util.find_spec("torch") else None
    if python is None and mergekit.executable():
        python = str(mergekit_python(str(mergekit.executable())))
    if python is None:
        return Contender(name, skipped="torch is not installed; pip install 'paramdelta[torch]'")
    command = (python, str(TORCH_SCRIPT), *map(str, folders), str(out))
    shown = "python benchmarks/peers/torch_script.py POST BASE NEW_BASE OUT"
    return Contender(name, command, shown, {"OMP_NUM_THREADS": str(threads)})


def mergekit_merge(method: str, folders: data.Folders, out: Path, threads: int) -> Contender:
    """mergekit by one of its methods; writes the configuration beside the output."""
    name = f"mergekit {method}"
    reason = mergekit.why_not()
    if reason:
        return Contender(name, skipped=reason)
    config = out.with_name(f"{method}.yml")
    config.write_text(mergekit.configuration(method, folders))
    command = mergekit.command(method, config, out, threads)
    program = "paramdelta-mergekit" if method == mergekit.OURS else "mergekit-yaml"
    shown = " ".join([program, f"{method}.yml", "OUT", *command[command.index(str(out)) + 1 :]])
    return Contender(name, tuple(command), shown, mergekit.environment(threads))


def take_turns(
    group: str,
    case: str,
    contenders: list[Contender],
    out: Path,
    *,
    rounds: int,
    parameters: dict[str, object],
    before: Callable[[], None] | None = None,
    sync: bool = False,
    log: Log = print,
) -> list[Record]:
    """Run every contender once per round, and return one record each, with ratios to ours.

    Round k begins with contender k; before the first, one run of the first contender is not counted.

    ``out`` is removed and ``before`` called before each run. ``sync`` counts the time until the output is on disk
    into every contender's.
    """
    usages: dict[str, list[process.Usage]] = {c.name: [] for c in contenders}
    failed: dict[str, str] = {c.name: c.skipped for c in contenders if c.skipped is not None}
    for name, reason in failed.items():
        log(f"{case}: {name} skipped: {reason}")
    starts = [k % len(contenders) for k in range(rounds)]
    turns = [(contenders[0], False)] + [(c, True) for k in starts for c in (*contenders[k:], *contenders[:k])]
    for contender, counted in turns:
        if contender.name not in failed:
            shutil.rmtree(out, ignore_errors=True)
            if before is not None:
                before()
            command = list(contender.command)
            if sync:
                command = ["sh", "-c", '"$@" && sync -f "$0"', str(out), *command]
            try:
                usage = process.measure(command, env=contender.env, cwd=ROOT)
            except process.CommandError as error:
                failed[contender.name] = f"failed: {error}"
                log(f"{case}: {contender.name} failed: {error}")
            else:
                usages[contender.name] += [usage] if counted else []
    shutil.rmtree(out, ignore_errors=True)
    records = []
    for c in contenders:
        reason = failed.get(c.name)
        told = {**parameters, "command": c.shown, "environment": c.env}
        metrics = {} if reason else _metrics(usages[c.name])
        records.append(Record(group, case, c.name, told, metrics, skipped=_without_folders(reason, out)))
    return compare_within_cases(records)


def _metrics(usages: list[process.Usage]) -> dict[str, Metric]:
    samples = {name: tuple(getattr(u, name) for u in usages) for name in UNITS}
    return {name: Metric(UNITS[name], values) for name, values in samples.items() if None not in values}


def _without_folders(text: str | None, out: Path) -> str | None:
    """Keep this machine's folders out of what is published."""
    if text is None:
        return None
    for path, name in ((str(out.parent), "SCRATCH"), (str(ROOT), "."), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text


def merges(
    size: str, *, quick: bool, threads: int, places: tuple[Path, ...] = (TMPFS, DISK), log: Log = print
) -> Iterator[Record]:
    """Merge three folders of ``size`` in each place, against every peer."""
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        kind = file_system_of(place)
        in_memory = kind == "tmpfs"
        case = f"{size}, {kind}, {threads} threads"
        try:
            with data.workspace(place, need=data.bytes_needed(size)) as scratch:
                log(f"{case}: writing the inputs")
                folders = data.write_inputs(scratch / "in", size)
                out = scratch / "out"
                contenders = [
                    ours(folders, out, threads),
                    copy(folders, out),
                    torch_script(folders, out, threads),
                    *(mergekit_merge(method, folders, out, threads) for method in mergekit.METHODS),
                ]
                yield from take_turns(
                    "merges",
                    case,
                    contenders,
                    out,
                    rounds=7 if in_memory and not quick else 5,
                    parameters={
                        "size": size,
                        "output_bytes": folders.nbytes,
                        "file_system": kind,
                        "inputs": "in memory" if in_memory else "dropped from the page cache before each run",
                        "synced": not in_memory,
                        "threads": threads,
                    },
                    before=None if in_memory else lambda f=folders: data.forget(f),
                    sync=not in_memory,
                    log=log,
                )
        except data.NoRoomError as error:
            log(f"{case}: skipped: {error}")
            yield Record("merges", case, OURS, {"size": size, "file_system": kind}, skipped=str(error))


def start(*, quick: bool, log: Log = print) -> Iterator[Record]:
    """Time ``paramdelta --help`` against the bare interpreter and mergekit's help."""
    contenders = [
        Contender(OURS, (sys.executable, "-m", "paramdelta", "--help"), "paramdelta --help"),
        Contender("python", (sys.executable, "-c", "pass"), "python -c pass"),
    ]
    reason = mergekit.why_not()
    helped = (str(mergekit.executable()), "--help")
    contenders.append(
        Contender("mergekit", skipped=reason) if reason else Contender("mergekit", helped, "mergekit-yaml --help")
    )
    with data.workspace(TMPFS if TMPFS.is_dir() else DISK, need=0) as scratch:
        rounds = 5 if quick else 15
        yield from take_turns("start", "--help", contenders, scratch / "none", rounds=rounds, parameters={}, log=log)


def many(*, quick: bool, threads: int, log: Log = print) -> Iterator[Record]:
    """Merge 100,000 tensors of 64 elements in 40 files, in tmpfs; plan them, too."""
    tensors, elements, shards = (10_000, 64, 4) if quick else (100_000, 64, 40)
    with data.workspace(TMPFS if TMPFS.is_dir() else DISK, need=10 * tensors * (elements * 2 + 300)) as scratch:
        kind = file_system_of(scratch)
        log(f"{tensors} tensors: writing the inputs")
        folders = data.write_many(scratch / "in", tensors=tensors, elements=elements, shards=shards)
        out = scratch / "out"
        parameters = {
            "tensors": tensors,
            "elements": elements,
            "shards": shards,
            "file_system": kind,
            "threads": threads,
        }
        merge = ours(folders, out, threads)
        contenders = [
            merge,
            copy(folders, out),
            torch_script(folders, out, threads),
            Contender("mergekit linear", skipped="not tried: its time grows with the square of the number of tensors"),
        ]
        rounds = 5
        case = f"{tensors} tensors, {kind}, merge"
        yield from take_turns("many", case, contenders, out, rounds=rounds, parameters=parameters, log=log)
        inputs = merge.command[4:10]
        plan = Contender(
            OURS,
            (sys.executable, "-m", "paramdelta", "plan", *inputs, "--quiet"),
            "paramdelta plan --post POST --base BASE --new-base NEW_BASE --quiet",
        )
        case = f"{tensors} tensors, {kind}, plan"
        yield from take_turns("many", case, [plan], out, rounds=rounds, parameters=parameters, log=log)


def default_places(disk: Path | None) -> tuple[Path, ...]:
    """Return where merges are measured: tmpfs where there is one, and a folder on disk."""
    places = (disk or DISK,)
    return (TMPFS, *places) if TMPFS.is_dir() and os.access(TMPFS, os.W_OK) else places
