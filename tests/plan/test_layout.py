"""Where bytes go: files, headers, index and spans, whatever the inputs' shards are; the same request,
the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_folders import carry_out, expected, llama, plan, same, three, values, write

from paramdelta.checkpoint.header import format_header
from paramdelta.dtypes import BF16
from paramdelta.plan import MergeRequest, make_plan, open_all


def index_of(made: object) -> dict[str, dict[str, object]]:
    return json.loads(made.index)  # type: ignore[attr-defined, no-any-return]


def test_names_order_and_metadata_are_new_base_s(tmp_path: Path) -> None:
    folders = three(tmp_path, llama(1), llama(2), llama(3), shards=3, metadata={"note": "kept", "total_parameters": 1})
    made = plan(folders)
    source = open_all(made.request)[2]
    assert made.names == source.tensors.names
    assert [name for name, _ in made.work.outputs] == [f.name for f in source.files]
    metadata = index_of(made)["metadata"]
    assert metadata["note"] == "kept"
    assert metadata["total_size"] == sum(t.nbytes for t in llama(3).values())
    assert metadata["total_parameters"] == sum(t.size for t in llama(3).values()) == made.parameters


def test_index_is_written_as_transformers_does(tmp_path: Path) -> None:
    made = plan(three(tmp_path, llama(1), llama(2), llama(3), shards=2))
    assert made.index is not None
    text = made.index.decode()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert "lm_head.weight" in index_of(made)["weight_map"]


def test_single_file_has_no_index(tmp_path: Path) -> None:
    made = plan(three(tmp_path, llama(1), llama(2), llama(3)))
    assert made.index is None
    assert [name for name, _ in made.work.outputs] == ["model.safetensors"]


@pytest.mark.parametrize("limit", [1, 40, 64, 100, 1000])
def test_max_shard_size(tmp_path: Path, limit: int) -> None:
    post, base, new = llama(1), llama(2), llama(3)
    made = plan(three(tmp_path, post, base, new, shards=2), max_shard_size=limit)
    merged = carry_out(made, tmp_path / "out")
    assert all(same(merged[n], expected(post[n], base[n], new[n])) for n in new)
    count = len(made.work.outputs)
    names = [name for name, _ in made.work.outputs]
    if count == 1:
        assert names == ["model.safetensors"]
        assert made.index is None
    else:
        assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i in range(count):
        sizes = [made.nbytes_of(t) for t in np.flatnonzero(made.out_files == i)]
        assert sum(sizes) <= limit or len(sizes) == 1


def test_a_shard_may_be_full_to_the_byte(tmp_path: Path) -> None:
    tensors = [{f"t{i}": values((4,), seed + i) for i in range(4)} for seed in (1, 2, 3)]  # 8 bytes each
    made = plan(three(tmp_path, *tensors), max_shard_size=16)
    assert np.bincount(made.out_files).tolist() == [2, 2]


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = [llama(i) | {"empty": values((0, 3), i), "scalar": values((), i)} for i in (1, 2, 3)]
    made = plan(three(tmp_path, *tensors))
    merged = carry_out(made, tmp_path / "out")
    assert merged["empty"].shape == (0, 3)
    assert same(merged["scalar"], expected(*(t["scalar"] for t in tensors)))
    assert (made.work.spans["count"] > 0).all()


def test_names_of_post_alone_go_behind_the_last_tensor(tmp_path: Path) -> None:
    post = llama(1) | {"extra.weight": values((2, 2), 9)}
    made = plan(three(tmp_path, post, llama(2), llama(3), shards=2), copy_from="post")
    merged = carry_out(made, tmp_path / "out")
    assert made.names[-1] == "extra.weight"
    assert same(merged["extra.weight"], post["extra.weight"])


def test_bytes_read_and_written(tmp_path: Path) -> None:
    post, base, new = llama(1, dtype=np.float32), llama(2), llama(3)
    made = plan(three(tmp_path, post, base, new), alphas=["*norm*=0"])
    size = sum(t.nbytes for t in new.values())
    norm = new["model.norm.weight"].nbytes
    assert made.bytes_written == size
    assert made.bytes_read == size + 3 * (size - norm)


def test_same_request_same_bytes(tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}", "LICENSE": "terms"}
    results = []
    for where in ("here", "there"):
        folders = three(tmp_path / where, llama(1), llama(2), llama(3), shards=2, files=files)
        made = plan(folders, out=tmp_path / f"{where}-out", max_shard_size="100B")
        carry_out(made, tmp_path / f"{where}-out")
        results.append({p.name: p.read_bytes() for p in sorted((tmp_path / f"{where}-out").iterdir())})
    assert results[0] == results[1]


def test_description_is_json(tmp_path: Path) -> None:
    description = plan(three(tmp_path, llama(1), llama(2), llama(3)), out=tmp_path / "out").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["tensors"] == 7
    assert not (tmp_path / "out").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.tuples(*[st.integers(1, 6)] * 3),
    shards=st.tuples(*[st.integers(1, 3)] * 3),
    limit=st.none() | st.integers(1, 200),
    dtype=st.sampled_from([None, "bf16", "f32", "f64"]),
    alpha=st.sampled_from([0.0, 1.0, 0.5, -2.0]),
)
def test_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    rows: tuple[int, int, int],
    shards: tuple[int, int, int],
    limit: int | None,
    dtype: str | None,
    alpha: float,
) -> None:
    root = tmp_path_factory.mktemp("layout")
    tensors = [llama(i, vocab=v, layers=1) for i, v in enumerate(rows)]
    folders = {
        role: write(root / role, t, shards=s)
        for role, t, s in zip(("post", "base", "new_base"), tensors, shards, strict=True)
    }
    made = plan(folders, vocab="extend", max_shard_size=limit, dtype=dtype, alpha=alpha)
    merged = carry_out(made, root / "out")
    out = np.dtype(dtype.replace("f", "float")) if dtype in ("f32", "f64") else tensors[2]["lm_head.weight"].dtype
    for name, new in tensors[2].items():
        post, base = tensors[0][name], tensors[1][name]
        height = max(len(post), len(new))
        p, b, n = (np.resize(np.zeros(1, t.dtype), (height, *t.shape[1:])) for t in (post, base, new))
        for padded, given_rows in ((p, post), (b, base), (n, new)):
            padded[: len(given_rows)] = given_rows[:height]
        want = expected(p, b, n.astype(out), alpha)
        want[len(post) :] = n[len(post) :]
        assert same(merged[name], want), name


def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    per_file, files = 2500, 40
    folders = {}
    for role in ("post", "base", "new_base"):
        folder = tmp_path / role
        folder.mkdir()
        weight_map = {}
        for number in range(files):
            names = [f"model.layers.{number * per_file + i}.weight" for i in range(per_file)]
            header, _ = format_header(names, [BF16] * per_file, [(64,)] * per_file, {})
            file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            with open(folder / file, "wb") as stream:
                stream.write(header)
                stream.truncate(len(header) + per_file * 128)  # holes: no disk is used
            weight_map |= dict.fromkeys(names, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text("{}")
        folders[role] = folder
    request = MergeRequest.build(**folders)
    made = make_plan(request, *open_all(request))
    spans = made.work.spans
    assert len(made.names) == len(spans) == len(made.work.terms) == per_file * files
    assert (np.diff(spans["out_offset"])[np.diff(spans["out_file"]) == 0] == 128).all()
    assert (spans["tensor"] == np.arange(len(spans))).all()
