"""Singular values against LAPACK's, and what the numbers are said to suggest: each finding where it belongs, and not
where it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_folders import LAYERS, SIDE, base_tensors, moved, noise, write

import paramdelta
from paramdelta.analysis.measures import place_of
from paramdelta.analysis.spectra import ACCURACY, SMALL, singular_values

# What products in binary32 add, of the largest value: √n · 2^-24, n below 1,000, and some.
ROUNDING = 4e-6


def low_rank(rank: int, rows: int, cols: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))).astype(np.float32)


@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32), id="small"),
        pytest.param(np.random.default_rng(1).standard_normal((600, 450)).astype(np.float32), id="flat spectrum"),
        pytest.param(low_rank(8, 500, 800), id="rank 8"),
        pytest.param(
            low_rank(4, 700, 500) + np.random.default_rng(2).standard_normal((700, 500)).astype(np.float32) / 10,
            id="rank 4 and noise",
        ),
        pytest.param(1e-12 * low_rank(2, 400, 900), id="tiny numbers"),
        pytest.param(np.zeros((500, 400), np.float32), id="zeros"),
        pytest.param(np.eye(500, dtype=np.float32), id="one value, 500 times"),
    ],
)
def test_singular_values_are_lapacks(matrix: np.ndarray[Any, Any]) -> None:
    count = 16
    values, error = singular_values(matrix, count)
    want = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:count]
    assert values[0] == pytest.approx(want[0], rel=ROUNDING)
    if min(matrix.shape) <= SMALL:
        np.testing.assert_allclose(values, want, rtol=1e-12)
        return
    assert error <= ACCURACY * max(want[0], 0.0)
    assert np.abs(np.array(values) - want).max() <= error + ROUNDING * want[0]


@pytest.fixture
def analysed(tmp_path: Path) -> Callable[..., paramdelta.Analysis]:
    """Return a function that analyses base plus the given steps."""

    def run(steps: dict[str, Any], drift: dict[str, Any] | None = None, **options: Any) -> paramdelta.Analysis:
        base = base_tensors(dtype=np.float32)
        folders = [write(tmp_path / "post", moved(base, steps)), write(tmp_path / "base", base)]
        if drift is not None:
            folders.append(write(tmp_path / "new_base", moved(base, drift)))
        return paramdelta.analyze(*folders, **options)

    return run


Analysed = Callable[..., paramdelta.Analysis]


def codes(found: paramdelta.Analysis) -> set[str]:
    return {f.code for f in found.findings}


def everywhere(size: float, seed: int) -> dict[str, Any]:
    return noise(base_tensors(), size, seed)


def test_stable_rank_of_a_delta_of_rank_one(analysed: Analysed) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    found = analysed({name: 1e-2 * low_rank(1, 3 * SIDE, SIDE)}, spectrum="*.layers.0.*", singular_values=5)
    spectra = {t.name: t.spectra for t in found.tensors if t.spectra}
    assert set(spectra) == {name, "model.layers.0.self_attn.q_proj.weight"}
    # Adding the step to base rounds it: about 2^-25 of base's norm, here 1e-6 of the delta's.
    assert spectra[name][0].stable_rank == pytest.approx(1.0, abs=1e-6)
    assert len(spectra[name][0].values) == 5
    assert spectra["model.layers.0.self_attn.q_proj.weight"][0].stable_rank is None
    assert spectra[name][0].frobenius_squared == pytest.approx(found.total.deltas[0].delta_squared, rel=1e-6)


def test_a_usual_delta_gives_no_alarm(analysed: Analysed) -> None:
    found = analysed(everywhere(1e-3, 1), everywhere(2e-3, 2), spectrum="*", singular_values=4)
    assert found.findings == ()


def test_low_rank(analysed: Analysed) -> None:
    names = [f"model.layers.{n}.{m}.weight" for n in range(LAYERS) for m in ("self_attn.q_proj", "mlp.up_proj")]
    steps = {n: 1e-3 * low_rank(2, 3 * SIDE if "up" in n else SIDE, SIDE, i) for i, n in enumerate(names)}
    found = analysed(steps, spectrum="*", singular_values=8)
    assert codes(found) == {"low-rank", "embeddings-untouched", "some-modules"}


def test_operands_in_the_wrong_order(analysed: Analysed) -> None:
    drift = everywhere(2e-2, 2)
    found = analysed({n: s + 1e-3 for n, s in drift.items()}, drift)
    assert [f.weight for f in found.findings if f.code == "operand-order"] == ["problem"]
    assert "is the order of the operands right?" in next(f.text for f in found.findings if f.code == "operand-order")


def test_another_family(tmp_path: Path) -> None:
    base, other = write(tmp_path / "base", base_tensors(0)), write(tmp_path / "other", base_tensors(1))
    assert codes(paramdelta.analyze(other, base)) == {"other-family"}
    near = write(tmp_path / "near", moved(base_tensors(0), everywhere(1e-3, 3)))
    assert "other-new-base" in codes(paramdelta.analyze(near, base, other))


def test_drift_that_is_far(analysed: Analysed) -> None:
    assert codes(analysed(everywhere(1e-2, 1), everywhere(4e-2, 2))) == {"far-drift"}


def test_drift_that_is_long(analysed: Analysed) -> None:
    assert codes(analysed(everywhere(1e-3, 1), everywhere(2e-2, 2))) == {"long-drift"}


def test_drift_along_the_delta(analysed: Analysed) -> None:
    steps, other = everywhere(4e-3, 1), everywhere(6e-3, 2)
    found = analysed(steps, {n: s + other[n] for n, s in steps.items()})
    assert codes(found) == {"along-drift"}
    assert found.findings[0].numbers["cosine"] == pytest.approx(0.55, abs=0.05)


def test_what_is_left_alone(analysed: Analysed) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    found = analysed({name: everywhere(1e-3, 1)[name]})
    texts = {f.code: f.text for f in found.findings}
    assert set(texts) == {"some-layers", "some-modules", "embeddings-untouched"}
    assert texts["some-layers"].startswith("2 of 3 layers are untouched: model.layers.0, model.layers.1")


def test_only_norms_differ(analysed: Analysed) -> None:
    steps = {n: s for n, s in everywhere(1e-3, 1).items() if "norm" in n}
    assert "vectors-only" in codes(analysed(steps))


def test_no_delta(analysed: Analysed) -> None:
    assert codes(analysed({})) == {"zero-delta"}


def test_another_tokenizer(tmp_path: Path) -> None:
    """Tokens that were added are none: only where base's tokens have moved, rows do not belong together."""
    tokens = {f"t{n}": n for n in range(200)}
    moved_tokens = {f"t{n}": (n + 1) % 200 for n in range(200)}
    base, near = base_tensors(), moved(base_tensors(), everywhere(1e-3, 1))
    start = write(tmp_path / "base", base, vocabulary=tokens)
    more = write(tmp_path / "more", near, vocabulary=tokens | {"<tool>": 200})
    other = write(tmp_path / "other", near, vocabulary=moved_tokens)
    assert "other-tokenizer" not in codes(paramdelta.analyze(more, start))
    finding = next(f for f in paramdelta.analyze(other, start).findings if f.code == "other-tokenizer")
    assert finding.numbers["differ"] == 200
    assert "other-tokenizer" in codes(paramdelta.analyze(more, start, other))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", ("model.layers", 3, "mlp.experts.*.up_proj")),
        ("transformer.h.0.ln_1.bias", ("transformer.h", 0, "ln_1.bias")),
        ("lm_head.weight", ("", None, "lm_head")),
        ("0.weight", ("", 0, "weight")),
    ],
)
def test_places(name: str, place: tuple[Any, ...]) -> None:
    assert tuple(place_of(name)) == place
