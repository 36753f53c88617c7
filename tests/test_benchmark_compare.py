"""Comparing result files: what counts as a loss, what as noise, and what cannot be compared. No time is asserted."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are part of the source tree only", allow_module_level=True)
sys.path.append(str(ROOT))  # last: an installed paramdelta comes before the one of the source tree

from benchmarks import compare, counters, data, differences, process, results, steadiness, whole  # noqa: E402
from benchmarks.results import OURS, Metric, Record  # noqa: E402

MACHINE = {"cpu": "A", "architecture": "x86_64", "threads_allowed": 2, "isa_flags": ["avx2"], "kernel": "6.1"}


def noisy(value: float, share: float, seed: int, count: int = 11) -> tuple[float, ...]:
    """Samples within ``share`` of ``value``."""
    draw = random.Random(seed)
    return tuple(value * (1 + share * draw.uniform(-1, 1)) for _ in range(count))


def kernel(of_bound: float = 0.9, *, mood: float = 1.0, seed: int = 0, isa: str = "avx2", **more: Any) -> Record:
    """A kernel beside its roofline; ``mood`` is how fast the machine is."""
    bound = noisy(mood * 40e9, 0.3, seed)
    rates = [b * f for b, f in zip(bound, noisy(of_bound, 0.03, seed + 1), strict=True)]
    metrics = {"bandwidth": Metric("B/s", tuple(rates)), "bound": Metric("B/s", bound)}
    return Record("kernels", "bf16, chosen, 2 threads", OURS, {"threads": 2, "elements": 9, "isa": isa} | more, metrics)


def merge(contender: str = OURS, wall: float = 1.0, *, mood: float = 1.0, seed: int = 0, **counts: float) -> Record:
    """A whole merge: ``counts`` overrides counters."""
    counted = {"read": 3e9, "written": 1e9, "read_calls": 3000, "minor_faults": 9000, "peak_rss": 42e6} | counts
    metrics = {"wall": Metric("s", tuple(mood * w for w in noisy(wall, 0.03, seed, 7)))}
    metrics |= {name: Metric(whole.UNITS[name], (value,) * 7) for name, value in counted.items()}
    command = "paramdelta merge" if contender == OURS else "cat"
    return Record("merges", "1GB, tmpfs", contender, {"command": command, "threads": 2}, metrics)


def result(*records: Record, **machine: Any) -> dict[str, Any]:
    return results.document(
        records,
        machine=MACHINE | machine,
        versions={"cp": "9.1"},
        commit={"commit": None, "dirty": None},
        options={},
    )


@pytest.fixture
def verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Write two results, compare them as the command line does, return exit code and JSON document."""

    def run(old: dict[str, Any], new: dict[str, Any], *options: str) -> tuple[int, dict[str, Any]]:
        results.write(tmp_path / "old.json", old)
        results.write(tmp_path / "new.json", new)
        code = compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--json", *options])
        return code, json.loads(capsys.readouterr().out)

    return run


def losses(told: dict[str, Any]) -> set[str]:
    return {change["number"] for change in told["changes"] if change["verdict"] == "loss"}


def test_a_machine_in_another_mood_is_no_loss(verdict: Any) -> None:
    for seed in range(20):
        old = result(kernel(seed=seed), merge(seed=seed), merge("cp", 1.2, seed=seed))
        new = result(kernel(seed=seed + 50, mood=0.4), merge(mood=3, seed=seed + 50), merge("cp", 3.6, seed=seed + 50))
        code, told = verdict(old, new)
        assert (code, told["losses"], told["comparable"]) == (0, 0, True), told


def test_a_slower_kernel_is_a_loss(verdict: Any) -> None:
    code, told = verdict(result(kernel(0.9)), result(kernel(0.6, seed=9, isa="scalar")))
    assert (code, losses(told)) == (1, {"of_bound"})
    [change] = told["changes"]
    assert change["change"] == pytest.approx(0.6 / 0.9 - 1, abs=0.03)
    assert 0.05 <= change["noise"] < 0.15


def test_a_slower_merge_is_a_loss_against_the_peer_of_its_own_run(verdict: Any) -> None:
    old = result(merge(OURS, 1.0), merge("cp", 1.2))
    code, told = verdict(old, result(merge(OURS, 1.3, seed=9), merge("cp", 1.2, seed=4)))
    assert (code, losses(told)) == (1, {"time of cp over ours"})


def test_on_a_busy_machine_the_clock_is_unsure_and_counters_are_not(verdict: Any) -> None:
    old = result(merge(), merge("cp", 1.2), kernel(0.9))
    slow = (merge(OURS, 1.5), merge("cp", 1.2), kernel(0.5))
    assert verdict(old, result(*slow, load_at_start=1.4))[0] == 1
    code, told = verdict(old, result(*slow, load_at_start=1.6))
    unsure = {(c["group"], c["number"]) for c in told["changes"] if c["verdict"] == "unsure"}
    assert (code, unsure) == (0, {("merges", "time of cp over ours"), ("kernels", "of_bound")})
    assert "NEW was taken on a busy machine (load 1.6 on 2 cores)" in told["notes"]
    assert verdict(old, result(merge(read=6e9), load_at_start=1.6))[0] == 1
    one_thread = (kernel(value, threads=1) for value in (0.9, 0.5))
    assert verdict(*(result(record, load_at_start=1.6) for record in one_thread))[0] == 1


