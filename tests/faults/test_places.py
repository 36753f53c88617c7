"""Places where files cannot be read or written as they should: links, pipes, devices, permissions, other merges."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import SHARDS, TIMEOUT, Workshop, digests, program

SHARD = f"post/{SHARDS[0]}"


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [SHARD, "base/config.json", "new_base/model.safetensors.index.json"])
@pytest.mark.parametrize("make", [pipe, device, folder], ids=lambda f: f.__name__)
def test_what_is_no_file_is_refused_without_waiting(
    workshop: Workshop, name: str, make: Callable[[Path], None]
) -> None:
    make(workshop.root / name)
    workshop.must_fail(saying=[f"{name}: is not a regular file", "1 problem; nothing was written."], code=2)


def test_links_in_a_circle(workshop: Workshop) -> None:
    circle(workshop.root / SHARD)
    workshop.must_fail(saying=[f"{SHARD}: cannot be opened: Too many levels of symbolic links"], code=2)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("post/out", "lies inside post: inputs are never written to"),
        ("base", "is base itself: inputs are never written to"),
        ("link/out", "lies inside post: inputs are never written to"),
        (".", "contains post: it would be replaced with it"),
    ],
)
def test_the_output_never_touches_an_input(workshop: Workshop, out: str, words: str) -> None:
    (workshop.root / "link").symlink_to("post")
    before = {role: digests(workshop.root / role) for role in ("post", "base", "new_base")}
    done = workshop.merge(extra=["--overwrite"], out=workshop.root / out)
    assert done.returncode == 2
    assert words in done.stderr
    assert {role: digests(workshop.root / role) for role in before} == before


@pytest.mark.parametrize("goal", ["elsewhere", "nowhere"])
def test_an_output_that_is_a_link_is_refused(workshop: Workshop, goal: str) -> None:
    (workshop.root / "elsewhere").mkdir()
    workshop.out.symlink_to(workshop.root / goal)
    saying = [f"{workshop.out}: is a symbolic link, to {workshop.root / goal}", "name the folder itself"]
    workshop.must_fail(saying=saying, code=2, extra=["--overwrite"])
    assert list((workshop.root / "elsewhere").iterdir()) == []


def ordinary(workshop: Workshop) -> subprocess.CompletedProcess[str]:
    """Run a merge that permissions bind, as they do not bind root."""
    command = workshop.command()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("there is no setpriv(1) to take root's powers away")
        powers = "-dac_override,-dac_read_search,-fowner"
        command = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", *command]
    return subprocess.run(command, env=workshop.environment(), capture_output=True, text=True, timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        (SHARD, 0o000, [f"{SHARD}: cannot be read: Permission denied"]),
        ("base/config.json", 0o000, ["base/config.json: cannot be read: Permission denied"]),
        ("new_base", 0o000, ["/new_base: new_base cannot be read: Permission denied"]),
        (".", 0o555, ["/out: its parent folder", "cannot be written to: its permissions forbid it"]),
    ],
    ids=["shard", "config", "folder", "parent"],
)
def test_missing_permissions(workshop: Workshop, name: str, mode: int, words: list[str]) -> None:
    path = workshop.root / name
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        done = ordinary(workshop)
    finally:
        path.chmod(before)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert "1 problem; nothing was written." in done.stderr
    assert not workshop.partial.exists()


def test_a_temporary_folder_of_someone_else(workshop: Workshop, root_only: None) -> None:
    workshop.partial.mkdir(mode=0o755)
    os.chown(workshop.partial, 65534, 65534)
    done = ordinary(workshop)
    assert done.returncode == 1
    assert ".out.partial: cannot create the temporary folder: Permission denied" in done.stderr
    assert "(it is there already and belongs to user 65534)" in done.stderr
    assert "look at owner and permissions" in done.stderr
    assert workshop.partial.is_dir()  # what is not ours stays


def test_a_second_merge_into_one_folder_ends_at_once(workshop: Workshop, tmp_path: Path) -> None:
    """It runs while the first one is in the middle, and does it no harm."""
    said = tmp_path / "said"
    variables = "env PYTHONPATH={PYTHONPATH} PARAMDELTA_SEGMENT_BYTES=1048576".format(**workshop.environment())
    second = program(
        tmp_path / "second", f"{variables} {shlex.join(workshop.command())} > {said} 2>&1; echo $? >> {said}"
    )
    workshop.must_merge(f"sync partial/journal 2 1 run={second}")
    text = said.read_text()
    assert f"{workshop.out}: another merge is writing it" in text
    assert text.endswith("\n1\n")
    assert text.count("error: ") == 1


def test_a_file_in_place_of_the_temporary_folder(workshop: Workshop) -> None:
    workshop.partial.write_text("mine")
    workshop.must_fail(saying=[".out.partial: cannot create the temporary folder: "])
    assert workshop.partial.read_text() == "mine"


def test_a_folder_in_place_of_an_output_file(workshop: Workshop) -> None:
    """In the leftovers of an earlier run, of all places: they are cleared away."""
    (workshop.partial / "output" / SHARDS[0]).mkdir(parents=True)
    workshop.must_merge()
