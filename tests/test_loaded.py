"""Merges into tensors that are loaded: the bits of the folder that merge writes, complaints before anything is changed,
and what is said when a merge fails on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import paramdelta
from paramdelta import engine, loaded
from paramdelta.errors import InputError, NonFiniteError, OperandTypeError, PartlyMergedError
from paramdelta.loaded_tensors import read_model
from paramdelta.plan import make_request

Arrays = dict[str, np.ndarray[Any, Any]]
SHAPES = {"a": (300, 1001), "b": (3,), "c": (), "d": (0, 4), "e": (64, 64)}
ROLES = ("post", "base", "new_base")


def write(folder: Path, arrays: Arrays) -> None:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def made(where: Path, dtype: Any = ml_dtypes.bfloat16) -> dict[str, Arrays]:
    """Write three checkpoints, and what a merge makes of them to ``out``; return the arrays by role."""
    rng = np.random.default_rng(0)
    first = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    values = {}
    for role, spread in (("base", 0.0), ("post", 0.05), ("new_base", 0.2)):
        values[role] = {
            **{n: np.asarray(v + spread * rng.normal(size=v.shape)).astype(dtype) for n, v in first.items()},
            "steps": np.arange(5) + len(role),
        }
        write(where / role, values[role])
    paramdelta.merge(**{role: where / role for role in ROLES}, out=where / "out", alpha=0.7)
    values["out"] = load_file(where / "out" / "model.safetensors")
    return values


def copied(arrays: Arrays) -> Arrays:
    return {name: np.array(value) for name, value in arrays.items()}


def same(one: Arrays, other: Arrays) -> None:
    assert {n: v.tobytes() for n, v in one.items()} == {n: v.tobytes() for n, v in other.items()}


@pytest.mark.parametrize("rehearse", [False, True], ids=["", "rehearsed"])
@pytest.mark.parametrize("memory", [None, 1 << 18], ids=["default", "smallest"])
def test_arrays_become_those_of_the_folder(tmp_path: Path, rehearse: bool, memory: int | None) -> None:
    values = made(tmp_path)
    for role in ("new_base", "post"):  # what the model is
        model = copied(values[role])
        named = {r: tmp_path / r for r in ROLES if r != role}
        seen: list[tuple[int, int]] = []
        report = paramdelta.merge_into(
            model, **named, alpha=0.7, memory=memory, threads=2, rehearse=rehearse,
            on_progress=lambda *at, seen=seen: seen.append(at),
        )  # fmt: skip
        same(model, values["out"])
        assert report.tensors == len(model)
        assert seen[-1] == (report.bytes_read, report.bytes_written)
        read = [v.nbytes for r in named for n, v in values[r].items() if n != "steps"]
        copies = values["new_base"]["steps"].nbytes if role == "post" else 0
        assert report.bytes_read == sum(read) + copies, "the model's own tensors are not read"


def test_batches_are_one_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = made(tmp_path, np.float32)
    monkeypatch.setattr(loaded.merge_held, "__kwdefaults__", {**loaded.merge_held.__kwdefaults__, "batch_bytes": 1})
    model = copied(values["new_base"])
    model["a"][0, 0] = np.inf
    with pytest.raises(NonFiniteError, match="the model holds them") as caught:
        paramdelta.merge_into(model, post=tmp_path / "post", base=tmp_path / "base", alpha=0.7)
    assert [(n.tensor, n.inf) for n in caught.value.report.nonfinite] == [("a", 1)]
    model["a"][0, 0] = values["out"]["a"][0, 0]
    same(model, values["out"])


def test_a_rehearsal_finds_what_is_not_finite(tmp_path: Path) -> None:
    values = made(tmp_path, np.float16)
    model = copied(values["new_base"])
    model["b"][1] = np.inf
    before = copied(model)
    folders = {role: tmp_path / role for role in ("post", "base")}
    with pytest.raises(NonFiniteError, match="nothing was changed"):
        paramdelta.merge_into(model, **folders, rehearse=True)
    same(model, before)
    report = paramdelta.merge_into(model, **folders, rehearse=True, allow_nonfinite=True)
    assert [n.tensor for n in report.nonfinite] == ["b"]
    assert model["a"].tobytes() != before["a"].tobytes()


def test_quantised_operands_are_decoded(tmp_path: Path) -> None:
    """post − base in blocks of e4m3 codes: regions, whose other operand and output are the model's."""
    rng = np.random.default_rng(1)
    values = {role: {"x.weight": rng.normal(size=(300, 257)).astype(np.float32)} for role in ROLES}
    for role, arrays in values.items():
        write(tmp_path / role, arrays)
    paramdelta.extract(post=tmp_path / "post", base=tmp_path / "base", out=tmp_path / "delta", dtype="f8")
    paramdelta.apply(new_base=tmp_path / "new_base", deltas=tmp_path / "delta", out=tmp_path / "out")
    model = copied(values["new_base"])
    paramdelta.merge_into(model, delta=tmp_path / "delta", threads=2, memory=1 << 18)
    same(model, load_file(tmp_path / "out" / "model.safetensors"))
    assert (model["x.weight"] != values["new_base"]["x.weight"]).mean() > 0.9


