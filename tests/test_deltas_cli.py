"""``paramdelta extract`` and ``paramdelta apply`` from the command line, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rank_folders import ENVIRONMENT, digests, write

import paramdelta
from paramdelta.errors import InputError

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three models, and a lossless delta."""
    root = tmp_path_factory.mktemp("made")
    folders = write(root, rows=32)
    paramdelta.extract(post=folders["post"], base=folders["base"], out=root / "delta", lossless=True)
    return {**folders, "delta": root / "delta", "root": root}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "paramdelta", *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)


def test_extract_and_apply(made: Folders, tmp_path: Path) -> None:
    pair = ("--post", made["post"], "--base", made["base"])
    dry = command("extract", *pair, "--out", tmp_path / "d", "--lossless", "--dry-run", "--json")
    assert (dry.returncode, (tmp_path / "d").exists()) == (0, False), dry.stderr
    planned = json.loads(dry.stdout)
    done = command("extract", *pair, "--out", tmp_path / "d", "--lossless")
    assert done.returncode == 0, done.stderr
    assert "to rebuild post" in done.stdout
    assert sum(file["bytes"] for file in planned["files"]) == sum(
        planned["policies"]["lossless"][k] for k in ("delta_bytes", "rebuild_bytes")
    )
    assert digests(tmp_path / "d") == digests(made["delta"])
    both = ("--delta", f"{tmp_path / 'd'}=0.5", "--delta", tmp_path / "d", "--alpha", "2:*norm*=0")
    done = command("apply", "--new-base", made["new_base"], *both, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "merge"
    given = [(tmp_path / "d", 0.5), tmp_path / "d"]
    paramdelta.apply(new_base=made["new_base"], deltas=given, alphas="2:*norm*=0", out=tmp_path / "same")
    assert digests(tmp_path / "out") == digests(tmp_path / "same")
    deltas = ("--delta", tmp_path / "d", "--delta", tmp_path / "d")
    verified = command("verify", tmp_path / "out", "--new-base", made["new_base"], *deltas, "--all")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    again = command(
        "apply", "--rebuild", "--new-base", made["base"], "--delta", tmp_path / "d", "--out", tmp_path / "post"
    )
    assert again.returncode == 0, again.stderr
    theirs = digests(made["post"])
    assert {n: d for n, d in digests(tmp_path / "post").items() if n in theirs} == theirs


def test_a_folder_whose_name_has_an_equals_sign(made: Folders, tmp_path: Path) -> None:
    shutil.copytree(made["delta"], tmp_path / "x=0.5")
    done = command("apply", "--new-base", made["new_base"], "--delta", tmp_path / "x=0.5", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`alpha · x=0.5` with alpha = 1" in card


def test_what_is_in_the_wrong_place_is_named(made: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    delta, post, base, new_base = (made[role] for role in ("delta", "post", "base", "new_base"))
    for role in ("post", "base", "new_base"):
        folders = {"post": post, "base": base, "new_base": new_base, role: delta}
        with pytest.raises(InputError, match=rf"{role} is a delta \(post − base\), not a model\n.*paramdelta apply"):
            paramdelta.merge(**folders, out=out)
    with pytest.raises(InputError, match="post is a delta"):
        paramdelta.extract(post=delta, base=base, out=out)
    with pytest.raises(InputError, match=r"is no delta: .*\n.*paramdelta extract"):
        paramdelta.apply(new_base=new_base, deltas=post, out=out)
    with pytest.raises(InputError, match="new_base is a delta"):
        paramdelta.apply(new_base=delta, deltas=delta, out=out)
    with pytest.raises(InputError, match="expected one of f32, bf16, f16, f64, f8, got 'int8'"):
        paramdelta.extract(post=post, base=base, out=out, dtype="int8")
    with pytest.raises(InputError, match="paramdelta apply scales it"):
        paramdelta.extract(post=post, base=base, out=out, alpha=0.5)
    refused = command("apply", "--new-base", new_base, "--delta", f"{delta}=much", "--out", out, "--json")
    assert refused.returncode == 2
    assert "expected a number or GLOB=number, got 'much'" in json.loads(refused.stdout)["complaints"][0]["problem"]
    assert not out.exists()


def test_a_delta_of_another_family(made: Folders, tmp_path: Path) -> None:
    """Everything that does not fit is told at once, and once."""
    other = write(tmp_path, rows=32, seed=4)
    for path in [*other["new_base"].glob("*.safetensors"), other["new_base"] / "model.safetensors.index.json"]:
        path.write_bytes(path.read_bytes().replace(b"gate_proj", b"gate_XXXX"))
    with pytest.raises(InputError) as refused:
        paramdelta.apply(new_base=other["new_base"], deltas=made["delta"], out=tmp_path / "out")
    text = str(refused.value)
    assert text.count("lacks 2 tensors that new_base has") == 1
    assert text.count("has 2 tensors that new_base lacks") == 1
