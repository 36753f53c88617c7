"""Folders and files that look like a checkpoint but are not one, or not a whole one."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from paramdelta.checkpoint import INDEX, header, open_checkpoint
from paramdelta.checkpoint.header import MAX_VALUES, parse_header, read_header
from paramdelta.errors import CheckpointError


def write(path: Path, *names: str) -> None:
    """Write a safetensors file of BF16 tensors of two elements."""
    entries = {n: {"dtype": "BF16", "shape": [2], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4 * len(names)))


def index(folder: Path, weight_map: Any, **metadata: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, role="post")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_one_shard_of_several_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00003.safetensors", "a")
    assert "one of 3 files" in refusal(tmp_path)


def test_an_adapter_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", "a")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(tmp_path)


@pytest.mark.parametrize(("weights", "config"), [("adapter_model", "config.json"), ("weights", "adapter_config.json")])
def test_an_adapter_is_known_by_both_its_files(weights: str, config: str, tmp_path: Path) -> None:
    """Either alone may lie beside, or be the name of, a whole checkpoint."""
    write(tmp_path / f"{weights}.safetensors", "a")
    (tmp_path / config).write_text("{}")
    assert open_checkpoint(tmp_path).tensors.names == ["a"]


@pytest.mark.parametrize("place", ["models--a--b/blobs/x", "datasets--a--b/snapshots/x", "a--b/snapshots/x"])
def test_only_snapshots_of_a_hub_cache_are_named_as_models(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    write(folder / "model.safetensors", "a")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.label, checkpoint.revision) == ("x", "")


def test_consolidated_weights_alone_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "consolidated.safetensors", "a")
    assert "Mistral's own layout" in refusal(tmp_path)


def test_the_index_decides_between_shards_that_repeat_a_tensor(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", "a", "b", "c", "unlisted")
    write(tmp_path / "two.safetensors", "a", "c")
    write(tmp_path / "model.safetensors", "stale")
    index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, total_size=0, kept="yes")
    checkpoint = open_checkpoint(tmp_path)
    table = checkpoint.tensors
    assert [(name, checkpoint.files[table.spec(name).file].name) for name in table.names] == [
        ("b", "one.safetensors"),
        ("c", "one.safetensors"),
        ("a", "two.safetensors"),
    ]
    assert checkpoint.index_metadata == {"total_size": 0, "kept": "yes"}
    assert any("1 tensors are in shards but not in the index" in note for note in checkpoint.notes)
    assert any("left out: model.safetensors" in note for note in checkpoint.notes)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in refusal(tmp_path)


def test_values_of_a_header_are_bounded() -> None:
    raw = b'{"a":[' + b"0," * MAX_VALUES + b"0]}"
    with pytest.raises(CheckpointError, match="the most allowed is 4,000,000"):
        parse_header(raw, file_size=8 + len(raw), subject="file")


def test_as_many_values_as_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comma, bracket and brace counts for one."""
    raw = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    options = {"file_size": 8 + len(raw) + 4, "subject": "file"}
    monkeypatch.setattr(header, "MAX_VALUES", 7)
    assert parse_header(raw, **options).names == ["a"]
    monkeypatch.setattr(header, "MAX_VALUES", 6)
    with pytest.raises(CheckpointError, match="about 7 values; the most allowed is 6"):
        parse_header(raw, **options)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [({}, "names no tensor"), ({"a": "pytorch_model.bin"}, "names pytorch_model.bin; only safetensors are read")],
    ids=["empty", "another format"],
)
def test_an_index_that_leads_to_no_safetensors(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    index(tmp_path, weight_map)
    assert message in refusal(tmp_path)


def test_an_index_may_name_consolidated_shards(tmp_path: Path) -> None:
    write(tmp_path / "consolidated.00.safetensors", "a")
    index(tmp_path, {"a": "consolidated.00.safetensors"})
    assert open_checkpoint(tmp_path).tensors.names == ["a"]


@pytest.mark.parametrize("more", [0, 1, 5])
@pytest.mark.parametrize("file", ["x.safetensors", "../x.safetensors"], ids=["absent", "elsewhere"])
def test_twenty_entries_that_are_wrong_are_told(file: str, more: int, tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "a")
    index(tmp_path, {f"b{i:02}": file for i in range(20 + more)})
    told = refusal(tmp_path)
    assert [f"b{i:02}" in told for i in range(20 + more)] == [True] * 20 + [False] * more
    assert (f"and {more} more" in told) == (more > 0)
    assert ("more" in told) == (more > 0)
