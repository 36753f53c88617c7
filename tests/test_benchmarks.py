"""The benchmark suite's own logic: schema, ratios, rendering, and that its parts run. No time is asserted."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are part of the source tree only", allow_module_level=True)
sys.path.append(str(ROOT))  # last: an installed paramdelta comes before the one of the source tree

from benchmarks import bound, data, machine, pooled, process, report, results, whole  # noqa: E402
from benchmarks.peers import compare_mergekit, mergekit  # noqa: E402
from benchmarks.results import Metric, Record  # noqa: E402


def kernel_record() -> Record:
    rate, roof = Metric("B/s", (40e9, 30e9, 20e9)), Metric("B/s", (50e9, 40e9, 45e9))
    parameters = {"merge": "bf16 alpha 1", "isa": "avx2", "threads": 2}
    return Record(
        "kernels",
        "bf16 alpha 1, avx2",
        results.OURS,
        parameters,
        {"bandwidth": rate, "bound": roof},
        results.bound_ratios(rate, roof),
    )


def process_record(contender: str, *walls: float) -> Record:
    metrics = {
        "wall": Metric("s", walls),
        "user": Metric("s", walls),
        "sys": Metric("s", walls),
        "peak_rss": Metric("B", tuple(1e6 * wall for wall in walls)),
    }
    return Record("merges", "1GB, tmpfs", contender, {}, metrics)


def whole_document() -> dict:
    skipped = Record("merges", "1GB, tmpfs", "mergekit linear", {}, skipped="PARAMDELTA_MERGEKIT is not set")
    timed = [process_record("paramdelta", 1.0, 2.0, 3.0), process_record("cat, cat, cp", 4.0, 6.0, 5.0)]
    records = [kernel_record(), *results.compare_within_cases(timed), skipped]
    return results.document(
        records,
        machine=machine.describe_machine(),
        versions=machine.describe_versions(),
        commit=machine.describe_commit(),
        options={"quick": True},
    )


def test_share_of_the_bound_is_of_medians_and_of_bests() -> None:
    assert kernel_record().ratios == {
        "of_bound": pytest.approx(30 / 45),
        "of_bound_best": pytest.approx(40 / 50),
    }


def test_peer_ratio_is_theirs_over_ours() -> None:
    ratios = results.peer_ratios(Metric("s", (4.0, 6.0, 5.0)), Metric("s", (1.0, 2.0, 5.0)))
    assert ratios == {"times_ours": 2.5, "times_ours_best": 4.0, "times_ours_paired": 3.0}


def test_ratios_stay_within_a_case() -> None:
    other = Record("many", "1GB, tmpfs", "cat, cat, cp", {}, {"wall": Metric("s", (1.0,))})
    ours, theirs, alone = results.compare_within_cases(
        [process_record("paramdelta", 1.0), process_record("torch script", 5.0), other]
    )
    assert ours.ratios == {}
    assert theirs.ratios["times_ours"] == 5.0
    assert alone.ratios == {}


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    made = whole_document()
    results.write(tmp_path / "new" / "result.json", made)
    again = results.read(tmp_path / "new" / "result.json")
    assert again == made
    assert results.records_of(again)[0] == kernel_record()


@pytest.mark.parametrize(
    ("break_it", "fault"),
    [
        (lambda d: d.update(schema="other/1"), "not a result file"),
        (lambda d: d.update(machine=None), "machine: expected an object"),
        (lambda d: d.update(records={}), "records: expected a list"),
        (lambda d: d["records"][0].update(group="other"), r"records\[0\]: group: expected one of"),
        (lambda d: d["records"][0].pop("ratios"), r"records\[0\]: expected exactly"),
        (lambda d: d["records"][0].update(skipped="no reason"), "either metrics or the reason"),
        (lambda d: d["records"][0]["metrics"]["bound"].update(unit="GB"), "bound: expected a unit"),
        (lambda d: d["records"][0]["metrics"]["bound"].update(samples=[]), "bound: expected finite samples"),
        (lambda d: d["records"][0]["metrics"]["bound"].update(samples=[-1.0]), "bound: expected finite samples"),
        (lambda d: d["records"][0]["ratios"].update(of_bound=None), "ratio of_bound: expected a finite number"),
    ],
    ids=lambda value: "" if callable(value) else value.split(":")[0],
)
def test_a_broken_result_is_refused(break_it: object, fault: str) -> None:
    made = whole_document()
    break_it(made)  # type: ignore[operator]
    with pytest.raises(ValueError, match=fault):
        results.check(made)


def test_a_result_tells_no_paths() -> None:
    text = json.dumps(whole_document())
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


def test_report_renders_every_table() -> None:
    text = report.render(whole_document())
    assert "| bf16 alpha 1 | avx2 | 2 | 30.0 | 45.0 | 0.67 | 0.80 |" in text
    assert "| 1GB, tmpfs | paramdelta | 2.000 | 2.000 | 2.000 | 3 | 1 |" in text
    assert "| 1GB, tmpfs | cat, cat, cp | 5.000 | 5.000 | 5.000 | 6 | 2.50 |" in text
    assert "| 1GB, tmpfs | mergekit linear | skipped |" in text
    assert "- 1GB, tmpfs, mergekit linear: PARAMDELTA_MERGEKIT is not set" in text
    assert "### Start" not in text, "a group that was not measured has no table"


def test_report_command_prints_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(tmp_path / "r.json", whole_document())
    assert report.main([str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out == report.render(results.read(tmp_path / "r.json"))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_roofline_loop_combines_the_three_streams(threads: int) -> None:
    if reason := bound.why_not():
        pytest.skip(reason)
    buffers = bound.allocate((65536,) * 4)
    rng = np.random.default_rng(0)
    for stream in buffers.inputs:
        stream[:] = rng.integers(0, 256, stream.size, dtype=np.uint8)
    expected = buffers.inputs[0] ^ buffers.inputs[1] ^ buffers.inputs[2]
    assert bound.variants(), "no loop runs on this machine"
    for name, variant in bound.variants().items():
        buffers.out[:] = 0
        assert bound.run(variant, buffers, threads) > 0
        np.testing.assert_array_equal(buffers.out, expected, err_msg=name)


def test_the_roofline_chooses_among_its_loops() -> None:
    if reason := bound.why_not():
        pytest.skip(reason)
    roofline = bound.Bound(bound.allocate((1 << 20,) * 4), threads=1)
    roofline.choose(keep=2, rounds=1)
    assert len(roofline.names) == min(2, len(bound.variants()))
    assert set(roofline.names) <= set(bound.variants())
    assert all(roofline.next_pass() > 0 for _ in range(3))
    assert roofline.passes == 3


@pytest.mark.parametrize(("stagger", "shift"), [(1088, 0), (0, 0), (1088, 1)])
def test_streams_lie_where_they_are_asked_to(stagger: int, shift: int) -> None:
    sizes = (10_000, 20_000, 8192, 4097)
    buffers = bound.allocate(sizes, stagger=stagger, shift=shift)
    streams = [*buffers.inputs, buffers.out]
    assert tuple(stream.nbytes for stream in streams) == sizes
    assert [stream.ctypes.data % 4096 for stream in streams] == [(i * stagger + shift) % 4096 for i in range(4)]
    ends = [(stream.ctypes.data, stream.ctypes.data + stream.nbytes) for stream in streams]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_kernel_measurement_makes_a_valid_record() -> None:
    if reason := bound.why_not():
        pytest.skip(reason)
    from benchmarks import kernels

    plans = list(kernels.plan(quick=True))
    assert len({case.name for case, _, _ in plans}) == len(plans)
    for case, isa, threads in plans:
        record = kernels.measure(kernels.Bench(case, 1 << 16), isa, threads, rounds=1)
        assert record.parameters["elements"] == (1 << 16) // case.out.itemsize
        made = results.document([record], machine={}, versions={}, commit={}, options={})
        assert made["records"][0]["ratios"].keys() == {"of_bound", "of_bound_best"}


def test_usage_of_a_process_is_its_own() -> None:
    held = bytearray(200_000_000)  # this process is larger than the one that is measured
    code = "import os; os.write(1, bytes(3_000_000)); held = bytearray(50_000_000); held[::4096] = held[::4096]"
    usage = process.measure([sys.executable, "-c", code])
    assert 50e6 < usage.peak_rss < 120e6 < len(held)
    assert usage.wall > 0
    assert usage.written is None or usage.written >= 3_000_000


def test_a_failing_process_says_why() -> None:
    with pytest.raises(process.CommandError, match=r"exit code 7: it broke"):
        process.measure(["sh", "-c", "echo it broke >&2; exit 7"])


def test_contenders_take_turns_and_failures_are_recorded(tmp_path: Path) -> None:
    order = tmp_path / "order"
    said: list[str] = []
    contenders = [
        whole.Contender("paramdelta", ("sh", "-c", f"echo ours >> {order}"), "ours"),
        whole.Contender("peer", ("sh", "-c", f"echo peer >> {order}"), "peer"),
        whole.Contender("broken", ("sh", "-c", f"echo {tmp_path}/x; exit 3"), "broken"),
        whole.Contender("absent", skipped="not installed"),
    ]
    records = whole.take_turns("merges", "case", contenders, tmp_path / "out", rounds=2, parameters={}, log=said.append)
    assert order.read_text().split() == ["ours", "ours", "peer", "peer", "ours"], "untimed, round 1, round 2"
    by_name = {record.contender: record for record in records}
    assert len(by_name["paramdelta"].metrics["wall"].samples) == 2
    assert by_name["peer"].ratios["times_ours"] > 0
    assert by_name["absent"].skipped == "not installed"
    assert by_name["broken"].skipped == "failed: exit code 3: SCRATCH/x"
    assert any("absent skipped: not installed" in line for line in said)
    results.document(records, machine={}, versions={}, commit={}, options={})


def test_a_place_without_room_is_a_skip_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "bytes_needed", lambda size: 1 << 60)
    said: list[str] = []
    [record] = whole.merges("1MB", quick=True, threads=1, places=(tmp_path,), log=said.append)
    assert record.skipped is not None
    assert "GB are needed" in record.skipped
    assert "skipped" in said[0]
    assert not list(tmp_path.iterdir())


def test_many_tensors_are_as_many(tmp_path: Path) -> None:
    from safetensors import safe_open

    folders = data.write_many(tmp_path, tensors=50, elements=64, shards=4)
    for folder in folders:
        files = sorted(folder.glob("*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        found = {}
        for file in files:
            with safe_open(file, framework="np") as opened:
                found |= dict.fromkeys(opened.keys(), file.name)
        assert len(files) == 4
        assert len(found) == 50
        assert index["weight_map"] == found


def test_mergekit_is_skipped_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(mergekit.VARIABLE, raising=False)
    folders = data.Folders(tmp_path, tmp_path, tmp_path)
    contender = whole.mergekit_merge("linear", folders, tmp_path / "out", 2)
    assert contender.skipped is not None
    assert "PARAMDELTA_MERGEKIT is not set" in contender.skipped
    assert "python -m benchmarks.peers.setup_mergekit DIR" in contender.skipped


def test_comparison_rounds_binary64_to_bf16_once() -> None:
    values = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-40, 2**-133, 0.0, 3.4e38])
    expected = np.array([1 + 2**-7, 1.0, 1 + 2**-6, -1 - 2**-7, 2**-133, 0.0, 3.4e38]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(compare_mergekit.bf16_once(values), expected.view(np.uint16))


class Paced:
    """Memory of a kernel that takes as long as it is told."""

    def __init__(self, *seconds: float) -> None:
        self.buffers = bound.allocate([4096] * 4)
        self.elements, self.nbytes = 1024, 4096
        self._seconds = itertools.cycle(seconds)

    def merge(self, isa: str, threads: int) -> float:
        return next(self._seconds)


def test_a_sample_is_the_best_of_as_many_passes_as_the_bound_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import kernels

    limits = itertools.cycle((1e6, 5e6, 2e6, 3e6))
    monkeypatch.setattr(bound, "run", lambda variant, buffers, threads: next(limits))
    monkeypatch.setattr(bound, "variants", lambda: {"a": 0, "b": 1})
    monkeypatch.setattr(kernels.counters, "why_not", lambda: "not here")
    made = kernels.Measurement("avx2", 1)
    made.loops = ("a", "b")
    made.take(Paced(9.0, 4.0, 2.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0), rounds=1, passes=2)
    assert made.limits == [5e6]
    assert made.rates == [4096 / 1.0], "the first pass does not count"
    made.take(Paced(0.5, 4.0, 2.0, 8.0, 4.0), rounds=1, passes=2)
    assert made.rates[1:] == [4096 / 2.0], "the first pass does not count"


def test_samples_of_several_processes_are_pooled_by_case() -> None:
    def taken(*rates: float) -> Record:
        bandwidth, bound_rate = Metric("B/s", rates), Metric("B/s", (10.0,) * len(rates))
        told = {"bound_loops": ["a" if rates[0] > 4 else "b"]}
        return Record("kernels", "case", results.OURS, told, {"bandwidth": bandwidth, "bound": bound_rate}, {})

    [record] = pooled.pool([[taken(5.0, 6.0)], [taken(1.0, 7.0)], [taken(8.0, 9.0)]])
    assert record.metrics["bandwidth"].samples == (5.0, 6.0, 1.0, 7.0, 8.0, 9.0)
    assert record.ratios == {"of_bound": 0.65, "of_bound_best": 0.9}
    assert record.parameters == {"bound_loops": ["a", "b"], "processes": 3}


@pytest.mark.parametrize(("theirs", "code"), [(1.0, 0), (1 + 2**-6, 1)], ids=["explained", "unexplained"])
def test_comparison_explains_a_difference_by_the_two_recipes(tmp_path: Path, theirs: float, code: int) -> None:
    from safetensors.numpy import save_file

    # 1 + 2^-8 + 2^-33 lies just above a tie; binary32 cannot hold the last term and rounds the tie to even.
    values = {"post": 2**-8, "base": -(2**-33), "new_base": 1.0, "ours": 1 + 2**-7, "theirs": theirs}
    for name, value in values.items():
        (tmp_path / name).mkdir()
        save_file({"w": np.array([value], dtype=ml_dtypes.bfloat16)}, tmp_path / name / "model.safetensors")
    folders = {name: str(tmp_path / name) for name in values}
    inputs = ["--post", folders["post"], "--base", folders["base"], "--new-base", folders["new_base"]]
    assert compare_mergekit.main([folders["ours"], folders["theirs"], *inputs]) == code


def test_comparison_tells_units_in_the_last_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import save_file

    values = np.array([1.0, 0.0, 2.0, -3.0], dtype=ml_dtypes.bfloat16)
    other = values.view(np.uint16).copy()
    other[1] ^= 0x8000  # sign of zero
    other[2] += 1
    other[3] += 5
    for name, codes in (("ours", values.view(np.uint16)), ("theirs", other)):
        (tmp_path / name).mkdir()
        save_file({"w": codes.view(ml_dtypes.bfloat16)}, tmp_path / name / "model.safetensors")
    assert compare_mergekit.main([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    told = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "(" not in line)
    assert {name.strip(): count for name, count in told.items()} == {
        "tensors": "1",
        "elements": "4",
        "sign of zero only": "1",
        "one unit in last place": "1",
        "more than one unit": "1",
    }
