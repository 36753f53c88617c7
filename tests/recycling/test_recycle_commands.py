"""Commands that fail, are told to stop, outlive their recycling, or leave what is no checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recycled import ENVIRONMENT, command, digests, make_plan, run

import paramdelta
from paramdelta.errors import InputError
from paramdelta.recycling import CommandError


def written(folder: Path, plan: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def state(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "recycle.json").read_text())
    return document


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def start(plan: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a recycling and wait until its command is at work."""
    process = subprocess.Popen(
        command(plan),
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = plan.parent / "out" / "logs" / "1-v1.log"
    wait_for(lambda: (log.exists() and "working on" in log.read_text()) or process.poll() is not None)
    return process


def test_a_command_that_fails(models: Path, tmp_path: Path) -> None:
    """Its exit code, its last lines, its log, and what comes then are said; then it is run again."""
    plan = written(tmp_path, make_plan(models, tmp_path / "out"))
    failed = run(plan, FAIL="50")
    assert failed.returncode == 1
    log = tmp_path / "out" / "logs" / "1-v1.log"
    for words in (
        "error: the command of version 1 of 3 (v1) ended with exit code 3",
        str(log),
        "\n    line 30\n",
        "\n    line 49\n",
        "runs this command again",
        "is then removed",
        "--restart-from 1",
    ):
        assert words in failed.stderr
    assert "    line 29\n" not in failed.stderr
    attempt = state(tmp_path / "out")["versions"][0]["command"]["attempts"][0]
    assert attempt["exit_code"] == 3
    assert (tmp_path / "out" / "outs" / "1-v1" / "half-written").exists()
    again = run(plan, "--json")
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    assert (document["kind"], document["complete"]) == ("recycle", True)
    assert [version["attempts"] for version in document["versions"]] == [2, 1, 1]
    assert log.read_text().count("# attempt") == 2
    paramdelta.recycle(make_plan(models, tmp_path / "whole"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(CommandError, match=r"ended with signal 9 \(SIGKILL\)") as killed:
        paramdelta.recycle(make_plan(models, tmp_path / "shot", command="kill -9 $$", shell=True))
    assert killed.value.command_exit_code == -9


def test_what_is_unfinished_may_stay(models: Path, tmp_path: Path) -> None:
    """With `unfinished: keep` a command finds what it had written."""
    plan = make_plan(models, tmp_path / "out", shell=True, unfinished="keep")
    plan["command"] = "if [ -e {out} ]; then cp {start}/* {out}; else mkdir {out}; exit 9; fi"
    with pytest.raises(CommandError, match="exit code 9"):
        paramdelta.recycle(plan, until=1)
    assert paramdelta.recycle(plan, until=1).versions[0].attempts == 2


def test_a_program_that_is_not_there(models: Path, tmp_path: Path) -> None:
    plan = written(tmp_path, make_plan(models, tmp_path / "out", command=["no-such-trainer", "{out}"]))
    failed = run(plan)
    assert failed.returncode == 1
    assert "no-such-trainer: cannot be started: No such file or directory" in failed.stderr


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        ("nothing", 1, ["ended with exit code 0, but left nothing in"]),
        ("deeper", 2, ["has to leave the tuned checkpoint there", "there are checkpoints in checkpoint-8"]),
        ("other-family", 2, ["expected a model of one family with v1, llama, got mistral"]),
    ],
)
def test_what_a_command_leaves_is_checked(
    models: Path, tmp_path: Path, spoil: str, code: int, words: list[str]
) -> None:
    plan = written(tmp_path, make_plan(models, tmp_path / "out"))
    refused = run(plan, "--until", "1", SPOIL=spoil)
    assert refused.returncode == code, refused.stderr
    assert all(word in refused.stderr for word in words), refused.stderr
    out = tmp_path / "out" / "outs" / "1-v1"
    if spoil == "deeper":  # repaired by hand, it is taken as it is
        for path in (out / "checkpoint-8").iterdir():
            path.rename(out / path.name)
        (out / "checkpoint-8").rmdir()
    elif spoil == "other-family":  # removed, the command runs again
        assert run(plan, "--until", "1").returncode == 2
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    again = run(plan, "--until", "1")
    assert again.returncode == 0, again.stderr
    assert len(state(tmp_path / "out")["versions"][0]["command"]["attempts"]) == (1 if spoil == "deeper" else 2)
    paramdelta.recycle(make_plan(models, tmp_path / "whole"), until=1)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_goes_to_the_command(models: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Which takes its time to stop, and may call that a success: it is run again all the same."""
    plan = written(tmp_path, make_plan(models, tmp_path / "out"))
    process = start(plan, SLEEP="30", ON_SIGNAL="0.3")
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"told to stop by {number.name}\nstopped in order" in told
    assert "interrupted: the same command continues" in told
    assert "fine-tune v1 with the command" in told
    attempt = state(tmp_path / "out")["versions"][0]["command"]["attempts"][0]
    assert (attempt["exit_code"], attempt["interrupted"]) == (0, True)
    again = run(plan)
    assert again.returncode == 0, again.stderr
    paramdelta.recycle(make_plan(models, tmp_path / "whole"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_second_and_a_third_signal(models: Path, tmp_path: Path) -> None:
    """For commands that take too long to stop."""
    plan = written(tmp_path, make_plan(models, tmp_path / "out"))
    process = start(plan, SLEEP="30", ON_SIGNAL="30")
    log = tmp_path / "out" / "logs" / "1-v1.log"
    for words in ("told to stop by SIGINT", "told to stop by SIGTERM"):
        process.send_signal(signal.SIGINT)
        wait_for(lambda words=words: words in log.read_text())  # type: ignore[misc]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert state(tmp_path / "out")["versions"][0]["command"]["attempts"][0]["exit_code"] == -9


def test_two_recyclings_in_one_folder(models: Path, tmp_path: Path) -> None:
    plan = written(tmp_path, make_plan(models, tmp_path / "out"))
    first = start(plan, SLEEP="1")
    second = run(plan)
    assert second.returncode == 1
    assert "another recycling works there" in second.stderr
    assert run(plan, "--dry-run").returncode == 0
    first.communicate(timeout=30)
    assert first.returncode == 0


def test_a_command_that_outlives_its_recycling(models: Path, tmp_path: Path) -> None:
    """It may still write: nothing is begun, or removed, before it has ended."""
    plan = written(tmp_path, make_plan(models, tmp_path / "out"))
    first = start(plan, SLEEP="60")
    first.kill()
    first.communicate(timeout=30)
    attempt = state(tmp_path / "out")["versions"][0]["command"]["attempts"][0]
    number = attempt["process"]
    for options in ([], ["--restart"]):
        refused = run(plan, *options)
        assert refused.returncode == 1
        assert f"still lives (process {number}) and may write there" in refused.stderr
        assert f"kill {number}" in refused.stderr
    assert (tmp_path / "out" / "outs" / "1-v1" / "half-written").exists()
    os.kill(number, signal.SIGKILL)
    wait_for(lambda: run(plan, "--until", "1").returncode == 0)
    attempts = state(tmp_path / "out")["versions"][0]["command"]["attempts"]
    assert [a.get("exit_code") for a in attempts] == [None, 0]


def test_a_command_that_writes_into_its_start(models: Path, tmp_path: Path) -> None:
    """Into the first version's own folder, of which the delta would be wrong."""
    shutil.copytree(models, tmp_path / "models")
    plan = make_plan(tmp_path / "models", tmp_path / "out", shell=True)
    plan["command"] = "cp -r {start} {out}; rm -f {start}/generation_config.json"
    with pytest.raises(InputError, match=r"v1: changed while version 1 of 3 \(v1\) was made of it"):
        paramdelta.recycle(plan)


def test_what_a_good_command_leaves_running_is_no_matter(models: Path, tmp_path: Path) -> None:
    plan = make_plan(models, tmp_path / "out", shell=True)
    plan["command"] = "cp -r {start} {out}; sleep 5 &"
    assert paramdelta.recycle(plan, until=2).versions[1].delta