@pytest.mark.parametrize(
    ("counter", "noise", "loss"),
    [
        ("read", 3e9 * 1.0005, 6e9),
        ("written", 1e9 * 1.0005, 1e9 * 1.002),
        ("read_calls", 3003, 6000),
        ("minor_faults", 9000 * 1.04, 9000 * 1.06),
        ("peak_rss", 42e6 * 1.04, 42e6 * 1.06),
        ("instructions", 1e9 * 1.004, 1e9 * 1.006),
    ],
)
def test_a_counter_beyond_its_floor_is_a_loss(verdict: Any, counter: str, noise: float, loss: float) -> None:
    old = result(merge(instructions=1e9))
    assert verdict(old, result(merge(**{"instructions": 1e9} | {counter: noise})))[0] == 0
    code, told = verdict(old, result(merge(**{"instructions": 1e9} | {counter: loss})))
    assert (code, losses(told)) == (1, {counter})
    code, told = verdict(result(merge(**{"instructions": 1e9} | {counter: loss})), old)
    assert (code, told["losses"], told["gains"]) == (0, 0, 1)


def test_counters_of_peers_are_theirs(verdict: Any) -> None:
    assert verdict(result(merge(), merge("cp")), result(merge(), merge("cp", read=9e9)))[0] == 0


def test_something_from_nothing_is_a_loss_beyond_the_grain(verdict: Any) -> None:
    old = result(merge(storage_read=0))
    assert verdict(old, result(merge(storage_read=4096)))[0] == 0
    code, told = verdict(old, result(merge(storage_read=1e9)))
    assert (code, losses(told)) == (1, {"storage_read"})
    [change] = [c for c in told["changes"] if c["number"] == "storage_read"]
    assert (change["change"], change["noise"], change["new"]) == (None, None, 1e9)
    comparison = differences.compare(old, result(merge(storage_read=1e9)))
    assert [compare.row(c)[4:6] for c in comparison.with_verdict("loss")] == [("of nothing", "of nothing")]


def test_noise_is_what_the_samples_show() -> None:
    steady = differences.Number(differences.FRACTION, (0.5,) * 11)
    two_moods = differences.Number(differences.FRACTION, (0.4,) * 6 + (0.6,) * 5)
    key = ("kernels", "case", OURS)
    assert differences.judge(key, "of_bound", steady, steady).noise == 0.05
    # Below the old median lies nothing; above the new one reaches the other mood.
    fallen = differences.Number(differences.FRACTION, (0.3,) * 6 + (0.45,) * 5)
    change = differences.judge(key, "of_bound", two_moods, fallen)
    assert change.noise == pytest.approx((0.0 + 0.15) / 0.4)
    assert (change.change, change.verdict) == (pytest.approx(-0.25), "same"), "0.45 lies above the old 0.4"
    other_mood = differences.Number(differences.FRACTION, (0.4,) * 5 + (0.6,) * 6)
    assert differences.judge(key, "of_bound", other_mood, two_moods).verdict == "same"
    assert differences.judge(key, "of_bound", two_moods, other_mood).verdict == "same"
    one_burst = differences.Number(differences.FRACTION, (0.1, *(0.5,) * 10))
    slower = differences.Number(differences.FRACTION, (0.44,) * 11)
    assert differences.judge(key, "of_bound", one_burst, slower).verdict == "loss", "one burst of noise hides nothing"


def test_few_samples_count_to_the_outermost() -> None:
    few = differences.Number(differences.FRACTION, (0.4, 0.5, 0.6))
    assert (few.low, few.value, few.high) == (0.4, 0.5, 0.6)
    many = differences.Number(differences.FRACTION, tuple(x / 10 for x in range(11)))
    assert (many.low, many.value, many.high) == (pytest.approx(0.1), 0.5, pytest.approx(0.9))


def test_another_machine_cannot_be_compared_unless_it_is_allowed(verdict: Any) -> None:
    old, new = result(kernel()), result(kernel(0.3), cpu="B")
    code, told = verdict(old, new)
    assert (code, told["comparable"], told["reason"]) == (2, False, "another machine: cpu: A in OLD, B in NEW")
    code, told = verdict(old, new, "--allow-other-machine")
    assert code == 1
    assert "cpu: A in OLD, B in NEW" in told["notes"]


def test_files_without_a_common_case_cannot_be_compared(verdict: Any) -> None:
    code, told = verdict(result(kernel()), result(merge()))
    assert (code, told["reason"]) == (2, "no record of ours is in both files")
    assert told["missing"] == ["kernels: bf16, chosen, 2 threads"]
    assert told["added"] == ["merges: 1GB, tmpfs"]
    code, told = verdict(result(kernel()), result(kernel(elements=10)))
    assert (code, told["reason"]) == (2, "no case did the same work in both files")
    assert told["unlike"] == ["kernels: bf16, chosen, 2 threads: elements 9 in OLD, 10 in NEW"]


