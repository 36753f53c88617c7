"""Whole merges of every family, bit for bit: codes, scales and everything else, by both policies for scales."""

from __future__ import annotations

from pathlib import Path

import pytest
from families_low_bit import ALL
from quantised_merges import Case, check_same, expected, places, read
from recorded_sums import check_sums

import paramdelta


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_merge(case: Case, policy: str, folders_of, tmp_path: Path) -> None:
    """Every tensor is decoded, merged in binary64 and quantised by the family's reference quantiser. Where new_base can
    be written as it is stored, its configs and the places of tensors in files are new_base's."""
    folders = folders_of(case)
    out = tmp_path / "out"
    report = paramdelta.merge(**folders.sources(), out=out, scale_policy=policy, **case.options)
    check_same(read(out), expected(case, folders, policy))
    check_sums(out)
    assert report.nonfinite == ()
    if case.converts:
        return
    assert places(out) == places(folders.new_base)
    for name in ("config.json", *case.new_base.files):
        assert (out / name).read_bytes() == (folders.new_base / name).read_bytes()
