"""Quantised formats as data: what a weight's planes are, which scale an element uses, and how each family quantises.

A quantised weight is a plane of codes and a grid of scales: the element in row r and column c of a matrix uses

    scale[(r // rows), (c // cols)]        value = code · scale                         (one level)
                                           value = code · scale · second                (second == "multiply")
                                           value = code · binary32(scale / second)      (second == "divide")

``rows`` and ``cols`` of a grid are elements per scale, 0 for the whole extent: (0, 0) is per tensor, (1, 0) per row,
(128, 128) blocks, (1, 32) groups along K. Stacks of matrices [E, N, K] have a grid for each matrix.

A :class:`Recipe` is the reference quantiser of one family; docs/formats.md has the table with its sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paramdelta.dtypes import BY_NAME, F8_E4M3, F32, DType

E8M0, U8, I8, I32 = (BY_NAME[name] for name in ("f8_e8m0", "u8", "i8", "i32"))

# Codes by number, as `Codec` in csrc/core/scaled.hpp. ``f4`` is E2M1, ``i4`` a nibble that stands for itself minus 8
# (or minus its zero point); two to a byte, the even column in the low half.
CODECS = ("bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz", "f4", "i4")
CODEC_BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f4": 4, "i4": 4} | dict.fromkeys(CODECS[4:8], 8)

# How a unit's scale follows from amax, as `ScaleRule` in csrc/core/scaled.hpp. All operations are binary32, each
# rounded to nearest even.
RULES = (
    "ratio",  # amax / largest, rounded to the type of the scale
    "ceil2",  # the least power of two ≥ amax / largest, by bits: (bits + 0x7FFFFF) & 0x7F800000, at least 2^-126
    "near2",  # of amax's bits + 0x200000 only the exponent, divided by 4, at least 2^-127: compressed-tensors' MXFP4
    "inverse",  # 1 / min(448 / amax, 448 · 512): FBGEMM
    "nv_multiply",  # e4m3(amax / (6 · second)), at least 2^-9; the code's scale is binary32(scale · second)
    "nv_divide",  # e4m3(second · (amax / 6)), zero becomes 0.125; the code's scale is binary32(scale / second)
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one family turns merged values into codes and scales.

    Each value acc (binary64) is rounded to ``values`` first. For each unit, amax = max(|x|, ``floor``) over its
    finite elements; the scale follows by ``rule``, and is ``zero`` for a unit whose amax is 0 and for one so small
    that its scale comes out as 0 (nv_multiply: before the limit of 2^-9). The code is x · (1 / scale) where
    ``reciprocal``, else x / scale, in binary32 and with the scale as stored (inverse: x times the factor itself),
    rounded to nearest even and clamped to the codec's range. ``largest`` is the code value that amax is mapped to.
    """

    name: str
    codec: str
    rule: str
    largest: float
    floor: float = 0.0
    zero: float = 1.0
    reciprocal: bool = False
    values: str = "f32"
    source: str = ""