def test_a_case_that_broke_is_told_with_its_reason(verdict: Any) -> None:
    broken = replace(merge(), metrics={}, skipped="failed: exit code 3")
    code, told = verdict(result(kernel(), merge()), result(kernel(), broken))
    assert (code, told["missing"]) == (0, ["merges: 1GB, tmpfs (failed: exit code 3)"])


def test_tables_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(tmp_path / "old.json", result(kernel(0.9), merge(), merge("cp")))
    results.write(tmp_path / "new.json", result(kernel(0.5), merge(peak_rss=20e6), merge("cp"), kernel="6.2"))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    text = capsys.readouterr().out
    assert "losses: 1" in text
    assert "gains: 1" in text
    assert "-52.4%" in text
    assert "beside the code: kernel: 6.1 in OLD, 6.2 in NEW" in text
    assert "7 numbers compared, 1 lost, 1 gained" in text


def test_a_file_that_is_no_result_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        compare.main([str(tmp_path / "x.json"), str(tmp_path / "x.json")])
    assert caught.value.code == 2


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_published_results_stay_readable_and_equal_themselves(path: Path) -> None:
    content = results.read(path)
    comparison = differences.compare(content, content)
    assert comparison.changes
    assert compare.exit_code(comparison) == 0


READS_TWICE = """
import dataclasses, numpy, paramdelta.engine as engine
run = engine.run
def run_twice(work, *rest, **options):
    terms = numpy.repeat(work.terms, 2)
    terms["alpha"] /= 2
    spans = work.spans.copy()
    spans["first_term"] *= 2
    spans["n_terms"] *= 2
    return run(dataclasses.replace(work, terms=terms, spans=spans), *rest, **options)
engine.run = run_twice
from paramdelta.cli import main
main()
"""


def test_a_real_merge_that_reads_twice_is_a_loss(tmp_path: Path, verdict: Any) -> None:
    folders = data.write_inputs(tmp_path / "in", "20MB")
    contender = whole.ours(folders, tmp_path / "out", 1)
    python, _, _, *arguments = contender.command
    files = []
    for command in (contender.command, contender.command, (python, "-c", READS_TWICE, *arguments)):
        taken = [replace(contender, command=tuple(command))]
        records = whole.take_turns("merges", "20MB", taken, tmp_path / "out", rounds=3, parameters={}, log=print)
        files.append(result(*records))
    if "read" not in files[0]["records"][0]["metrics"]:
        pytest.skip("this kernel does not tell what a process read")
    same = {c["number"]: c for c in verdict(files[0], files[1])[1]["changes"]}
    assert {same[number]["verdict"] for number in ("read", "written", "read_calls", "write_calls")} == {"same"}
    code, told = verdict(files[0], files[2])
    assert code == 1
    assert "read" in losses(told)
    [read] = [c for c in told["changes"] if c["number"] == "read"]
    assert read["change"] > 0.5, "five inputs instead of three, and what starting takes"


def test_counts_reach_threads_and_children() -> None:
    """The counter's own way through fork and exec, shown by page faults, which every machine counts."""
    try:
        counter = counters.Counter(on_exec=True, kind=counters.SOFTWARE, event=counters.PAGE_FAULTS)
    except counters.CounterError as error:
        pytest.skip(str(error))
    code = "import threading; t = threading.Thread(target=lambda: bytearray(b'a') * 20_000_000); t.start(); t.join()"
    import subprocess

    held = bytearray(b"a") * 30_000_000  # not counted: faults of this process
    subprocess.run([sys.executable, "-c", code], check=True)
    count = counter.stop()
    counter.close()
    assert count is not None
    assert 20_000_000 // 4096 < count < 60_000_000 // 4096 < 2 * len(held)


def test_instructions_are_counted_or_the_reason_is_told() -> None:
    usage = process.measure([sys.executable, "-c", "sum(range(100_000))"])
    if counters.why_not() is None:
        assert usage.instructions is not None
        assert usage.instructions > 100_000
    else:
        assert usage.instructions is None
        assert len(str(counters.why_not())) > 10


def test_a_process_tells_what_it_moved() -> None:
    code = "import os; f = os.open('/dev/zero', 0); [os.read(f, 1000) for _ in range(5000)]"
    usage = process.measure([sys.executable, "-c", code])
    assert usage.minor_faults > 0
    if usage.read is not None:
        assert usage.read >= 5_000_000
        assert usage.read_calls is not None
        assert 5000 <= usage.read_calls < 6000


def test_steadiness_tells_the_pairs_that_pass() -> None:
    old, same, slow = (result(kernel(value, seed=i)) for i, value in enumerate((0.9, 0.9, 0.5)))
    told = steadiness.summarise([differences.compare(old, same), differences.compare(same, slow)])
    assert "pair 1: 1 numbers, 0 lost, 0 gained" in told
    assert "pair 2: 1 numbers, 1 lost, 0 gained" in told
    assert told.endswith("1 of 2 pairs pass")
