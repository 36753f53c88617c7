"""The GPU's measurements, tried without a GPU: every part on the host with tiny sizes, the schema of what they write,
the budget, overlaps in a made-up trace, the summary. No time is asserted."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are part of the source tree only", allow_module_level=True)
for module in ("torch", "triton", "pybind11"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: the kernels cannot be tried on the host", allow_module_level=True)
sys.path.append(str(ROOT))  # last: an installed paramdelta comes before the one of the source tree

from benchmarks import results  # noqa: E402
from benchmarks.gpu import __main__ as runner  # noqa: E402
from benchmarks.gpu import conformance, laws, overlap, sanitizer, sizes, summary  # noqa: E402
from benchmarks.gpu.child import PARTS  # noqa: E402
from benchmarks.gpu.device import Clock  # noqa: E402
from benchmarks.results import Metric, Record  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all parts but those that run tests, as ``make gpu`` does, on the host; all but the first in one process."""
    made = tmp_path_factory.mktemp("gpu")
    parts = [part for part in PARTS if part not in ("conformance", "sanitizer")]
    real = runner.run_part

    def run_part(part: str, limit: float, most: float, options: object) -> dict:
        if part == parts[0]:
            return real(part, limit, most, options)  # type: ignore[arg-type]
        if part == parts[1]:
            return real(",".join(parts[1:]), most, most, options) | {"part": part}  # type: ignore[arg-type]
        return {"part": part, "limit": 0.0, "seconds": 0.0, "exit_code": 0, "cut": False}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_part", run_part)
        arguments = ["--on", "host", "--parts", ",".join(parts), "--budget", "400", "--commit", "abc"]
        code = runner.main([*arguments, "--out", str(made)])
    assert code == 0, (made / "summary.md").read_text()
    return made


def test_every_part_writes_the_schema(folder: Path) -> None:
    content = results.read(folder / "gpu.json")
    assert content["commit"]["commit"] == "abc"
    assert [run["exit_code"] for run in content["options"]["runs"]] == [0] * 5
    groups = {record["group"] for record in content["records"]}
    assert groups == {"gpu-build", "gpu-laws", "gpu-kernels", "gpu-foreach", "gpu-pipeline"}
    assert content["machine"]["gpu"]["why_not"]["cuda"] is None, "the host's kernels run"
    assert sorted(p.name for p in folder.iterdir()) == ["gpu.json", "summary.json", "summary.md", "trace.json.gz"]


def test_every_contender_was_measured(folder: Path) -> None:
    records = results.records_of(results.read(folder / "gpu.json"))
    skipped = {(r.group, r.contender) for r in records if r.skipped}
    assert skipped <= {("gpu-build", "paramdelta._cuda")}, skipped
    merged = [r for r in records if r.group == "gpu-pipeline"]
    assert len(merged) == 11, "two bounds, three merges, bytes compared, the trace, four processes"
    assert all("of_bound" in r.ratios for r in merged if "--device" in r.contender)
    kernels = [r for r in records if r.case == "fp8 blocks to fp8 blocks"]
    assert {r.contender for r in kernels} == {
        "paramdelta cuda", "paramdelta triton", "torch eager", "torch.compile", "device-to-device copy"
    }  # fmt: skip
    assert all("of_copy" in r.ratios and len(r.metrics["time"].samples) == 3 for r in kernels)


def test_every_lane_was_compared(folder: Path) -> None:
    records = [r for r in results.records_of(results.read(folder / "gpu.json")) if r.group == "gpu-laws"]
    assert len(records) == 4 * len(laws.LANES) + 1
    for record in records:
        present = ["cuda"] if record.case.endswith(": norms") else ["cuda", "triton"]
        assert record.contender == ", ".join([*present, "cpu"])
        zero = {name for name, m in record.metrics.items() if m.median == 0}
        assert zero == {f"{what}_{kernels}" for what in ("differing", "counts") for kernels in present}
        assert record.metrics["elements"].median >= record.parameters.get("wanted", 1)