DEEPGEMM = Recipe(
    name="deepgemm",
    codec="f8_e4m3",
    rule="ratio",
    largest=448.0,
    floor=1e-4,
    reciprocal=True,
    source="deepseek-ai/DeepGEMM deep_gemm/utils/math.py per_block_cast_to_fp8",
)
DEEPGEMM_UE8M0 = replace(DEEPGEMM, name="deepgemm-ue8m0", rule="ceil2")
FP8_TENSOR = Recipe(
    name="fp8-tensor",
    codec="f8_e4m3",
    rule="ratio",
    largest=448.0,
    source="NVIDIA/TensorRT-Model-Optimizer FP8QTensor; scale 1 for a tensor of zeros",
)
FBGEMM = Recipe(
    name="fbgemm",
    codec="f8_e4m3",
    rule="inverse",
    largest=448.0,
    zero=1.0 / (448.0 * 512.0),
    reciprocal=True,
    source="pytorch/FBGEMM quantize_fp8_row and fp8_row_quantize_ref",
)
# The scale is computed and rounded in the weight's own type; a unit of zeros has that type's epsilon.
COMPRESSED_BF16 = Recipe(
    name="compressed-tensors-bf16",
    codec="f8_e4m3",
    rule="ratio",
    largest=448.0,
    zero=2.0**-7,
    values="bf16",
    source="vllm-project/compressed-tensors calculate_qparams",
)
COMPRESSED_F32 = replace(COMPRESSED_BF16, name="compressed-tensors-f32", zero=2.0**-23, values="f32")
MXFP8 = Recipe(
    name="mxfp8",
    codec="f8_e4m3",
    rule="ceil2",
    largest=448.0,
    zero=2.0**-127,
    reciprocal=True,
    source="pytorch/ao to_mx, scaling mode RCEIL",
)
MXFP4_OPENAI = Recipe(
    name="mxfp4-openai",
    codec="f4",
    rule="ceil2",
    largest=6.0,
    zero=2.0**-127,
    reciprocal=True,
    source="triton-lang/triton downcast_to_mxfp, as used for gpt-oss",
)
MXFP4_DEEPSEEK = replace(
    MXFP4_OPENAI, name="mxfp4-deepseek", floor=6.0 * 2.0**-126, source="deepseek-ai/DeepSeek-V4 inference/kernel.py"
)
MXFP4_COMPRESSED = Recipe(
    name="mxfp4-compressed-tensors",
    codec="f4",
    rule="near2",
    largest=6.0,
    zero=2.0**-127,
    source="vllm-project/compressed-tensors generate_mx_scales",
)
NVFP4_MODELOPT = Recipe(
    name="nvfp4-modelopt",
    codec="f4",
    rule="nv_multiply",
    largest=6.0,
    source="NVIDIA/TensorRT-Model-Optimizer NVFP4QTensor",
)
NVFP4_COMPRESSED = Recipe(
    name="nvfp4-compressed-tensors",
    codec="f4",
    rule="nv_divide",
    largest=6.0,
    zero=0.125,
    source="vllm-project/compressed-tensors generate_gparam, calculate_qparams",
)
INT4 = Recipe(
    name="int4",
    codec="i4",
    rule="ratio",
    largest=7.5,
    zero=2.0**-7,
    values="bf16",
    source="vllm-project/compressed-tensors calculate_qparams, pack_to_int32",
)
INT4_F32 = replace(INT4, name="int4-f32", zero=2.0**-23, values="f32")
RECIPES = {
    r.name: r
    for r in (
        DEEPGEMM,
        DEEPGEMM_UE8M0,
        FP8_TENSOR,
        FBGEMM,
        COMPRESSED_BF16,
        COMPRESSED_F32,
        MXFP8,
        MXFP4_OPENAI,
        MXFP4_DEEPSEEK,
        MXFP4_COMPRESSED,
        NVFP4_MODELOPT,
        NVFP4_COMPRESSED,
        INT4,
        INT4_F32,
    )
}


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """What a family calls the tensors of one weight: suffixes in place of ``.weight`` and, for stacked experts whose
    names have no ``.weight``, suffixes behind the name. Empty where a family has no such tensor."""

    codes: str = ".weight"
    scale: str = ""
    second: str = ""
    zero_point: str = ""
    shape: str = ""
    stacked_codes: str = ""
    stacked_scale: str = ""
    stacked_second: str = ""

    def of(self, weight: str, part: str) -> str | None:
        """Return the name of a part (codes, scale, second, zero_point, shape) of the weight called ``weight``."""
        if weight.endswith(".weight"):
            suffix: str = getattr(self, part)
            return weight.removesuffix(".weight") + suffix if suffix else None
        if part == "codes":
            return weight + self.stacked_codes
        suffix = getattr(self, f"stacked_{part}", "")
        return weight + suffix if suffix else None


@dataclass(frozen=True, kw_only=True)
class Format:
    """How quantised weights are stored. ``scale`` is what a scale is (``f8_e8m0`` also where its bytes are called U8);
    ``codes_dtype`` and ``scale_dtype`` are the dtypes in the headers. ``codec`` may differ from the recipe's where a
    format is only read (e4m3fnuz, e5m2). ``method`` is the config's family: fp8, mxfp8, mxfp4, modelopt,
    compressed-tensors, fbgemm_fp8."""

    name: str
    method: str
    recipe: Recipe
    rows: int
    cols: int
    scale: DType
    spelling: Spelling
    codes_dtype: DType = F8_E4M3
    scale_dtype: DType = F32
    codec: str = ""
    second: str = ""
    zero_points: bool = False
    # How scales are shaped: grid [R, C]; row [N] and scalar [], one [1] for one scale per row and per tensor;
    # spread [R, 1, C, 1], modelopt's blocks.
    scale_shape: str = "grid"

    def __post_init__(self) -> None:
        if not self.codec:
            object.__setattr__(self, "codec", self.recipe.codec)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return CODEC_BITS[self.codec]

    @property
    def whole(self) -> bool:
        """Whether something is scaled by all of a tensor, so that its amax must be known before the first code."""
        return (self.rows == 0 and self.cols == 0) or bool(self.second)


NATIVE = Spelling(scale=".weight_scale_inv", stacked_scale="_scale_inv")
DOT_SCALE = Spelling(scale=".scale", stacked_scale=".scale")
WEIGHT_SCALE = Spelling(scale=".weight_scale", stacked_scale="_scale")
MODELOPT_SPELLING = Spelling(
    scale=".weight_scale", second=".weight_scale_2", stacked_scale="_weight_scale", stacked_second="_weight_scale_2"
)
GPT_OSS_SPELLING = Spelling(codes=".weight", stacked_codes="_blocks", stacked_scale="_scales")
PACKED = Spelling(
    codes=".weight_packed",
    scale=".weight_scale",
    second=".weight_global_scale",
    zero_point=".weight_zero_point",
    shape=".weight_shape",
)
