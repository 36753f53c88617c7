"""The known quantised formats: what each family stores for a weight, and the formats that an output can be given.

A :class:`Layout` is what the headers show: how the tensors are called, and the types of codes and scales. The grid,
found from the shapes, makes it one of the layout's formats; the config's family then gives the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from paramdelta.checkpoint.grids import COLUMN, ROW, TENSOR, Grid, Shape
from paramdelta.dtypes import BF16, BY_NAME, F8_E4M3, F8_E5M2, F16, F32, DType
from paramdelta.formats import (
    COMPRESSED_BF16,
    COMPRESSED_F32,
    DEEPGEMM,
    DEEPGEMM_UE8M0,
    DOT_SCALE,
    E8M0,
    FBGEMM,
    FP8_TENSOR,
    GPT_OSS_SPELLING,
    I8,
    I32,
    INT4,
    INT4_F32,
    MODELOPT_SPELLING,
    MXFP4_COMPRESSED,
    MXFP4_DEEPSEEK,
    MXFP4_OPENAI,
    MXFP8,
    NATIVE,
    NVFP4_COMPRESSED,
    NVFP4_MODELOPT,
    PACKED,
    U8,
    WEIGHT_SCALE,
    Format,
    Recipe,
    Spelling,
)

F4 = BY_NAME["f4"]
FP8_CODES = (F8_E4M3, F8_E5M2, BY_NAME["f8_e4m3fnuz"], BY_NAME["f8_e5m2fnuz"])
CODES = (*FP8_CODES, F4, U8, I8, I32)
_FLOATS = (F32, BF16, F16)
_FP8 = ("fp8-block", "fp8-channel", "fp8-tensor")
_COMPRESSED = "compressed-tensors"

MISTRAL = Spelling(scale=".qscale_weight")
SCALE_WEIGHT = Spelling(scale=".scale_weight")
MODELOPT_FP8 = replace(MODELOPT_SPELLING, second="", stacked_second="")
PACKED_MXFP4 = replace(PACKED, second="", zero_point="", shape="")
PACKED_NVFP4 = replace(PACKED, zero_point="", shape="")
PACKED_INT4 = replace(PACKED, second="")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Codes of type ``codes`` with scales of type ``scales``, called as in ``spelling``: one of the formats ``names``.

    ``per_element`` is how many codes one element of the stored tensor holds; ``scale`` what a scale is, where its
    bytes are called otherwise; ``second`` how a second level of scales applies; ``method`` the family that is assumed
    where no config says it.
    """

    names: tuple[str, ...]
    spelling: Spelling
    codes: tuple[DType, ...]
    scales: tuple[DType, ...]
    method: str
    per_element: int = 1
    scale: DType | None = None
    second: str = ""

    def shape(self, codes: Shape) -> Shape:
        """Return the logical shape of codes of this stored shape. gpt-oss stores blocks of 16 bytes each."""
        if self.spelling is GPT_OSS_SPELLING:
            return (*codes[:-2], codes[-2] * codes[-1] * 2)
        return (*codes[:-1], codes[-1] * self.per_element)


def _fp8(spelling: Spelling, method: str) -> tuple[Layout, ...]:
    """fp8 codes under one spelling: with scales of floats, or of powers of two as E8M0 or as bytes."""
    return (
        Layout(names=_FP8, spelling=spelling, codes=FP8_CODES, scales=_FLOATS, method=method),
        Layout(names=("mxfp8", "fp8-block"), spelling=spelling, codes=FP8_CODES, scales=(E8M0,), method=method),
        Layout(names=("mxfp8",), spelling=spelling, codes=FP8_CODES, scales=(U8,), method="mxfp8", scale=E8M0),
    )


def _fp4(spelling: Spelling, codes: DType, scales: DType, method: str, per_element: int = 2) -> Layout:
    return Layout(
        names=("mxfp4",),
        spelling=spelling,
        codes=(codes,),
        scales=(scales,),
        method=method,
        per_element=per_element,
        scale=E8M0,
    )


