"""What int4 weights say of their shape is held against what their packed codes have."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from quantised_folders import Tensors, folder_of

from paramdelta.checkpoint import open_checkpoint, packed, recognise

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True},
            "format": "pack-quantized",
        }
    },
}


def int4(name: str, rows: int = 16, words: int = 8, dtype: str = "I64", sizes: int = 2) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (rows, words)),
        f"{name}.weight_scale": ("BF16", (rows, 1)),
        f"{name}.weight_shape": (dtype, (sizes,)),
    }


def say(folder: Path, name: str, *sizes: int, code: str = "q") -> None:
    opened = open_checkpoint(folder, role="post")
    spec = opened.tensors.spec(f"{name}.weight_shape")
    with open(opened.files[spec.file].path, "r+b") as file:
        file.seek(spec.offset)
        file.write(struct.pack(f"<{len(sizes)}{code}", *sizes))


def complaints_of(folder: Path) -> list[Any]:
    return recognise(open_checkpoint(folder, role="post"))[1]


def test_the_shape_of_the_codes_is_fine(tmp_path: Path) -> None:
    folder_of(tmp_path, {**int4("a"), **int4("b", dtype="I32")}, CONFIG)
    assert complaints_of(tmp_path) == []


@pytest.mark.parametrize(("dtype", "code"), [("I64", "q"), ("I32", "i")])
@pytest.mark.parametrize("columns", [57, 61, 63])
def test_padded_rows_are_refused(tmp_path: Path, columns: int, dtype: str, code: str) -> None:
    folder_of(tmp_path, {**int4("a"), **int4("b", dtype=dtype)}, CONFIG)
    say(tmp_path, "b", 16, columns, code=code)
    (complaint,) = complaints_of(tmp_path)
    assert complaint.subject.endswith("model.safetensors: b.weight_shape")
    assert f"says that the weight is [16, {columns}], but b.weight_packed holds [16, 64]" in complaint.problem
    assert "padding" in complaint.problem
    assert "dequantise" in complaint.remedy


@pytest.mark.parametrize("said", [(64, 16), (16, 56), (16, 65), (15, 61), (0, 0), (-16, 64), (16, 2**62)], ids=str)
def test_other_shapes_are_refused(tmp_path: Path, said: tuple[int, int]) -> None:
    folder_of(tmp_path, int4("a"), CONFIG)
    say(tmp_path, "a", *said)
    (complaint,) = complaints_of(tmp_path)
    assert f"is {list(said)}" in complaint.problem
    assert "padding" not in complaint.problem


@pytest.mark.parametrize(("dtype", "sizes"), [("F32", 2), ("I64", 1), ("I64", 4), ("U8", 2)])
def test_what_has_another_form_says_nothing(tmp_path: Path, dtype: str, sizes: int) -> None:
    folder_of(tmp_path, {**int4("a", dtype=dtype, sizes=sizes)}, CONFIG)
    assert [c for c in complaints_of(tmp_path) if "says that" in c.problem] == []


def test_of_very_many_one_of_each_kind_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_READ", 3)
    many = {k: v for n in range(6) for k, v in int4(f"a{n}").items()}
    folder_of(tmp_path, {**many, **int4("z", rows=24)}, CONFIG)
    for name in ("a1", "a5", "z"):
        say(tmp_path, name, 8, 8)
    assert sorted(c.subject.rpartition(" ")[2] for c in complaints_of(tmp_path)) == [
        "a1.weight_shape",
        "z.weight_shape",
    ]
    monkeypatch.undo()
    assert len(complaints_of(tmp_path)) == 3


def test_every_weight_is_in_the_complaints_together(tmp_path: Path) -> None:
    folder_of(tmp_path, {k: v for n in range(4) for k, v in int4(f"a{n}").items()}, CONFIG, shards=2)
    for n in range(3):
        say(tmp_path, f"a{n}", 16, 60 + n)
    assert len(complaints_of(tmp_path)) == 3
