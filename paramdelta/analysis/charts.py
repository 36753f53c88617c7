"""The report's plots as inline SVG: heat maps of layers and modules, lines along the layers, bars, spectra. Every mark
has its value as text, for pointers and for readers of the page's structure."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paramdelta.analysis.colours import STEPS, Scale
from paramdelta.errors import shown

Show = Callable[[float], str]


def text_of(name: object) -> str:
    """Return a stranger's text for a page: control characters and marks of direction shown, mark-up escaped."""
    return html.escape(shown(name), quote=True)


def number(value: float | None) -> str:
    """Return three digits of a number: 0.0123, 4.5e-06, 1,230."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0.0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def cosine(value: float | None) -> str:
    """Return a cosine, to three places."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}".replace("-0.000", "0.000").replace("-", "−")


def percent(value: float | None) -> str:
    """Return a fraction in percent."""
    if value is None or not math.isfinite(value):
        return "–"
    return "100 %" if value == 1.0 else f"{number(min(100 * value, 99.99) if value < 1.0 else 100 * value)} %"


@dataclass(frozen=True)
class HeatMap:
    """Values of layers (downwards) and modules (across); what has none is left blank."""

    title: str
    note: str
    layers: Sequence[int]
    modules: Sequence[str]
    values: Mapping[tuple[int, str], float | None]
    scale: Scale
    show: Show = number

    def svg(self) -> str:
        """Return the figure."""
        row = 20 if len(self.layers) <= 24 else 14 if len(self.layers) <= 48 else 9
        col, left = 29, 34
        names = [short(m) for m in self.modules]
        top = 14 + round(max((len(n) for n in names), default=0) * 5.1)
        right = 10 + round(len(names[-1]) * 2.9) if names else 0
        width = left + col * len(self.modules) + max(right - col // 2, 8)
        height = top + row * len(self.layers) + 6
        every = 1 if row >= 20 else 4 if row == 14 else 8
        parts = [
            f'<text class="axis" transform="translate({left + col * i + col // 2},{top - 6}) rotate(-60)">{text_of(n)}'
            f"<title>{text_of(module)}</title></text>"
            for i, (n, module) in enumerate(zip(names, self.modules, strict=True))
        ]
        for j, layer in enumerate(self.layers):
            y = top + row * j
            if j % every == 0:
                parts.append(f'<text class="axis end" x="{left - 6}" y="{y + row / 2 + 4:g}">{layer}</text>')
            for i, module in enumerate(self.modules):
                if (layer, module) not in self.values:
                    continue
                value = self.values[layer, module]
                said = "no value" if value is None else self.show(value)
                parts.append(
                    f'<rect class="{self.scale.css(value)}" x="{left + col * i}" y="{y}" width="{col - 1}" '
                    f'height="{row - 1}"><title>layer {layer} · {text_of(module)}: {said}</title></rect>'
                )
        return figure(self.title, self.note, svg(width, height, "".join(parts), self.title), legend(self))


def legend(chart: HeatMap) -> str:
    """Return the strip of colours with its ends and middle labelled."""
    width, kind = 216, "d" if chart.scale.diverging else "s"
    cell = width / STEPS
    strip = "".join(
        f'<rect class="{kind}{i}" x="{28 + i * cell:.2f}" y="0" width="{cell + 0.3:.2f}" height="9"/>'
        for i in range(STEPS)
    )
    marks = "".join(
        f'<text class="axis mid" x="{28 + width * chart.scale.fraction(v):.1f}" y="22">{chart.show(v)}</text>'
        for v in chart.scale.ticks()
    )
    return svg(width + 60, 26, strip + marks, f"colours of {chart.title}", "legend")


@dataclass(frozen=True)
class Line:
    """One line of a plot along the layers, or along the numbers of singular values."""

    name: str
    points: Sequence[tuple[int, float]]
    series: int
    dashed: bool = False
    faint: bool = False


def lines(title: str, note: str, across: str, drawn: Sequence[Line], show: Show = number) -> str:
    """Return a figure of lines over whole numbers."""
    width, height, left, top, bottom = 720, 260, 58, 12, 34
    scale = Scale.from_zero(y for line in drawn for _, y in line.points)
    xs = [x for line in drawn for x, _ in line.points]
    first, last = min(xs, default=0), max(xs, default=1)

    def at(x: float, y: float) -> tuple[float, float]:
        along = (x - first) / (last - first) if last > first else 0.5
        return left + along * (width - left - 14), top + (1 - scale.fraction(y)) * (height - top - bottom)

    parts = []
    for tick in scale.ticks():
        y = at(first, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis end" x="{left - 6}" y="{y + 4:.1f}">{show(tick)}</text>')
    step = max(1, math.ceil((last - first + 1) / 9))
    for x in range(first, last + 1, step):
        parts.append(f'<text class="axis mid" x="{at(x, scale.low)[0]:.1f}" y="{height - bottom + 16}">{x}</text>')
    parts.append(f'<text class="axis mid" x="{(left + width) / 2:g}" y="{height - 3}">{html.escape(across)}</text>')
    for line in drawn:
        kind = f"line line{line.series % 4}" + " dashed" * line.dashed + " faint" * line.faint
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in line.points))
        parts.append(f'<polyline class="{kind}" points="{path}"><title>{text_of(line.name)}</title></polyline>')
        if line.faint:
            continue
        parts += [
            f'<circle class="mark{line.series % 4}" cx="{at(*p)[0]:.1f}" cy="{at(*p)[1]:.1f}" r="3">'
            f"<title>{text_of(line.name)}, {html.escape(across)} {p[0]}: {show(p[1])}</title></circle>"
            for p in line.points
        ]
    named = [line for line in drawn if not line.faint]
    keys = "".join(f"<li>{svg(26, 10, _key(line), '', 'key')}{text_of(line.name)}</li>" for line in named)
    key_list = f'<ul class="keys">{keys}</ul>' if len(named) > 1 else ""
    return figure(title, note, svg(width, height, "".join(parts), title, "wide"), key_list)


