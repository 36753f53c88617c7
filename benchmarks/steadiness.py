"""Shows whether one build passes against itself: ``python -m benchmarks.steadiness COUNT [options of benchmarks.run]``.

Runs the quick kernels (or what the options say) COUNT times and compares each run with the one before. Prints losses,
gains, and the noise of each number over all pairs. Exit code 1 if any pair shows a loss.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import differences, results, run
from benchmarks.differences import Comparison, told

QUICK_KERNELS = ("--only", "kernels", "--quick")


def summarise(comparisons: Sequence[Comparison]) -> str:
    """Return the outcome of each pair, and the noise and the largest change of each number."""
    lines = []
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for i, comparison in enumerate(comparisons):
        losses, gains = comparison.with_verdict("loss"), comparison.with_verdict("gain")
        lines.append(f"pair {i + 1}: {len(comparison.changes)} numbers, {len(losses)} lost, {len(gains)} gained")
        for change in (*losses, *gains):
            lines.append(
                f"  {change.verdict}: {told(change.key)}, {change.number}: {change.old:.4g} to {change.new:.4g}, "
                f"{change.change:+.1%}, noise {change.noise:.1%}"
            )
        for change in comparison.changes:
            seen[f"{told(change.key)}, {change.number}"].append((change.noise, abs(change.change)))
    for name, pairs in seen.items():
        noise, moved = zip(*pairs, strict=True)
        lines.append(
            f"{name}: noise {min(noise):.1%} to {max(noise):.1%}, median {statistics.median(noise):.1%}; "
            f"largest change {max(moved):.1%}"
        )
    passed = sum(not comparison.with_verdict("loss") for comparison in comparisons)
    lines.append(f"{passed} of {len(comparisons)} pairs pass")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if not arguments or not arguments[0].isdigit() or int(arguments[0]) < 2:
        sys.exit(f"{__doc__}\nCOUNT: expected a number of runs, at least 2")
    options = arguments[1:] or QUICK_KERNELS
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{i}.json" for i in range(int(arguments[0]))]
        for file in files:
            run.main([*options, "--out", str(file)])
        contents = [results.read(file) for file in files]
    comparisons = [differences.compare(old, new) for old, new in itertools.pairwise(contents)]
    print(summarise(comparisons))
    return int(any(comparison.with_verdict("loss") for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
