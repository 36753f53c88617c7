"""A recycling that is killed, anywhere and again and again, continues and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recycled import digests, make_plan

import paramdelta
from paramdelta import recycling
from paramdelta.errors import StorageError

STILL_ALIVE = 7
MOST_RUNS = 400


def carry_out(plan: dict[str, Any], kill_before: int | None) -> tuple[int, int]:
    """Recycle in a process of its own that is killed just before its ``kill_before``-th call that changes or syncs
    something on disk, or starts or ends the command; return its status, and how many such calls there were."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with open(read, "rb") as counts:
            count = len(counts.read())
        return os.waitpid(child, 0)[1], count
    code = 1
    try:
        os.close(read)
        os.set_inheritable(write, False)
        _count_calls(write, kill_before)
        paramdelta.recycle(plan, threads=1)
        code = 0
    except StorageError as error:
        code = STILL_ALIVE if "still lives" in str(error) else 1
        if code == 1:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _count_calls(pipe: int, kill_before: int | None) -> None:
    left = [kill_before]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            os.write(pipe, b".")
            return call(*arguments, **options)

        return wrapped

    for module, names in (
        (os, ("fsync", "rename", "replace", "mkdir", "unlink")),
        (shutil, ("rmtree",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    subprocess.Popen.__init__ = counted(subprocess.Popen.__init__)  # type: ignore[method-assign]
    subprocess.Popen.poll = counted(subprocess.Popen.poll)  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start and each delta is several segments, which are continued within."""
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(1 << 15))


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """What an undisturbed recycling leaves that keeps everything, and how many calls it takes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, calls = carry_out(make_plan(models, out, keep=["starts", "outs"]), None)
    assert status == 0
    made = digests(out)
    assert {"/".join(Path(name).parts[:2]) for name in made} == {
        *(f"outs/{i}-v{i}" for i in (1, 2, 3)),
        *(f"deltas/{i}-v{i}" for i in (1, 2, 3)),
        *(f"starts/{i}-v{i}" for i in (2, 3)),
    }
    return made, calls


def continued(plan: dict[str, Any], kills: Callable[[int], int | None]) -> list[int]:
    """Repeat a recycling until it ends, killed as ``kills`` says of its runs; return the statuses."""
    statuses = []
    for run in range(MOST_RUNS):
        status, _ = carry_out(plan, kills(run))
        if os.waitstatus_to_exitcode(status) == STILL_ALIVE:  # the command that the killed one had started
            time.sleep(0.05)
            continue
        statuses.append(status)
        if not os.WIFSIGNALED(status):
            break
    return statuses


@pytest.mark.parametrize("eighth", range(8))
def test_killed_once(models: Path, whole: tuple[dict[str, str], int], eighth: int, tmp_path: Path) -> None:
    """One kill, in one eighth of the recycling, then an undisturbed run."""
    made, calls = whole
    place = 2 + eighth * calls // 8 + random.Random(eighth).randrange(calls // 8)
    out = tmp_path / "out"
    statuses = continued(make_plan(models, out, keep=["starts", "outs"]), lambda run: None if run else place)
    assert [os.WIFSIGNALED(status) for status in statuses] == [True, False]
    assert statuses[-1] == 0
    assert digests(out) == made, f"killed before call {place} of {calls}"
    assert sorted(os.listdir(out)) == ["deltas", "lock", "logs", "outs", "recycle.json", "starts"]


def test_killed_again_and_again(models: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """Never left alone for long, and nothing kept but deltas."""
    chance = random.Random(1)
    out = tmp_path / "out"
    statuses = continued(make_plan(models, out, keep=[]), lambda run: chance.randint(15, 40 + run))
    assert statuses[-1] == 0
    assert len(statuses) > 5
    assert digests(out) == {name: digest for name, digest in whole[0].items() if name.startswith("deltas")}


def test_a_model_that_is_touched(models: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """The journal of an extraction goes by times of modification; a recycling goes on without it."""
    shutil.copytree(models, tmp_path / "models")
    for place in range(25, whole[1]):
        out = tmp_path / str(place)
        plan = make_plan(tmp_path / "models", out, keep=["starts", "outs"])
        assert os.WIFSIGNALED(carry_out(plan, place)[0])
        journal = out / "deltas" / ".1-v1.partial" / "journal"
        if journal.exists() and len(journal.read_text().splitlines()) > 1:
            break
    (tmp_path / "models" / "v1" / "model-00001-of-00002.safetensors").touch()
    assert carry_out(plan, None)[0] == 0
    assert digests(out) == whole[0]


def test_a_kill_leaves_the_state_readable(models: Path, tmp_path: Path) -> None:
    """Whatever is cut short, the file is the one before or the one after."""
    plan = make_plan(models, tmp_path / "out")
    done = 0
    for place in (3, 9, 20, 25, 40):
        carry_out(plan, place)
        steps = recycling.preview(plan).steps
        assert sum(step.done for step in steps) >= done
        done = sum(step.done for step in steps)
    assert done
