"""Sizes that someone else chose: of headers, of counts and of files. Each is refused, or read, in bounded time and
memory, and the refusal names the file and the tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bounded import run
from hostile_folders import INDEX, SINGLE, WEIGHT, inputs, tensor, three, write, write_file, write_json

CAP = 100_000_000
ENTRY = '"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def folder_of(path: Path, raw: bytes, data: int = 0, *, length: int | None = None) -> Path:
    write(path)
    write_file(path / SINGLE, raw, data, length=length)
    return path


@pytest.mark.parametrize("length", [CAP + 1, 2**31, 2**63 - 9, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_any_file(tmp_path: Path, length: int) -> None:
    outcome = run("inspect", folder_of(tmp_path / "a", b"{}", length=length), seconds=5, megabytes=150)
    assert outcome.code == 2
    assert f"{SINGLE}: names a header of {length:,} bytes" in outcome.err
    outcome.check_terminal()


# What 100 MB of header hold: a name of astral letters takes four bytes each as text, and again as a name.
LARGE = {
    "bytes": (b"\xff" * CAP, "is not UTF-8 (byte 0)", 300),
    "brackets": (b"[" * CAP, "holds about 100,000,000 values", 500),
    "empty lists": (b"[" + b"[]," * (CAP // 3 - 1), "values; the most allowed is 4,000,000", 500),
    "tensors": (b"{" + (ENTRY % 0).encode() * (CAP // len(ENTRY % 0)), "values; the most allowed is 4,000,000", 500),
    "one name": (b'{"' + b"a" * (CAP - 10) + b'":1}', "is not described by a JSON object", 600),
    "one name beyond ASCII": (
        '{"\U0001f600'.encode() + b"a" * (CAP - 20) + b'":1}',
        "is not described by a JSON object",
        1200,
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_hundred_megabytes_of_header(tmp_path: Path, kind: str) -> None:
    raw, message, megabytes = LARGE[kind]
    outcome = run("inspect", folder_of(tmp_path / "a", raw[:CAP]), seconds=20, megabytes=megabytes)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err) < 5000, "long names are cut"
    outcome.check_terminal()


def test_a_sound_header_of_a_hundred_megabytes(tmp_path: Path) -> None:
    document = json.dumps({"a": tensor([2])}).encode()
    outcome = run("inspect", folder_of(tmp_path / "a", document.ljust(CAP), 4), "--json", seconds=20, megabytes=500)
    assert outcome.document()["parameters"] == 2


def test_ten_million_tensors_in_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    entries = ",".join([f'"{i:07d}":"x"' for i in range(100_000)])
    write_json(folder / INDEX, '{"weight_map":{' + (entries + ",") * 41 + entries + "}}")
    outcome = run("inspect", folder, seconds=10, megabytes=300)
    assert outcome.code == 2
    assert f"{INDEX}: holds about 4,2" in outcome.err


@pytest.mark.parametrize("name", [INDEX, "config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("size", [500_000_000, 1 << 40])
def test_a_sparse_document(tmp_path: Path, name: str, size: int) -> None:
    folder = write(tmp_path / "a")
    if name == "hf_quant_config.json":
        write_json(folder / "config.json", {})
    with open(folder / name, "wb") as file:
        file.truncate(size)
    outcome = run("inspect", folder, seconds=5, megabytes=150)
    # A table may break a line within the path, wherever the folder's name is as long as that takes.
    told = "".join((outcome.out + outcome.err).replace("│", " ").split())
    assert f"{name}:holds{size:,}bytes;themostallowedis100,000,000" in told


def test_a_record_of_a_terabyte(tmp_path: Path) -> None:
    folders = three(tmp_path)
    assert run("merge", *inputs(folders), "--out", tmp_path / "out").code == 0
    with open(tmp_path / "out" / "paramdelta.json", "wb") as file:
        file.truncate(1 << 40)
    outcome = run("verify", tmp_path / "out", *inputs(folders), seconds=5, megabytes=150)
    assert outcome.code == 2
    assert "it holds 1,099,511,627,776 bytes" in outcome.err


def test_side_files_larger_than_memory_may_be(tmp_path: Path) -> None:
    folders = three(tmp_path)
    for role in ("post", "new_base"):
        with open(folders[role] / "LICENSE", "wb") as file:
            file.truncate(600_000_000)
    merged = run("merge", *inputs(folders), "--out", tmp_path / "out", seconds=20, megabytes=200)
    assert merged.code == 0
    assert (tmp_path / "out" / "LICENSE").stat().st_size == 600_000_000
    assert not (tmp_path / "out" / "LICENSE.post").exists()
    assert run("verify", tmp_path / "out", *inputs(folders), seconds=20, megabytes=200).code == 0


SHAPES = {
    "overflows": ([2**32, 2**32], 0),
    "overflows behind a zero": ([2**40, 2**40, 0], 0),
    "beyond 63 bits": ([2**62], 2**63),
    "beyond 64 bits": ([2**64], 4),
    "near 2^63": ([2**62 - 1], 2**63 - 2),
    "dimensions": ([1] * 65, 2),
    "a million dimensions": ([1] * 1_000_000, 2),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_shapes_that_cannot_be(tmp_path: Path, kind: str, command: str) -> None:
    shape, end = SHAPES[kind]
    folders = three(tmp_path / "sound")
    bad = write(tmp_path / "bad", {WEIGHT: tensor([4, 4]), "evil": tensor(shape, 32, 32 + end)}, data=32)
    arguments = [str(bad)] if command == "inspect" else inputs(folders | {"post": bad})
    outcome = run(command, *arguments, seconds=10, megabytes=400)
    assert outcome.code == 2
    assert str(bad / SINGLE) in outcome.err
    assert "evil" in outcome.err or "truncated" in outcome.err
    outcome.check_terminal()


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**64 - 1], [2**59, 0], [2**40, 0, 2**20], [0] * 32], ids=str)
def test_huge_sizes_beside_a_zero_are_empty_tensors(tmp_path: Path, shape: list[int]) -> None:
    header = {WEIGHT: tensor([4, 4]), "empty": tensor(shape, 32, 32)}
    folders = {role: write(tmp_path / role, header) for role in ("post", "base", "new_base")}
    merged = run("merge", *inputs(folders), "--out", tmp_path / "out", "--json")
    assert merged.document()["parameters"] == 16
    assert run("verify", tmp_path / "out", *inputs(folders), "--all").code == 0
