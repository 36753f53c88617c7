"""Checkpoint folders: which files count, whom the index is believed, and that nothing odd on disk hangs or escapes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import tensors_bytes, write_json, write_shard

from paramdelta.checkpoint import INDEX, SINGLE, describe, open_checkpoint
from paramdelta.errors import CheckpointError

HUGE = "9" * 5000


def write_index(folder: Path, weight_map: dict[str, str], **metadata: Any) -> None:
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def refusal(folder: Path | str, role: str = "post") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, role=role)
    return caught.value


def stored(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor, read where the table says they lie."""
    checkpoint = open_checkpoint(folder)
    table, found = checkpoint.tensors, {}
    for name in table.names:
        spec = table.spec(name)
        found[name] = checkpoint.files[spec.file].path.read_bytes()[spec.offset :][: spec.nbytes]
    return found


def test_a_single_file(tmp_path: Path) -> None:
    content = tensors_bytes({"a": ("BF16", (2, 3)), "b": ("F32", ())}, {"format": "pt"})
    (tmp_path / SINGLE).write_bytes(content)
    checkpoint = open_checkpoint(str(tmp_path), role="base")
    assert checkpoint.role == "base"
    assert not checkpoint.sharded
    assert (checkpoint.config, checkpoint.index_metadata, checkpoint.notes) == ({}, {}, ())
    (file,) = checkpoint.files
    assert (file.name, file.path, file.size) == (SINGLE, tmp_path / SINGLE, len(content))
    assert file.metadata == {"format": "pt"}
    spec = checkpoint.tensors.spec("a")
    assert (spec.dtype.name, spec.shape, spec.elements, spec.nbytes) == ("bf16", (2, 3), 6, 12)
    assert stored(tmp_path) == {"a": content[-16:-4], "b": content[-4:]}
    assert "c" not in checkpoint.tensors
    with pytest.raises(KeyError):
        checkpoint.tensors.row("c")


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "weights.safetensors", "a")
    write_shard(tmp_path / ".hidden.safetensors", "b")
    assert open_checkpoint(tmp_path).tensors.names == ["a"]


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_shard(tmp_path / "y.safetensors", "b")
    assert f"post has 2 safetensors files but no {INDEX}" in str(refusal(tmp_path))


def test_model_safetensors_counts_among_several(tmp_path: Path) -> None:
    write_shard(tmp_path / SINGLE, "a")
    write_shard(tmp_path / "adapter.safetensors", "b")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.names == ["a"]
    assert "adapter.safetensors" in " ".join(checkpoint.notes)


@pytest.mark.parametrize("names", [("model-00001-of-00002", "model-00002-of-00002"), ("m-00000-of-1", "odd é name")])
def test_an_index(tmp_path: Path, names: tuple[str, str]) -> None:
    one, two = (f"{name}.safetensors" for name in names)
    write_shard(tmp_path / one, "b", "a")
    write_shard(tmp_path / two, c=("F32", (5,)))
    write_index(tmp_path, {"c": two, "a": one, "b": one}, total_size=0, total_parameters=9, extra="kept")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.sharded
    assert checkpoint.tensors.names == ["b", "a", "c"], "in the order of the files and of their data"
    assert [file.name for file in checkpoint.files] == [one, two]
    assert checkpoint.tensors.file.tolist() == [0, 0, 1]
    assert checkpoint.index_metadata == {"total_size": 0, "total_parameters": 9, "extra": "kept"}
    assert checkpoint.notes == ()
    assert stored(tmp_path)["c"] == bytes(range(20))


def test_the_index_decides_between_two_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "base.safetensors", a=("BF16", (2,)), b=("BF16", (2,)))
    write_shard(tmp_path / "overlay.safetensors", a=("F32", (3,)))
    write_index(tmp_path, {"a": "overlay.safetensors", "b": "base.safetensors"})
    table = open_checkpoint(tmp_path).tensors
    assert sorted(table.names) == ["a", "b"]
    assert (table.spec("a").shape, table.spec("b").shape) == ((3,), (2,))
    assert open_checkpoint(tmp_path).files[table.spec("a").file].name == "overlay.safetensors"


