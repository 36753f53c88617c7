"""Means over seeds with their intervals, and the few numbers that are made of curves and lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# The 97.5 % quantile of Student's t with n degrees of freedom, n = 1, 2, …
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with a 95 % interval of Student's t. From one seed no interval follows: it is unbounded."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def half(self) -> float:
        """Half the interval's width."""
        n = len(self.values)
        if n < 2:
            return math.inf
        quantile = _QUANTILES[min(n - 1, len(_QUANTILES)) - 1]  # beyond the table: a little wider than need be
        return quantile * float(np.std(self.values, ddof=1)) / math.sqrt(n)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, digits: int = 2) -> str:
        if not self.values:
            return "–"
        mean = f"{self.mean:.{digits}f}"
        return (mean if math.isinf(self.half) else f"{mean} ± {self.half:.{digits}f}").replace("-", "−")


def recovered(merged: float, plain: float, direct: float, least_gain: float = 0.1) -> float | None:
    """The fraction of direct fine-tuning's gain that the merge has; None where that gain is too small to divide by."""
    gain = direct - plain
    return (merged - plain) / gain if gain >= least_gain else None


def barrier(at: Sequence[float], loss: Sequence[float]) -> float:
    """How far the loss rises above the straight line between its ends, at most; 0 where it never does."""
    return max(y - ((1 - x) * loss[0] + x * loss[-1]) for x, y in zip(at, loss, strict=True))


def steps_to(curve: Sequence[Sequence[float]], score: float) -> int | None:
    """The steps after which a score was first reached; None where it never was."""
    return next((int(step) for step, found in curve if found >= score), None)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs. NaN where either side does not vary."""
    a, b = _ranks(x), _ranks(y)
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    return (found[:, None] > found).sum(1) + ((found[:, None] == found).sum(1) - 1) / 2
