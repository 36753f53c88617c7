"""How checkpoints store weights, written down once more for tests and apart from the package's own recognition: which
tensors a weight becomes, with which names, dtypes and shapes, and how they are read back into matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from paramdelta import reference
from paramdelta import reference_scaled as scaled
from paramdelta.dtypes import BY_NAME
from paramdelta.formats import RECIPES, Recipe
from paramdelta.reference_scaled import Quantised, Scaled

Values = NDArray[np.float64]
BITS = {"bf16": 16, "f16": 16, "f32": 32, "f4": 4, "i4": 4}  # of codes; the others have 8
HEADER = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


class Tensor(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Weight(NamedTuple):
    """The matrices of a weight, one for each expert of a stack, else one."""

    matrices: list[Scaled]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way of storing a weight [N, K] or a stack [E, N, K].

    ``recipe`` names the family's quantiser, empty for plain dtypes; ``codec`` is what a code is. ``rows`` and ``cols``
    are elements per scale, 0 for all; ``scale`` is what a scale is, ``scale_dtype`` what the header calls it. Suffixes
    stand in place of ``.weight``; of stacks whose names lack it, behind the name. ``scale_shape`` is grid [R, C],
    row [R], scalar [] or one [1]; ``stable`` says what decoding and quantising again reproduces: codes, values or
    nothing.
    """

    codec: str
    recipe: str = ""
    rows: int = 0
    cols: int = 0
    scale: str = "f32"
    codes_dtype: str = "F8_E4M3"
    scale_dtype: str = "F32"
    codes_suffix: str = ".weight"
    scale_suffix: str = ""
    second_suffix: str = ""
    zero_suffix: str = ""
    shape_suffix: str = ""
    stacked: tuple[str, str, str] = ("", "", "")  # suffixes of codes, scale and second scale of stacks
    scale_shape: str = "grid"
    second_shape: tuple[int, ...] = ()
    stable: str = "codes"

    @property
    def kind(self) -> str:
        """How the second scale takes part: multiply, divide or nothing."""
        return {"nvfp4-modelopt": "multiply", "nvfp4-compressed-tensors": "divide"}.get(self.recipe, "")

    @property
    def made_by(self) -> Recipe:
        """The quantiser."""
        return RECIPES[self.recipe]

    @property
    def whole(self) -> bool:
        """Whether a scale needs all of a matrix."""
        return bool(self.recipe) and (bool(self.kind) or (self.rows, self.cols) == (0, 0))

    def names(self, weight: str) -> dict[str, str]:
        """Return what the tensors of a weight are called, by part."""
        if not self.recipe:
            return {"codes": weight}
        if not weight.endswith(".weight"):
            suffixes = dict(zip(("codes", "scale", "second"), self.stacked, strict=True))
            return {part: weight + s for part, s in suffixes.items() if s or part == "codes"}
        stem = weight.removesuffix(".weight")
        parts = ("codes", "scale", "second", "zero", "shape")
        return {part: stem + s for part in parts if (s := getattr(self, f"{part}_suffix"))}

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the scales of a matrix in either direction."""
        return -(-rows // self.rows) if self.rows else 1, -(-cols // self.cols) if self.cols else 1

    def quantised(self, values: Values, second: float | None) -> Scaled:
        """Return a matrix as the family's quantiser stores it."""
        if not self.recipe:
            return Scaled(reference.encode(values, BY_NAME[self.codec])[0], self.codec)
        if self.codec.endswith("fnuz"):
            return self._fnuz(values)
        if self.zero_suffix:
            return self._asymmetric(values)
        return self.matrix(scaled.quantise(values, self.made_by, self.rows, self.cols, self.scale, second))

    def matrix(self, made: Quantised) -> Scaled:
        """Return what a quantiser made as a stored matrix."""
        second = made.second if self.kind else None
        return Scaled(made.codes, self.codec, made.scales, self.scale, self.rows, self.cols, second, self.kind)

    def _fnuz(self, values: Values) -> Scaled:
        scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-6).astype(np.float32) / np.float32(240)
        codes = (values / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fnuz).view(np.uint8)
        return Scaled(codes, self.codec, scale.view(np.uint32), "f32", 1, 0)

    def _asymmetric(self, values: Values) -> Scaled:
        shape, groups = values.shape, values.reshape(len(values), -1, self.cols)
        low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
        codes = scaled.scale_codes(np.maximum(high - low, 1e-6) / 15, self.scale)
        scale = scaled.scale_values(codes, self.scale)
        zero = np.clip(np.rint(-low / scale), 0, 15)
        nibbles = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, 15).reshape(shape).astype(np.uint8)
        return Scaled(
            nibbles, "i4", codes, self.scale, 1, self.cols, zero_points=zero.astype(np.uint8).reshape(codes.shape)
        )

    def tensors(self, name: str, weight: Weight, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the tensors that a weight of this shape is stored as."""
        names, first = self.names(name), weight.matrices[0]
        stack = shape[:-2] if len(shape) > 2 else ()
        packed = b"".join(scaled.pack(m.codes, self.codec).tobytes() for m in weight.matrices)
        if not self.recipe:
            return {name: Tensor(HEADER[self.codec], shape, packed)}
        per_item = {"I32": 8, "U8": 2, "I8": 2}.get(self.codes_dtype, 1)
        stored = (*shape[:-1], shape[-1] // per_item)
        if self.stacked[0] == "_blocks":
            stored = (*shape[:-1], shape[-1] // 32, 16)
        assert first.scales is not None
        rows, cols = first.scales.shape
        scales = {"grid": (*stack, rows, cols), "row": (*stack, rows), "scalar": stack, "one": (*stack, 1)}
        out = {
            names["codes"]: Tensor(self.codes_dtype, stored, packed),
            names["scale"]: Tensor(
                self.scale_dtype, scales[self.scale_shape], b"".join(m.scales.tobytes() for m in weight.matrices)
            ),
        }
        if "second" in names:
            data = np.array([m.second for m in weight.matrices], np.float32).tobytes()
            out[names["second"]] = Tensor("F32", stack or self.second_shape, data)
        if "zero" in names:
            padded = np.zeros((-(-rows // 8) * 8, cols), np.uint32)
            padded[:rows] = first.zero_points
            words = (padded.reshape(-1, 8, cols) << np.arange(0, 32, 4, dtype=np.uint32)[:, None]).sum(1, np.uint32)
            out[names["zero"]] = Tensor("I32", words.shape, words.tobytes())
        if "shape" in names:
            out[names["shape"]] = Tensor("I64", (len(shape),), np.array(shape, np.int64).tobytes())
        return out

    def read(self, name: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Weight:
        """Return a weight of this shape from the tensors of a folder."""
        names = self.names(name)
        rows, cols = (shape[-2:] if len(shape) > 1 else (1, math.prod(shape)))[:2]
        count = math.prod(shape[:-2])
        bits = BITS.get(self.codec, 8)
        raw = np.frombuffer(tensors[names["codes"]].data, np.uint8).reshape(count, rows, cols * bits // 8)
        codes = [scaled.unpack(part, self.codec, cols) for part in raw]
        if not self.recipe:
            return Weight([Scaled(c, self.codec) for c in codes])
        width = {"f32": 4, "bf16": 2, "f16": 2}.get(self.scale, 1)
        grids = np.frombuffer(tensors[names["scale"]].data, f"<u{width}").reshape(count, *self.grid(rows, cols))
        seconds: list[Any] = [None] * count
        if "second" in names:
            seconds = np.frombuffer(tensors[names["second"]].data, np.float32).tolist()
        zeros = None
        if "zero" in names:
            words = np.frombuffer(tensors[names["zero"]].data, np.uint32).reshape(-1, grids.shape[-1])
            zeros = scaled.unpack_zero_points(words, rows)
        return Weight(
            [
                Scaled(c, self.codec, g, self.scale, self.rows, self.cols, s, self.kind, zeros)
                for c, g, s in zip(codes, grids, seconds, strict=True)
            ]
        )


BF16, F16, F32 = (Form(codec=name) for name in ("bf16", "f16", "f32"))
BLOCKS = Form(
    codec="f8_e4m3",
    recipe="deepgemm",
    rows=128,
    cols=128,
    scale_suffix=".weight_scale_inv",
    stacked=("", "_scale_inv", ""),
)
BLOCKS_BF16 = replace(BLOCKS, scale="bf16", scale_dtype="BF16")
BLOCKS_UE8M0 = replace(BLOCKS, recipe="deepgemm-ue8m0", stable="values")
DOT_E8M0 = replace(BLOCKS_UE8M0, scale="f8_e8m0", scale_dtype="F8_E8M0", scale_suffix=".scale")
DOT_F32 = replace(BLOCKS_UE8M0, scale_suffix=".scale")
DOT_FP4 = replace(
    DOT_E8M0, codec="f4", recipe="mxfp4-deepseek", rows=1, cols=32, codes_dtype="I8", stacked=("", ".scale", "")
)
FBGEMM = Form(
    codec="f8_e4m3",
    recipe="fbgemm",
    rows=1,
    scale_suffix=".weight_scale",
    stacked=("", "_scale", ""),
    stable="",
)
FBGEMM_COLUMNS = replace(FBGEMM, rows=0, cols=1)
MODELOPT_FP8 = Form(
    codec="f8_e4m3",
    recipe="fp8-tensor",
    scale_suffix=".weight_scale",
    scale_shape="scalar",
    stacked=("", "_weight_scale", ""),
)
MISTRAL = replace(MODELOPT_FP8, scale_suffix=".weight_scale_inv", stacked=("", "_scale_inv", ""))
CHANNELS = replace(
    FBGEMM, recipe="compressed-tensors-bf16", scale="bf16", scale_dtype="BF16", stacked=("", "", ""), stable="codes"
)
CHANNELS_F32 = replace(CHANNELS, recipe="compressed-tensors-f32", scale="f32", scale_dtype="F32")
COMPRESSED_TENSOR = replace(CHANNELS, rows=0, scale_shape="one")
COMPRESSED_BLOCKS = replace(CHANNELS, rows=128, cols=128)
FNUZ = replace(FBGEMM, recipe="compressed-tensors-f32", codec="f8_e4m3fnuz", codes_dtype="F8_E4M3FNUZ")
MXFP8 = Form(
    codec="f8_e4m3",
    recipe="mxfp8",
    rows=1,
    cols=32,
    scale="f8_e8m0",
    scale_dtype="U8",
    scale_suffix=".weight_scale_inv",
    stable="values",
)
NVFP4_MODELOPT = Form(
    codec="f4",
    recipe="nvfp4-modelopt",
    rows=1,
    cols=16,
    scale="f8_e4m3",
    codes_dtype="U8",
    scale_dtype="F8_E4M3",
    scale_suffix=".weight_scale",
    second_suffix=".weight_scale_2",
    stacked=("", "_weight_scale", "_weight_scale_2"),
    stable="",
)
NVFP4_PACKED = replace(
    NVFP4_MODELOPT,
    recipe="nvfp4-compressed-tensors",
    codes_suffix=".weight_packed",
    second_suffix=".weight_global_scale",
    stacked=("", "", ""),
    second_shape=(1,),
)
MXFP4_PACKED = Form(
    codec="f4",
    recipe="mxfp4-compressed-tensors",
    rows=1,
    cols=32,
    scale="f8_e8m0",
    codes_dtype="U8",
    scale_dtype="U8",
    codes_suffix=".weight_packed",
    scale_suffix=".weight_scale",
    stable="",
)
GPT_OSS = replace(
    MXFP4_PACKED, recipe="mxfp4-openai", stacked=("_blocks", "_scales", ""), codes_suffix=".weight", stable="values"
)
INT4 = Form(
    codec="i4",
    recipe="int4",
    rows=1,
    cols=32,
    scale="bf16",
    codes_dtype="I32",
    scale_dtype="BF16",
    codes_suffix=".weight_packed",
    scale_suffix=".weight_scale",
    shape_suffix=".weight_shape",
    stable="",
)
INT4_F32 = replace(INT4, recipe="int4-f32", scale="f32", scale_dtype="F32")
INT4_ZEROS = replace(INT4, zero_suffix=".weight_zero_point")