def test_a_stale_single_file_beside_an_index(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"junk")
    write_shard(tmp_path / "x.safetensors", "a")
    write_index(tmp_path, {"a": "x.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["x.safetensors"]
    assert SINGLE in " ".join(checkpoint.notes)
    assert SINGLE not in checkpoint.side_files


def test_tensors_the_index_leaves_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a", "extra", "more")
    write_index(tmp_path, {"a": "x.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.names == ["a"]
    assert "2 tensors" in " ".join(checkpoint.notes)


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--Some--Model"
    snapshot, blobs = repository / "snapshots" / ("0123abcd" * 5), repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    write_shard(blobs / "aaaa", "a")
    write_json(blobs / "bbbb", {"tie_word_embeddings": True})
    write_json(blobs / "cccc", {"weight_map": {"a": "model-1.safetensors"}})
    for name, blob in (("model-1.safetensors", "aaaa"), ("config.json", "bbbb"), (INDEX, "cccc")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.label == "org/Some/Model"
    assert checkpoint.tied is True
    assert checkpoint.files[0].path == (blobs / "aaaa").resolve()
    assert stored(snapshot) == {"a": bytes(range(4))}
    assert checkpoint.side_files == ("config.json",)
    (blobs / "aaaa").unlink()
    assert "model-1.safetensors" in str(refusal(snapshot))
    (snapshot / INDEX).unlink()
    (snapshot / "model-1.safetensors").rename(snapshot / SINGLE)
    assert "missing" in str(refusal(snapshot))


def test_the_label_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / SINGLE, "a")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(tmp_path).label == open_checkpoint(".").label == tmp_path.name


PLACES = (
    "../x.safetensors",
    "/etc/passwd",
    "sub/x.safetensors",
    "a\\b.safetensors",
    "..",
    ".",
    "",
    "x\0y",
    5,
    None,
    ["x"],
)


@pytest.mark.parametrize("place", PLACES, ids=repr)
def test_a_shard_lies_in_the_folder(tmp_path: Path, place: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "x.safetensors", folder / "sub" / "x.safetensors", folder / "a\\b.safetensors"):
        write_shard(path, "a")
    write_shard(folder / "good.safetensors", "b")
    write_index(folder, {"a": place, "b": "good.safetensors"})
    error = refusal(folder)
    assert [c.subject for c in error.complaints] == [f"{folder / INDEX}: a"]
    assert "not a plain file name" in str(error)


def test_many_bad_places_are_cut_short(tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{i}": "../x" for i in range(1000)})
    error = refusal(tmp_path)
    assert len(error.complaints) == 21
    assert "980 more" in str(error.complaints[-1])


def test_a_missing_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "z" * 300})
    error = refusal(tmp_path)
    assert [Path(c.subject).name for c in error.complaints] == ["y.safetensors", "z" * 300]
    assert "missing" in error.complaints[0].problem


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_shard(tmp_path / "y.safetensors", "b", "c")
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors", "d": "y.safetensors"})
    subjects = [c.subject for c in refusal(tmp_path).complaints]
    assert subjects == [f"{tmp_path / 'x.safetensors'}: b", f"{tmp_path / 'y.safetensors'}: d"]


def test_many_absent_tensors_are_cut_short(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_index(tmp_path, {f"t{i}": "x.safetensors" for i in range(50)})
    error = refusal(tmp_path)
    assert len(error.complaints) == 21
    assert "30 more" in str(error.complaints[-1])


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", "{")
    (tmp_path / "x.safetensors").write_bytes(b"short")
    (tmp_path / "y.safetensors").write_bytes(tensors_bytes({"a": ("F32", (2,))}) + b"more")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors"})
    named = [Path(c.subject).name for c in refusal(tmp_path).complaints]
    assert named == ["config.json", "x.safetensors", "y.safetensors", "z.safetensors"]


@pytest.mark.parametrize("index", ['{"weight_map": []}', "{}", None], ids=["bad map", "no map", "no weights"])
def test_a_bad_config_hides_no_other_complaint(tmp_path: Path, index: str | None) -> None:
    write_json(tmp_path / "config.json", "[]")
    if index is not None:
        write_json(tmp_path / INDEX, index)
    error = refusal(tmp_path)
    assert len(error.complaints) == 2
    assert error.complaints[0].subject.endswith("config.json")


BAD_JSON: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is not JSON: Expecting value"),
    "cut off": ('{"weight_map": {', "is not JSON"),
    "duplicate key": ('{"weight_map": {"a": "x", "a": "y"}}', "holds the key a twice"),
    "an array": ("[]", "is not a JSON object"),
    "null": ("null", "is not a JSON object"),
    "bad UTF-8": (b'{"\xff": 1}', "is not UTF-8 (byte 2)"),
    "byte order mark": ("\ufeff{}", "BOM"),
    "lone surrogate": ('{"weight_map": {"\\ud800": "x"}}', "lone surrogate"),
    "deep nesting": ('{"a":' * 100_000, "nested too deeply"),
    "deep nesting, closed": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "5000 digits": ('{"weight_map": ' + HUGE + "}", ""),
}


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize(("content", "message"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write_shard(tmp_path / SINGLE, "a")
    write_json(tmp_path / name, content)
    error = refusal(tmp_path)
    assert [c.subject for c in error.complaints] == [str(tmp_path / name)]
    assert message in str(error)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "x"}'])
def test_an_index_without_a_map(tmp_path: Path, content: str) -> None:
    write_shard(tmp_path / SINGLE, "a")
    write_json(tmp_path / INDEX, content)
    assert "has no weight_map object" in str(refusal(tmp_path))


def test_odd_metadata_of_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_json(tmp_path / INDEX, {"metadata": [1], "weight_map": {"a": "x.safetensors"}})
    assert open_checkpoint(tmp_path).index_metadata == {}


OTHER = ("pytorch_model.bin", "consolidated.00.pth", "model.Q4_K_M.gguf", "model.ckpt", "tf_model.h5", "model.onnx")


@pytest.mark.parametrize("name", OTHER)
def test_weights_of_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    error = refusal(tmp_path)
    assert f"holds weights as {name}" in str(error)
    assert "save_pretrained" in error.complaints[0].remedy


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "new_base holds no safetensors file" in str(refusal(tmp_path, role="new_base"))


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(Path("Qwen/Qwen3-8B"))
    assert "post: there is no such folder" in str(error)
    assert error.complaints[0].remedy.startswith("a model on the Hub is named 'Qwen/Qwen3-8B', as text")
    assert refusal(tmp_path / "absent").complaints[0].remedy == ""
    for odd in ("x" * 300, "a\0b"):
        assert len(refusal(tmp_path / odd).complaints) == 1


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = write_shard(tmp_path / SINGLE, "a")
    error = refusal(path)
    assert "post is a file; a checkpoint is a folder" in str(error)
    assert str(tmp_path) in error.complaints[0].remedy


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "dangling"])
def test_what_is_no_file_never_hangs(tmp_path: Path, name: str, kind: str) -> None:
    write_shard(tmp_path / SINGLE, "a")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if kind == "loop" else "nowhere")
    (complaint,) = refusal(tmp_path).complaints
    assert complaint.subject == str(path)


def test_a_loop_of_links_as_the_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in str(refusal(tmp_path / "loop"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", [SINGLE, "config.json", "."])
def test_what_may_not_be_read(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / SINGLE, "a")
    write_json(tmp_path / "config.json", {})
    (tmp_path / name).chmod(0)
    try:
        assert "Permission denied" in str(refusal(tmp_path))
    finally:
        (tmp_path / name).chmod(0o700)


TIES: dict[str, tuple[dict[str, Any], bool | None]] = {
    "nothing said": ({}, None),
    "tied": ({"tie_word_embeddings": True}, True),
    "not tied": ({"tie_word_embeddings": False}, False),
    "nested": ({"text_config": {"tie_word_embeddings": True}}, True),
    "nested, not tied": ({"text_config": {"tie_word_embeddings": False}}, False),
    "outside decides": ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    "not a truth value": ({"tie_word_embeddings": "yes", "text_config": {"tie_word_embeddings": True}}, True),
    "text_config null": ({"text_config": None}, None),
}


@pytest.mark.parametrize(("config", "tied"), TIES.values(), ids=TIES.keys())
def test_tied_embeddings(tmp_path: Path, config: dict[str, Any], tied: bool | None) -> None:
    write_shard(tmp_path / SINGLE, "a")
    write_json(tmp_path / "config.json", config)
    assert open_checkpoint(tmp_path).tied is tied


def test_side_files(tmp_path: Path) -> None:
    write_shard(tmp_path / SINGLE, "a")
    side = ("README.md", "chat_template.jinja", "config.json", "merges.txt", "tokenizer.json", "tokenizer.model")
    for name in side:
        write_json(tmp_path / name, {})
    for name in (
        ".gitattributes",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "x.gguf",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "original").mkdir()
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    assert open_checkpoint(tmp_path).side_files == side


def test_describe_is_json(tmp_path: Path) -> None:
    write_shard(tmp_path / SINGLE, a=("BF16", (2, 3)), b=("F32", ()), c=("F4", (4,)), d=("BF16", (0,)))
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    told = json.loads(json.dumps(describe(open_checkpoint(tmp_path))))
    assert (told["architecture"], told["model_type"], told["kind"]) == ("LlamaForCausalLM", "llama", "checkpoint")
    assert (told["parameters"], told["tensors"], told["bytes"], told["files"]) == (11, 4, 18, 1)
    assert told["dtypes"]["BF16"] == {"tensors": 2, "elements": 6, "bytes": 12}
    assert told["quantised"] is None


@pytest.mark.parametrize("architectures", [5, {"a": 1}, True, [], None], ids=repr)
def test_describe_takes_any_config(tmp_path: Path, architectures: Any) -> None:
    write_shard(tmp_path / SINGLE, "a")
    write_json(tmp_path / "config.json", {"architectures": architectures})
    assert describe(open_checkpoint(tmp_path))["architecture"] is None


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_a_folder_of_transformers(tmp_path: Path, size: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=size)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.sharded == (size == "20KB")
    assert (len(checkpoint.files) > 1) == checkpoint.sharded
    expected = {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()}
    assert stored(tmp_path) == expected
    assert checkpoint.notes == ()
    assert checkpoint.tied is False
