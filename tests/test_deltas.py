"""Deltas as folders: extracting and applying them gives the bytes of the reference, and of the merge they stand for, up
to the one rounding of the delta's own type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rank_folders import SEGMENT, digests, write
from safetensors import deserialize
from safetensors.numpy import save_file

import paramdelta
from paramdelta import deltas, gathering, merging, publish, reference
from paramdelta.dtypes import BF16, BY_NAME, F64, DType
from paramdelta.errors import InputError
from paramdelta.ranks import Rank

ALPHAS = (0.7, -0.25)
Folders = dict[str, Path]
Codes = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Folders]:
    """Two pairs of post and base, and a new_base for both."""
    root = tmp_path_factory.mktemp("sources")
    return [write(root / str(k), seed=k, rows=64) for k in range(2)]


def codes(folder: Path) -> dict[str, tuple[DType, Codes]]:
    """Return the type and the codes of every tensor of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, info in deserialize(path.read_bytes()):
            dtype = next(d for d in BY_NAME.values() if d.safetensors == info["dtype"])
            found[name] = (dtype, np.frombuffer(bytes(info["data"]), f"u{dtype.itemsize}"))
    return found


def arrays(folder: Path) -> dict[str, reference.Array]:
    return {name: reference.Array(code, dtype) for name, (dtype, code) in codes(folder).items()}


def zeros(like: reference.Array) -> reference.Array:
    return reference.Array(np.zeros(len(like.codes), np.uint64), F64)


def differences(post: Path, base: Path, dtype: str) -> dict[str, reference.Array]:
    """Return what the reference makes of post − base, stored as a type."""
    old, made = arrays(base), {}
    for name, new in arrays(post).items():
        term = reference.Term(new, old[name], 1.0)
        made[name] = reference.Array(reference.merge(zeros(new), [term], BY_NAME[dtype]).codes, BY_NAME[dtype])
    return made


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_the_law_of_extracting_and_applying(sources: list[Folders], dtype: str, tmp_path: Path) -> None:
    """Each delta is rounded once to its type, the sum once more: out = encode(new_base + Σ alpha · stored delta)."""
    stored = []
    for k, pair in enumerate(sources):
        paramdelta.extract(post=pair["post"], base=pair["base"], out=tmp_path / f"d{k}", dtype=dtype)
        stored.append(differences(pair["post"], pair["base"], dtype))
        for name, (found, code) in codes(tmp_path / f"d{k}").items():
            assert found.name == dtype
            assert np.array_equal(code, stored[k][name].codes), name
    new_base = sources[0]["new_base"]
    given = [(tmp_path / f"d{k}", alpha) for k, alpha in enumerate(ALPHAS)]
    paramdelta.apply(new_base=new_base, deltas=given, out=tmp_path / "out")
    made = codes(tmp_path / "out")
    for name, start in arrays(new_base).items():
        terms = [reference.Term(d[name], zeros(d[name]), a) for d, a in zip(stored, ALPHAS, strict=True)]
        assert np.array_equal(made[name][1], reference.merge(start, terms, BF16).codes), name


def test_where_f32_holds_the_difference_the_bits_are_those_of_the_merge(sources: list[Folders], tmp_path: Path) -> None:
    """Element by element: bit-equal where binary32 is exact; and some elements, where it is not, do differ."""
    first = sources[0]
    options = {"alpha": 0.7, "dtype": "f64"}
    paramdelta.extract(post=first["post"], base=first["base"], out=tmp_path / "d")
    paramdelta.apply(new_base=first["new_base"], deltas=tmp_path / "d", out=tmp_path / "out", **options)
    paramdelta.merge(**first, out=tmp_path / "merged", **options)
    made, merged = codes(tmp_path / "out"), codes(tmp_path / "merged")
    exactly = differences(first["post"], first["base"], "f64")
    inexact = 0
    for name, exact in exactly.items():
        values = exact.codes.view(np.float64)
        held = values.astype(np.float32) == values
        assert np.array_equal(made[name][1][held], merged[name][1][held]), name
        inexact += int((made[name][1][~held] != merged[name][1][~held]).sum())
    assert inexact > 0  # the two sides of the law