def test_summary_of_what_was_measured(folder: Path) -> None:
    made = json.loads((folder / "summary.json").read_text())
    aims = {aim["name"]: aim for aim in made["aims"]}
    assert made["right"]
    assert aims["bf16 three-way, cuda: of a device-to-device copy"]["measured"] is not None
    assert all(aim["measured"] is not None for aim in made["aims"]), "every aim finds its record"
    text = (folder / "summary.md").read_text()
    assert "| pipeline: of the bound | ≥ 0.85 |" in text
    assert "paramdelta --device auto, one process" in text
    assert "is done before a GPU is ready" in text, "why auto chose"


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that ends one element differently, or miscounts."""
    import torch

    from benchmarks.gpu.operands import Plain

    def enqueue(self: Plain, kernels: str, out: torch.Tensor, counts: torch.Tensor) -> None:
        right, found = self.on_cpu()
        out.copy_(right)
        counts[:3] = torch.tensor(found)
        if kernels == "cuda":
            out.view(torch.int16)[5] ^= 1
        else:
            counts[0] += 1

    monkeypatch.setattr(Plain, "enqueue", enqueue)
    device = SimpleNamespace(
        on="host", torch=torch, place=torch.device("cpu"), fetch=torch.clone, host_room=torch.empty_like
    )
    record = laws.elements(device, sizes.TINY, Clock(60), laws.LANES[0], ["cuda", "triton"])
    found = {name: metric.median for name, metric in record.metrics.items()}
    assert found == {"elements": 1536, "differing_cuda": 3, "differing_triton": 0, "counts_cuda": 0, "counts_triton": 3}
    aims = list(summary.lanes([record], full=False))
    assert [aim.met for aim in aims] == [False]


def test_what_a_cut_part_has_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that outlives its time is ended, its records stay, a line it was writing is left out, and others run."""
    script = (
        "import sys, time; from pathlib import Path; part, folder = sys.argv[1], Path(sys.argv[-1]);"
        "line = (folder / 'line').read_text(); file = (folder / f'{part}.jsonl').open('w');"
        "file.write(line); file.write('{' if part == 'build' else ''); file.close();"
        "time.sleep(60 if part == 'build' else 0)"
    )
    real = runner.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        return real([sys.executable, "-c", script, *command[3:]], **options)  # type: ignore[call-overload]

    about = {"machine": {"cpu": "", "threads_allowed": 1}, "versions": {}, "commit": {"commit": None, "dirty": None}}
    faked = SimpleNamespace(Popen=popen, TimeoutExpired=runner.subprocess.TimeoutExpired)
    monkeypatch.setattr(runner, "subprocess", faked)
    monkeypatch.setattr(runner, "about", lambda options: about)
    monkeypatch.setattr(runner, "GRACE", 0.0)
    monkeypatch.setattr(runner, "SPARE", 1.0)
    monkeypatch.setitem(runner.WEIGHTS, "build", 1)
    record = Record("gpu-build", "backend", "cuda", {}, {"runs": Metric("1", (1,))})
    (tmp_path / "line").write_text(json.dumps(asdict(record)) + "\n")
    code = runner.main(["--out", str(tmp_path), "--parts", "build,foreach", "--budget", "40"])
    content = results.read(tmp_path / "gpu.json")
    runs = content["options"]["runs"]
    assert [run["cut"] for run in runs] == [True, False]
    assert [run["exit_code"] for run in runs] == [None, 0]
    assert len(content["records"]) == 2
    assert code == 1, "no question of right or wrong was answered"
    assert "Cut short or failed: build." in (tmp_path / "summary.md").read_text()


def test_shares_of_the_budget() -> None:
    parts = list(PARTS)
    left = 500.0
    for part in parts:
        limit = runner.limit_of(part, parts, left)
        assert 0 < limit <= left
        left -= limit
    assert left == pytest.approx(0)
    assert runner.limit_of("pipeline", parts, 100.0) == 100.0, "the last has all that is left"


def test_overlaps_of_a_made_up_trace(tmp_path: Path) -> None:
    def event(cat: str, name: str, start: float, end: float) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}

    events = [
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 10),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 5, 20),  # another stream's: counted once
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 15, 30),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 100),
        event("kernel", "void paramdelta::cuda::run<...>", 18, 22),
        event("kernel", "void paramdelta::cuda::run<...>", 28, 40),
        event("cuda_runtime", "cudaLaunchKernel", 0, 40),
        {"ph": "M", "name": "process_name", "cat": "kernel"},
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = {name: round(seconds * 1e6, 6) for name, seconds in overlap.overlaps(overlap.read(path)).items()}
    assert found == {
        "up": 20, "down": 15, "kernels": 16, "up_down": 5, "up_kernels": 2, "down_kernels": 6, "all": 2, "span": 40
    }  # fmt: skip
    assert overlap.overlaps([])["span"] == 0


def test_what_the_sanitizer_says() -> None:
    assert sanitizer.errors_in("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitizer.errors_in("========= ERROR SUMMARY: 12 errors\n") == 12
    assert sanitizer.errors_in("==== RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n") == 3
    assert sanitizer.errors_in("Segmentation fault") is None


def test_what_pytest_reports(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        "<testsuites><testsuite><testcase/><testcase><failure/></testcase><testcase><error/></testcase>"
        "<testcase><skipped/></testcase><testcase/></testsuite></testsuites>"
    )
    assert conformance.counted(path) == {"passed": 2, "failed": 2, "skipped": 1}


def test_conformance_runs_tests_and_counts_them() -> None:
    selection = conformance.Selection(("tests/conformance/test_fast_lanes.py",), "cuda-host and known_results")
    record = conformance.tests("cuda", selection, "host", Clock(120))
    assert record.skipped is None, record.skipped
    assert record.metrics["passed"].median >= 1
    assert record.metrics["failed"].median == 0


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.parse(["--parts", "build,speed"])
    assert "--parts: speed is none of build,conformance" in capsys.readouterr().err
