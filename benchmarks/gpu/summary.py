"""What a run on a GPU came to: each aim with what was measured, as JSON and as Markdown for docs/performance.md.

``python -m benchmarks.gpu.summary FOLDER`` makes both again from FOLDER/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.gpu import bounds, foreach, kernels, pipeline
from benchmarks.report import table
from benchmarks.results import Record

NOT_MEASURED = "not measured"
LANE_ELEMENTS = 1_000_000_000


class Aim(NamedTuple):
    """One thing to show: ``measured`` is None where nothing was; ``correctness`` tells right and wrong from speed."""

    name: str
    wanted: str
    measured: float | None
    met: bool | None
    correctness: bool = False


def of(content: dict[str, Any]) -> dict[str, Any]:
    """Return every aim, what was skipped, and whether everything that can be wrong was measured and right."""
    records = results.records_of(content)
    aims = [*correctness(records, content["options"]), *speed(records)]
    right = [aim for aim in aims if aim.correctness]
    runs = content["options"].get("runs", [])
    return {
        "right": bool(right) and all(aim.met for aim in right) and not any(run["exit_code"] for run in runs),
        "aims": [aim._asdict() for aim in aims],
        "skipped": [f"{r.group}: {r.case}, {r.contender}: {r.skipped}" for r in records if r.skipped],
        "runs": runs,
    }


def correctness(records: Sequence[Record], options: dict[str, Any]) -> Iterator[Aim]:
    """Yield what is right or wrong, for the parts that were asked for."""
    parts = options.get("parts", ())
    if "conformance" in parts:
        for name in ("cuda", "triton"):
            record = one(records, "gpu-conformance", None, name)
            failed = None if record is None else record.metrics["failed"].median
            yield Aim(f"conformance, {name}: tests failed", "0", failed, failed == 0, True)
    if "laws" in parts:
        yield from lanes(records, options.get("on") == "cuda")
    if "sanitizer" in parts:
        for tool in ("none", "memcheck", "racecheck") if options.get("on") == "cuda" else ("none",):
            record = one(records, "gpu-sanitizer", None, tool)
            errors = None if record is None else record.metrics["errors"].median + record.metrics["failed"].median
            # Where the program is missing the check is not a failure of the kernels: it is listed as skipped.
            absent = any(r.contender == tool and "there is no compute-sanitizer" in (r.skipped or "") for r in records)
            yield Aim(f"script that reaches every kernel, under {tool}: errors", "0", errors, errors == 0, not absent)
    if "pipeline" in parts:
        record = one(records, "gpu-pipeline", None, pipeline.SAME)
        differing = None if record is None else record.metrics["differing"].median
        yield Aim("pipeline: tensors that differ from the processor's", "0", differing, differing == 0, True)


def lanes(records: Sequence[Record], full: bool) -> Iterator[Aim]:
    """Yield, for each lane, elements that differ, and how many were compared."""
    found = [r for r in records if r.group == "gpu-laws" and r.metrics]
    if not found:
        yield Aim("random elements that differ", "0", None, None, True)
    for r in records:
        if r.group == "gpu-laws" and r.case == "all":
            yield Aim(f"random elements that differ, {r.contender}", "0", None, None, True)
    for record in found:
        wrong = sum(m.median for name, m in record.metrics.items() if name != "elements")
        yield Aim(f"{record.case}: differing ({record.contender})", "0", wrong, wrong == 0, True)
        if full and "wanted" in record.parameters:
            count = record.metrics["elements"].median
            yield Aim(f"{record.case}: compared", "≥ 1e9", count, count >= LANE_ELEMENTS, True)


def speed(records: Sequence[Record]) -> Iterator[Aim]:
    """Yield the aims of speed."""

    def kernel(case: str, contender: str, ratio: str, least: float, name: str) -> Aim:
        return aim(one(records, "gpu-kernels", case, contender), lambda r: r.ratios.get(ratio), least, name)

    for backend in ("cuda", "triton"):
        ours = kernels.ours(backend)
        for case, least in ((kernels.THREE_WAY, 0.93), (kernels.FOUR_DELTAS, 0.90), (kernels.BLOCKS, 0.75)):
            yield kernel(case, ours, "of_copy", least, f"{case}, {backend}: of a device-to-device copy")
    for backend in ("cuda", "triton"):
        for case in (kernels.THREE_WAY, kernels.FOUR_DELTAS, kernels.BLOCKS):
            for peer, least in ((kernels.EAGER, 3.0), (kernels.COMPILED, 1.0)):
                yield kernel(case, peer, f"times_{backend}", least, f"{case}: times of {peer} over {backend}'s")
    loop = one(records, "gpu-foreach", None, foreach.LOOP)
    yield aim(loop, lambda r: r.ratios.get("times_ours"), 20.0, "many small tensors: times of the loop over one call's")
    through = "paramdelta --device cuda, one process"
    merged = one(records, "gpu-pipeline", None, through)
    yield aim(merged, lambda r: r.ratios.get("of_bound"), 0.85, "pipeline: of the bound")
    trace = one(records, "gpu-pipeline", None, pipeline.TRACED)
    for name, words in (("up_down", "copies both ways"), ("up_kernels", "copies up and kernels"), ("all", "all three")):
        yield aim(trace, lambda r, n=name: r.metrics[n].median * 1e6, 1.0, f"trace: {words} at once, µs")  # type: ignore[misc]


def aim(record: Record | None, value: Callable[[Record], float | None], least: float, name: str) -> Aim:
    """Return an aim that a value of a record is to reach."""
    measured = None if record is None else value(record)
    return Aim(name, f"≥ {least:g}", measured, None if measured is None else measured >= least)


def one(records: Sequence[Record], group: str, case: str | None, contender: str) -> Record | None:
    """Return the measured record of a contender, or None."""
    fits = (r for r in records if r.group == group and r.contender == contender and case in (None, r.case))
    return next((r for r in fits if r.metrics), None)


def markdown(made: dict[str, Any], content: dict[str, Any]) -> str:
    """Return the lines for docs/performance.md: what it was measured on, the aims, the times of the merges."""
    gpu, versions = content["machine"].get("gpu", {}), content["versions"]
    named = (
        ", ".join(f"{d['name']}, sm_{''.join(map(str, d['capability']))}" for d in gpu.get("devices", ())) or "no GPU"
    )
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "nvcc", "driver") if versions.get(name))
    rows = [
        (a["name"], a["wanted"], shown(a["measured"]), {True: "yes", False: "no", None: "–"}[a["met"]])
        for a in made["aims"]
    ]
    lines = [
        f"{named}; {content['machine']['cpu']}, {content['machine']['threads_allowed']} cores; {told}; commit "
        f"{(content['commit']['commit'] or 'unknown')[:12]}.",
        "",
        table(("what", "aim", "measured", "met"), rows),
    ]
    merged = pipeline_rows(results.records_of(content))
    if merged:
        lines += ["", table(("merge", "s", "GB/s", "of the bound", "computed by"), merged)]
    if made["skipped"]:
        lines += ["", "Not measured:", "", *(f"- {text.splitlines()[0][:300]}" for text in made["skipped"])]
    cut = [run["part"] for run in made["runs"] if run["cut"] or run["exit_code"]]
    if cut:
        lines += ["", f"Cut short or failed: {', '.join(cut)}."]
    return "\n".join(lines) + "\n"


def pipeline_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return a row for the bounds and for every way to merge."""
    rows = []
    for r in records:
        name = next((n for n in ("engine", "wall", "time") if n in r.metrics), None)
        if r.group != "gpu-pipeline" or name is None or "bandwidth" not in r.metrics:
            continue
        share = f"{r.ratios['of_bound']:.2f}" if "of_bound" in r.ratios else ""
        seconds, rate = r.metrics[name].median, r.metrics["bandwidth"].median / 1e9
        why = r.parameters.get("device_why") or ""
        by = f"{r.parameters.get('device', '')}{': ' + why if why else ''}"
        rows.append((r.contender, f"{seconds:.3f}", f"{rate:.1f}", share, by if r.contender != bounds.LINK else ""))
    return rows


def shown(value: float | None) -> str:
    """Return a number as the table has it."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.0f}" if value == int(value) or value >= 1000 else f"{value:.3f}"


def write(folder: Path, made: dict[str, Any], content: dict[str, Any]) -> None:
    """Write summary.json and summary.md beside gpu.json."""
    (folder / "summary.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(markdown(made, content), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.summary", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    content = results.read(folder / "gpu.json")
    made = of(content)
    write(folder, made, content)
    sys.stdout.write(markdown(made, content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