def test_an_f64_delta_is_the_merge(sources: list[Folders], tmp_path: Path) -> None:
    for k, pair in enumerate(sources):
        paramdelta.extract(post=pair["post"], base=pair["base"], out=tmp_path / f"d{k}", dtype="f64")
    new_base, rules = sources[0]["new_base"], {"alpha": list(ALPHAS), "alphas": ["2:*norm*=3"]}
    pairs = {role: [pair[role] for pair in sources] for role in ("post", "base")}
    paramdelta.merge(**pairs, new_base=new_base, out=tmp_path / "merged", **rules)
    given = {str(tmp_path / f"d{k}"): alpha for k, alpha in enumerate(ALPHAS)}
    paramdelta.apply(new_base=new_base, deltas=given, out=tmp_path / "out", alphas=rules["alphas"])
    made, merged = digests(tmp_path / "out"), digests(tmp_path / "merged")
    differ = {name for name in made if made[name] != merged.get(name)}
    assert differ <= {"README.md", "paramdelta.json"}
    assert made.keys() == merged.keys()


def test_what_a_delta_says_of_itself(sources: list[Folders], tmp_path: Path) -> None:
    first = sources[0]
    report = paramdelta.extract(post=first["post"], base=first["base"], out=tmp_path / "d")
    assert sorted(codes(tmp_path / "d")) == sorted(codes(first["post"]))
    record = json.loads((tmp_path / "d" / "paramdelta.json").read_text())
    assert (record["kind"], record["formula"], report.files) == ("delta", "post - base", 2)
    assert {len(file["sample_sha256"]) for file in record["inputs"]["base"]["files"]} == {64}
    assert (tmp_path / "d" / "base_config.json").read_bytes() == (first["base"] / "config.json").read_bytes()
    assert "This is no model" in (tmp_path / "d" / "README.md").read_text()
    sources_of = {"post": first["post"], "base": first["base"]}
    assert paramdelta.verify(tmp_path / "d").problems == ()
    report = paramdelta.verify(tmp_path / "d", **sources_of, everything=True)
    assert (report.problems, report.fraction) == ((), 1.0)
    paramdelta.extract(**sources_of, out=tmp_path / "changed", checksums=False)
    path = sorted((tmp_path / "changed").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (problem,) = paramdelta.verify(tmp_path / "changed", **sources_of, everything=True).problems
    assert ": 1 of " in problem
    paramdelta.apply(new_base=first["new_base"], deltas=tmp_path / "d", out=tmp_path / "out")
    against = {"delta": tmp_path / "d", "new_base": first["new_base"]}
    assert paramdelta.verify(tmp_path / "out", **against, everything=True).problems == ()
    with pytest.raises(InputError, match="was made from delta and new_base, and given are post and base"):
        paramdelta.verify(tmp_path / "out", **sources_of)
    own = paramdelta.apply(new_base=first["base"], deltas=tmp_path / "d", out=tmp_path / "own")
    assert any("new_base is the base that the delta was taken from" in line for line in own.warnings)


def test_f8_tells_what_it_loses(sources: list[Folders], tmp_path: Path) -> None:
    first = sources[0]
    report = paramdelta.extract(post=first["post"], base=first["base"], out=tmp_path / "d", dtype="f8")
    (lost,) = report.quantised
    (recorded,) = json.loads((tmp_path / "d" / "paramdelta.json").read_text())["lost"]
    assert recorded["relative_error"] == pytest.approx(lost.relative_error, rel=0.01)
    exact = differences(first["post"], first["base"], "f64")
    stored = codes(tmp_path / "d")
    name = "model.layers.0.mlp.down_proj.weight"
    values = stored[name][1].view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(544, 64)
    scales = stored[f"{name}_scale_inv"][1].view(np.float32).astype(np.float64).reshape(5, 1)
    decoded = values * np.repeat(scales, 128, axis=0)[:544]
    wanted = exact[name].codes.view(np.float64).reshape(544, 64)
    error = np.linalg.norm(decoded - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(dict(lost.worst)[name], rel=1e-3)
    paramdelta.apply(new_base=first["new_base"], deltas=tmp_path / "d", out=tmp_path / "out")
    assert {dtype.name for dtype, _ in codes(tmp_path / "out").values()} == {"bf16"}
    checked = paramdelta.verify(tmp_path / "out", delta=tmp_path / "d", new_base=first["new_base"], everything=True)
    assert checked.problems == ()


def test_what_has_no_difference_is_zeros(tmp_path: Path) -> None:
    """Integers, what is excluded, and what base lacks; rows that base lacks are post's own."""
    rng = np.random.default_rng(3)

    def model(rows: int, **more: Any) -> dict[str, Any]:
        made = {"model.embed_tokens.weight": rng.standard_normal((rows, 8)), "a.weight": rng.standard_normal((4, 8))}
        return {n: t.astype(np.float32) for n, t in made.items()} | {"ids": np.arange(rows)} | more

    extra = {"only.weight": np.ones((2, 2), np.float32)}
    held = {"post": model(6, **extra, ids=np.arange(6) + 1), "base": model(5, ids=np.arange(6)), "new_base": model(5)}
    held["new_base"]["ids"] = np.arange(6)
    for role, tensors in held.items():
        (tmp_path / role).mkdir()
        save_file(tensors, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
    pair = {"post": tmp_path / "post", "base": tmp_path / "base"}
    with pytest.raises(InputError) as refused:
        paramdelta.extract(**pair, out=tmp_path / "d")
    assert "base lacks 1 tensors that post has" in str(refused.value)
    assert "--vocab extend" in str(refused.value)
    options = {"copy_from": "new-base", "vocab": "extend"}
    report = paramdelta.extract(**pair, out=tmp_path / "d", exclude="a.*", **options)
    assert any("integer tensors that post changed" in line for line in report.warnings)
    found = codes(tmp_path / "d")
    assert {n for n, (_, c) in found.items() if not c.any()} == {"ids", "a.weight", "only.weight"}
    last = found["model.embed_tokens.weight"][1].view(np.float32).reshape(6, 8)[5]
    assert np.array_equal(last, held["post"]["model.embed_tokens.weight"][5])
    with pytest.raises(InputError, match="a delta is no weight"):
        paramdelta.apply(new_base=tmp_path / "new_base", deltas=tmp_path / "d", out=tmp_path / "o", copy_from="post")
    paramdelta.apply(new_base=tmp_path / "new_base", deltas=tmp_path / "d", out=tmp_path / "out", **options)
    paramdelta.merge(**pair, new_base=tmp_path / "new_base", out=tmp_path / "merged", exclude="a.*", **options)
    assert paramdelta.verify(tmp_path / "d", **pair, everything=True).problems == ()
    for name, (_, wanted) in codes(tmp_path / "merged").items():
        assert np.array_equal(codes(tmp_path / "out")[name][1], wanted) or name.startswith("model.embed"), name


def test_names_of_another_spelling(tmp_path: Path) -> None:
    """Renames serve pairing alone: a delta has post's own names, and what it is added to new_base's."""
    rng = np.random.default_rng(4)
    prefixes = {"post": "language_model.", "base": "", "new_base": "model."}
    for role, prefix in prefixes.items():
        (tmp_path / role).mkdir()
        tensors = {f"{prefix}{n}.weight": rng.standard_normal((4, 8)).astype(np.float32) for n in "ab"}
        save_file(tensors, tmp_path / role / "model.safetensors")
    pair = {"post": tmp_path / "post", "base": tmp_path / "base"}
    post_to_base, both = r"^language_model\.=", {"rename_post": r"^language_model\.=", "rename_new_base": r"^model\.="}
    with pytest.raises(InputError, match="--rename-base"):
        paramdelta.extract(**pair, out=tmp_path / "d")
    paramdelta.extract(**pair, out=tmp_path / "d", rename_post=post_to_base, dtype="f64")
    assert set(codes(tmp_path / "d")) == {"language_model.a.weight", "language_model.b.weight"}
    assert paramdelta.verify(tmp_path / "d", **pair, everything=True).problems == ()
    with pytest.raises(InputError, match="--rename-post"):
        paramdelta.apply(new_base=tmp_path / "new_base", deltas=tmp_path / "d", out=tmp_path / "out")
    paramdelta.apply(new_base=tmp_path / "new_base", deltas=tmp_path / "d", out=tmp_path / "out", **both)
    paramdelta.merge(**pair, new_base=tmp_path / "new_base", out=tmp_path / "merged", **both)
    for name, (_, wanted) in codes(tmp_path / "merged").items():
        assert np.array_equal(codes(tmp_path / "out")[name][1], wanted), name


def test_interrupted_and_shared_extractions(
    sources: list[Folders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))
    pair = {role: sources[0][role] for role in ("post", "base")}
    paramdelta.extract(**pair, out=tmp_path / "whole")

    def stop(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(merging, "conclude", stop)
        with pytest.raises(InterruptedError):
            paramdelta.extract(**pair, out=tmp_path / "out")
    with pytest.raises(InputError, match=r"request\.delta_dtype"):
        paramdelta.extract(**pair, out=tmp_path / "out", dtype="f64")
    report = paramdelta.extract(**pair, out=tmp_path / "out")
    assert report.resumed_bytes > 0
    for rank in range(2):
        request = deltas.extract_request(**pair, out=tmp_path / "shared")
        gathering.merge_part(merging.prepare(request), Rank(number=rank, world=2))
    gathering.finalize(tmp_path / "shared")
    for rank in range(2):
        request = deltas.apply_request(
            new_base=sources[0]["new_base"], deltas=[tmp_path / "out"], out=tmp_path / "applied"
        )
        gathering.merge_part(merging.prepare(request), Rank(number=rank, world=2))
    gathering.finalize(tmp_path / "applied")
    publish.kept.clear()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") == digests(tmp_path / "shared")
    paramdelta.apply(new_base=sources[0]["new_base"], deltas=tmp_path / "out", out=tmp_path / "alone")
    assert digests(tmp_path / "alone") == digests(tmp_path / "applied")


def test_arguments_that_cannot_be_are_refused(sources: list[Folders], tmp_path: Path) -> None:
    pair = {role: sources[0][role] for role in ("post", "base")}
    with pytest.raises(InputError, match=r"--dtype.*expected one of .*bf16.*got.*bf17"):
        paramdelta.extract(**pair, out=tmp_path / "d", dtype="bf17")
    given = {"new_base": sources[0]["new_base"], "out": tmp_path / "a"}
    with pytest.raises(InputError, match=r"beside deltas are one too many\s.*give `alphas` rules"):
        paramdelta.apply(deltas={tmp_path / "d": 0.5}, alpha={"*": 0.5}, **given)
    assert list(tmp_path.iterdir()) == []


def test_scales_of_activations_are_those_of_new_base_unless_told(tmp_path: Path) -> None:
    """A delta has none. What makes post again takes nothing of new_base's."""
    given = {"new_base": tmp_path, "deltas": tmp_path, "out": tmp_path / "out"}
    assert deltas.apply_request(**given).activation_scales == "new-base"
    assert deltas.apply_request(**given, activation_scales="drop").activation_scales == "drop"
    assert deltas.apply_request(**given, rebuild=True).activation_scales == "post"
