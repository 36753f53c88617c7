"""The HTML report: one page with its styles, plots and script in it. Nothing is loaded from anywhere, and the page's
own policy forbids it; names of tensors and folders are strangers' text and are escaped."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING

from paramdelta.analysis.charts import HeatMap, Line, bars, cosine, lines, number, percent, text_of
from paramdelta.analysis.colours import Scale, css_rules
from paramdelta.analysis.measures import DeltaMeasures, Group, Tensor, gathered
from paramdelta.errors import escaped

if TYPE_CHECKING:
    from paramdelta.analysis.result import Analysis

MOST_ROWS = 2000  # of the table: a browser sorts them at once; the CSV file has every tensor
MOST_SPECTRA = 160  # lines in one plot
MOST_MODULES = 24  # columns of a heat map, bars of a plot

Show = Callable[[float | None], str]

_DARK = (
    ":root{--page:#12161c;--card:#191f27;--ink:#e6ebf1;--quiet:#9aa7b5;--rule:#2b343f;--accent:#62b5f5;"
    "--problem:#ff8a80;--caution:#e9b44c;--note:#62b5f5;--none:#22282f}"
)
_KINDS = (("attn", "attention"), ("mlp", "expert", "ffn", "moe"))
_FLOW = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up", "gate", "up_proj", "down_proj")
_WEIGHTS = {"problem": "Problem", "caution": "Caution", "note": "Note"}


def page(analysis: Analysis) -> str:
    """Return the page."""
    style = _resource("report.css") + css_rules("light")
    style += "@media screen and (prefers-color-scheme:dark){" + _DARK + css_rules("dark") + "}"
    script = _resource("report.js")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    body = "".join(_sections(analysis))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=True)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Delta of {text_of(_short(analysis.sources[0].post))}</title><style>{style}</style></head>"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def _sections(analysis: Analysis) -> Iterator[str]:
    several = len(analysis.sources) > 1
    yield _header(analysis)
    yield "<main>"
    yield _findings(analysis)
    if several:
        yield _between(analysis)
    for k in range(len(analysis.sources)):
        delta = analysis.total.deltas[k]
        if delta is None:
            continue
        title = f"Delta {k + 1}: {text_of(_short(analysis.sources[k].post))}" if several else "The delta"
        yield f'<section><h2>{title}</h2><div class="tiles">{_tiles(delta)}</div>'
        yield f'<div class="figures">{"".join(_figures(analysis, k))}</div></section>'
    yield _table(analysis)
    yield "</main>"
    read = f"{analysis.bytes_read / 1e9:.3g} GB read in {analysis.seconds:.3g} s"
    yield f"<footer>paramdelta · {len(analysis.tensors):,} tensors · {read}</footer>"


def _header(analysis: Analysis) -> str:
    rows = []
    for k, source in enumerate(analysis.sources):
        end = f" {k + 1}" if len(analysis.sources) > 1 else ""
        rows += [(f"post{end}", source.post), (f"base{end}", source.base)]
    if analysis.new_base is not None:
        rows.append(("new base", analysis.new_base))
    entries = "".join(f"<dt>{role}</dt><dd>{text_of(_short(p))} <span>{text_of(p)}</span></dd>" for role, p in rows)
    drift = ", drift = new_base − base" if analysis.new_base is not None else ""
    return (
        f'<header><h1>What post-training changed</h1><p class="formula">delta = post − base{drift}</p>'
        f'<dl class="sources">{entries}</dl></header>'
    )


def _tiles(delta: DeltaMeasures) -> str:
    tiles = [
        (percent(delta.relative_norm), "relative norm: ‖delta‖ / ‖base‖"),
        (percent(delta.unchanged_fraction), "of the elements are bit-equal in post and base"),
        (cosine(delta.cosine_post_base), "cosine between the weights of post and base"),
    ]
    if delta.drift_squared is not None:
        tiles += [
            (percent(delta.relative_drift), "relative drift: ‖new_base − base‖ / ‖base‖"),
            (number(delta.drift_to_delta), "times as long as the delta is the drift"),
            (cosine(delta.cosine_to_drift), "cosine between delta and drift"),
        ]
    tiles.append((number(delta.largest), "largest change of one element"))
    return "".join(f'<div class="tile"><b>{value}</b><span>{words}</span></div>' for value, words in tiles)


def _findings(analysis: Analysis) -> str:
    several = len(analysis.sources) > 1
    items = []
    for finding in analysis.findings:
        of = f"Delta {finding.delta + 1}: " if several and finding.delta is not None else ""
        items.append(
            f'<li class="{finding.weight}"><b>{_WEIGHTS[finding.weight]}</b>{of}{text_of_words(finding.text)}</li>'
        )
    if analysis.unpaired:
        names = ", ".join(text_of(n) for n in analysis.unpaired[:6])
        more = f" and {len(analysis.unpaired) - 6:,} more" if len(analysis.unpaired) > 6 else ""
        items.append(f'<li class="caution"><b>Caution</b>not compared, for want of a partner: {names}{more}</li>')
    items += [f'<li class="caution"><b>Caution</b>{text_of_words(warning)}</li>' for warning in analysis.warnings]
    if not items:
        items = ['<li class="note"><b>Note</b>Nothing stands out.</li>']
    return f'<section><h2>What the numbers suggest</h2><ul class="findings">{"".join(items)}</ul></section>'


def text_of_words(text: str) -> str:
    """Return a sentence for the page, which may hold names: control characters shown, mark-up escaped."""
    return html.escape(escaped(text), quote=True)


def _between(analysis: Analysis) -> str:
    pairs = sorted(analysis.total.inner)
    tiles = "".join(
        f'<div class="tile"><b>{cosine(analysis.total.cosine(i, j))}</b><span>cosine between deltas {i + 1} and {j + 1}'
        "</span></div>"
        for i, j in pairs
    )
    maps: list[str] = []
    for i, j in pairs:
        title = f"Deltas {i + 1} and {j + 1}: cosine"
        note = "1: the same direction, 0: unrelated, −1: against each other"
        maps += _maps(analysis, title, note, _cosine_of(i, j), lambda _: Scale(-1.0, 1.0, diverging=True), cosine)
    return (
        f'<section><h2>Between the deltas</h2><div class="tiles">{tiles}</div>'
        f'<div class="figures">{"".join(maps)}</div></section>'
    )


def _cosine_of(i: int, j: int) -> Callable[[Group], float | None]:
    return lambda group: group.cosine(i, j)


def _figures(analysis: Analysis, k: int) -> Iterator[str]:
    def of(name: str) -> Callable[[Group], float | None]:
        def value(group: Group) -> float | None:
            delta = group.deltas[k]
            found: float | None = None if delta is None else getattr(delta, name)
            return found

        return value

    def positive(values: Sequence[float]) -> Scale:
        return Scale.logarithmic(values)

    note = "‖delta‖ / ‖base‖ of each module in each layer, on a logarithmic scale"
    yield from _maps(analysis, "Relative norm", note, of("relative_norm"), positive)
    note = "elements that are bit-equal in post and base"
    yield from _maps(analysis, "Unchanged", note, of("unchanged_fraction"), lambda _: Scale(0.0, 1.0), percent)
    if analysis.new_base is not None:
        note = "1: new_base has moved along the delta, 0: the two are unrelated, −1: against it"
        yield from _maps(analysis, "Cosine to the drift", note, of("cosine_to_drift"), _symmetric, cosine)
        note = "‖new_base − base‖ / ‖base‖, on a logarithmic scale"
        yield from _maps(analysis, "Relative drift", note, of("relative_drift"), positive)
    if any(s.delta == k for t in analysis.tensors for s in t.spectra):
        note = "‖A‖_F² / ‖A‖₂² of the delta matrices: 1 for a matrix of rank 1"
        yield from _maps(analysis, "Stable rank", note, _stable_rank(k), positive)
        yield _spectra(analysis.tensors, k)
    yield _profile(analysis, k)
    ranked = sorted(analysis.modules, key=lambda g: -(of("relative_norm")(g) or 0.0))[:MOST_MODULES]
    note = "‖delta‖ / ‖base‖ over all layers, the largest first"
    yield bars("By type of module", note, [(g.name, of("relative_norm")(g)) for g in ranked])


def _symmetric(values: Sequence[float]) -> Scale:
    """Return a diverging scale around 0 that reaches as far as the values, and a tenth at least."""
    most = min(max([0.1, *(abs(v) for v in values)]), 1.0)
    return Scale(-most, most, diverging=True)


def _stable_rank(k: int) -> Callable[[Group], float | None]:
    def value(group: Group) -> float | None:
        found = [s.stable_rank for s in group.spectra if s.delta == k] if isinstance(group, Tensor) else []
        return found[0] if found else None

    return value


def _maps(
    analysis: Analysis,
    title: str,
    note: str,
    value: Callable[[Group], float | None],
    scale: Callable[[Sequence[float]], Scale],
    show: Callable[[float], str] = number,
) -> Iterator[str]:
    """Yield a heat map for every stack of layers."""
    stacks: dict[str, dict[tuple[int, str], list[Tensor]]] = {}
    for tensor in analysis.tensors:
        place = tensor.place
        if place.layer is not None:
            stacks.setdefault(place.stack, {}).setdefault((place.layer, place.module), []).append(tensor)
    for stack, cells in stacks.items():
        if len({layer for layer, _ in cells}) < 2:
            continue
        values = {key: value(m[0] if len(m) == 1 else gathered("", m)) for key, m in cells.items()}
        known = {key: v for key, v in values.items() if v is not None}
        if not known:
            continue
        modules = list(dict.fromkeys(module for _, module in cells if any(m == module for _, m in known)))
        modules = sorted(modules, key=_order)[:MOST_MODULES]
        where = f", {stack}" if len(stacks) > 1 else ""
        yield HeatMap(
            title=f"{title}{where}",
            note=note,
            layers=sorted({layer for layer, _ in cells}),
            modules=modules,
            values={key: v for key, v in values.items() if key[1] in modules},
            scale=scale(list(known.values())),
            show=show,
        ).svg()


def _order(module: str) -> tuple[int, int, str]:
    """Return where a module stands in a heat map: attention, then the feed-forward part, norms last; within each as
    data flows."""
    kind = next((at for at, words in enumerate(_KINDS) if any(word in module for word in words)), len(_KINDS))
    if "norm" in module or "ln_" in module:
        kind = len(_KINDS) + 1
    return kind, next((at for at, word in enumerate(_FLOW) if word in module), len(_FLOW)), module


def _profile(analysis: Analysis, k: int) -> str:
    """Return the plot of sizes along the layers of the longest stack."""
    by_stack: dict[str, dict[int, list[Tensor]]] = {}
    for tensor in analysis.tensors:
        if tensor.place.layer is not None:
            by_stack.setdefault(tensor.place.stack, {}).setdefault(tensor.place.layer, []).append(tensor)
    if not by_stack:
        return ""
    layers = max(by_stack.values(), key=len)
    groups = {layer: gathered("", layers[layer]).deltas[k] for layer in sorted(layers)}
    drawn = [
        Line(name, points, series, dashed=series > 0)
        for series, (name, what) in enumerate((("delta", "relative_norm"), ("drift", "relative_drift")))
        if (points := [(n, v) for n, d in groups.items() if d is not None and (v := getattr(d, what)) is not None])
    ]
    if not any(len(line.points) > 1 for line in drawn):
        return ""
    return lines("Along the layers", "lengths relative to ‖base‖", "layer", drawn)


def _spectra(tensors: Sequence[Tensor], k: int) -> str:
    """Return the plot of singular values, each matrix's relative to its largest."""
    drawn: list[Line] = []
    for tensor in tensors:
        for spectrum in tensor.spectra:
            largest = spectrum.values[0] if spectrum.values else 0.0
            points = [(i + 1, v / largest) for i, v in enumerate(spectrum.values) if largest and v > 1e-6 * largest]
            if spectrum.delta == k and len(points) > 1:
                drawn.append(Line(tensor.name, points, len(drawn), faint=True))
    if not drawn:
        return ""
    note = "the largest singular values of each delta matrix, relative to its first"
    return lines("Spectra", note, "number of the singular value", drawn[:MOST_SPECTRA])


