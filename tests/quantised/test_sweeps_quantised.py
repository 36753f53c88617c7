"""Sweeps over quantised checkpoints of every family: each folder is that of the merge with its alpha, byte for byte;
scales of whole tensors are measured for each alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families_low_bit import ALL
from quantised_merges import Case, Folders, folder_bytes

import paramdelta
from paramdelta import publish

ALPHAS = (1.0, 0.0, -100.0)  # the last moves most scales
RECOMPUTED = ("deepseek-v3", "mistral", "compressed-nvfp4", "kimi-k2.5")
CASES = [(name, "keep") for name in ALL] + [(name, "recompute") for name in RECOMPUTED]
FoldersOf = Callable[["Case"], Folders]


@pytest.mark.parametrize(("name", "policy"), CASES, ids=[f"{name}-{policy}" for name, policy in CASES])
def test_folders_are_those_of_merges(name: str, policy: str, folders_of: FoldersOf, tmp_path: Path) -> None:
    options = {**ALL[name].options, "scale_policy": policy, "allow_nonfinite": True}
    options.pop("alpha", None)
    sources = folders_of(ALL[name]).sources()
    report = paramdelta.sweep(**sources, out=tmp_path / "sweep", alphas=ALPHAS, **options)
    assert report.passes == 2  # an alpha of 0 may copy what the others quantise
    for alpha, one in zip(ALPHAS, report.folders, strict=True):
        merged = paramdelta.merge(**sources, out=tmp_path / f"merge-{alpha}", alpha=alpha, **options)
        assert one.out is not None
        assert folder_bytes(one.out) == folder_bytes(tmp_path / f"merge-{alpha}"), alpha
        assert one.nonfinite == merged.nonfinite
        for mine, theirs in zip(one.quantised, merged.quantised, strict=True):
            assert (mine.format, mine.tensors) == (theirs.format, theirs.tensors)
            assert mine.relative_error == pytest.approx(theirs.relative_error, rel=1e-9)


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "compressed-tensor"])
def test_segments(name: str, folders_of: FoldersOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into segments, and with slots of other sizes, whole tensors have the scales of their alphas."""
    sources, case = folders_of(ALL[name]).sources(), ALL[name]
    paramdelta.sweep(**sources, out=tmp_path / "whole", alphas=ALPHAS, **case.options, allow_nonfinite=True)
    monkeypatch.setenv("PARAMDELTA_SEGMENT_BYTES", str(1 << 15))
    paramdelta.sweep(
        **sources, out=tmp_path / "cut", alphas=ALPHAS, **case.options, allow_nonfinite=True, threads=3, memory=1 << 20
    )
    for alpha in ("alpha-1", "alpha-0", "alpha--100"):
        assert folder_bytes(tmp_path / "cut" / alpha) == folder_bytes(tmp_path / "whole" / alpha), alpha
    assert publish.kept == []
