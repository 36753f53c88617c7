"""Weights in every quantised form, for tests: what each recipe's matrices look like."""

from __future__ import annotations

import numpy as np

from paramdelta import reference_scaled as scaled
from paramdelta.formats import RECIPES, Recipe
from paramdelta.reference_scaled import Output, Scaled

# How each recipe is stored: type of the scale, grid.
STORED = {
    "deepgemm": ("f32", 128, 128),
    "deepgemm-ue8m0": ("f32", 128, 128),
    "fp8-tensor": ("f32", 0, 0),
    "fbgemm": ("f32", 1, 0),
    "compressed-tensors-bf16": ("bf16", 1, 0),
    "compressed-tensors-f32": ("f32", 1, 0),
    "mxfp8": ("f8_e8m0", 1, 32),
    "mxfp4-openai": ("f8_e8m0", 1, 32),
    "mxfp4-deepseek": ("f8_e8m0", 1, 32),
    "mxfp4-compressed-tensors": ("f8_e8m0", 1, 32),
    "nvfp4-modelopt": ("f8_e4m3", 1, 16),
    "nvfp4-compressed-tensors": ("f8_e4m3", 1, 16),
    "int4": ("bf16", 1, 32),
    "int4-f32": ("f32", 1, 32),
}


def kind_of(recipe: Recipe) -> str:
    """Return how the recipe's second scale takes part: multiply, divide or nothing."""
    return recipe.rule.removeprefix("nv_") if recipe.rule.startswith("nv_") else ""


def stored(name: str, x: np.ndarray) -> tuple[Scaled, Output]:
    """Return x quantised by a recipe, and the description of how it is stored."""
    recipe = RECIPES[name]
    scale_dtype, rows, cols = STORED[name]
    kind = kind_of(recipe)
    second = scaled.second_of(float(np.abs(scaled.round_values(x, recipe)).max()), kind) if kind else None
    got = scaled.quantise(x, recipe, rows, cols, scale_dtype, second)
    m = Scaled(got.codes, recipe.codec, got.scales, scale_dtype, rows, cols, second, kind)
    return m, Output(recipe.codec, recipe, rows, cols, scale_dtype, second)


def weights(seed: int, shape: tuple[int, int] = (130, 160)) -> np.ndarray:
    """Return values of the size of weights."""
    return np.random.default_rng(seed).normal(size=shape) * 0.02
