"""Merges that add several deltas, run for real: the bytes of the reference, whole, interrupted, shared and streamed,
from Python and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_folders import ENVIRONMENT, SEGMENT, digests, write
from safetensors import deserialize

import paramdelta
from paramdelta import gathering, merging, publish, reference
from paramdelta.dtypes import BF16, BY_NAME
from paramdelta.errors import InputError
from paramdelta.plan import make_request
from paramdelta.ranks import Rank

ALPHAS = (0.7, -0.25, 1.5)
Sources = dict[str, Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Three deltas, and new_base."""
    root = tmp_path_factory.mktemp("sources")
    made = [write(root / str(k), seed=k, rows=256) for k in range(len(ALPHAS))]
    return {"post": [m["post"] for m in made], "base": [m["base"] for m in made], "new_base": made[0]["new_base"]}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))


def codes(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the codes of every tensor of a bf16 folder."""
    files = [deserialize(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]
    return {name: np.frombuffer(bytes(info["data"]), np.uint16) for file in files for name, info in file}


def expected(sources: Sources, alphas: tuple[float, ...], dtype: str = "bf16") -> dict[str, np.ndarray[Any, Any]]:
    """Return the sums of the reference."""
    posts, bases = ([codes(folder) for folder in sources[role]] for role in ("post", "base"))
    made = {}
    for name, start in codes(sources["new_base"]).items():
        terms = [
            reference.Term(reference.Array(p[name], BF16), reference.Array(b[name], BF16), alpha)
            for p, b, alpha in zip(posts, bases, alphas, strict=True)
        ]
        made[name] = reference.merge(reference.Array(start, BF16), terms, BY_NAME[dtype]).codes
    return made


@pytest.mark.parametrize("isa", ["scalar", None], ids=["scalar", "best"])
def test_bytes_are_those_of_the_reference(sources: Sources, isa: str | None, tmp_path: Path) -> None:
    paramdelta.merge(**sources, out=tmp_path / "out", alpha=list(ALPHAS), isa=isa)
    made, wanted = codes(tmp_path / "out"), expected(sources, ALPHAS)
    assert made.keys() == wanted.keys()
    for name, want in wanted.items():
        assert np.array_equal(made[name], want), name


def test_one_sum_is_rounded_once(sources: Sources, tmp_path: Path) -> None:
    """One merge of three deltas is not three merges of one: those round three times."""
    step = sources["new_base"]
    for k, alpha in enumerate(ALPHAS):
        pair = {"post": sources["post"][k], "base": sources["base"][k]}
        paramdelta.merge(**pair, new_base=step, out=tmp_path / f"step{k}", alpha=alpha)
        step = tmp_path / f"step{k}"
    paramdelta.merge(**sources, out=tmp_path / "out", alpha=list(ALPHAS))
    stepped, made = codes(step), codes(tmp_path / "out")
    assert any(not np.array_equal(stepped[name], made[name]) for name in made)


def test_deltas_that_cancel_or_repeat(sources: Sources, tmp_path: Path) -> None:
    """A delta and its opposite give new_base, and two halves the whole, up to roundings in binary64."""
    one = {"post": sources["post"][0], "base": sources["base"][0]}
    twice = {role: [folder, folder] for role, folder in one.items()}
    new_base = {"new_base": sources["new_base"]}
    paramdelta.merge(**one, **new_base, out=tmp_path / "one", dtype="f64")
    paramdelta.merge(**twice, **new_base, out=tmp_path / "halves", dtype="f64", alpha=[0.5, 0.5])
    paramdelta.merge(**one, **new_base, out=tmp_path / "zero", alpha=0, dtype="f64")
    paramdelta.merge(**twice, **new_base, out=tmp_path / "none", dtype="f64", alpha=[1, -1])
    for a, b in (("one", "halves"), ("zero", "none")):
        first, second = (codes_f64(tmp_path / name) for name in (a, b))
        for name, values in first.items():
            np.testing.assert_allclose(second[name], values, rtol=0, atol=2.0**-50, err_msg=name)


def codes_f64(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array.view(np.float64) for name, array in codes(folder).items()}


def test_streams_and_verification(sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paramdelta.merge(**sources, out=out, alpha=list(ALPHAS))
    made = codes(out)
    for name, tensor in paramdelta.stream(**sources, alpha=list(ALPHAS)):
        assert np.array_equal(tensor.reshape(-1).view(np.uint16), made[name]), name
    report = paramdelta.verify(out, **sources, everything=True)
    assert (report.problems, report.fraction) == ((), 1.0)
    assert paramdelta.verify(out).problems == ()
    swapped = {**sources, "post": sources["post"][::-1], "base": sources["base"][::-1]}
    named = {problem.partition(":")[0] for problem in paramdelta.verify(out, **swapped, everything=True).problems}
    assert named >= set(made)
    with pytest.raises(InputError, match="is for delta 2, but there is one delta"):
        paramdelta.verify(out, post=sources["post"][0], base=sources["base"][0], new_base=sources["new_base"])


def test_a_changed_value_is_found_by_recomputing(sources: Sources, tmp_path: Path) -> None:
    """The record and the headers are right, one element is not."""
    out = tmp_path / "out"
    paramdelta.merge(**sources, out=out, alpha=list(ALPHAS), checksums=False)
    path = sorted(out.glob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)
    (problem,) = paramdelta.verify(out, **sources, everything=True).problems
    assert ": 1 of " in problem


def test_ranks_then_finalize(sources: Sources, tmp_path: Path) -> None:
    options = {"alpha": list(ALPHAS)}
    paramdelta.merge(**sources, out=tmp_path / "whole", **options)
    for rank in range(3):
        plan = merging.prepare(make_request(**sources, out=tmp_path / "out", **options))
        gathering.merge_part(plan, Rank(number=rank, world=3))
    gathering.finalize(tmp_path / "out")
    publish.kept.clear()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_interrupted_merge_continues_only_as_itself(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"alpha": list(ALPHAS)}
    paramdelta.merge(**sources, out=tmp_path / "whole", **options)

    def stop(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(merging, "conclude", stop)  # the weights are done and noted, nothing is published
        with pytest.raises(InterruptedError):
            paramdelta.merge(**sources, out=tmp_path / "out", **options)
    with pytest.raises(InputError, match=r"request\.alphas"):
        paramdelta.merge(**sources, out=tmp_path / "out", alpha=[0.7, -0.25, 1.0])
    other = {**sources, "post": [*sources["post"][:2], sources["post"][0]]}
    with pytest.raises(InputError, match=r"inputs\.post_3\."):
        paramdelta.merge(**other, out=tmp_path / "out", **options)
    report = paramdelta.merge(**sources, out=tmp_path / "out", **options)
    publish.kept.clear()
    assert report.resumed_bytes > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "paramdelta", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)


def test_from_the_command_line(sources: Sources, tmp_path: Path) -> None:
    pairs = zip(sources["post"], sources["base"], strict=True)
    given = [option for post, base in pairs for option in (f"--post={post}", f"--base={base}")]
    given.append(f"--new-base={sources['new_base']}")
    alphas = [f"--alpha={n}:{alpha}" for n, alpha in enumerate(ALPHAS, 1)]
    paramdelta.merge(**sources, out=tmp_path / "whole", alpha=list(ALPHAS))
    done = command("merge", *given, *alphas, "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    planned = json.loads(command("plan", *given, *alphas, "--json").stdout)
    assert planned["bytes_read"] == json.loads(done.stdout)["bytes_read"]
    assert command("verify", str(tmp_path / "out"), *given).returncode == 0
    lacking = command("merge", *given[1:], "--out", str(tmp_path / "no"))
    assert lacking.returncode == 2
    assert "there are 2 of post and 3 of base" in lacking.stderr