LAYOUTS: tuple[Layout, ...] = (
    *_fp8(NATIVE, "fp8"),
    *_fp8(DOT_SCALE, "fp8"),
    *_fp8(WEIGHT_SCALE, _COMPRESSED),
    *_fp8(MODELOPT_FP8, "modelopt"),
    Layout(names=_FP8, spelling=MISTRAL, codes=FP8_CODES, scales=_FLOATS, method="fp8"),
    Layout(names=_FP8, spelling=SCALE_WEIGHT, codes=FP8_CODES, scales=_FLOATS, method="fp8"),
    _fp4(DOT_SCALE, I8, E8M0, "fp8"),
    _fp4(DOT_SCALE, U8, E8M0, "fp8"),
    _fp4(DOT_SCALE, F4, E8M0, "fp8", 1),
    _fp4(PACKED_MXFP4, U8, U8, _COMPRESSED),
    _fp4(PACKED_MXFP4, U8, E8M0, _COMPRESSED),
    _fp4(GPT_OSS_SPELLING, U8, U8, "mxfp4"),
    _fp4(GPT_OSS_SPELLING, U8, E8M0, "mxfp4"),
    Layout(
        names=("nvfp4",),
        spelling=MODELOPT_SPELLING,
        codes=(U8,),
        scales=(F8_E4M3,),
        method="modelopt",
        per_element=2,
        second="multiply",
    ),
    Layout(
        names=("nvfp4",),
        spelling=PACKED_NVFP4,
        codes=(U8,),
        scales=(F8_E4M3,),
        method=_COMPRESSED,
        per_element=2,
        second="divide",
    ),
    Layout(
        names=("int4",),
        spelling=PACKED_INT4,
        codes=(I32,),
        scales=_FLOATS,
        method=_COMPRESSED,
        per_element=8,
    ),
)


def _suffixes(codes: str, stacked: bool) -> tuple[str, ...]:
    """Return the suffixes of scales whose codes have the suffix ``codes``, each once."""
    which = ("stacked_codes", "stacked_scale") if stacked else ("codes", "scale")
    found = [getattr(s.spelling, which[1]) for s in LAYOUTS if getattr(s.spelling, which[0]) == codes]
    return tuple(dict.fromkeys(suffix for suffix in found if suffix))


# Suffix of codes: suffixes of their scales. "" is for stacks, whose names have no suffix of their own.
SCALES: dict[str, tuple[str, ...]] = {
    ".weight": _suffixes(".weight", False),
    ".weight_packed": _suffixes(".weight_packed", False),
    "_blocks": _suffixes("_blocks", True),
    "": _suffixes("", True),
}
# (suffix of codes, suffix of scale, dtype of codes, dtype of scale): the layout.
BY_NAMES: dict[tuple[str, str, int, int], Layout] = {}
for _layout in reversed(LAYOUTS):  # the first of the list wins
    for _codes in _layout.codes:
        for _scale in _layout.scales:
            _s = _layout.spelling
            BY_NAMES[_s.codes, _s.scale, _codes.code, _scale.code] = _layout
            if _s.stacked_scale:
                BY_NAMES[_s.stacked_codes, _s.stacked_scale, _codes.code, _scale.code] = _layout


def named(names: Iterable[str], grid: Grid) -> str:
    """Return which of a layout's formats has this grid."""
    names = tuple(names)
    if len(names) == 1:
        return names[0]
    if "mxfp8" in names:
        return "mxfp8" if grid == (1, 32) else "fp8-block"
    return "fp8-tensor" if grid == TENSOR else "fp8-channel" if grid in (ROW, COLUMN) else "fp8-block"


def recipe_of(name: str, method: str, layout: Layout, scale: DType, power_of_two: bool) -> Recipe:
    """Return how a family quantises: a format's recipe in the checkpoints of one config method."""
    packed = layout.spelling.codes == ".weight_packed"
    if name == "int4":
        return INT4 if scale == BF16 else INT4_F32
    if name == "nvfp4":
        return NVFP4_COMPRESSED if packed else NVFP4_MODELOPT
    if name == "mxfp4":
        if packed:
            return MXFP4_COMPRESSED
        return MXFP4_OPENAI if layout.spelling is GPT_OSS_SPELLING else MXFP4_DEEPSEEK
    if name == "mxfp8":
        return MXFP8
    if method == _COMPRESSED:
        return COMPRESSED_BF16 if scale == BF16 else COMPRESSED_F32
    if method == "fbgemm_fp8":
        return FBGEMM
    if name == "fp8-block" and method != "modelopt":
        return DEEPGEMM_UE8M0 if power_of_two or scale == E8M0 else DEEPGEMM
    return FP8_TENSOR


