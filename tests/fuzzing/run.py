"""`make fuzz`: runs every target under atheris (libFuzzer for Python), one after the other, says how many inputs were
tried and how much of the package they covered, and ends with 1 where one ended in anything but a refusal.

A finding is an exception that the target does not expect, an input that takes more than 5 seconds, or more than 1 GB of
memory; its bytes are printed, for tests/fuzzing/test_findings.py. What the fuzzer learnt stays in build/fuzz, and the
next run goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "fuzz"
SHARES = {"header": 0.15, "folder": 0.2, "plan": 0.45, "columns": 0.2}  # of the seconds
LIMITS = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=4096", "-len_control=0", "-print_final_stats=1"]


def main() -> int:
    """Fuzz, in processes of their own, since libFuzzer ends the process it runs in; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARES)}; all where none is named")
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _fuzz(options.inside, options.seconds)
    targets = options.targets or list(SHARES)
    if unknown := set(targets) - set(SHARES):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    whole = sum(SHARES[name] for name in targets)
    found = [_run(name, max(1, round(options.seconds * SHARES[name] / whole))) for name in targets]
    print("fuzz: nothing found" if not any(found) else f"fuzz: {sum(found)} findings")
    return 1 if any(found) else 0


def _run(name: str, seconds: int) -> int:
    """Fuzz one target; print what it did and return the number of findings."""
    folder = WORK / name
    corpus, findings = folder / "corpus", folder / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    command = [sys.executable, str(HERE / "run.py"), "--inside", name, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    (folder / "log").write_text(done.stdout + done.stderr)
    text = done.stderr
    executions = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    peak = re.search(r"stat::peak_rss_mb:\s*(\d+)", text)
    lines = re.findall(r"cov: (\d+) ft: (\d+)", text)
    covered, features = lines[-1] if lines else ("none", "none")
    print(
        f"fuzz {name}: {executions[1] if executions else '?'} executions in {seconds} s, {covered} branches covered, "
        f"{features} features, {len(list(corpus.iterdir()))} inputs kept, peak {peak[1] if peak else '?'} MB"
        + "".join(f"\n  {line}" for line in done.stdout.splitlines() if line.startswith("reached")),
        flush=True,
    )
    new = sorted(set(findings.iterdir()) - before)
    for path in new:
        print(f"  FINDING {path.name}: {path.read_bytes()!r}")
    if done.returncode or executions is None:
        print(text[-4000:])
    return max(len(new), int(done.returncode != 0 or executions is None))


def _fuzz(name: str, seconds: int) -> None:
    """Run one target until the time is up; does not return."""
    import atheris

    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["paramdelta", f"target_{name}", "folders"], enable_loader_override=False):
        target = importlib.import_module(f"target_{name}")
    folder = WORK / name
    seeds = folder / "seeds"
    seeds.mkdir(exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (seeds / f"{i:03d}").write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            *LIMITS,
            f"-max_total_time={seconds}",
            f"-artifact_prefix={folder / 'findings'}/",
            str(folder / "corpus"),
            str(seeds),
        ],
        target.run,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
