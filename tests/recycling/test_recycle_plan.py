"""Plans: every complaint at once, with its file, line and field; YAML and JSON; and what the survey finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors reads bf16 with it)
import pytest
from recycled import make_plan, run
from safetensors.numpy import load_file, save_file

import paramdelta
from paramdelta import recycling
from paramdelta.errors import InputError
from paramdelta.recycling.example import EXAMPLE
from paramdelta.recycling.plan import load

WRONG = """\
versions:
  - models/v1
  - modle: models/v2
  - 2026-01-31
  - {model: models/v4, name: "a/b"}
command: [train, "{strat}", true, 1e-5, 3]
shell: perhaps
keep: [deltas]
unfinished: forget
alpha: much
extract: {dtype: int8, vocab: shrink}
apply: {vocap: extend}
kepp: []
env: {1X: a, Y: [1]}
"""


def refused(plan: Any, **options: Any) -> list[str]:
    """Return the complaints, one a line, without what to do."""
    with pytest.raises(InputError) as caught:
        load(plan, **options)
    return [f"{c.subject}: {c.problem}" for c in caught.value.complaints]


def test_every_complaint_at_once(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="plans in YAML need PyYAML")
    path = tmp_path / "plan.yaml"
    path.write_text(WRONG)
    found = refused(path)
    assert found == [
        f"{path}:13: kepp: there is no such field",
        f"{path}:3: versions[1].modle: there is no such field",
        f"{path}:3: versions[1]: has no model: a folder, or org/name[@revision]",
        f"{path}:4: versions[2]: expected text, got datetime.date(2026, 1, 31)",
        f"{path}:5: versions[3].name: expected letters, digits and . _ + - (at most 100), got 'a/b'",
        f"{path}:1: out: is missing: the folder to work in",
        f"{path}:6: command[1]: expected one of {{start}}, {{out}}, {{version}}, {{index}}, got '{{strat}}'",
        f"{path}:6: command[2]: expected text, got True",
        f"{path}:7: shell: expected true or false, got 'perhaps'",
        f"{path}:14: env.1X: is no name of a variable",
        f"{path}:14: env.Y: expected text, got [1]",
        f"{path}:8: keep: expected a list of starts and outs, or [], got ['deltas']",
        f"{path}:9: unfinished: expected remove or keep, got 'forget'",
        f"{path}:11: extract.dtype: expected one of f32, bf16, f16, f64, f8, got 'int8'",
        f"{path}:11: extract.vocab: expected one of error, extend, align, got 'shrink'",
        f"{path}:12: apply.vocap: there is no such field",
    ]


def test_policies_are_checked_as_the_commands_check_them(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = {"versions": ["a"], "out": "out", "command": ["true"], "alpha": "much"}
    path.write_text(
        json.dumps({**plan, "extract": {"dtype": "int8", "vocab": "shrink"}, "apply": {"vocap": 1}}, indent=1)
    )
    found = refused(path)
    assert found[0] == f"{path}:11: extract.dtype: expected one of f32, bf16, f16, f64, f8, got 'int8'"
    assert found[1].startswith(f"{path}:12: extract.vocab: expected one of error, extend")
    assert found[2] == f"{path}:15: apply.vocap: there is no such field"
    path.write_text(json.dumps({**plan, "apply": {"copy_from": "post", "vocab": 7}}))
    found = refused(path)
    assert any(text.startswith(f"{path}:1: alpha: expected a number or GLOB=number") for text in found), found


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.yaml", "versions: [", "p.yaml:1: is not YAML: "),
        ("p.yaml", "out: a\nout: b\n", "p.yaml:2: the field out is there twice"),
        ("p.yaml", "- a\n", "p.yaml:1: expected fields with names: versions, out, command, got ['a']"),
        ("p.yaml", "", "p.yaml: expected fields with names"),
        ("p.yaml", "out: !!python/object/apply:os.system [ls]\n", "p.yaml:1: is not YAML: could not determine"),
        ("p.json", '{\n"out": }', "p.json:2: is not JSON: Expecting value"),
        ("p.json", '{"out": "a", "out": "b"}', "p.json: holds the field out twice"),
        ("p.json", "[" * 100_000, "p.json: is nested too deeply"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, name: str, text: str, expected: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml", reason="plans in YAML need PyYAML")
    (tmp_path / name).write_text(text)
    (found,) = refused(tmp_path / name)[:1]
    assert found.startswith(f"{tmp_path}/{expected}"), found


def test_lines_of_json(tmp_path: Path) -> None:
    """Also behind empty lists, nested ones, and text that looks like structure."""
    path = tmp_path / "plan.json"
    path.write_text(
        '{"keep": [],\n"env": {},\n"versions": ["a", {"model": "[{,\\"",\n"name": "b"},\n3],\n"command": 4}'
    )
    assert [text.removeprefix(f"{path}:") for text in refused(path)] == [
        "5: versions[2]: expected text, got 3",
        "1: out: is missing: the folder to work in",
        "6: command: expected a list: the program and its arguments, got 4",
    ]


def test_a_command_as_text_needs_a_shell() -> None:
    plan = {"versions": ["a"], "out": "o", "command": "train {out}"}
    assert refused(plan) == ["plan: command: is text, which needs a shell"]
    assert refused({**plan, "command": ["train"], "shell": True}) == [
        "plan: shell: a shell reads text, and command is a list"
    ]
    made = load({**plan, "shell": True, "command": "train {out} ${HOME} {{index}} {index}"})
    filled = made.command.filled({"out": "a b", "index": "1", "start": "s", "version": "v"})
    assert filled == ["/bin/sh", "-c", "train 'a b' ${HOME} {index} 1"]


def test_without_pyyaml(tmp_path: Path) -> None:
    """JSON needs nothing, and YAML says what it needs."""
    (tmp_path / "plan.yaml").write_text(EXAMPLE)
    code = "import sys; sys.modules['yaml'] = None; sys.argv[0] = 'paramdelta'; from paramdelta.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "recycle", str(tmp_path / "plan.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "plans in YAML need PyYAML" in done.stderr
    assert "pip install 'paramdelta[yaml]', or write plan.json" in done.stderr


def test_the_example_is_a_plan(tmp_path: Path) -> None:
    """As printed; with every option that it mentions; and as documented."""
    pytest.importorskip("yaml", reason="plans in YAML need PyYAML")
    printed = run("--example")
    assert printed.stdout == EXAMPLE
    for text in (EXAMPLE, EXAMPLE.replace("\n# env", "\nenv").replace("\n# alpha", "\nalpha").replace("\n# e", "\ne")):
        (tmp_path / "plan.yaml").write_text(text.replace("\n# apply", "\napply").replace("\n# work", "\nwork"))
        plan = load(tmp_path / "plan.yaml")
        assert [version.label for version in plan.versions] == ["1-base-v1", "2-base-v2", "3-v3"]
        assert plan.out == tmp_path / "recycled"
    assert plan.command.env == {"WANDB_PROJECT": "recycling"}
    assert plan.extract == {"dtype": "f32"}
    documented = Path(paramdelta.__file__).parents[1] / "docs" / "recycling.md"
    if documented.exists():
        assert f"```yaml\n{EXAMPLE}```" in documented.read_text()


def test_versions_that_do_not_fit_are_found_before_anything_is_run(models: Path, tmp_path: Path) -> None:
    """Another family, another vocabulary, another shape, a delta in place of a model, places that are not there."""
    plan = make_plan(models, tmp_path / "out")
    places = [str(models / "v1"), str(models / "nowhere"), str(models / "v3"), str(tmp_path / "other")]
    with pytest.raises(InputError, match=r"plan: versions\[1\]: [\s\S]*there is no such folder") as caught:
        recycling.preview({**plan, "versions": places, "workdir": "/nowhere"})
    assert len(caught.value.complaints) == 3
    shutil.copytree(models / "v3", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    with pytest.raises(InputError, match=r"versions\[2\]: expected a model of one family with v1, llama, got qwen3"):
        recycling.preview({**plan, "versions": [*plan["versions"][:2], str(tmp_path / "other")]})
    (shard,) = [p for p in (models / "v2").glob("*.safetensors") if "lm_head.weight" in load_file(p)]
    shutil.copytree(models / "v2", tmp_path / "grown")
    tensors = load_file(shard)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:60].copy()}, tmp_path / "grown" / shard.name)
    with pytest.raises(InputError, match=r"versions\[1\], which the delta of v1 is for: [\s\S]*lm_head[\s\S]*`apply`"):
        recycling.preview({**plan, "versions": [str(models / "v1"), str(tmp_path / "grown")]})
    paramdelta.extract(post=models / "v2", base=models / "v1", out=tmp_path / "delta")
    with pytest.raises(InputError, match="is a delta"):
        recycling.preview({**plan, "versions": [str(models / "v1"), str(tmp_path / "delta")]})
    with pytest.raises(InputError, match=r"first_delta: .*is no delta"):
        recycling.preview({**plan, "first_delta": str(models / "v2")})
    with pytest.raises(InputError, match="are one, or one lies in the other"):
        recycling.preview(plan, out=models / "v1" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex and no recycle\.json"):
        paramdelta.recycle(plan, out=tmp_path / "full", restart=True)
    assert not (tmp_path / "out").exists()
