"""Whole merges of every family, bit for bit: codes, scales and everything else, by both policies for scales."""

from __future__ import annotations

from pathlib import Path

import families_fp8
import families_low_bit
import pytest
from quantised_merges import Case, check_same, expected, make_folders, places, read

import paramdelta

CASES = families_fp8.CASES | families_low_bit.CASES
every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@every_family
def test_merge(case: Case, policy: str, tmp_path: Path) -> None:
    """Every tensor is decoded, merged in binary64 and quantised by the family's reference quantiser. Where new_base can
    be written as it is stored, its configs and the places of tensors in files are new_base's."""
    folders = make_folders(tmp_path, case)
    out = tmp_path / "out"
    paramdelta.merge(**folders.sources(), out=out, scale_policy=policy, **case.options)
    check_same(read(out), expected(case, folders, policy))
    if any(form.zero_suffix for _, form in case.new_base.weights.values()):
        return
    assert places(out) == places(folders.new_base)
    for name in ("config.json", *case.new_base.files):
        assert (out / name).read_bytes() == (folders.new_base / name).read_bytes()
