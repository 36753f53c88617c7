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


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_verify(case: Case, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """Nothing is wrong with what a merge wrote. One byte changed in the codes of every weight, or in its scales, and
    every weight is named; so are plain and calibration tensors."""
    sources, out = folders_of(case).sources(), tmp_path / "out"
    paramdelta.merge(**sources, out=out, **case.options)
    clean = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    for everything in (False, True):
        report = paramdelta.verify(out, **sources, everything=everything)
        assert report.problems == ()
    assert report.fraction == 1.0
    layout = case.new_base
    codes = {form.names(name)["codes"] for name, (_, form) in layout.weights.items()}
    rounds = {
        "codes": (codes | set(layout.statistics) | set(layout.integers), codes),
        "scale": (quantised_names(layout, "scale"), codes_of(layout, "scale")),
        "second": (quantised_names(layout, "second"), codes_of(layout, "second")),
    }
    for seed, (changed, named) in enumerate(rounds.values()):
        if not changed:
            continue
        flip(out, changed, seed)
        problems = paramdelta.verify(out, **sources, everything=True).problems
        reported = {problem.partition(":")[0] for problem in problems}
        wanted = set(named) | (set(changed) if seed == 0 else set())
        assert reported == wanted
        for path, data in clean.items():
            path.write_bytes(data)


def codes_of(layout, part: str) -> list[str]:
    """Return the names of the codes of weights that have a part."""
    forms = ((name, form) for name, (_, form) in layout.weights.items())
    return [form.names(name)["codes"] for name, form in forms if part in form.names(name)]


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
    problems = paramdelta.verify(out, **sources, everything=True).problems
    assert {problem.partition(":")[0] for problem in problems} == set(changed)
