"""Recycling with a trainer: transformers and torch take steps of SGD, are killed in the middle, and continue."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from recycled import HERE, digests, make_plan, run

LOSS = re.compile(r"^loss (\d+\.\d+) -> (\d+\.\d+)$", re.MULTILINE)


def test_fine_tuning_killed_in_the_middle(models: Path, tmp_path: Path) -> None:
    """The second version is fine-tuned from the delta of the first; killed with its command after a step, the recycling
    comes to the same bytes. The recycled start is better than the plain version, of which the first shows the loss."""
    pytest.importorskip("torch", reason="the trainer of this test is made of torch")
    flag = tmp_path / "stop"
    script = f'exec {sys.executable} {HERE / "finetune.py"} {{start}} {{out}} $(cat "{flag}" 2>/dev/null)'
    plan = make_plan(
        models, Path("whole"), versions=[str(models / "v1"), str(models / "v2")], command=script, shell=True
    )
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan, "out": "whole"}))
    begun = run(path, "--until", "1")
    assert begun.returncode == 0, begun.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    undisturbed = run(path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    flag.write_text("--stop-parent")
    killed = run(path, "--out", tmp_path / "killed")
    assert killed.returncode == -9
    flag.unlink()
    while (again := run(path, "--out", tmp_path / "killed")).returncode == 1:
        assert "still lives" in again.stderr
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    state = json.loads((tmp_path / "killed" / "recycle.json").read_text())
    assert [attempt.get("exit_code") for attempt in state["versions"][1]["command"]["attempts"]] == [None, 0]
    losses = [LOSS.findall((tmp_path / "whole" / "logs" / f"{i}-v{i}.log").read_text()) for i in (1, 2)]
    ((first, tuned),), ((recycled, again_tuned),) = ([tuple(map(float, pair)) for pair in found] for found in losses)
    assert tuned < first
    assert again_tuned < recycled < first
