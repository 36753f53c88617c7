"""Many processes share one merge, and ``paramdelta finalize`` publishes it: the same bytes as one process, and what
goes wrong costs nothing that is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_folders import SEGMENT, digests, merge_arguments, run, start, write

import paramdelta
from paramdelta import engine, gathering, merging, publish, resuming
from paramdelta.errors import InputError, NonFiniteError, PrecisionError, StorageError
from paramdelta.plan import Plan, make_request
from paramdelta.ranks import Rank, find_rank


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))
    yield
    publish.kept.clear()


def plan_of(folders: dict[str, Path], out: Path, **options: object) -> Plan:
    return merging.prepare(make_request(**folders, out=out, **options))


def part(folders: dict[str, Path], out: Path, rank: int, world: int, **options: object) -> None:
    gathering.merge_part(plan_of(folders, out, **options), Rank(number=rank, world=world))


def test_four_processes_then_finalize(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    paramdelta.merge(**folders, out=tmp_path / "whole")
    command = merge_arguments(folders, out, "--json")
    ranks = [start(*command, RANK=str(rank), WORLD_SIZE="4") for rank in range(3)]
    ranks.append(start(*command, "--rank=3", "--world-size=4", RANK="7", WORLD_SIZE="9"))
    for number, process in enumerate(ranks):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        report = json.loads(stdout)
        assert (report["kind"], report["rank"], report["ranks"]) == ("rank", number, 4)
        assert report["source"] == ("RANK, WORLD_SIZE" if number < 3 else "--rank")
        assert report["bytes_written"] > 0
    assert not out.exists()
    done = run("-m", "paramdelta", "finalize", str(out))
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    again = run("-m", "paramdelta", "finalize", str(out))
    assert again.returncode == 2
    assert "is published already" in again.stderr


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (3, {"format": "fp8-tensor"}),
        (20, {"format": "fp8-tensor"}),  # more than there are weights
        (3, {"format": "nvfp4", "alpha": 0.5}),
        (20, {"format": "nvfp4"}),
        (3, {"format": "fp8-block"}),
        (20, {"max_shard_size": "700kB"}),
    ],
    ids=str,
)
def test_the_same_folder(tmp_path: Path, options: dict[str, object], world: int) -> None:
    folders, out = write(tmp_path, rows=128), tmp_path / "out"
    whole = paramdelta.merge(**folders, out=tmp_path / "whole", **options)
    plan = plan_of(folders, out, **options)
    for rank in reversed(range(world)):
        gathering.merge_part(plan, Rank(number=rank, world=world))
    report = gathering.finalize(out)
    assert digests(out) == digests(tmp_path / "whole")
    assert report.bytes_written == whole.bytes_written
    assert [q.format for q in report.quantised] == [q.format for q in whole.quantised]
    for ours, theirs in zip(report.quantised, whole.quantised, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error)


def test_ranks_that_are_missing_or_unfinished_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    paramdelta.merge(**folders, out=tmp_path / "whole")
    part(folders, out, 0, 4)
    part(folders, out, 2, 4)
    cut_short(monkeypatch, folders, out, 3, 4)
    before = digests(tmp_path / ".out.partial" / "output")
    with pytest.raises(StorageError, match=r"of 4 ranks, never began: 1; not finished: 3\. .*nothing is lost"):
        gathering.finalize(out)
    failed = run("-m", "paramdelta", "finalize", str(out))
    assert failed.returncode == 1
    assert digests(tmp_path / ".out.partial" / "output") == before
    part(folders, out, 1, 4)
    plan = plan_of(folders, out)
    assert gathering.merge_part(plan, Rank(number=3, world=4)).resumed_bytes > 0
    assert gathering.finalize(out).resumed_bytes > 0
    assert digests(out) == digests(tmp_path / "whole")


class CutShortError(Exception):
    """What stops a rank here."""


def cut_short(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], out: Path, rank: int, world: int) -> None:
    """Let a rank carry out two segments, then fail."""
    done, left = engine.carry_out, [2]

    def carry_out(*arguments: object, **options: object) -> engine.RunResult:
        if not left[0]:
            raise CutShortError
        left[0] -= 1
        return done(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(resuming.engine, "carry_out", carry_out)
        with pytest.raises(CutShortError):
            part(folders, out, rank, world)


def test_a_rank_that_is_repeated_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    plan = plan_of(folders, out, format="fp8-tensor")
    whole = gathering.merge_part(plan, Rank(number=0, world=2))
    again = gathering.merge_part(plan, Rank(number=0, world=2))
    assert (again.bytes_read, again.bytes_written, again.resumed_bytes) == (0, 0, whole.bytes_written)


@pytest.mark.parametrize(
    ("world", "options", "difference"),
    [
        (4, {"alpha": 0.5}, r"request\.alphas"),
        (3, {}, r"ranks: 4 then, 3 now"),
        (4, {"max_shard_size": "700kB"}, r"plan: "),
    ],
    ids=["request", "ranks", "plan"],
)
def test_ranks_that_disagree_are_refused(
    tmp_path: Path, world: int, options: dict[str, object], difference: str
) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    part(folders, out, 0, 4)
    before = digests(tmp_path / ".out.partial" / "output")
    with pytest.raises(InputError, match=rf"{difference}[\s\S]*give every rank the command that was begun"):
        part(folders, out, 1, world, **options)
    assert digests(tmp_path / ".out.partial" / "output") == before
    assert not (tmp_path / ".out.partial" / f"journal-1-of-{world}").exists()


def test_changed_inputs_are_refused(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    part(folders, out, 0, 2)
    part(folders, out, 1, 2)
    file = folders["post"] / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"inputs\.post\.model-00002-of-00002\.safetensors\.last_mib"):
        part(folders, out, 1, 2)
    with pytest.raises(InputError, match=r"last_mib[\s\S]*restore the inputs"):
        gathering.finalize(out)
    assert not out.exists()


def test_two_jobs_at_once(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    seen: list[str] = []

    def while_it_runs(_read: int, _written: int) -> None:
        if seen:
            return
        seen.append("")
        with pytest.raises(StorageError, match=r"out: another merge is writing it"):
            paramdelta.merge(**folders, out=out)
        with pytest.raises(StorageError, match=r"rank 0 of 2 of this merge is running already"):
            part(folders, out, 0, 2)
        with pytest.raises(StorageError, match=r"another merge is writing it"):
            gathering.finalize(out)
        part(folders, out, 1, 2)
        seen.append("rank 1 ran beside it")

    gathering.merge_part(plan_of(folders, out), Rank(number=0, world=2), on_progress=while_it_runs)
    assert seen[1:] == ["rank 1 ran beside it"]
    with publish.Staging(tmp_path / "other"), pytest.raises(StorageError, match=r"another merge is writing it"):
        part(folders, tmp_path / "other", 0, 2)
    gathering.finalize(out)


def test_one_process_and_ranks_do_not_continue_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    part(folders, out, 0, 2)
    for limit in (SEGMENT, 1 << 30):  # with a journal of its own, and without
        monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(limit))
        with pytest.raises(InputError, match=r"ranks: 2 then, 1 now"):
            paramdelta.merge(**folders, out=out)
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(SEGMENT))
    part(folders, out, 1, 2)
    gathering.finalize(out)  # the refusals took nothing away
    report = paramdelta.merge(**folders, out=tmp_path / "other")
    assert digests(out) == digests(report.out or out)

    part(folders, tmp_path / "anew", 0, 2)
    paramdelta.merge(**folders, out=tmp_path / "anew", restart=True)
    assert digests(tmp_path / "anew") == digests(out)

    alone = tmp_path / ".third.partial"
    (alone / "output").mkdir(parents=True)
    who = paramdelta.journal.identity(plan_of(folders, tmp_path / "third"))
    (alone / "journal").write_text(json.dumps(who) + "\n")
    with pytest.raises(InputError, match=r"ranks: 1 then, 2 now"):
        part(folders, tmp_path / "third", 0, 2)


def test_output_files_that_are_gone_are_made_anew(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    part(folders, out, 0, 2)
    (tmp_path / ".out.partial" / "output" / "model-00002-of-00002.safetensors").unlink()
    part(folders, out, 1, 2)
    with pytest.raises(StorageError, match=r"never began: 0"):
        gathering.finalize(out)
    part(folders, out, 0, 2)
    gathering.finalize(out)
    paramdelta.merge(**folders, out=tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_what_is_not_finite_or_too_lossy_is_not_published(tmp_path: Path) -> None:
    folders, out = write(tmp_path, inf=True), tmp_path / "out"
    part(folders, out, 0, 2)
    part(folders, out, 1, 2)
    with pytest.raises(NonFiniteError) as failed:
        gathering.finalize(out)
    assert [(row.tensor, row.inf) for row in failed.value.report.nonfinite] == [("model.embed_tokens.weight", 1)]
    refused = run("-m", "paramdelta", "finalize", str(out), "--json")
    assert (refused.returncode, json.loads(refused.stdout)["error"]) == (3, "NonFiniteError")
    assert not out.exists()
    assert gathering.finalize(out, allow_nonfinite=True).nonfinite
    folders = write(tmp_path / "second")
    part(folders, tmp_path / "lossy", 0, 1 + 1, format="nvfp4")
    part(folders, tmp_path / "lossy", 1, 1 + 1, format="nvfp4")
    with pytest.raises(PrecisionError):
        gathering.finalize(tmp_path / "lossy", max_quant_error=0.001)
    assert gathering.finalize(tmp_path / "lossy").out


def test_an_existing_folder_is_replaced_only_where_it_was_asked_for(tmp_path: Path) -> None:
    folders, out = write(tmp_path), tmp_path / "out"
    part(folders, out, 0, 2)
    part(folders, out, 1, 2)
    paramdelta.merge(**write(tmp_path / "second", seed=1), out=tmp_path / "between")
    (tmp_path / "between").rename(out)
    with pytest.raises(InputError, match=r"exists already"):
        gathering.finalize(out)
    gathering.finalize(out, overwrite=True)
    paramdelta.merge(**folders, out=tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_ranks_alone_cannot_begin_anew(tmp_path: Path) -> None:
    folders = write(tmp_path)
    failed = run(*merge_arguments(folders, tmp_path / "out", "--rank=0", "--world-size=2", "--restart"))
    assert failed.returncode == 2
    assert f"rm -r {tmp_path / '.out.partial'}" in failed.stderr


def test_finalize_without_a_merge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no merge of several ranks is unfinished"):
        gathering.finalize(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (1, 4, "RANK, WORLD_SIZE")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (3, 8, "SLURM_PROCID, SLURM_NTASKS")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script, not a task
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            (1, 2, "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE"),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, "PMI_RANK, PMI_SIZE")),
    ],
    ids=str,
)
def test_the_rank_comes_from_the_launcher(environment: dict[str, str], expected: tuple[int, int, str] | None) -> None:
    found = find_rank(None, None, environment)
    assert (found and (found.number, found.world, found.source)) == expected
    assert find_rank(None, 1, environment) is None


@pytest.mark.parametrize(
    ("rank", "world", "environment"),
    [
        (0, None, {}),
        (None, 2, {}),
        (2, 2, {}),
        (1, 1, {}),
        (None, None, {"RANK": "4", "WORLD_SIZE": "4"}),
        (None, None, {"RANK": "x", "WORLD_SIZE": "4"}),
    ],
    ids=str,
)
def test_ranks_that_make_no_sense(rank: int | None, world: int | None, environment: dict[str, str]) -> None:
    with pytest.raises(InputError):
        find_rank(rank, world, environment)