def test_policies_leave_tensors_as_they_are(tmp_path: Path) -> None:
    values = made(tmp_path)
    model = copied(values["new_base"])
    folders = {role: tmp_path / role for role in ("post", "base")}
    report = paramdelta.merge_into(model, **folders, alphas=["0.7", "b=0"], exclude="e")
    expected = {**values["out"], **{name: values["new_base"][name] for name in ("b", "e")}}
    same(model, expected)
    assert report.bytes_written == sum(values["out"][name].nbytes for name in ("a", "c"))
    before = copied(model)
    report = paramdelta.merge_into(model, **folders, alpha=0.0)
    same(model, before)
    assert report.bytes_written == 0


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    values = made(tmp_path)
    model = copied(values["new_base"])
    model["a"] = model["a"].T
    model["b"].flags.writeable = False
    model["e"] = model["e"].astype(ml_dtypes.float8_e4m3fn)
    before = copied(model)
    with pytest.raises(InputError) as caught:
        paramdelta.merge_into(
            model, post=tmp_path / "none", base=tmp_path / "base", dtype="f32", vocab="align", alpha="much"
        )
    text = str(caught.value)
    for part in ("a: is not in row-major", "b: is read-only", "e: holds f8_e4m3", "no such folder", "dtype: says how",
                 "vocab: expected one of error, extend", "--alpha"):  # fmt: skip
        assert part in text, (part, text)
    same(model, before)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a": None}, "a"),
        ({"more": np.zeros(3, np.float32)}, "more"),
        ({"a": np.zeros((300, 1000), ml_dtypes.bfloat16)}, "300"),
        ({"b": np.zeros(3, np.int32)}, "i32"),
    ],
    ids=["missing", "unknown", "shape", "integers"],
)
def test_a_model_that_does_not_fit(tmp_path: Path, change: Arrays, expected: str) -> None:
    values = made(tmp_path)
    model = {n: v for n, v in {**copied(values["new_base"]), **change}.items() if v is not None}
    before = copied(model)
    with pytest.raises(InputError, match=expected):
        paramdelta.merge_into(model, post=tmp_path / "post", base=tmp_path / "base")
    same(model, before)


def test_the_types_of_the_model_are_kept(tmp_path: Path) -> None:
    """Post in binary32 becomes binary32, whatever new_base is stored in; several types would have to change."""
    values = made(tmp_path)
    paramdelta.merge(**{role: tmp_path / role for role in ROLES}, out=tmp_path / "f32", dtype="f32")
    model = {n: v.astype(np.float32) if n != "steps" else v.copy() for n, v in values["post"].items()}
    named = {role: tmp_path / role for role in ("base", "new_base")}
    paramdelta.merge_into(model, **named)
    same(model, load_file(tmp_path / "f32" / "model.safetensors"))
    model["b"] = model["b"].astype(ml_dtypes.bfloat16)
    with pytest.raises(InputError, match=r"a: expected bf16 \[300, 1001\].*has f32"):
        paramdelta.merge_into(model, **named)


@pytest.mark.parametrize("column", ["new_file", "new_offset"])
def test_an_operand_that_lies_elsewhere_in_the_model_is_never_merged(tmp_path: Path, column: str) -> None:
    """Nothing plans such work; it would read what another worker has written."""
    values = made(tmp_path)
    held = read_model(copied(values["new_base"]), None, [])
    request = make_request(post=tmp_path / "post", base=tmp_path / "base", new_base=Path("x"), held="new_base")
    plan = loaded._planned(held, request, "new_base")
    numbers = range(len(plan.names))
    targets = loaded._targets(plan, held, "new_base")
    assert loaded._in_place(plan, numbers, targets) is not None
    spans = plan.work.spans
    at = {plan.names[tensor]: row for row, tensor in enumerate(spans["tensor"].tolist())}
    spans[at["b"]][column] = spans[at["a"]]["new_file"] if column == "new_file" else 2
    with pytest.raises(AssertionError, match="lies elsewhere"):
        loaded._in_place(plan, numbers, targets)


