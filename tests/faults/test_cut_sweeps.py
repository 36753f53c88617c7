"""Sweeps that are killed while they publish: every folder that is there is complete, and the same command continues
with the rest."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_runs import ROLES, TIMEOUT, Workshop, digests

import paramdelta

ALPHAS = ("0", "0.5", "2")
WAYS = {
    "rename": ("rename", []),
    "exchange": ("exchange", []),
    "two renames": ("rename", ["exchange * 0 -1 errno=22"]),
}


def sweep(workshop: Workshop, *rules: str, extra: list[str], segments: bool) -> subprocess.CompletedProcess[str]:
    """Run a sweep that meets ``rules``; a hang is a failure."""
    inputs = [f"--{role.replace('_', '-')}={workshop.root / role}" for role in ROLES]
    command = [sys.executable, "-m", "paramdelta", "sweep", *inputs, f"--alphas={','.join(ALPHAS)}"]
    return subprocess.run(
        [*command, f"--out={workshop.out}", "--threads=2", "--quiet", *extra],
        env=workshop.environment(*rules, segments=segments),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def expected(
    made_once: tuple[Path, dict[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    root, folder = made_once[0], tmp_path_factory.mktemp("merges")
    for alpha in ALPHAS:
        paramdelta.merge(**{role: root / role for role in ROLES}, out=folder / f"alpha-{alpha}", alpha=alpha)
    return {path.name: digests(path) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("way", "calls", "segments"),
    [("rename", 2, False), ("rename", 1, True), ("exchange", 2, False), ("two renames", 3, False)],
    ids=["rename", "rename, with segments", "exchange", "two renames"],
)
def test_killed_while_publishing(
    workshop: Workshop, expected: dict[str, dict[str, str]], way: str, calls: int, segments: bool
) -> None:
    call, rules = WAYS[way]
    extra = [] if way == "rename" else ["--overwrite"]
    seen = set()
    for number in range(1, calls + 1):
        shutil.rmtree(workshop.out, ignore_errors=True)
        old = {}
        if extra:
            for name in expected:
                (workshop.out / name).mkdir(parents=True)
                (workshop.out / name / "paramdelta.json").write_text("{}")
            old = {name: digests(workshop.out / name) for name in expected}
        done = sweep(workshop, *rules, f"{call} alpha- {number} 1 kill", extra=extra, segments=segments)
        assert done.returncode == -signal.SIGKILL, done.stderr
        there = {name: digests(workshop.out / name) for name in expected if (workshop.out / name).exists()}
        finished = {name for name, found in there.items() if found == expected[name]}
        assert all(there[name] == old[name] for name in there if name not in finished)
        seen.add(len(finished))
        again = sweep(workshop, *rules, extra=extra, segments=segments)
        assert again.returncode == 0, again.stderr
        assert {path.name: digests(path) for path in workshop.out.iterdir()} == expected
    assert seen == ({0, 1} if way == "two renames" else {1, 2} - {calls + 1})


def test_what_is_published_is_not_made_again(workshop: Workshop, expected: dict[str, dict[str, str]]) -> None:
    """Nor is it touched: and where it has gone away meanwhile, that is said."""
    kill = "rename alpha- 2 1 kill"
    assert sweep(workshop, kill, extra=[], segments=False).returncode == -signal.SIGKILL
    before = {name: (workshop.out / name / "model.safetensors.index.json").stat() for name in ("alpha-0", "alpha-0.5")}
    assert sweep(workshop, extra=[], segments=False).returncode == 0
    for name, stat in before.items():
        after = (workshop.out / name / "model.safetensors.index.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    shutil.rmtree(workshop.out)
    assert sweep(workshop, kill, extra=[], segments=False).returncode == -signal.SIGKILL
    shutil.rmtree(workshop.out / "alpha-0")
    lost = sweep(workshop, extra=[], segments=False)
    assert lost.returncode == 2
    assert "of which folders went away: alpha-0" in lost.stderr
    assert "--restart" in lost.stderr
    assert sweep(workshop, extra=["--restart", "--overwrite"], segments=False).returncode == 0
    assert {path.name: digests(path) for path in workshop.out.iterdir()} == expected
