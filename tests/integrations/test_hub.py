"""Models on the Hub by name: huggingface_hub itself, in processes of its own, against a server on this machine that
speaks the Hub's endpoints; then from its cache, without a network."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documented import examples
from hub_server import COMMIT, OTHER_COMMIT, Hub, serving

import paramdelta
from paramdelta import demo
from paramdelta.checkpoint import hub as identifiers

pytest.importorskip("huggingface_hub", reason="models are fetched by huggingface_hub")

ROOT = Path(paramdelta.__file__).resolve().parent.parent
MODELS = ["meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"]
THREE = ("--post", "acme/chat@v1", "--base", "acme/base", "--new-base", "acme/base-2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three checkpoints, one of them with files that no merge needs, and a model without safetensors."""
    where = tmp_path_factory.mktemp("models")
    folders = demo.write_demo(where, size="tiny")
    found = dict(zip(("acme/chat", "acme/base", "acme/base-2"), folders, strict=True))
    chat = found["acme/chat"]
    (chat / "LICENSE").write_text("Do as you like.\n")
    (chat / "original").mkdir()
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/model.pth",
        "original/params.json",
        "a.png",
    ):
        (chat / name).write_bytes(b"not needed")
    (where / "pickled").mkdir()
    (where / "pickled" / "config.json").write_text("{}")
    (where / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    return {**found, "acme/pickled": where / "pickled"}


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    with serving(models) as served:
        yield served


def clean(hub_url: str, home: Path) -> dict[str, str]:
    """Return an environment with a hub and a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub_url, "HF_HOME": str(home)}


def run(hub_url: str, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in an empty folder."""
    work = home.parent / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "paramdelta", *arguments],
        env=clean(hub_url, home) | environment,
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )


def complaints(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    assert done.returncode == 2, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)["complaints"]
    return found