def test_which_operand_the_model_is(tmp_path: Path) -> None:
    for given in (
        {},
        {"post": "x"},
        {"base": "x"},
        {"post": "x", "base": "x", "new_base": "x"},
        {"delta": "x", "base": "y"},
    ):
        with pytest.raises(InputError, match="which one it is cannot be told"):
            paramdelta.merge_into({}, **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alfa'"):
        paramdelta.merge_into({}, post="x", base="x", alfa=1)
    with pytest.raises(OperandTypeError, match="expected a torch"):
        paramdelta.merge_into("model", post="x", base="x")


def test_rows_that_only_the_model_has_stay(tmp_path: Path) -> None:
    """A vocabulary that was padded: vocab="extend" keeps new_base's further rows."""
    rng = np.random.default_rng(3)
    name = "model.embed_tokens.weight"
    values = {r: {name: rng.normal(size=(7 + 3 * (r == "new_base"), 16)).astype(np.float32)} for r in ROLES}
    for role, arrays in values.items():
        write(tmp_path / role, arrays)
    folders = {role: tmp_path / role for role in ("post", "base")}
    model = copied(values["new_base"])
    with pytest.raises(InputError, match=name):
        paramdelta.merge_into(model, **folders)
    paramdelta.merge(**folders, new_base=tmp_path / "new_base", out=tmp_path / "out", vocab="extend")
    paramdelta.merge_into(model, **folders, vocab="extend")
    same(model, load_file(tmp_path / "out" / "model.safetensors"))
    assert model[name][7:].tobytes() == values["new_base"][name][7:].tobytes()


def test_memory_that_is_shared() -> None:
    whole = np.zeros((4, 6), np.float32)
    wrong: list[Any] = []
    tied = read_model({"embed_tokens.weight": whole, "lm_head.weight": whole}, None, wrong)
    assert [t.names for t in tied.tensors] == [("embed_tokens.weight", "lm_head.weight")]
    assert not wrong
    read_model({"x": whole, "y": whole[1:]}, None, wrong)
    assert "y: shares a part of its memory with x" in str(wrong[-1])
    read_model({"x": whole, "y": whole.reshape(-1)}, None, wrong)
    assert "shares the memory of x, in another shape" in str(wrong[-1])


def test_a_failure_on_the_way_says_what_is_left(tmp_path: Path) -> None:
    """A folder that is cut short after planning: tensors before the cut are merged, those behind it are not."""
    names = [f"t{i}" for i in range(6)]
    rng = np.random.default_rng(2)
    values = {role: {n: rng.normal(size=(64, 1024)).astype(np.float32) for n in names} for role in ROLES}
    for role, arrays in values.items():
        write(tmp_path / role, arrays)
    model = copied(values["new_base"])
    held = read_model(model, None, [])
    folders = {"post": tmp_path / "post", "base": tmp_path / "base"}
    request = make_request(**folders, new_base=Path("x"), held="new_base")
    one = values["post"]["t0"].nbytes
    chosen: Any = {"role": "new_base", "options": {"cpu": engine.EngineOptions(threads=1)}, "batch_bytes": one}

    def stop(_: int, written: int) -> None:
        raise KeyboardInterrupt

    before = copied(model)
    with pytest.raises(KeyboardInterrupt, match="0 tensors are merged, 1 may be in part, 5 are as they were"):
        loaded.merge_held(held, request, **chosen, on_progress=stop)
    for name, value in before.items():
        model[name][:] = value

    def cut_short(_: int, written: int) -> None:
        if written == 3 * one:
            with open(folders["base"] / "model.safetensors", "r+b") as file:
                file.truncate(1000)

    with pytest.raises(PartlyMergedError, match="changed in part: 2 tensors are merged, 1 may be") as caught:
        loaded.merge_held(held, request, **chosen, on_progress=cut_short)
    assert caught.value.done == tuple(names[:2])
    assert caught.value.in_part == ("t2",)
    assert caught.value.untouched == tuple(names[3:])
    assert isinstance(caught.value.__cause__, OSError)
    for name in names[:3]:
        assert model[name].tobytes() != values["new_base"][name].tobytes()
    for name in names[3:]:
        assert model[name].tobytes() == values["new_base"][name].tobytes()
