"""The merge method in the real mergekit, which has an environment of its own: its YAML gives the bits of our merges.

Skipped where PARAMDELTA_MERGEKIT names no mergekit; ``make test-mergekit`` makes one and runs this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documented import NAMES, examples

import paramdelta
from benchmarks.peers import mergekit as peer

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
pytest.importorskip("transformers", reason="the models of this test are made by transformers")

from test_models import FAMILIES, make_models, tensors_of  # noqa: E402

ROOT = Path(paramdelta.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(peer.executable() is None, reason=str(peer.why_not()))

PLAIN = """
merge_method: paramdelta
base_model: {new_base}      # gets the post-training
models:
  - model: {post}
    parameters: {{alpha: 0.7}}
  - model: {base}
    parameters: {{role: base}}
"""

BY_FILTER = """
merge_method: paramdelta
base_model: {new_base}
models:
  - model: {post}
    parameters:
      alpha:
        - filter: self_attn
          value: 0.5
        - filter: lm_head
          value: 0
        - value: 1.0
  - model: {base}
    parameters: {{role: base}}
"""

GRADIENT = PLAIN.replace("alpha: 0.7", "alpha: [0.25, 0.75]")  # along the layers, of which there are two

SEVERAL = """
merge_method: paramdelta
base_model: {new_base}
models:
  - model: {post}
    parameters: {{alpha: 0.75}}
  - model: {post_2}
    parameters: {{alpha: -0.5}}
  - model: {base}
    parameters: {{role: base}}
"""

AGAINST_NEW_BASE = """
merge_method: paramdelta
base_model: {new_base}
models: [{{model: {post}}}]
"""


TOO_LARGE = PLAIN.replace("alpha: 0.7", "alpha: 1.0e+45")


def in_mergekit(*arguments: str | Path, at: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in mergekit's environment, with this package importable."""
    python = Path(str(peer.executable())).parent / "python"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | peer.environment(1) | {"PYTHONPATH": path}
    return subprocess.run([python, *arguments], env=environment, cwd=at, capture_output=True, text=True, check=False)


def run_command(config: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run mergekit's command with our method registered."""
    file = out.with_suffix(".yaml")
    file.write_text(config)
    return in_mergekit("-m", "paramdelta.integrations.mergekit", file, out, "--quiet")


# For a program that uses mergekit from Python the import is all it takes, and it may happen twice.
MANY = """
import json, sys
from paramdelta.integrations import mergekit
from mergekit.scripts.run_yaml import main
mergekit.register()
for config, out in json.loads(sys.argv[1]):
    main([config, out, "--quiet"], standalone_mode=False)
"""


def same_bits(ours: Path, theirs: Path) -> None:
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert b[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(b[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """post, base and new_base of an untied Llama in bf16, a second post of the same base, and a post in f32."""
    where = tmp_path_factory.mktemp("models")
    make_models(FAMILIES["llama-untied"], where)
    for name, options in {"post_2": {"alpha": 0.3}, "wide": {"alpha": 0.37, "dtype": "f32"}}.items():
        paramdelta.merge(
            post=where / "new_base", base=where / "base", new_base=where / "post", out=where / name, **options
        )
    return {role: where / role for role in ("post", "base", "new_base", "post_2", "wide")}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one-delta": (PLAIN, {"post": "post", "base": "base", "alpha": 0.7}),
    "filters": (BY_FILTER, {"post": "post", "base": "base", "alpha": {"*": 1.0, "lm_head*": 0.0, "*self_attn*": 0.5}}),
    "gradient": (GRADIENT, {"post": "post", "base": "base", "alpha": {"*": 0.25, "model.layers.1.*": 0.75}}),
    "several": (SEVERAL, {"post": ["post", "post_2"], "base": ["base", "base"], "alpha": [0.75, -0.5]}),
    "against-base-model": (AGAINST_NEW_BASE, {"post": "post", "base": "new_base"}),
    # post in f32: what is cast to one dtype first, or last, is rounded more than once
    "mixed-dtypes": (PLAIN.replace("{post}", "{wide}"), {"post": "wide", "base": "base", "alpha": 0.7}),
    "not-finite": (
        TOO_LARGE + "parameters: {{allow_nonfinite: true}}\n",
        {"post": "post", "base": "base", "alpha": 1e45, "allow_nonfinite": True},
    ),
}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases merged by mergekit, all in one process: starting it takes longer than merging."""
    where = tmp_path_factory.mktemp("theirs")
    for case, (text, _) in CASES.items():
        (where / f"{case}.yaml").write_text(text.format_map(folders))
    done = in_mergekit("-c", MANY, json.dumps([[str(where / f"{case}.yaml"), str(where / case)] for case in CASES]))
    assert done.returncode == 0, done.stderr[-3000:]
    return where


def roles(value: Any, folders: dict[str, Path]) -> Any:
    """Return a value with the names of roles as folders."""
    if isinstance(value, list):
        return [roles(v, folders) for v in value]
    return folders.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_a_merge(case: str, folders: dict[str, Path], theirs: Path, tmp_path: Path) -> None:
    options = {name: roles(value, folders) for name, value in CASES[case][1].items()}
    paramdelta.merge(new_base=folders["new_base"], out=tmp_path / "ours", **options)
    same_bits(tmp_path / "ours", theirs / case)


def test_the_documented_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    """The YAML and the command of docs/integrations.md, in a folder with checkpoints of those names."""
    for role, name in NAMES.items():
        (tmp_path / name).symlink_to(folders[role])
    (tmp_path / "merge.yaml").write_text(examples("mergekit", "yaml")[0])
    program, *arguments = examples("mergekit", "bash")[0].split()
    assert program == "paramdelta-mergekit"
    arguments.append("--no-write-model-card")  # for it mergekit asks the Hub whether these names are models there
    done = in_mergekit("-m", "paramdelta.integrations.mergekit", *arguments, at=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    paramdelta.merge(**{role: folders[role] for role in NAMES}, out=tmp_path / "ours", alpha=0.7)
    same_bits(tmp_path / "ours", tmp_path / "merged")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN.replace("role: base", "role: grandmother"), "role: expected post or base, got grandmother"),
        (PLAIN.replace("alpha: 0.7", "role: base"), "0 are post and 2 are base"),
    ],
    ids=["unknown-role", "no-post"],
)
def test_refused(text: str, words: str, folders: dict[str, Path], tmp_path: Path) -> None:
    done = run_command(text.format_map(folders), tmp_path / "theirs")
    assert done.returncode == 2, done.stderr[-3000:]
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_results_that_are_not_finite_end_it(folders: dict[str, Path], tmp_path: Path) -> None:
    done = run_command(TOO_LARGE.format_map(folders), tmp_path / "theirs")
    assert done.returncode == 3, done.stderr[-3000:]
    assert re.search(r"weight: results that are not finite: 0 NaN, 0 Inf, [1-9][\d,]* overflow", done.stderr)
