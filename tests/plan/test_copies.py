"""What is carried over as it is: tensors without arithmetic, metadata, the order of data; and an index like the one
that transformers writes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_folders import carry_out, expected, llama, plan, same, three, values, write

from paramdelta.dtypes import BY_SAFETENSORS

Stored = dict[str, tuple[str, list[int], bytes]]


def write_raw(folder: Path, tensors: Stored, metadata: dict[str, str] | None = None) -> Path:
    """Write one file whose tensors lie in the given order, of types that NumPy need not have."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        assert len(content) * 8 == int(np.prod(shape)) * BY_SAFETENSORS[dtype].bits
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text("{}")
    return folder


def read_raw(path: Path) -> tuple[Stored, dict[str, str]]:
    """Read a file without any library; tensors in the order of their data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    data = content[8 + length :]
    rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {n: (r["dtype"], r["shape"], data[slice(*r["data_offsets"])]) for n, r in rows}, metadata


def test_every_type_without_arithmetic(tmp_path: Path) -> None:
    """Left alone, each keeps its bits, whole bytes or not; elements are counted by their true width."""
    rng = np.random.default_rng(1)
    tensors: Stored = {
        f"t.{name}": (name, [2, 4], rng.bytes(dtype.bits)) for name, dtype in BY_SAFETENSORS.items() if not dtype.merges
    }
    folders = {role: write_raw(tmp_path / role, tensors) for role in ("post", "base", "new_base")}
    made = plan(folders, exclude="t.*")
    (tmp_path / "again").mkdir()
    carried = carry_raw(made, tmp_path / "again")
    assert carried == tensors
    assert made.parameters == 8 * len(tensors)
    assert made.bytes_read == made.bytes_written == sum(len(t[2]) for t in tensors.values())


def carry_raw(made: Any, folder: Path) -> Stored:
    """Carry out a plan of copies and read it without the library, which lacks NumPy types for some."""
    for number, ((name, size), header) in enumerate(zip(made.work.outputs, made.work.headers, strict=True)):
        data = bytearray(header)
        for span in made.work.spans[made.work.spans["out_file"] == number]:
            assert span["out_offset"] == len(data)
            assert span["n_terms"] == 0
            with open(made.work.inputs[span["new_file"]], "rb") as stream:
                stream.seek(int(span["new_offset"]))
                data += stream.read(int(span["count"]))  # a copy counts bytes
        assert len(data) == size
        (folder / name).write_bytes(data)
    return read_raw(folder / made.work.outputs[0][0])[0]


def test_packed_fours_from_post(tmp_path: Path) -> None:
    """What only post has keeps its type and bits too."""
    packed: Stored = {"f": ("F4", [3, 6], bytes(range(9)))}
    weight: Stored = {"w": ("BF16", [4], bytes(8))}
    folders = {
        "post": write_raw(tmp_path / "post", weight | packed),
        "base": write_raw(tmp_path / "base", weight),
        "new_base": write_raw(tmp_path / "new_base", weight),
    }
    made = plan(folders, copy_from="post", alpha=0)
    (tmp_path / "out").mkdir()
    assert carry_raw(made, tmp_path / "out") == weight | packed
    assert made.parameters == 4 + 18


def test_the_order_of_the_data_is_new_base_s(tmp_path: Path) -> None:
    names = ["z", "a", "m.10", "m.9"]  # neither sorted nor by type
    folders = {}
    for i, role in enumerate(("post", "base", "new_base")):
        order = names if role == "new_base" else sorted(names)
        tensors: Stored = {n: ("BF16", [3], values((3,), i).tobytes()) for n in order}
        folders[role] = write_raw(tmp_path / role, tensors, {"format": "pt", "made": role})
    made = plan(folders)
    merged = carry_out(made, tmp_path / "out")
    stored, metadata = read_raw(tmp_path / "out" / "model.safetensors")
    assert list(stored) == made.names == names
    assert metadata == {"format": "pt", "made": "new_base"}
    assert all(same(merged[n], expected(*(values((3,), i) for i in range(3)))) for n in names)


def test_metadata_survives_new_shards(tmp_path: Path) -> None:
    tensors: Stored = {n: ("BF16", [3], bytes(6)) for n in "abc"}
    folders = {r: write_raw(tmp_path / r, tensors, {"made": r}) for r in ("post", "base", "new_base")}
    made = plan(folders, max_shard_size=6)
    carry_out(made, tmp_path / "out")
    for name, _ in made.work.outputs:
        assert read_raw(tmp_path / "out" / name)[1] == {"format": "pt", "made": "new_base"}


@pytest.mark.parametrize(
    ("sizes", "limit", "files"),
    [
        ([4, 50, 4], 10, [0, 1, 2]),  # a larger tensor is alone, wherever it comes
        ([50, 4, 4], 10, [0, 1, 1]),
        ([4, 4, 50], 10, [0, 0, 1]),
        ([50, 60], 10, [0, 1]),
        ([6, 6, 4, 4], 10, [0, 1, 1, 2]),
        ([2, 0, 2], 4, [0, 0, 0]),
    ],
)
def test_shards_are_filled_in_order(tmp_path: Path, sizes: list[int], limit: int, files: list[int]) -> None:
    tensors: Stored = {f"t{i}": ("BF16", [n // 2], bytes(n)) for i, n in enumerate(sizes)}
    folders = {role: write_raw(tmp_path / role, tensors) for role in ("post", "base", "new_base")}
    made = plan(folders, max_shard_size=limit)
    assert made.out_files.tolist() == files
    carry_out(made, tmp_path / "out")


def test_sharded_input_into_one_file(tmp_path: Path) -> None:
    tensors = [llama(i) for i in range(3)]
    made = plan(three(tmp_path, *tensors, shards=3), max_shard_size="1GB")
    assert [name for name, _ in made.work.outputs] == ["model.safetensors"]
    assert made.index is None
    merged = carry_out(made, tmp_path / "out")
    assert all(same(merged[n], expected(*(t[n] for t in tensors))) for n in merged)


def test_a_single_file_of_another_name_gets_an_index(tmp_path: Path) -> None:
    """Loaders find model.safetensors by its name and everything else by an index."""
    folders = three(tmp_path, llama(1), llama(2), llama(3))
    (folders["new_base"] / "model.safetensors").rename(folders["new_base"] / "weights.safetensors")
    made = plan(folders)
    assert made.index is not None
    assert set(json.loads(made.index)["weight_map"].values()) == {"weights.safetensors"}
    carry_out(made, tmp_path / "out")


def test_index_of_transformers(tmp_path: Path) -> None:
    """Merging a model that transformers sharded gives the index that transformers wrote, byte for byte."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to("cpu")
    model.save_pretrained(tmp_path / "model", max_shard_size="6KB")
    written = (tmp_path / "model" / "model.safetensors.index.json").read_bytes()
    folders = dict.fromkeys(("post", "base", "new_base"), tmp_path / "model")
    made = plan(folders)
    assert len(made.work.outputs) > 2
    assert made.index == written
    config_file = next(f for f in made.side_files if f.name == "config.json")
    assert config_file.data == (tmp_path / "model" / "config.json").read_bytes()
    carry_out(made, tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name


def test_totals_follow_the_output(tmp_path: Path) -> None:
    """Types and tensors differ from new_base's: the totals are the output's, other metadata new_base's."""
    post, base, new = llama(1) | {"more": values((5,), 1)}, llama(2), llama(3)
    metadata = {"total_parameters": 1, "total_size": 2, "who": {"deep": [1]}}
    made = plan(three(tmp_path, post, base, new, shards=2, metadata=metadata), dtype="f32", copy_from="post")
    merged = carry_out(made, tmp_path / "out")
    assert made.index is not None
    assert json.loads(made.index)["metadata"] == {
        "total_parameters": sum(t.size for t in merged.values()),
        "total_size": sum(t.nbytes for t in merged.values()),
        "who": {"deep": [1]},
    }


def test_unknown_totals_are_not_invented(tmp_path: Path) -> None:
    folders = {role: write(tmp_path / role, llama(1), shards=2) for role in ("post", "base", "new_base")}
    index = json.loads(plan(folders).index or b"")
    assert set(index["metadata"]) == {"total_size"}
