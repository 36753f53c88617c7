"""Versions named by identifiers of the Hub, from a cache laid out as huggingface_hub lays it out, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from recycled import digests, make_plan, run

pytest.importorskip("huggingface_hub", reason="this test looks models up with huggingface_hub")
COMMITS = ("a" * 40, "b" * 40)


def cached(cache: Path, name: str, revision: str, commit: str, folder: Path) -> None:
    """Put a model into a cache: ``revision`` is where its branch is."""
    repository = cache / f"models--org--{name}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


def test_a_branch_that_moves_is_no_change(models: Path, tmp_path: Path) -> None:
    """A version is continued at the commit that it was begun with."""
    cache = tmp_path / "cache"
    cached(cache, "llama", "main", COMMITS[0], models / "v1")
    cached(cache, "llama-2", "early", COMMITS[0], models / "v2")
    plan = make_plan(models, tmp_path / "out", versions=["org/llama", {"model": "org/llama-2@early", "name": "v2"}])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    failed = run(path, FAIL="1", **environment)
    assert failed.returncode == 1, failed.stderr
    cached(cache, "llama", "main", COMMITS[1], models / "v3")
    done = run(path, **environment)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(cache / "models--org--llama")  # what is done is not fetched again
    assert run(path, **environment).returncode == 0
    plain = make_plan(models, tmp_path / "plain", versions=[{"model": str(models / "v1"), "name": "llama"}])
    plain["versions"].append(str(models / "v2"))
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    assert run(tmp_path / "plain.json").returncode == 0
    made, expected = digests(tmp_path / "out"), digests(tmp_path / "plain")
    weights = [name for name in expected if name.endswith(".safetensors") and name.startswith("outs")]
    assert weights
    assert [made[name] for name in weights] == [expected[name] for name in weights]
    state = json.loads((tmp_path / "out" / "recycle.json").read_text())
    assert [version["commit"] for version in state["versions"]] == [COMMITS[0], COMMITS[0]]
    cached(cache, "llama", "main", COMMITS[1], models / "v3")
    missing = make_plan(models, tmp_path / "other", versions=["org/llama", "org/unknown"])
    path.write_text(json.dumps(missing))
    refused = run(path, **environment)
    assert refused.returncode == 2
    assert f"{path}:1: versions[1]: org/unknown: a version: " in refused.stderr