def _compressed(name: str, recipe: Recipe, grid: Grid, scale: DType, **more: object) -> Format:
    rows, cols = grid
    values = {"spelling": WEIGHT_SCALE, "scale_dtype": scale} | more
    return Format(name=name, method=_COMPRESSED, recipe=recipe, rows=rows, cols=cols, scale=scale, **values)  # type: ignore[arg-type]


# What an output is given from scratch, by the name of its format.
OUTPUT_FORMATS: dict[str, Format] = {
    "fp8-block": Format(
        name="fp8-block", method="fp8", recipe=DEEPGEMM, rows=128, cols=128, scale=F32, spelling=NATIVE
    ),
    "fp8-channel": _compressed("fp8-channel", COMPRESSED_BF16, ROW, BF16),
    "fp8-tensor": _compressed("fp8-tensor", COMPRESSED_BF16, TENSOR, BF16, scale_shape="one"),
    "mxfp8": Format(
        name="mxfp8", method="mxfp8", recipe=MXFP8, rows=1, cols=32, scale=E8M0, spelling=NATIVE, scale_dtype=U8
    ),
    "mxfp4": _compressed(
        "mxfp4", MXFP4_COMPRESSED, (1, 32), E8M0, spelling=PACKED_MXFP4, codes_dtype=U8, scale_dtype=U8
    ),
    "nvfp4": _compressed(
        "nvfp4", NVFP4_COMPRESSED, (1, 16), F8_E4M3, spelling=PACKED_NVFP4, codes_dtype=U8, second="divide"
    ),
    "int4": _compressed("int4", INT4, (1, 32), BF16, spelling=replace(PACKED_INT4, zero_point=""), codes_dtype=I32),
}
# The scale types that can be asked for. ue8m0 are powers of two stored as F32, e8m0 the same as bytes.
_SCALE_TYPES: dict[str, dict[str, tuple[Recipe, DType]]] = {
    "fp8-block": {
        "f32": (DEEPGEMM, F32),
        "bf16": (DEEPGEMM, BF16),
        "ue8m0": (DEEPGEMM_UE8M0, F32),
        "e8m0": (DEEPGEMM_UE8M0, E8M0),
    },
    "fp8-channel": {"bf16": (COMPRESSED_BF16, BF16), "f32": (COMPRESSED_F32, F32)},
    "fp8-tensor": {"bf16": (COMPRESSED_BF16, BF16), "f32": (COMPRESSED_F32, F32)},
    "int4": {"bf16": (INT4, BF16), "f32": (INT4_F32, F32)},
}


def output_format(name: str, *, block: tuple[int, int] | None = None, scale: str | None = None) -> Format:
    """Return the format that ``--format`` names.

    ``block`` is (rows, columns) per scale, for fp8-block and int4; ``scale`` a type of scales (f32, bf16; for fp8-block
    also ue8m0, powers of two in F32, and e8m0, the same as bytes). ValueError says what does not fit together.
    """
    if name not in OUTPUT_FORMATS:
        raise ValueError(f"{name!r} is no format of an output; there are {', '.join(OUTPUT_FORMATS)}")
    made = OUTPUT_FORMATS[name]
    if block is not None and block != (made.rows, made.cols):
        rows, cols = block
        if name == "fp8-block":
            if rows <= 0 or cols <= 0:
                raise ValueError(f"blocks of {rows}×{cols} cannot be; both sides are positive")
        elif name == "int4":
            if rows != 1 or cols < 0 or cols % 8:
                raise ValueError(f"int4 has groups of a multiple of 8 within a row (or 0, the row), not {rows}×{cols}")
        else:
            raise ValueError(f"the scales of {name} cannot be laid out as {rows}×{cols}; only fp8-block and int4 vary")
        made = replace(made, rows=rows, cols=cols)
    if scale is not None:
        known = _SCALE_TYPES.get(name, {})
        if scale not in known:
            there = ", ".join(known) if known else f"only {made.scale}, which need not be said"
            raise ValueError(f"{name} has no scales of type {scale!r}; there are {there}")
        recipe, dtype = known[scale]
        made = replace(made, recipe=recipe, scale=dtype, scale_dtype=dtype)
    return made
