"""Plans carried out by the engine, with every policy: the folder a merge writes, the tensors a stream yields and what
``verify`` recomputes must all be what the NumPy evaluation of the plan gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_folders import BF16, Tensors, carry_out, llama, plan, read, three, values
from recorded_sums import check_sums

import paramdelta
from paramdelta.checkpoint.header import format_header
from paramdelta.dtypes import F32
from paramdelta.errors import NonFiniteError, OperandError, PlanError

F8 = ml_dtypes.float8_e4m3fn


def plain() -> tuple[Tensors, Tensors, Tensors]:
    return llama(1), llama(2), llama(3)


def vocabularies(post: int, base: int, new: int) -> tuple[Tensors, Tensors, Tensors]:
    return llama(1, vocab=post), llama(2, vocab=base), llama(3, vocab=new)


def mixed() -> tuple[Tensors, Tensors, Tensors]:
    """Types that differ between the operands, integers, scalars, empty tensors, fp8 without scales."""

    def one(seed: int, dtype: Any) -> Tensors:
        return {
            **llama(seed, dtype=dtype),
            "ids": np.arange(5),
            "mask": np.array([True, False]),
            "scale": values((), seed, dtype),
            "none": values((0, 3), seed, dtype),
            "codes": values((3, 5), seed, F8),
        }

    return one(1, np.float32), one(2, np.float16), one(3, BF16)


def unpaired() -> tuple[Tensors, Tensors, Tensors]:
    post, base, new = plain()
    post["adapter.weight"] = values((3, 3), 9)
    new["new.weight"] = values((2, 2), 8)
    new["model.norm.weight"] = values((5,), 7)
    return post, base, new


def prefixed() -> tuple[Tensors, Tensors, Tensors]:
    return llama(1, prefix="language_model."), llama(2), llama(3)


CASES: dict[str, tuple[tuple[Tensors, Tensors, Tensors], dict[str, Any]]] = {
    "plain": (plain(), {}),
    "alphas": (plain(), {"alpha": {"*": 0.5, "*.mlp.*": -2.0, "lm_head*": 0}}),
    "excluded": (plain(), {"exclude": ["*norm*"], "include": ["model.*"]}),
    "dtype": (plain(), {"dtype": "f32"}),
    "split": (plain(), {"max_shard_size": 100}),
    "mixed": (mixed(), {"allow_unscaled": True}),
    "mixed to f64": (mixed(), {"allow_unscaled": True, "dtype": "f64", "alpha": 0.3}),
    "post grew": (vocabularies(11, 8, 8), {"vocab": "extend"}),
    "new_base grew": (vocabularies(8, 8, 13), {"vocab": "extend", "alpha": 0.5}),
    "all differ": (vocabularies(9, 7, 12), {"vocab": "extend"}),
    "base is largest": (vocabularies(9, 20, 6), {"vocab": "extend", "dtype": "f32"}),
    "from new_base": (unpaired(), {"copy_from": "new-base"}),
    "renamed": (prefixed(), {"rename_post": [(r"language_model\.", "")]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shards", [1, 3])
def test_merge_stream_and_verify_agree(case: str, shards: int, tmp_path: Path) -> None:
    (post, base, new_base), options = CASES[case]
    folders: dict[str, Any] = three(tmp_path, post, base, new_base, shards=shards)
    expected = carry_out(plan(folders, **options), tmp_path / "expected")

    paramdelta.merge(**folders, out=tmp_path / "out", **options, threads=2)
    merged = read(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name in expected:
        assert merged[name].tobytes() == expected[name].tobytes(), name
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name

    check_sums(tmp_path / "out")
    assert paramdelta.verify(tmp_path / "out").problems == ()

    streamed = dict(paramdelta.stream(**folders, **options, batch_bytes=64))
    assert streamed.keys() == expected.keys()
    for name, array in streamed.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        assert array.tobytes() == expected[name].tobytes(), name
        assert array.base is None, f"{name} does not own its memory"

    for everything in (False, True):
        report = paramdelta.verify(tmp_path / "out", **folders, everything=everything)
        assert report.problems == ()
    assert report.fraction == 1.0


def test_verify_notices_each_kind_of_damage(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain(), shards=2)
    out = tmp_path / "out"

    def fresh() -> None:
        paramdelta.merge(**folders, out=out, overwrite=True)

    def problems() -> str:
        return "\n".join(paramdelta.verify(out, **folders).problems)

    fresh()
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "truncated" in problems()
    fresh()
    data = bytearray(shard.read_bytes())
    data[-2] ^= 0x40
    shard.write_bytes(data)
    assert "elements differ" in problems()
    fresh()
    (out / "model.safetensors.index.json").unlink()
    assert problems()
    fresh()
    (out / "README.md").write_text("mine")
    assert "README.md: is not what the sources give" in problems()
    fresh()
    assert problems() == ""


def test_verify_needs_a_merged_folder(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    with pytest.raises(paramdelta.InputError, match=r"paramdelta\.json"):
        paramdelta.verify(tmp_path / "base", **folders)


def test_verify_with_other_sources_fails(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    paramdelta.merge(**folders, out=tmp_path / "out")
    swapped = {**folders, "post": folders["base"], "base": folders["post"]}
    assert paramdelta.verify(tmp_path / "out", **swapped).problems


def infinite() -> tuple[Tensors, Tensors, Tensors]:
    post, base, new = plain()
    post["model.norm.weight"][1] = np.inf
    return post, base, new


def test_a_stream_stops_at_what_is_not_finite(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *infinite())
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight \(0 NaN, 1 Inf, 0 overflow\)"):
        list(paramdelta.stream(**folders))
    streamed = dict(paramdelta.stream(**folders, allow_nonfinite=True))
    assert np.isinf(streamed["model.norm.weight"].astype(np.float32)).sum() == 1


def test_a_merge_that_is_not_finite_carries_its_report(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *infinite())
    with pytest.raises(NonFiniteError, match="--allow-nonfinite") as caught:
        paramdelta.merge(**folders, out=tmp_path / "out")
    (row,) = caught.value.report.nonfinite
    assert (row.tensor, row.nan, row.inf, row.overflow) == ("model.norm.weight", 0, 1, 0)
    assert caught.value.report.out is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "new_base", "post"]


def test_a_stream_that_is_dropped_stops_its_workers(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    stream = paramdelta.stream(**folders, batch_bytes=1)
    next(stream)
    stream.close()


def test_a_stream_complains_before_it_yields(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    with pytest.raises(OperandError, match="framework"):
        paramdelta.stream(**folders, framework="jax")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="matches no tensor"):
        paramdelta.stream(**folders, exclude="nothing*")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    seen: list[tuple[int, int]] = []
    report = paramdelta.merge(**folders, out=tmp_path / "out", on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (report.bytes_read, report.bytes_written)
    assert report.bytes_read == 3 * report.bytes_written


def test_too_little_space_is_an_error_before_writing(tmp_path: Path) -> None:
    """A sparse file of eight terabytes is three checkpoints that no disk here has room to merge."""
    shape = (1 << 41,)
    header, _ = format_header(["w"], [F32], [shape], {})
    folder = tmp_path / "huge"
    folder.mkdir()
    with open(folder / "model.safetensors", "xb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * shape[0])
    with pytest.raises(paramdelta.StorageError, match=r"needs 8,796,\d\d\d,\d\d\d,\d\d\d bytes, but only"):
        paramdelta.merge(post=folder, base=folder, new_base=folder, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]


def test_an_input_that_is_linked_into_the_output_is_never_replaced(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    out = tmp_path / "out"
    paramdelta.merge(**folders, out=out)
    (folders["post"] / "model.safetensors").unlink()
    (folders["post"] / "model.safetensors").symlink_to(out / "model.safetensors")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(PlanError, match=r"post/model\.safetensors: really lies in the output folder"):
        paramdelta.merge(**folders, out=out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_copy_never_takes_the_name_of_another_tensor(tmp_path: Path) -> None:
    post, base, new = plain()
    new["old.weight"] = values((2, 2), 5)
    post["old.weight"], post["fresh.weight"] = values((2, 2), 6), values((2, 2), 7)
    base["fresh.weight"] = values((2, 2), 8)
    folders: dict[str, Any] = three(tmp_path, post, base, new)
    with pytest.raises(PlanError, match="would take the name of another tensor") as caught:
        plan(folders, rename_new_base=[("^old", "fresh")], copy_from="post")
    assert "old.weight" in str(caught.value)


def test_folders_that_are_left_out_are_listed(tmp_path: Path) -> None:
    folders: dict[str, Any] = three(tmp_path, *plain())
    (folders["post"] / "additional_chat_templates").mkdir()
    assert "additional_chat_templates/" in plan(folders).policies["files_left_out"]
