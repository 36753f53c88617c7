"""Verification of merged folders of every family: silent about what is right, and about one byte that is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from families_low_bit import ALL
from quantised_merges import Case, Folders, quantised_names

import paramdelta


def flip(folder: Path, names: Iterable[str], seed: int) -> None:
    """Change one byte, somewhere, of each of these tensors."""
    rng, left = random.Random(seed), set(names)
    for path in sorted(folder.glob("*.safetensors")):
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        for name in sorted(left & set(header)):
            begin, end = header[name]["data_offsets"]
            raw[start + rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
            left.discard(name)
        path.write_bytes(raw)
    assert not left


def problems_of(out: Path, sources: dict[str, Path]) -> tuple[set[str], set[str]]:
    """Return the tensors whose values are wrong by recomputing them, and those whose checksums are."""
    found: tuple[set[str], set[str]] = set(), set()
    for problem in paramdelta.verify(out, **sources, everything=True).problems:
        name, _, what = problem.partition(":")
        found["CRC-32" in what].add(name)
    return found


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_verify(case: Case, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """Nothing is wrong with what a merge wrote. One byte changed of every weight, in turn in its codes, its scales and
    its second scale, and every weight is named; so are plain and calibration tensors. Checksums name the tensor
    that was changed, with and without the sources."""
    sources, out = folders_of(case).sources(), tmp_path / "out"
    paramdelta.merge(**sources, out=out, **case.options)
    for everything in (False, True):
        report = paramdelta.verify(out, **sources, everything=everything)
        assert report.problems == ()
    assert report.fraction == 1.0
    layout = case.new_base
    changed, named = [*layout.statistics, *layout.integers], {*layout.statistics, *layout.integers}
    for number, (name, (_, form)) in enumerate(sorted(layout.weights.items())):
        names = form.names(name)
        parts = [part for part in ("codes", "scale", "second") if part in names]
        changed.append(names[parts[number % len(parts)]])
        named.add(names["codes"])
    flip(out, changed, 0)
    values, sums = problems_of(out, sources)
    assert values == named
    assert sums == set(changed)
    assert {problem.partition(":")[0] for problem in paramdelta.verify(out).problems} == set(changed)


@pytest.mark.parametrize("name", ["kimi-k2.5", "modelopt-nvfp4", "gpt-oss"])
def test_copies(name: str, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """Weights that are copied are compared, too, and counted as the parameters that they are."""
    sources, out = folders_of(ALL[name]).sources(), tmp_path / "out"
    paramdelta.merge(**sources, out=out, alpha=0)
    report = paramdelta.verify(out, **sources, everything=True)
    assert (report.problems, report.fraction) == ((), 1.0)
    parts = [quantised_names(ALL[name].new_base, part)[:1] for part in ("codes", "scale", "second", "shape")]
    changed = [tensor for names in parts for tensor in names]
    flip(out, changed, 0)
    assert problems_of(out, sources) == (set(changed), set(changed))
