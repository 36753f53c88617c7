"""Sweeps over alpha and lines between checkpoints, run for real: every folder is that of the plain merge, whole, cut
short, refused and continued, from Python and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rank_folders import ROLES, SEGMENT, digests, run, write
from safetensors.numpy import load_file, save_file

import paramdelta
from paramdelta import engine, publish, resuming
from paramdelta.errors import InputError, NonFiniteError, PlanError

ALPHAS = (0.25, 0.0, 1.0, -0.5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("sources"), rows=256)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> dict[str, Any]:
    """Two deltas, and new_base."""
    other = write(tmp_path_factory.mktemp("other"), seed=1, rows=256)
    both = {role: [sources[role], other[role]] for role in ("post", "base")}
    return {**both, "new_base": sources["new_base"]}


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))
    yield
    publish.kept.clear()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "f32"}, {"max_shard_size": "200KB"}, {"alpha": {"*.norm.weight": 0, "model.embed*": 2}}],
    ids=["plain", "converted", "sharded anew", "rules"],
)
def test_folders_are_those_of_merges(sources: dict[str, Path], options: dict[str, Any], tmp_path: Path) -> None:
    report = paramdelta.sweep(**sources, out=tmp_path / "sweep", alphas=ALPHAS, **options)
    assert report.passes == 1
    rules = options.pop("alpha", {})
    for alpha, one in zip(ALPHAS, report.folders, strict=True):
        merged = paramdelta.merge(**sources, out=tmp_path / f"{alpha}", alpha={"*": alpha, **rules}, **options)
        assert one.out == tmp_path / "sweep" / f"alpha-{alpha:g}"
        assert digests(one.out) == digests(tmp_path / f"{alpha}"), alpha
        assert one.policies == merged.policies
        assert one.bytes_written == merged.bytes_written
        assert paramdelta.verify(one.out, **sources).problems == ()
    assert names_in(tmp_path / "sweep") == sorted(f"alpha-{alpha:g}" for alpha in ALPHAS)


def test_inputs_are_read_once(sources: dict[str, Path], tmp_path: Path) -> None:
    one = paramdelta.merge(**sources, out=tmp_path / "one", alpha=0.25)
    many = paramdelta.sweep(**sources, out=tmp_path / "many", alphas=ALPHAS)
    assert many.bytes_read == one.bytes_read
    assert many.bytes_written == len(ALPHAS) * one.bytes_written


@pytest.mark.parametrize(
    ("alphas", "each", "passes"),
    [
        ("0,0.5,1", [(0, 0), (0.5, 0.5), (1, 1)], 1),
        (["2:0,0.5,1"], [(0.8, 0), (0.8, 0.5), (0.8, 1)], 1),
        (["1:0,0.25,1", "2:1,0.75,0"], [(0, 1), (0.25, 0.75), (1, 0)], 1),
        ([(0, 1), (2, 0)], [(0, 1), (2, 0)], 2),
    ],
    ids=["together", "the second", "one for another", "nothing in common"],
)
def test_several_deltas(
    two: dict[str, Any], alphas: Any, each: list[tuple[float, float]], passes: int, tmp_path: Path
) -> None:
    rules = "1:0.8" if alphas == ["2:0,0.5,1"] else ()
    report = paramdelta.sweep(**two, out=tmp_path / "sweep", alphas=alphas, alpha=rules)
    assert report.passes == passes
    for wanted, one in zip(each, report.folders, strict=True):
        paramdelta.merge(**two, out=tmp_path / f"{wanted}", alpha=list(wanted))
        assert one.out is not None
        assert digests(one.out) == digests(tmp_path / f"{wanted}"), wanted


def grown(root: Path) -> dict[str, Path]:
    """Write three checkpoints whose vocabularies differ, with a NaN in new_base."""
    folders = {}
    for seed, (role, rows) in enumerate(zip(ROLES, (70, 60, 64), strict=True)):
        rng = np.random.default_rng(seed)
        tensors = {
            "model.embed_tokens.weight": rng.standard_normal((rows, 48)),
            "model.layers.0.mlp.up_proj.weight": rng.standard_normal((33, 48)),
        }
        if role == "new_base":
            tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = np.nan
        folders[role] = root / role
        folders[role].mkdir(parents=True)
        save_file({n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}, folders[role] / "model.safetensors")
        config = {"model_type": "x", "tie_word_embeddings": True, "vocab_size": rows}
        (folders[role] / "config.json").write_text(json.dumps(config))
    return folders


def test_grown_vocabularies(tmp_path: Path) -> None:
    folders = grown(tmp_path / "in")
    options = {"vocab": "extend", "allow_nonfinite": True}
    report = paramdelta.sweep(**folders, out=tmp_path / "sweep", alphas=(0.0, 0.5, 2.0), **options)
    for alpha, one in zip((0.0, 0.5, 2.0), report.folders, strict=True):
        merged = paramdelta.merge(**folders, out=tmp_path / f"{alpha}", alpha=alpha, **options)
        assert one.out is not None
        assert digests(one.out) == digests(tmp_path / f"{alpha}"), alpha
        assert one.nonfinite == merged.nonfinite


def test_what_is_not_finite_is_not_published(tmp_path: Path, small_segments: None) -> None:
    """A folder is judged by itself: with an alpha of 0 nothing is computed, and a NaN of new_base is copied."""
    folders = grown(tmp_path / "in")
    for folder in folders.values():
        tensors = {n: t[:32] for n, t in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"alpha-0.5 was not published") as caught:
        paramdelta.sweep(**folders, out=tmp_path / "sweep", alphas=(0.5, 0.0))
    assert "1 of 2 folders of the sweep is published, complete" in str(caught.value)
    assert [one.out for one in caught.value.report.folders] == [None, tmp_path / "sweep" / "alpha-0"]
    assert names_in(tmp_path / "sweep") == ["alpha-0"]
    paramdelta.merge(**folders, out=tmp_path / "zero", alpha=0)
    assert digests(tmp_path / "sweep" / "alpha-0") == digests(tmp_path / "zero")
    report = paramdelta.sweep(**folders, out=tmp_path / "again", alphas=(0.5, 0.0), allow_nonfinite=True)
    assert len(report.folders[0].nonfinite) == 1


def test_the_line_between_two(sources: dict[str, Path], tmp_path: Path) -> None:
    a, b = sources["new_base"], sources["post"]
    report = paramdelta.interpolate(a, b, at=(0, 0.25, 1), out=tmp_path / "line")
    assert names_in(tmp_path / "line") == ["at-0", "at-0.25", "at-1"]
    paramdelta.merge(post=b, base=a, new_base=a, out=tmp_path / "merge", alpha=0.25)
    assert report.folders[1].out is not None
    assert digests(report.folders[1].out) == digests(tmp_path / "merge")
    for end, folder in (("at-0", a), ("at-1", b)):
        for shard in sorted(folder.glob("*.safetensors")):
            made, wanted = load_file(tmp_path / "line" / end / shard.name), load_file(shard)
            for name, want in wanted.items():  # exponents lie near each other: both operations are exact
                assert made[name].tobytes() == want.tobytes() or end == "at-1", name
                assert np.array_equal(made[name].astype(np.float32), want.astype(np.float32)), name


class CutShortError(Exception):
    """What stops a run here."""


def cut_short(monkeypatch: pytest.MonkeyPatch, count: int, **request: Any) -> None:
    """Let a sweep carry out ``count`` segments, then fail."""
    done, left = engine.carry_out, [count]

    def carry_out(*arguments: Any, **options: Any) -> engine.RunResult:
        if not left[0]:
            raise CutShortError
        left[0] -= 1
        return done(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(resuming.engine, "carry_out", carry_out)
        with pytest.raises(CutShortError):
            paramdelta.sweep(**request)


@pytest.mark.parametrize("count", [1, 9])
def test_the_same_sweep_continues(
    sources: dict[str, Path], count: int, tmp_path: Path, small_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = paramdelta.sweep(**sources, out=tmp_path / "whole", alphas=ALPHAS)
    cut_short(monkeypatch, count, **sources, out=tmp_path / "out", alphas=ALPHAS)
    assert names_in(tmp_path / "out") == [".sweep.partial"]
    with pytest.raises(InputError, match=r"holds an unfinished merge that differs.*\n.*folders") as caught:
        paramdelta.sweep(**sources, out=tmp_path / "out", alphas=ALPHAS[:2])
    assert "--restart" in str(caught.value)
    report = paramdelta.sweep(**sources, out=tmp_path / "out", alphas=ALPHAS)
    assert report.resumed_bytes + report.bytes_written == whole.bytes_written
    assert 0 < report.bytes_read < whole.bytes_read
    assert names_in(tmp_path / "out") == sorted(f"alpha-{alpha:g}" for alpha in ALPHAS)
    for alpha in ALPHAS:
        assert digests(tmp_path / "out" / f"alpha-{alpha:g}") == digests(tmp_path / "whole" / f"alpha-{alpha:g}")


def test_restart_begins_anew(
    sources: dict[str, Path], tmp_path: Path, small_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(monkeypatch, 2, **sources, out=tmp_path / "out", alphas=ALPHAS)
    report = paramdelta.sweep(**sources, out=tmp_path / "out", alphas=(0.5, 2.0), restart=True)
    assert report.resumed_bytes == 0
    assert names_in(tmp_path / "out") == ["alpha-0.5", "alpha-2"]


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ({"alphas": "0.5,x"}, "expected finite numbers"),
        ({"alphas": (0.5, float("nan"))}, "expected finite numbers"),
        ({"alphas": ()}, "at least one number"),
        ({"alphas": (0.0, 0.5, -0.0)}, "0 is there twice"),
        ({"alphas": "2:0,1"}, "2: is for delta 2, but there is one delta"),
        ({"alphas": ["0,1", "1:0,0.5,1"]}, "these have 2 and 3 numbers"),
        ({"alphas": ["0,1", "0.5"]}, "two lists for all deltas"),
        ({"alphas": [(1, 2)]}, "expected a number for each of the 1 deltas, got 2"),
        ({"alphas": "0.5,1", "alpha": "0.7"}, "gives the delta one alpha for all tensors"),
        ({"alphas": "0.5", "dtype": "f7"}, "--dtype"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_refused(sources: dict[str, Path], options: dict[str, Any], saying: str, tmp_path: Path) -> None:
    folders = {**sources, "post": tmp_path / "nowhere"}
    with pytest.raises(PlanError, match=saying) as caught:
        paramdelta.sweep(**folders, out=tmp_path / "out", **options)
    assert "nowhere" in str(caught.value)  # all complaints at once
    assert names_in(tmp_path) == []


def test_places(sources: dict[str, Path], tmp_path: Path) -> None:
    paramdelta.sweep(**sources, out=tmp_path / "run-{alpha}", alphas=(0.5,))
    assert names_in(tmp_path) == ["run-0.5"]
    for out, saying in (
        ("run-{alpha}", "exists already"),
        ("{alpha}/x", "part of the name of the folders themselves"),
        ("no/where", "does not exist"),
    ):
        with pytest.raises(PlanError, match=saying):
            paramdelta.sweep(**sources, out=tmp_path / out, alphas=(0.5, 1.0))
    paramdelta.sweep(**sources, out=tmp_path / "run-{alpha}", alphas=(0.5, 1.0), overwrite=True)
    assert names_in(tmp_path) == ["run-0.5", "run-1"]
    assert paramdelta.verify(tmp_path / "run-0.5").problems == ()


def test_room_for_all(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramdelta.merging._SPARE_BYTES", 1 << 60)
    with pytest.raises(OSError, match="the output needs"):
        paramdelta.sweep(**sources, out=tmp_path / "out", alphas=ALPHAS)
    assert names_in(tmp_path) == []


def test_command_lines(sources: dict[str, Path], tmp_path: Path) -> None:
    inputs = [f"--{role.replace('_', '-')}={folder}" for role, folder in sources.items()]
    done = run("-m", "paramdelta", "sweep", *inputs, "--alphas=0,0.5", f"--out={tmp_path / 'cli'}", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["passes"], len(document["folders"])) == ("sweep", 1, 2)
    paramdelta.sweep(**sources, out=tmp_path / "python", alphas=(0, 0.5))
    for name in ("alpha-0", "alpha-0.5"):
        assert digests(tmp_path / "cli" / name) == digests(tmp_path / "python" / name)
    ends = (str(sources["base"]), str(sources["new_base"]))
    done = run("-m", "paramdelta", "interpolate", *ends, "--at=-0.5,1", f"--out={tmp_path / 'l-{at}'}")
    assert done.returncode == 0, done.stderr
    assert {"l--0.5", "l-1"} <= set(names_in(tmp_path))
    refused = run("-m", "paramdelta", "sweep", *inputs, "--alphas=1", f"--out={tmp_path}", RANK="1", WORLD_SIZE="2")
    assert refused.returncode == 2
    assert "several processes cannot share a sweep" in refused.stderr
