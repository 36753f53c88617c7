"""Lossless deltas: applied to any base they give the bytes of the merge, and from their own base they make post again,
byte for byte, with −0, NaN payloads, integers and quantised planes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rank_folders import SEGMENT, digests, write
from safetensors import safe_open
from safetensors.numpy import save_file

import paramdelta
from paramdelta import deltas, gathering, merging, publish
from paramdelta.errors import InputError, StorageError
from paramdelta.plan import lossless
from paramdelta.plan.lossless import POSITIONS, REBUILD, WHOLE
from paramdelta.ranks import Rank

BF16 = ml_dtypes.bfloat16
Folders = dict[str, Path]
MADE = {"README.md", "paramdelta.json"}


def checkpoint(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """Write a checkpoint of one file with its own metadata, and a tokenizer beside it."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": folder.name})
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": "bfloat16", **config}))
    (folder / "tokenizer.json").write_text(folder.name)
    return folder


@pytest.fixture
def odd(tmp_path: Path) -> Folders:
    """Three checkpoints with values that arithmetic does not give back."""
    rng = np.random.default_rng(8)
    draws = {role: rng.standard_normal((64, 64)).astype(np.float32) for role in ("post", "base", "new_base")}
    folders = {}
    for role, values in draws.items():
        near = (draws["base"] + values * 2.0**-7).astype(BF16)  # differences that f32 holds
        near.view(np.uint16)[0] &= 0x7FFF
        wide = (values * 2.0 ** rng.integers(-100, 100, values.shape)).astype(BF16)
        odd = values.astype(BF16)
        if role == "base":
            odd[0, :4] = [0.0, 1.0, np.nan, np.inf]
        if role == "post":
            odd[0, :4].view(np.uint16)[:] = [0x8000, 0x7FA5, 0xFFC1, 0x7F80]  # −0, NaN payloads, and Inf in both
        flipped = np.full((64, 64), -0.0 if role == "post" else 0.0, BF16)
        tensors = {"near.weight": near, "wide.weight": wide, "odd.weight": odd, "zeros.weight": flipped}
        tensors |= {"ids": np.arange(9) + (role == "post"), "scalar": np.array(values[0, 0]), "none": values[:0]}
        tensors["mixed.weight"] = values if role == "base" else values.astype(np.float16)
        folders[role] = checkpoint(tmp_path / role, tensors)
    return folders


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name not in MADE}


def pair_of(folders: Folders) -> Folders:
    return {role: folders[role] for role in ("post", "base")}


@pytest.mark.parametrize("alpha", [1.0, -0.3])
def test_applied_it_is_the_merge(odd: Folders, alpha: float, tmp_path: Path) -> None:
    options = {"alpha": alpha, "allow_nonfinite": True}
    report = paramdelta.extract(**pair_of(odd), out=tmp_path / "d", lossless=True, allow_nonfinite=True)
    kept = report.policies["lossless"]
    assert kept["f32"] > 0
    assert kept["f64"] > 0
    for name in ("new_base", "base", "post"):
        paramdelta.apply(new_base=odd[name], deltas=tmp_path / "d", out=tmp_path / f"a_{name}", **options)
        paramdelta.merge(**pair_of(odd), new_base=odd[name], out=tmp_path / f"m_{name}", **options)
        assert weights(tmp_path / f"a_{name}") == weights(tmp_path / f"m_{name}")


def test_post_is_made_again(odd: Folders, tmp_path: Path) -> None:
    """Whole files: tensors, headers and configs."""
    report = paramdelta.extract(**pair_of(odd), out=tmp_path / "d", lossless=True, allow_nonfinite=True)
    with safe_open(tmp_path / "d" / REBUILD, "np") as kept:
        names = set(kept.keys())
        assert kept.get_tensor(f"{POSITIONS}odd.weight").tolist() == [0, 1, 2]
    whole = {"ids", "none", "zeros.weight", "wide.weight"}
    assert {n for n in names if n.startswith(WHOLE)} == {WHOLE + name for name in whole}
    assert {n for n in names if n.startswith(POSITIONS)} == {f"{POSITIONS}odd.weight"}
    told = report.policies["lossless"]
    kinds = [tensor["dtype"] for tensor in headers_of(tmp_path / "d" / "model.safetensors").values()]
    assert (told["f32"], told["f64"]) == (kinds.count("F32"), kinds.count("F64"))
    assert told["single_elements"] == 3
    assert told["whole"] == len(whole)
    again = paramdelta.apply(
        new_base=odd["base"], deltas=tmp_path / "d", out=tmp_path / "again", rebuild=True, allow_nonfinite=True
    )
    assert weights(tmp_path / "again") == weights(odd["post"])
    assert again.policies["rebuilt"]["tensors"] == 8
    assert paramdelta.verify(tmp_path / "again").problems == ()
    sources = {"delta": tmp_path / "d", "new_base": odd["base"]}
    with pytest.raises(InputError, match="verify it without its sources"):
        paramdelta.verify(tmp_path / "again", **sources)
    assert paramdelta.verify(tmp_path / "d").problems == ()
    assert paramdelta.verify(tmp_path / "d", **pair_of(odd), everything=True).problems == ()