def test_merges_by_name_then_offline(hub: Hub, models: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run(hub.url, home, "merge", *THREE, "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr

    paramdelta.merge(
        post=models["acme/chat"], base=models["acme/base"], new_base=models["acme/base-2"], out=tmp_path / "ours"
    )
    files = sorted(f.name for f in (tmp_path / "ours").iterdir())
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == files
    told_apart = {"README.md", "paramdelta.json"}  # by the names of the inputs
    same, differ, _ = filecmp.cmpfiles(tmp_path / "ours", tmp_path / "out", files, shallow=False)
    assert set(differ) <= told_apart
    assert "model.safetensors.index.json" in same or "model.safetensors" in same

    record = json.loads((tmp_path / "out" / "paramdelta.json").read_text())
    named = {role: (source["name"], source["revision"]) for role, source in record["inputs"].items()}
    assert named == {
        "post": ("acme/chat", OTHER_COMMIT),
        "base": ("acme/base", COMMIT),
        "new_base": ("acme/base-2", COMMIT),
    }
    assert '- "acme/base-2"\n- "acme/chat"' in (tmp_path / "out" / "README.md").read_text()
    needed = {f.name for f in models["acme/chat"].iterdir() if f.suffix in (".json", ".txt", ".jinja", ".model")}
    weights = {f.name for f in models["acme/chat"].glob("model*.safetensors")}
    assert set(hub.fetched("acme/chat")) == needed | weights | {"LICENSE"}

    hub.asked.clear()
    again = run(hub.url, home, "merge", *THREE, "--out", str(tmp_path / "again"), "--json", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert not hub.asked, "offline is offline"
    assert filecmp.cmpfiles(tmp_path / "out", tmp_path / "again", files, shallow=False)[0] == files
    checked = run(hub.url, home, "verify", str(tmp_path / "out"), *THREE, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(checked.stdout)["problems"] == []


def test_the_documented_commands(models: dict[str, Path], tmp_path: Path) -> None:
    """Those of docs/integrations.md, in bash, where ``paramdelta`` is this one and the Hub is here."""
    named = dict(zip(("acme/chat", "acme/base", "acme/base-2"), MODELS, strict=True))
    program = tmp_path / "paramdelta"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m paramdelta "$@"\n')
    program.chmod(0o755)
    (script,) = examples("Models on the Hub", "bash")
    with serving({named[name]: folder for name, folder in models.items() if name in named}) as served:
        environment = clean(served.url, tmp_path / "home") | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-ec", script], env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    inputs = json.loads((tmp_path / "merged" / "paramdelta.json").read_text())["inputs"]
    assert [source["name"] for source in inputs.values()] == MODELS


def test_one_repository_in_several_roles_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    roles = ("--post", "acme/base", "--base", "acme/base", "--new-base", "acme/base")
    done = run(hub.url, tmp_path / "home", "plan", *roles, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(hub.fetched("acme/base")) == len(set(hub.fetched("acme/base")))
    assert sum(path == "/api/models/acme/base/revision/main" for _, path in hub.asked) == 1


def test_inspect_and_progress(hub: Hub, tmp_path: Path) -> None:
    """The Hub's own progress is shown, unless --quiet or --json."""
    shown = run(hub.url, tmp_path / "home", "inspect", "acme/chat")
    assert shown.returncode == 0, shown.stderr
    assert "acme/chat" in shown.stdout
    assert "Fetching" in shown.stderr
    silent = run(hub.url, tmp_path / "other", "inspect", "acme/chat", "--quiet")
    assert silent.returncode == 0
    assert silent.stderr == ""


def test_a_folder_of_that_name_wins(hub: Hub, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "work" / "acme").mkdir(parents=True)
    (tmp_path / "work" / "acme" / "chat").symlink_to(models["acme/base"])
    done = run(hub.url, tmp_path / "home", "inspect", "acme/chat", "--json")
    assert json.loads(done.stdout)["name"] == models["acme/base"].name
    assert not hub.asked


REFUSED: dict[str, tuple[str, dict[str, str], str, str]] = {
    "not-found": ("acme/chatt", {}, "no model of this name on the Hub that this account may see", "hf auth login"),
    "revision": ("acme/chat@v9", {}, "acme/chat has no revision v9", "name a branch, tag or commit"),
    "gated": ("acme/base", {}, "acme/base is gated, and this account has no access", "ask for it"),
    "offline": (
        "acme/chat",
        {"HF_HUB_OFFLINE": "1"},
        "the Hub may not be asked (HF_HUB_OFFLINE)",
        "paramdelta inspect acme/chat",
    ),
    "unreachable": (
        "acme/chat",
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "the Hub cannot be reached",
        "paramdelta inspect",
    ),
    "no-safetensors": ("acme/pickled", {}, "neither model.safetensors nor an index", "save_pretrained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, hub: Hub, tmp_path: Path) -> None:
    name, environment, problem, remedy = REFUSED[case]
    hub.gated.add("acme/base")
    done = run(hub.url, tmp_path / "home", "inspect", name, "--json", **environment)
    (complaint,) = complaints(done)
    assert complaint["subject"] == name
    assert problem in complaint["problem"]
    assert remedy in complaint["remedy"]


def test_everything_wrong_is_told_at_once(hub: Hub, tmp_path: Path) -> None:
    """Wrong options before anything is fetched; then all models that cannot be had, each once."""
    options = run(hub.url, tmp_path / "home", "plan", *THREE, "--dtype", "f99", "--json")
    assert [c["subject"] for c in complaints(options)] == ["--dtype"]
    assert not hub.asked
    names = ("--post", "acme/a", "--base", "acme/b", "--new-base", "acme/a")
    assert [c["subject"] for c in complaints(run(hub.url, tmp_path / "home", "plan", *names, "--json"))] == [
        "acme/a",
        "acme/b",
    ]


def test_an_incomplete_copy_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(hub.url, home, "inspect", "acme/chat", "--quiet").returncode == 0
    (snapshot,) = (home / "hub" / "models--acme--chat" / "snapshots").iterdir()
    next(snapshot.glob("*.safetensors")).unlink()
    (complaint,) = complaints(run(hub.url, home, "inspect", "acme/chat", "--json", HF_HUB_OFFLINE="1"))
    assert "only a part of this model" in complaint["problem"]
    assert str(snapshot) in complaint["remedy"]


def test_without_huggingface_hub(tmp_path: Path) -> None:
    """A module of that name that cannot be imported, first on the path, stands for one that is not installed."""
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not installed')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    (complaint,) = complaints(run("", tmp_path / "home", "inspect", "acme/chat", "--json", PYTHONPATH=path))
    assert complaint["remedy"] == "pip install 'paramdelta[hub]'"


NAMES: dict[str, Any] = {
    "meta-llama/Llama-3.1-8B": True,
    "Qwen/Qwen3-8B@main": True,
    "Qwen/Qwen3-8B@refs/pr/3": True,
    "gpt2": False,
    "/models/llama": False,
    "./models/llama": False,
    "../llama": False,
    "a/b/c": False,
    "org/": False,
    "org/name@": False,
    "org/name\n": False,
}


@pytest.mark.parametrize("text", NAMES)
def test_what_is_an_identifier(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert identifiers.is_identifier(text) is NAMES[text]
    assert not identifiers.is_identifier(Path(text))