def _key(line: Line) -> str:
    kind = f"line line{line.series % 4}" + " dashed" * line.dashed
    return f'<line class="{kind}" x1="0" x2="26" y1="5" y2="5"/>'


def bars(title: str, note: str, values: Sequence[tuple[str, float | None]], show: Show = number) -> str:
    """Return a figure of horizontal bars from zero."""
    largest = max((v for _, v in values if v is not None and math.isfinite(v)), default=0.0) or 1.0
    row, left, width = 22, 176, 720
    parts = []
    for i, (name, value) in enumerate(values):
        y = i * row
        length = 0.0 if value is None or not math.isfinite(value) else value / largest * (width - left - 72)
        label = short(name, 26)
        said = "no value" if value is None else show(value)
        parts.append(
            f'<text class="axis end" x="{left - 8}" y="{y + 15}">{text_of(label)}<title>{text_of(name)}</title></text>'
            f'<rect class="mark0" x="{left}" y="{y + 3}" width="{max(length, 0.5):.1f}" height="{row - 7}" rx="2">'
            f"<title>{text_of(name)}: {said}</title></rect>"
            f'<text class="axis" x="{left + length + 6:.1f}" y="{y + 15}">{said}</text>'
        )
    return figure(title, note, svg(width, row * len(values) + 2, "".join(parts), title, "wide"), "")


def short(name: str, most: int = 24) -> str:
    """Return the end of a module's name, at most ``most`` letters."""
    tail = name if len(name) <= most else ".".join(name.split(".")[-1:])
    return tail if len(tail) <= most else "…" + tail[-(most - 1) :]


def svg(width: float, height: float, inner: str, label: str, kind: str = "") -> str:
    """Return an SVG element that scales with the page."""
    named = f'role="img" aria-label="{html.escape(label, quote=True)}"' if label else 'aria-hidden="true"'
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg class="{kind}" {size} {named}>{inner}</svg>'


def figure(title: str, note: str, drawing: str, under: str) -> str:
    """Return a figure with its caption, and a line that says what is pointed at."""
    return (
        f"<figure><figcaption><h3>{html.escape(title)}</h3><p>{html.escape(note)}</p></figcaption>"
        f'<div class="scroll">{drawing}</div>{under}<output aria-live="polite"></output></figure>'
    )