def test_how_much_is_looked_at_once_leaves_no_trace(
    odd: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lossless": True, "allow_nonfinite": True}
    whole = paramdelta.extract(**pair_of(odd), out=tmp_path / "whole", **options)
    monkeypatch.setattr(lossless, "_CHUNK", 1000)
    parts = paramdelta.extract(**pair_of(odd), out=tmp_path / "parts", **options)
    assert digests(tmp_path / "parts")[REBUILD] == digests(tmp_path / "whole")[REBUILD]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert parts.policies["lossless"] == whole.policies["lossless"]


@pytest.mark.parametrize(
    "positions", [[-1, 0, 1], [1, 0, 2], [0, 0, 1], [0, 1, 4096]], ids=["below", "falling", "twice", "beyond"]
)
def test_positions_that_cannot_be_are_refused(odd: Folders, positions: list[int], tmp_path: Path) -> None:
    """Those of single elements, in a file that somebody changed."""
    out = tmp_path / "d"
    paramdelta.extract(**pair_of(odd), out=out, lossless=True, allow_nonfinite=True)
    kept = (out / REBUILD).read_bytes()
    there = struct.pack("<3q", 0, 1, 2)
    assert kept.count(there) == 1
    (out / REBUILD).write_bytes(kept.replace(there, struct.pack("<3q", *positions)))
    with pytest.raises(InputError, match=r"odd\.weight"):
        paramdelta.apply(new_base=odd["base"], deltas=out, out=tmp_path / "again", rebuild=True, allow_nonfinite=True)
    assert not (tmp_path / "again").exists()


def headers_of(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        found = json.loads(opened.read(length))
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


def test_what_is_kept_beside_the_delta_is_verified(odd: Folders, tmp_path: Path) -> None:
    paramdelta.extract(**pair_of(odd), out=tmp_path / "d", lossless=True, allow_nonfinite=True, checksums=False)
    path = tmp_path / "d" / REBUILD
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    (problem,) = paramdelta.verify(tmp_path / "d", **pair_of(odd)).problems
    assert "manifest is not what the sources give" in problem


def test_shards_quantised_post_and_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An fp8 post over a bf16 base in shards: its planes are kept whole; shared by ranks, the bytes are the same."""
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))
    made = write(tmp_path, rows=128)
    fp8 = tmp_path / "fp8"
    paramdelta.merge(post=made["post"], base=made["base"], new_base=made["base"], out=fp8, format="fp8-block")
    pair = {"post": fp8, "base": made["base"]}
    paramdelta.extract(**pair, out=tmp_path / "d", lossless=True)
    options = {"allow_nonfinite": True}
    paramdelta.apply(new_base=made["new_base"], deltas=tmp_path / "d", out=tmp_path / "a", **options)
    paramdelta.merge(**pair, new_base=made["new_base"], out=tmp_path / "m", **options)
    assert weights(tmp_path / "a") == weights(tmp_path / "m")
    for rank in range(2):
        request = deltas.apply_request(
            new_base=made["base"], deltas=tmp_path / "d", out=tmp_path / "again", rebuild=True
        )
        gathering.merge_part(merging.prepare(request), Rank(number=rank, world=2))
    gathering.finalize(tmp_path / "again")
    publish.kept.clear()
    theirs = {n: d for n, d in digests(fp8).items() if n != "paramdelta.json"}
    assert {n: d for n, d in digests(tmp_path / "again").items() if n != "paramdelta.json"} == theirs


def test_what_is_refused(odd: Folders, tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    paramdelta.extract(**pair_of(odd), out=plain, allow_nonfinite=True)
    paramdelta.extract(**pair_of(odd), out=kept, lossless=True, allow_nonfinite=True)
    again: dict[str, Any] = {"out": tmp_path / "again", "rebuild": True, "allow_nonfinite": True}
    refused = [
        ({"new_base": odd["base"], "deltas": plain}, "it is not lossless"),
        ({"new_base": odd["new_base"], "deltas": kept}, "is not the base that kept was taken from"),
        ({"new_base": odd["base"], "deltas": kept, "alpha": 0.5}, "alphas cannot change it"),
        ({"new_base": odd["base"], "deltas": [kept, kept]}, "leave out --rebuild"),
    ]
    for options, words in refused:
        with pytest.raises(InputError, match=words):
            paramdelta.apply(**options, **again)
    with pytest.raises(InputError, match="a lossless delta is f32 or f64"):
        paramdelta.extract(**pair_of(odd), out=tmp_path / "x", lossless=True, dtype="f32")
    assert not (tmp_path / "again").exists()


def test_damage_is_found_before_anything_is_published(odd: Folders, tmp_path: Path) -> None:
    """A delta whose data has changed does not give post: nothing is published."""
    out = tmp_path / "d"
    paramdelta.extract(**pair_of(odd), out=out, lossless=True, allow_nonfinite=True)
    path = out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length])["near.weight"]
    raw[8 + length + entry["data_offsets"][0] + 803] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=r"near\.weight: base and delta do not give back"):
        paramdelta.apply(new_base=odd["base"], deltas=out, out=tmp_path / "again", rebuild=True, allow_nonfinite=True)
    assert not (tmp_path / "again").exists()
    kept = out / REBUILD
    kept.write_bytes(kept.read_bytes().replace(b'"base": "near.weight"', b'"base": "none.weight"'))
    with pytest.raises(InputError, match="does not fit the delta or its base"):
        paramdelta.apply(new_base=odd["base"], deltas=out, out=tmp_path / "again", rebuild=True)
