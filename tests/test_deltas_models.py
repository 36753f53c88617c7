"""Deltas of real models, plain and quantised: made by transformers, extracted, applied, and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from quantised_models import (
    assert_complete,
    distance,
    load,
    logits,
    make_models,
    quantise_fp8,
    quantise_gpt_oss,
    torch,
    transformers,
)
from rank_folders import digests

import paramdelta

MADE = {"README.md", "paramdelta.json"}
# What is quantised, and how: post and base, the one that the delta is applied to, or all.
FAMILIES: dict[str, tuple[str, Callable[[Path], None] | None, tuple[str, ...]]] = {
    "llama": ("llama", None, ()),
    "qwen3-post-fp8": ("qwen3", lambda folder: quantise_fp8(folder, theirs=False), ("post",)),
    "qwen3-moe-fp8": ("qwen3-moe", lambda folder: quantise_fp8(folder, theirs=False), ("post", "base", "new_base")),
    "gpt-oss-mxfp4": ("gpt-oss", quantise_gpt_oss, ("post", "base", "new_base")),
    "gpt-oss-new-base-mxfp4": ("gpt-oss", quantise_gpt_oss, ("new_base",)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    name, quantise, roles = FAMILIES[request.param]
    folders = make_models(name, tmp_path_factory.mktemp(request.param))
    for role in roles:
        assert quantise is not None
        quantise(folders[role])
    for role, token in (("base", 1), ("post", 7), ("new_base", 1)):
        path = folders[role] / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": token}))
    return SimpleNamespace(**folders, folders=folders, pair={r: folders[r] for r in ("post", "base")}, roles=roles)


def test_applied_lossless_it_is_the_merge(family: SimpleNamespace, tmp_path: Path) -> None:
    paramdelta.extract(**family.pair, out=tmp_path / "d", lossless=True)
    report = paramdelta.apply(new_base=family.new_base, deltas=tmp_path / "d", out=tmp_path / "out", alpha=0.8)
    paramdelta.merge(**family.folders, out=tmp_path / "merged", alpha=0.8)
    made, merged = digests(tmp_path / "out"), digests(tmp_path / "merged")
    assert {n: d for n, d in made.items() if n not in MADE} == {n: d for n, d in merged.items() if n not in MADE}
    assert "eos_token_id = 7" in report.policies["config_from_post"]
    sources = {"delta": tmp_path / "d", "new_base": family.new_base}
    assert paramdelta.verify(tmp_path / "out", **sources, everything=True).problems == ()
    model, info = load(tmp_path / "out")
    assert_complete(info)
    assert bool(torch.isfinite(logits(model)).all())


def test_post_is_made_again(family: SimpleNamespace, tmp_path: Path) -> None:
    paramdelta.extract(**family.pair, out=tmp_path / "d", lossless=True)
    paramdelta.apply(new_base=family.base, deltas=tmp_path / "d", out=tmp_path / "again", rebuild=True)
    made = {n: d for n, d in digests(tmp_path / "again").items() if n != "paramdelta.json"}
    assert made == digests(family.post)


@pytest.mark.parametrize("dtype", ["f32", "f8"])
def test_a_rounded_delta_is_near(family: SimpleNamespace, dtype: str, tmp_path: Path) -> None:
    """Added to its own base, an f32 delta acts as post does, and an f8 one nearly."""
    if "base" in family.roles:
        pytest.skip("a quantised base stores the sum in few bits, whatever the delta is")
    paramdelta.extract(**family.pair, out=tmp_path / "d", dtype=dtype)
    paramdelta.apply(new_base=family.base, deltas=tmp_path / "d", out=tmp_path / "out")
    made, wanted, start = (logits(load(folder)[0]) for folder in (tmp_path / "out", family.post, family.base))
    allowed = 0.1 if dtype == "f8" or family.roles == ("post",) else 1e-3
    assert distance(made, wanted) < allowed * distance(start, wanted)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 7