def _table(analysis: Analysis) -> str:
    several = len(analysis.sources) > 1
    heads: list[str] = ["tensor", "shape"]
    columns: list[tuple[int, str, Show]] = []
    names: list[tuple[str, str, Show]] = [
        ("relative_norm", "relative norm", number),
        ("unchanged_fraction", "unchanged", percent),
    ]
    if analysis.new_base is not None:
        names += [("relative_drift", "drift", number), ("cosine_to_drift", "cosine to drift", cosine)]
    names += [("largest", "largest", number)]
    for k in range(len(analysis.sources)):
        for name, words, show in names:
            columns.append((k, name, show))
            heads.append(f"{words} {k + 1}" if several else words)
    ranked = sorted(analysis.tensors, key=lambda t: -max((d.relative_norm or 0.0) for d in t.deltas if d is not None))
    rows = []
    for tensor in ranked[:MOST_ROWS]:
        size = 1
        for n in tensor.shape:
            size *= n
        shape = "×".join(map(str, tensor.shape)) or "1"
        cells = [f"<td>{text_of(tensor.name)}</td>", f'<td data-v="{size}">{shape}</td>']
        for k, name, show in columns:
            delta = tensor.deltas[k]
            value = None if delta is None else getattr(delta, name)
            cells.append(f'<td data-v="{"" if value is None else repr(value)}">{show(value)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    left_out = len(ranked) - len(rows)
    said = f"The {len(rows):,} with the largest relative norm; --csv has {left_out:,} more. " if left_out else ""
    head = "".join(f'<th scope="col"><button type="button">{words}</button></th>' for words in heads)
    return (
        f'<section><h2>Tensors</h2><p class="quiet">{said}Headings sort.</p><p class="filter">'
        '<input type="search" placeholder="Filter by name" aria-label="Filter tensors by name"> '
        '<span class="quiet" id="shown" aria-live="polite"></span></p><div class="table"><table id="tensors">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _short(path: str) -> str:
    return PurePath(path).name or path


def _resource(name: str) -> str:
    return (files("paramdelta.analysis") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
