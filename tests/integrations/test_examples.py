"""The Python examples of docs/integrations.md, as they stand; those of the Hub and of mergekit are in their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from documented import NAMES, examples

import paramdelta

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
pytest.importorskip("transformers", reason="the models of this test are made by transformers")

from test_models import FAMILIES, make_models, tensors_of  # noqa: E402


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[float, dict[str, Any]]:
    """Checkpoints of the names in the text, in the working folder; what merging them gives, by alpha."""
    make_models(FAMILIES["llama-untied"], tmp_path)
    for role, name in NAMES.items():
        (tmp_path / role).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = {}
    for alpha in (0.7, 1.0):
        paramdelta.merge(**NAMES, out=f"out-{alpha}", alpha=alpha)
        found[alpha] = tensors_of(tmp_path / f"out-{alpha}")
    return found


def run(section: str, number: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(examples(section, "python")[number], f"docs/integrations.md, {section}", "exec"), names)
    return names


def test_transformers(merged: dict[float, dict[str, Any]]) -> None:
    model = run("transformers", 0)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, merged[0.7][name]), name
    assert torch.equal(run("transformers", 1)["norm"], merged[1.0]["model.norm.weight"])


def test_inference_engines(merged: dict[float, dict[str, Any]]) -> None:
    class Model:
        def load_weights(self, weights: Any) -> set[str]:
            self.held = dict(weights)
            return set(self.held)

    model = Model()
    assert run("Inference engines", 0)["load"](model) == set(merged[0.7])
    assert all(torch.equal(model.held[name], tensor) for name, tensor in merged[0.7].items())
