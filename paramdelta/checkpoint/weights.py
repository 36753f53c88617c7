"""Which tensors of a checkpoint are quantised weights: found by the headers, confirmed by the quantisation config."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paramdelta.checkpoint.declared import Declared, Formats, declared
from paramdelta.checkpoint.families import BY_NAMES, CODES, FP8_CODES, SCALES, Layout, named, recipe_of
from paramdelta.checkpoint.folder import Checkpoint
from paramdelta.checkpoint.grids import TENSOR, USUAL, Grid, Shape, fitting, grid_shape, grid_words, matrix, misfit
from paramdelta.checkpoint.packed import contradicted_shapes
from paramdelta.checkpoint.quantised import hopeless_codes
from paramdelta.dtypes import DTYPES, F32, DType
from paramdelta.errors import Complaint, shown
from paramdelta.formats import FP8_TENSOR, Format, Spelling

NONE = -1
_MOST_SHOWN = 20
_FP8 = frozenset(d.code for d in FP8_CODES)
_CODES = np.array([d.code for d in CODES])
_ENDINGS = tuple(ending for ending in SCALES if ending)
_CODED = {(ending, codes) for ending, _, codes, _ in BY_NAMES if ending}

# Calibration of activations and of the key-value cache.
_STATISTICS = (
    *(f".{what}_scale" for what in ("input", "activation", "output", "k", "v", "q", "kv", "kv_cache", "prob")),
    *(".input_global_scale", ".input_scale_ub", ".activation_scale_ub", ".qscale_act", "_input_scale"),
    *(".activation_scale_inv", ".input_scale_inv", ".input_zero_point", ".k_zero_point", ".v_zero_point"),
)
# What belongs to codes and to nothing else. ``.scale`` and ``_scale`` are not here: parameters are called so, too.
_PLANES = (
    *(f".weight_{what}" for what in ("scale_inv", "scale", "scale_2", "global_scale", "zero_point", "shape")),
    *(".qscale_weight", ".scale_weight", "_scale_inv", "_weight_scale", "_weight_scale_2"),
)


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """A quantised weight of a checkpoint: its logical name and shape, its format, and the rows of its planes.

    ``shape`` is [out, in], or [E, out, in] for stacks: of elements, however they are packed. ``format`` has this
    weight's own grid. ``codes``, ``scale``, ``second``, ``zero_point`` and ``shape_row`` are rows of the checkpoint's
    table, NONE where there is no such plane; ``scale`` is NONE only where unscaled codes were allowed.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    codes: int
    scale: int
    second: int = NONE
    zero_point: int = NONE
    shape_row: int = NONE


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What is quantised in a checkpoint, and how.

    ``weights`` are by logical name, in the order of the table; ``parts`` are all rows that are planes of one.
    ``statistics`` are rows of calibration (input_scale, k_scale, …): no arithmetic. ``method`` is the config's family,
    None for a plain checkpoint; ``config`` and ``config_place`` are the quantisation config and where it stood;
    ``ignored`` are the modules that it leaves alone, as written; ``dynamic`` tells that activations are scaled as they
    come, or not at all; ``description`` says it in words.
    """

    weights: dict[str, QuantisedWeight] = field(default_factory=dict)
    parts: frozenset[int] = frozenset()
    statistics: tuple[int, ...] = ()
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_place: str = ""
    ignored: tuple[str, ...] = ()
    dynamic: bool = True
    description: str = ""


def recognise(checkpoint: Checkpoint, *, allow_unscaled: bool = False) -> tuple[Quantisation, list[Complaint]]:
    """Return what is quantised in a checkpoint, and every complaint about it.

    ``allow_unscaled`` takes fp8 codes without a scale for values. A plain checkpoint, fp8 without any scales included,
    gives an empty Quantisation and no complaints.
    """
    table = checkpoint.tensors
    config, complaints = declared(checkpoint)
    low_bit = np.flatnonzero(np.isin(table.dtype, _CODES)).tolist()
    if config is None and not low_bit:
        return Quantisation(), complaints
    if complaints:  # a config that is refused: what it says of the tensors is not known
        method = config.method if config else None
        return Quantisation(method=method, description=config.words if config else ""), complaints
    refused = hopeless_codes(checkpoint, low_bit)
    if refused is not None:
        return Quantisation(description=refused[0]), [refused[1]]
    search = _Search(checkpoint, config or Declared())
    search.weights_among(low_bit)
    quantised = bool(search.weights or search.wrong or (config is not None and config.formats != {}))
    if quantised:
        search.unscaled(allow=allow_unscaled)
        search.without_weights()
        if not search.weights and not search.wrong:
            search.complain(
                str(checkpoint.path),
                f"{checkpoint.role} is quantised by its config, {search.config.words}, but none of its tensors is",
                "if they were dequantised, take the quantisation config out",
            )
    if not search.wrong:
        search.wrong += contradicted_shapes(checkpoint, search.weights.values())
    return search.result(quantised), search.complaints()


class _Search:
    """Goes through the tensors of one checkpoint, collecting weights, planes and complaints."""

    def __init__(self, checkpoint: Checkpoint, config: Declared) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.table = checkpoint.tensors
        self.rows = self.table.rows
        self.dtype: list[int] = self.table.dtype.tolist()
        self.weights: dict[str, QuantisedWeight] = {}
        self.parts: set[int] = set()
        self.bare: list[int] = []  # codes without a scale
        self.wrong: list[Complaint] = []
        self.formats: dict[tuple[Any, ...], Format | str] = {}
        self.shared: dict[Format, Format] = {}
        self.variants: dict[tuple[Any, ...], Format] = {}

    def complain(self, subject: str, problem: str, remedy: str) -> None:
        self.wrong.append(Complaint(subject, problem, remedy))

    def complain_of(self, row: int, problem: str, remedy: str = "use the bf16 release, or dequantise it first") -> None:
        file = self.checkpoint.files[int(self.table.file[row])].path
        self.complain(f"{file}: {shown(self.table.names[row])}", problem, remedy)

    def complaints(self) -> list[Complaint]:
        rest = len(self.wrong) - _MOST_SHOWN
        more = [Complaint(str(self.checkpoint.path), f"and {rest:,} more like these")] if rest > 0 else []
        return self.wrong[:_MOST_SHOWN] + more

    def weights_among(self, low_bit: list[int]) -> None:
        """Pair the codes among these rows with their scales."""
        names, rows = self.table.names, self.rows
        last = {"." + name.rpartition(".")[2] for name in names}
        present = {e: [s for s in scales if any(n.endswith(s) for n in last)] for e, scales in SCALES.items()}
        for row in low_bit:
            name = names[row]
            ending = next((e for e in _ENDINGS if name.endswith(e)), "")
            stem = name[: len(name) - len(ending)]
            found = [(s, scale) for s in present[ending] if (scale := rows.get(stem + s, NONE)) != NONE]
            if len(found) == 1:
                self._weight(row, stem, ending, *found[0])
            elif found:
                self.parts.update((row, *(scale for _, scale in found)))
                both = " and ".join(shown(names[scale]) for _, scale in found)
                self.complain_of(row, f"has several scales, {both}: which one counts is not known")
            elif (ending, self.dtype[row]) in _CODED or self.dtype[row] in _FP8:
                self.bare.append(row)

    def _weight(self, row: int, stem: str, ending: str, suffix: str, scale: int) -> None:
        """Make a weight of codes and the scale that was found for them."""
        codes_dtype, scale_dtype = self.dtype[row], self.dtype[scale]
        layout = BY_NAMES.get((ending, suffix, codes_dtype, scale_dtype))
        if layout is None:
            if ending != "" or codes_dtype in _FP8:
                self.parts.update((row, scale))
                codes, scales = (DTYPES[c].safetensors for c in (codes_dtype, scale_dtype))
                what = f"is {codes} with a scale of {scales}, {shown(self.table.names[scale])}"
                self.complain_of(row, f"{what}: no format that is known here stores that")
            return None
        self.parts.add(row)
        self.parts.add(scale)
        key = (id(layout), codes_dtype, scale_dtype, self.table.shapes[row], self.table.shapes[scale])
        made = self.formats.get(key)
        if made is None:
            made = self.formats[key] = self._shared(self._format(layout, *key[1:]))
        if isinstance(made, str):
            return self.complain_of(row, made)
        more: dict[str, int] = {}
        if ending == ".weight_packed":
            for part, spelt in (("zero_point", layout.spelling.zero_point), ("shape_row", layout.spelling.shape)):
                if spelt and stem + spelt in self.rows:
                    more[part] = self.rows[stem + spelt]
        if layout.second:
            more["second"] = self._second(row, stem, ending, layout.spelling)
        if more:
            self.parts.update(r for r in more.values() if r != NONE)
        shape = layout.shape(self.table.shapes[row])
        if layout.names == ("int4",):
            made = self._int4(row, made, shape, more.get("zero_point", NONE))
        name = f"{stem}.weight" if ending.startswith(".") else stem
        if self.rows.get(name, row) != row:
            self.complain_of(row, f"is the weight {shown(name)}, which is there under that name, too")
        self.weights[name] = QuantisedWeight(name=name, shape=shape, format=made, codes=row, scale=scale, **more)
        return None

    def _format(self, layout: Layout, codes: int, scales: int, stored: Shape, scale: Shape) -> Format | str:
        """Return the format of codes and scales of these types and shapes, or what is wrong with them."""
        config, method = self.config, self.config.method or layout.method
        what = f"{DTYPES[codes].safetensors} codes with scales of {DTYPES[scales].safetensors}"
        if (
            config.codes
            and codes in _FP8
            and DTYPES[codes].name.removeprefix("f8_").removesuffix("fnuz") != config.codes
        ):
            return f"is {DTYPES[codes].safetensors}, but the config, {config.words}, has codes of {config.codes}"
        if len(stored) < 1 or (layout.per_element == 2 and layout.spelling.stacked_codes and stored[-1] != 16):
            return f"is {what} of shape {list(stored)}, which is no such matrix"
        allowed: Formats = {n: USUAL[n] for n in layout.names}
        if config.formats is not None:
            allowed = {n: config.formats[n] or USUAL[n] for n in layout.names if n in config.formats}
        if not allowed:
            expected = ", ".join(config.formats or {}) or "no quantised weights"
            return f"is {what} ({' or '.join(layout.names)}), but the config, {config.words}, allows {expected}"
        shape = layout.shape(stored)
        grids = [grid for known in allowed.values() for grid in known]
        if config.formats is None and len(scale) < max(len(shape), 2):
            grids.sort(key=lambda grid: grid != TENSOR)
        fits = fitting(shape, scale, grids)
        if fits is None:
            likely = grids if config.formats is not None else [known[0] for known in allowed.values()]
            return misfit(shape, scale, dict.fromkeys(likely))
        grid, how = fits
        name = named(allowed if len(allowed) > 1 else layout.names, grid)
        meaning = layout.scale or DTYPES[scales]
        recipe = recipe_of(name, method, layout, meaning, config.power_of_two)
        return Format(
            name=name,
            method=method,
            recipe=recipe,
            rows=grid[0],
            cols=grid[1],
            scale=meaning,
            spelling=layout.spelling,
            codes_dtype=DTYPES[codes],
            scale_dtype=DTYPES[scales],
            codec=DTYPES[codes].name if codes in _FP8 else recipe.codec,
            second=layout.second,
            scale_shape=how,
        )

    def _second(self, row: int, stem: str, ending: str, spelling: Spelling) -> int:
        """Return the row of a weight's second level of scales, one for each matrix; complain where it is missing."""
        suffix = spelling.second if ending else spelling.stacked_second
        found = self.rows.get(stem + suffix, NONE)
        if found == NONE:
            self.complain_of(row, f"has scales, but no second level of them: there is no {shown(stem + suffix)}")
            return NONE
        stack = matrix(self.table.shapes[row])[0]
        shapes = (stack, (*stack, 1), (*stack, 1, 1))
        if self.dtype[found] != F32.code or self.table.shapes[found] not in shapes:
            seen = f"{DTYPES[self.dtype[found]].safetensors} {list(self.table.shapes[found])}"
            wanted = " or ".join(str(list(s)) for s in shapes[:2])
            self.complain_of(found, f"is {seen}, but the second level of scales is F32 {wanted}")
        return found

    def _int4(self, row: int, made: Format, shape: Shape, zero_point: int) -> Format:
        """Return the format of packed int4 with what is beside its codes taken into account."""
        config = self.config
        if config.formats is None:
            self.complain_of(
                row,
                "is I32 with integers packed into it, but no config says of how many bits each is",
                "restore the quantization_config in config.json",
            )
        if zero_point == NONE:
            return self._variant(made, spelling=replace(made.spelling, zero_point=""))
        scale = grid_shape(shape, (made.rows, made.cols))
        wanted = (*scale[:-2], -(-scale[-2] // 8), scale[-1])
        if self.dtype[zero_point] != made.codes_dtype.code or self.table.shapes[zero_point] != wanted:
            seen = f"{DTYPES[self.dtype[zero_point]].safetensors} {list(self.table.shapes[zero_point])}"
            self.complain_of(zero_point, f"is {seen}, but zero points are packed into I32 {list(wanted)}")
        return self._variant(made, zero_points=True)

    def _shared(self, made: Format | str) -> Format | str:
        """Return the one object that stands for all formats equal to this one."""
        return made if isinstance(made, str) else self.shared.setdefault(made, made)

    def _variant(self, made: Format, **changes: Any) -> Format:
        """Return a format with changes, one object for all weights that have it."""
        key = (id(made), *changes)
        if key not in self.variants:
            self.variants[key] = replace(made, **changes)
        return self.variants[key]

    def unscaled(self, *, allow: bool) -> None:
        """Complain about codes whose scale was not found, or take fp8 among them for values."""
        for row in self.bare:
            name = self.table.names[row]
            if row in self.parts or name.endswith((*_PLANES, *_STATISTICS)):
                continue
            dtype = DTYPES[self.dtype[row]]
            ending = next((e for e in _ENDINGS if name.endswith(e)), "")
            fp8 = dtype.code in _FP8
            if fp8 and allow:
                self.weights[name] = QuantisedWeight(
                    name=name, shape=self.table.shapes[row], format=_unscaled(dtype), codes=row, scale=NONE
                )
                self.parts.add(row)
                continue
            tried = ", ".join(SCALES[ending])
            remedy = (
                "--allow-unscaled if the codes are the values" if fp8 else "download the checkpoint again, all of it"
            )
            self.complain_of(
                row, f"is {dtype.safetensors} in a quantised checkpoint, but has no scale (tried {tried})", remedy
            )

    def without_weights(self) -> None:
        """Complain about scales and other planes that belong to no codes."""
        for row, name in enumerate(self.table.names):
            if row in self.parts or not name.endswith(_PLANES) or name.endswith(_STATISTICS):
                continue
            stem = name[: len(name) - len(next(p for p in _PLANES if name.endswith(p)))]
            weight = next((n for n in (f"{stem}.weight", f"{stem}.weight_packed", stem) if n in self.rows), None)
            if weight is None:
                problem = f"has no codes: there is no {shown(stem)}.weight"
            else:
                dtype = DTYPES[self.dtype[self.rows[weight]]].safetensors
                problem = f"belongs to codes, but {shown(weight)} is {dtype} and takes no such tensor"
            self.complain_of(row, problem, "if the weight was dequantised, leave this tensor out of the checkpoint")

    def result(self, quantised: bool) -> Quantisation:
        """Return what was found."""
        config = self.config
        if not quantised and not config.words:
            return Quantisation()
        statistics = [r for r, n in enumerate(self.table.names) if n.endswith(_STATISTICS) and r not in self.parts]
        alike = Counter(id(w.format) for w in self.weights.values())  # formats are shared: hashing each is slow
        formats = {id(w.format): w.format for w in self.weights.values()}
        found: Counter[str] = Counter()
        for number, count in alike.items():
            found[_words(formats[number])] += count
        summary = ", ".join(f"{count:,} × {words}" for words, count in found.most_common())
        first = next(iter(self.weights.values()), None)
        method = config.method or (first.format.method if first else None)
        if not quantised:
            summary = "no weights are quantised"
        example = f", such as {shown(first.name)}" if first and not config.words else ""
        return Quantisation(
            weights=self.weights,
            parts=frozenset(self.parts),
            statistics=tuple(statistics),
            method=method,
            config=config.config,
            config_place=config.place,
            ignored=config.ignored,
            dynamic=config.dynamic,
            description=": ".join(t for t in (config.words or method or "", summary) if t) + example,
        )


def _unscaled(dtype: DType) -> Format:
    """Return the format of fp8 codes that are values."""
    return Format(
        name="fp8-tensor",
        method="fp8",
        recipe=FP8_TENSOR,
        rows=0,
        cols=0,
        scale=F32,
        spelling=Spelling(),
        codes_dtype=dtype,
        codec=dtype.name,
        scale_shape="scalar",
    )


def _words(made: Format) -> str:
    """Return a format in words: its codes, its grid and the type of its scales."""
    if not made.spelling.scale and not made.spelling.stacked_scale:
        return f"{made.codes_dtype.safetensors} without scales"
    grid: Grid = (made.rows, made.cols)
    return f"{made.name} ({grid_words(grid)}, scales {made.scale_dtype.safetensors})"


def quantised_as(checkpoint: Checkpoint) -> str | None:
    """Return what a quantised checkpoint is quantised as, in words; None for a plain one."""
    return recognise(checkpoint, allow_unscaled=True)[0].description or None
