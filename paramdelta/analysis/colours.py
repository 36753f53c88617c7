"""Colours of the report's plots: steps of scales as CSS classes, one set for light and one for dark, and how values
find their step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = 24  # finer than neighbouring cells can be told apart
# Anchors of each scale, from its low end to its high end. Lightness alone orders the first; the second is neutral in
# the middle. They hold for readers who do not tell red from green.
SEQUENTIAL = {
    "light": ("#eef3f8", "#9cc6e4", "#3a86c8", "#143c73"),
    "dark": ("#1b2533", "#1f5a94", "#4aa3df", "#e3f3ff"),
}
DIVERGING = {
    "light": ("#a8430e", "#eb9a5b", "#f1f1ee", "#62a8c9", "#0d4f7c"),
    "dark": ("#ffb27a", "#b8602a", "#2a2d31", "#2f7fa8", "#9fdcff"),
}
SERIES = {"light": ("#1f6fb5", "#c2571a", "#2f855a", "#8a4fbe"), "dark": ("#62b5f5", "#f29a5c", "#6fce9d", "#c79bf2")}


@dataclass(frozen=True)
class Scale:
    """How values become steps: linear or logarithmic between two ends, in one of the two sets of colours."""

    low: float
    high: float
    log: bool = False
    diverging: bool = False

    @classmethod
    def logarithmic(cls, values: Iterable[float]) -> Scale:
        """Return the scale from the smallest positive value to the largest, over four decades at most."""
        found = [v for v in values if math.isfinite(v) and v > 0.0]
        high = max(found, default=1.0)
        low = max(min(found, default=high), high / 1e4)
        return cls(low, high if high > low * 1.01 else low * 10.0, log=True)

    @classmethod
    def from_zero(cls, values: Iterable[float]) -> Scale:
        """Return the linear scale from 0 to a round number that no value exceeds."""
        high = max((v for v in values if math.isfinite(v)), default=0.0)
        if high <= 0.0:
            return cls(0.0, 1.0)
        unit = 10.0 ** math.floor(math.log10(high))
        return cls(0.0, next(unit * m for m in (1, 2, 4, 6, 8, 10, 20) if unit * m >= high * (1 - 1e-9)))

    def fraction(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1."""
        if self.log:
            if value <= 0.0:
                return 0.0
            at = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            at = (value - self.low) / (self.high - self.low)
        return min(max(at, 0.0), 1.0)

    def css(self, value: float | None) -> str:
        """Return the class of a value's colour."""
        if value is None or not math.isfinite(value) or (self.log and value <= 0.0):
            return "none"
        return f"{'d' if self.diverging else 's'}{round(self.fraction(value) * (STEPS - 1))}"

    def ticks(self) -> list[float]:
        """Return three to five values to label."""
        if not self.log:
            return [self.low + (self.high - self.low) * i / 2 for i in range(3)]
        decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        found = [10.0**d for d in decades]
        return found if len(found) >= 2 else [self.low, math.sqrt(self.low * self.high), self.high]


def css_rules(mode: str) -> str:
    """Return the rules of all classes for ``light`` or ``dark``."""
    rules = [f".s{i}{{fill:{mixed(SEQUENTIAL[mode], i / (STEPS - 1))}}}" for i in range(STEPS)]
    rules += [f".d{i}{{fill:{mixed(DIVERGING[mode], i / (STEPS - 1))}}}" for i in range(STEPS)]
    for i, colour in enumerate(SERIES[mode]):
        rules += [f".line{i}{{stroke:{colour}}}", f".mark{i}{{fill:{colour}}}"]
    return "".join(rules)


def mixed(anchors: Sequence[str], at: float) -> str:
    """Return the colour at ``at`` of the way along the anchors."""
    place = at * (len(anchors) - 1)
    first = min(int(place), len(anchors) - 2)
    a, b = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in anchors[first : first + 2])
    parts = (round(x + (y - x) * (place - first)) for x, y in zip(a, b, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
