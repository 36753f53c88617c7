"""Files that are none, links that lead nowhere or around, and places out of the folder: every command ends, soon, with
a complaint that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bounded import run
from hostile_folders import INDEX, SINGLE, WEIGHT, inputs, three, write, write_json

KINDS = ("fifo", "folder", "loop", "two loops", "dangling", "zero", "random")


def place(path: Path, kind: str) -> None:
    """Put something at ``path`` that is no file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "two loops":
        path.symlink_to(f"{path.name}2")
        path.with_name(f"{path.name}2").symlink_to(path.name)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "zero": "/dev/zero", "random": "/dev/urandom"}[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX, "paramdelta.json"])
def test_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    folders = three(tmp_path)
    if name == "paramdelta.json":
        assert run("merge", *inputs(folders), "--out", tmp_path / "out").code == 0
        place(tmp_path / "out" / name, kind)
        outcome = run("verify", tmp_path / "out", *inputs(folders), seconds=5, megabytes=150)
    else:
        place(folders["post"] / name, kind)
        outcome = run("merge", *inputs(folders), "--out", tmp_path / "out", seconds=5, megabytes=150)
        assert not (tmp_path / "out").exists()
    assert outcome.code == 2
    assert name in outcome.err
    outcome.check_terminal()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_are_no_files(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "a")
    place(folder / "evil.safetensors", kind)
    write_json(folder / INDEX, {"weight_map": {WEIGHT: SINGLE, "b": "evil.safetensors"}})
    outcome = run("inspect", folder, "--json", seconds=5, megabytes=150)
    assert outcome.code == 2
    assert outcome.document()["complaints"][0]["subject"] == str(folder / "evil.safetensors")


OUT_OF_THE_FOLDER = (
    "../secret.safetensors",
    "/etc/passwd",
    "./model.safetensors",
    "a/../model.safetensors",
    "..",
    "a\0",
)


def test_all_entries_that_climb_out_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path / "secret")
    folder = write(tmp_path / "a")
    entries = {f"t{i}": entry for i, entry in enumerate(OUT_OF_THE_FOLDER)}
    write_json(folder / INDEX, {"weight_map": {**entries, WEIGHT: SINGLE}})
    outcome = run("inspect", folder, "--json", seconds=5, megabytes=150)
    complaints = outcome.document()["complaints"]
    assert [c["subject"] for c in complaints] == [f"{folder / INDEX}: {name}" for name in entries]
    assert all("not a plain file name within the folder" in c["problem"] for c in complaints)


def test_links_are_followed_as_a_hub_cache_needs(tmp_path: Path) -> None:
    """The user named the folder, and a merge reads nothing that the user may not: links of shards lead anywhere."""
    folders = three(tmp_path)
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    (folders["post"] / SINGLE).rename(blob)
    (folders["post"] / SINGLE).symlink_to("../blobs/0123")
    assert run("merge", *inputs(folders), "--out", tmp_path / "out").code == 0
    assert not (tmp_path / "out" / SINGLE).is_symlink()


def test_side_files_that_are_no_files_are_left_alone(tmp_path: Path) -> None:
    folders = three(tmp_path)
    for number, kind in enumerate(KINDS):
        place(folders["post"] / f"tokenizer{number or ''}.json", kind)
    place(folders["post"] / "generation_config.json", "fifo")
    place(folders["new_base"] / "evil.py", "zero")
    outcome = run("merge", *inputs(folders), "--out", tmp_path / "out", seconds=5, megabytes=150)
    assert outcome.code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".py", ".json")) == [
        "config.json",
        "paramdelta.json",
    ]
