"""How merges of quantised matrices are checked: stored matrices of every format, the kernels' call, the comparison."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import cuda_calls
import numpy as np
from remembered import remembered

from paramdelta import _cpu, reference, reference_scaled
from paramdelta.dtypes import BY_NAME
from paramdelta.formats import CODEC_BITS, CODECS, RECIPES, RULES, Recipe
from paramdelta.reference_scaled import Output, Quantised, Scaled, ScaledTerm

SECONDS = {"": 0, "multiply": 1, "divide": 2}


class Kind(NamedTuple):
    """How a matrix is stored: its codec, its grid, the dtype of its scales (empty: none), and its second scale."""

    codec: str
    rows: int = 0
    cols: int = 0
    scale_dtype: str = ""
    second: str = ""
    zero_points: bool = False

    def __str__(self) -> str:
        grid = f"-{self.rows}x{self.cols}-{self.scale_dtype}" if self.scale_dtype else ""
        return f"{self.codec}{grid}{'-' + self.second if self.second else ''}{'-zeros' if self.zero_points else ''}"


def stored(rng: np.random.Generator, kind: Kind, values: reference.Values) -> Scaled:
    """Return values stored about as a quantiser would. How well does not matter, that all bits occur does."""
    if not kind.scale_dtype:
        if kind.codec in ("f8_e4m3fnuz", "f8_e5m2fnuz", "f4", "i4"):
            return Scaled(_nearest(values, kind.codec), kind.codec)
        return Scaled(reference.encode(values, BY_NAME[kind.codec])[0], kind.codec)
    amax = reference_scaled.unit_max(np.abs(values), kind.rows, kind.cols)
    scale = np.where(amax == 0, 1.0, amax) / {"f4": 6.0, "i4": 7.0}.get(kind.codec, 200.0)
    second = None
    if kind.second:
        second = float(np.float32(scale.max() / 200.0 if kind.second == "multiply" else 200.0 / scale.max()))
        scale = scale / second if kind.second == "multiply" else scale * second
    if kind.scale_dtype == "f8_e8m0":
        scale = 2.0 ** np.clip(np.ceil(np.log2(scale)), -127, 127)
    codes = reference_scaled.scale_codes(scale, kind.scale_dtype)
    used = reference_scaled.scale_values(codes, kind.scale_dtype)
    if kind.second:
        used = used * second if kind.second == "multiply" else used / second
    zeros = rng.integers(6, 11, scale.shape).astype(np.uint8) if kind.zero_points else None
    spread = reference_scaled.spread(np.where(used == 0, 1.0, used), values.shape, kind.rows, kind.cols)
    return Scaled(
        _nearest(values / spread, kind.codec), kind.codec, codes, kind.scale_dtype, kind.rows, kind.cols, second,
        kind.second, zeros,
    )  # fmt: skip


def _nearest(values: reference.Values, codec: str) -> reference.Codes:
    if codec == "i4":
        return (np.clip(np.rint(values), -8, 7) + 8).astype(np.uint8)
    if codec in ("bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2"):
        return reference.encode(values, BY_NAME[codec])[0]
    every = np.arange(1 << CODEC_BITS[codec], dtype=np.uint8)
    table = reference_scaled.code_values(every, codec)
    order = np.argsort(table)[: np.isfinite(table).sum()]
    found = np.searchsorted(table[order], values).clip(0, order.size - 1)
    return every[order[found]]


class Memory:
    """A stored matrix in memory as the kernels take it, with room between rows, and as one region of a larger one."""

    def __init__(self, matrix: Scaled | None, codec: str = "f32", gap: int = 0) -> None:
        if matrix is None:
            self.tuple: Any = (0, CODECS.index(codec), 0, None)
            return
        packed = reference_scaled.pack(matrix.codes, matrix.codec)
        self.bytes = np.full((len(packed), packed.shape[1] + gap), 0xA5, np.uint8)
        self.bytes[:, : packed.shape[1]] = packed
        scales = None
        if matrix.scales is not None:
            dtype = BY_NAME[str(matrix.scale_dtype)]
            self.scales = np.ascontiguousarray(matrix.scales, f"u{dtype.bits // 8}")
            zeros, zero_pitch = 0, 0
            if matrix.zero_points is not None:
                count = -(-len(matrix.zero_points) // 8)
                nibbles = np.zeros((count * 8, matrix.zero_points.shape[1]), np.uint32)
                nibbles[: len(matrix.zero_points)] = matrix.zero_points
                shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
                self.words = (nibbles.reshape(count, 8, -1) << shifts).sum(1, dtype=np.uint32)
                zeros, zero_pitch = address(self.words), self.words.shape[1]
            scales = (
                address(self.scales), dtype.code, self.scales.shape[1], matrix.rows, matrix.cols, 0, 0,
                SECONDS[matrix.second_kind], 1.0 if matrix.second is None else matrix.second, zeros, zero_pitch,
            )  # fmt: skip
        self.tuple = (address(self.bytes), CODECS.index(matrix.codec), self.bytes.shape[1], scales)

    def region(self, row: int, col: int) -> Any:
        """Return the matrix from an element on, by pointers and phases; ``col`` is even where codes are nibbles."""
        start, codec, pitch, scales = self.tuple
        start += row * pitch + col * CODEC_BITS[CODECS[codec]] // 8
        if scales is not None:
            scales = (*scales[:5], row if scales[3] or scales[9] else 0, col if scales[4] else 0, *scales[7:])
        return start, codec, pitch, scales


# The arrays behind the addresses that Memory hands out.
_ALIVE: weakref.WeakValueDictionary[int, np.ndarray[Any, Any]] = weakref.WeakValueDictionary()


def address(array: np.ndarray[Any, Any]) -> int:
    start = int(array.__array_interface__["data"][0])
    _ALIVE[start] = array
    return start


def _gap(kernels: str, nbytes: int) -> int:
    """Return the bytes between rows: the Triton kernels want rows to begin with an element."""
    return 8 if kernels == "triton" else nbytes


def recipe_tuple(recipe: Recipe, scale_dtype: str) -> Any:
    return (
        CODECS.index(recipe.codec), BY_NAME[scale_dtype].code, RULES.index(recipe.rule), recipe.reciprocal,
        recipe.values == "bf16", recipe.largest, recipe.floor, recipe.zero,
    )  # fmt: skip


class Ran(NamedTuple):
    """What the kernels gave."""

    codes: reference.Codes
    scales: reference.Codes | None
    counts: tuple[int, int, int]
    touched: bool
    amax: float
    error: float
    value: float


def run(
    new_base: Any,
    terms: Sequence[tuple[Any, Any, float]],
    shape: tuple[int, int],
    output: Output,
    *,
    kernels: str,
    keep: bool = False,
    threads: int = 1,
    gap: int = 7,
) -> Ran:
    """Merge with the kernels. Operands are what Memory makes. Bytes around the output must stay as they are."""
    rows, cols = shape
    width = -(-cols * CODEC_BITS[output.codec] // 8)
    out = np.full((rows + 1, width + _gap(kernels, gap)), 0x5A, np.uint8)
    scales = None
    options: dict[str, Any] = {}
    if output.recipe is None:
        options["out_dtype"] = BY_NAME[output.codec].code
    else:
        options |= {"recipe": recipe_tuple(output.recipe, output.scale_dtype), "grid": (output.rows, output.cols)}
        options |= {"given": output.given, "keep": keep, "second": 1.0 if output.second is None else output.second}
        if output.given is None:
            grid = reference_scaled.grid_shape(shape, output.rows, output.cols)
            scales = np.full((grid[0], grid[1] + 3), 0x5A, f"u{BY_NAME[output.scale_dtype].bits // 8}")
            options["out_scales"] = (address(scales), scales.shape[1])
    written = [out] if scales is None else [out, scales]
    result = call(
        kernels,
        written,
        threads,
        new_base=new_base,
        terms=list(terms),
        rows=rows,
        cols=cols,
        out=(address(out), out.shape[1]),
        **options,
    )
    assert (out[:, width:] == 0x5A).all(), "bytes beyond a row were written"
    assert (out[rows:] == 0x5A).all(), "bytes beyond the last row were written"
    if scales is not None:
        assert (scales[:, grid[1] :] == 0x5A).all(), "bytes beyond the scales were written"
        scales = scales[:, : grid[1]]
    if CODEC_BITS[output.codec] == 4 and cols % 2:
        assert (out[:rows, width - 1] < 16).all(), "the nibble beyond an odd row is not zero"
    codes = reference_scaled.unpack(np.ascontiguousarray(out[:rows, :width]), output.codec, cols)
    return Ran(codes, scales, result[:3], *result[3:])


def call(
    kernels: str, written: Sequence[np.ndarray[Any, Any]], threads: int, *, measure: bool = False, **job: Any
) -> Any:
    """Call the kernels: an instruction set of the CPU, or one of ``cuda_calls.KERNELS``, which know no threads."""
    if kernels in cuda_calls.KERNELS:
        return cuda_calls.merge_scaled(kernels, [*written, *_ALIVE.values()], written, measure=measure, **job)
    function = _cpu.measure_scaled if measure else _cpu.merge_scaled
    return function(isa=kernels, threads=threads, **job)


def check(
    new_base: Scaled,
    terms: Sequence[ScaledTerm],
    output: Output,
    *,
    kernels: str,
    keep: bool = False,
    threads: int = 1,
    want: Quantised | None = None,
    gaps: tuple[int, int, int] = (5, 3, 7),
) -> Ran:
    """Merge with the kernels and compare with the reference: codes, scales, counts, touched, amax.

    ``gaps``: bytes between rows of new_base, post and the output. Multiples of 16 suit the lanes for aligned rows.
    """
    memory = Memory(new_base, gap=_gap(kernels, gaps[0]))
    pairs = [(Memory(t.post, gap=_gap(kernels, gaps[1])), Memory(t.base), t.alpha) for t in terms]
    got = run(
        memory.tuple,
        [(post.tuple, base.tuple, alpha) for post, base, alpha in pairs],
        new_base.codes.shape,  # type: ignore[arg-type]
        output,
        kernels=kernels,
        keep=keep,
        threads=threads,
        gap=gaps[2],
    )
    if want is None:
        want = remembered(reference_scaled.merge_scaled, new_base, terms, output, keep)
    equal(got, want, output)
    return got


def equal(got: Ran, want: Quantised, output: Output) -> None:
    """Fail, showing the first scale or code that differs."""
    if want.scales is not None and got.scales is not None:
        bad = np.argwhere(got.scales != want.scales)
        assert not bad.size, (
            f"{len(bad)} of {want.scales.size} scales differ, first {tuple(bad[0])}: expected "
            f"{int(want.scales[tuple(bad[0])]):#x}, got {int(got.scales[tuple(bad[0])]):#x}"
        )
    bad = np.argwhere(got.codes != want.codes)
    assert not bad.size, (
        f"{len(bad)} of {want.codes.size} codes differ, first {tuple(bad[0])}: expected "
        f"{int(want.codes[tuple(bad[0])]):#x}, got {int(got.codes[tuple(bad[0])]):#x}"
    )
    wanted = (want.nan, want.inf, want.overflow)
    assert got.counts == wanted, f"counts (nan, inf, overflow): expected {wanted}, got {got.counts}"
    assert got.touched == want.touched
    if output.recipe is not None:
        assert got.amax == want.amax


def outputs() -> list[Output]:
    """Return every recipe with the grids and types of scales that it is used with, and plain codecs."""
    blocks = [(128, 128), (1, 0), (0, 0)]
    found = [Output(codec) for codec in ("bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2")]
    for name in ("deepgemm", "deepgemm-ue8m0", "fp8-tensor", "compressed-tensors-f32"):
        found += [Output("f8_e4m3", RECIPES[name], *grid, "f32") for grid in blocks]
    found.append(Output("f8_e4m3", RECIPES["deepgemm"], 128, 128, "bf16"))
    found.append(Output("f8_e4m3", RECIPES["deepgemm-ue8m0"], 128, 128, "f8_e8m0"))
    found.append(Output("f8_e4m3", RECIPES["deepgemm-ue8m0"], 32, 32, "f8_e8m0"))
    found += [Output("f8_e4m3", RECIPES["fbgemm"], *grid, "f32") for grid in ((1, 0), (0, 1))]
    found += [Output("f8_e4m3", RECIPES["compressed-tensors-bf16"], *grid, "bf16") for grid in blocks]
    found.append(Output("f8_e4m3", RECIPES["mxfp8"], 1, 32, "f8_e8m0"))
    for name in ("mxfp4-openai", "mxfp4-deepseek", "mxfp4-compressed-tensors"):
        found.append(Output("f4", RECIPES[name], 1, 32, "f8_e8m0"))
    found += [
        Output("f4", RECIPES[f"nvfp4-{n}"], 1, 16, "f8_e4m3", s)
        for n, s in (("modelopt", 0.003), ("compressed-tensors", 300.0))
    ]
    found += [Output("i4", RECIPES["int4"], 1, 32, "bf16"), Output("i4", RECIPES["int4"], 1, 128, "bf16")]
    found += [Output("i4", RECIPES["int4-f32"], 1, 32, "f32"), Output("i4", RECIPES["int4-f32"], 1, 0, "f16")]
    return found


def output_id(output: Output) -> str:
    if output.recipe is None:
        return output.codec
    return f"{output.recipe.name}-{output.rows}x{output.cols}-{output.scale_dtype}"


KINDS = (
    Kind("bf16"),
    Kind("f16"),
    Kind("f32"),
    Kind("f64"),
    Kind("f8_e4m3"),
    Kind("f8_e5m2"),
    Kind("f8_e4m3", 128, 128, "f32"),
    Kind("f8_e4m3", 128, 128, "bf16"),
    Kind("f8_e4m3", 32, 32, "f8_e8m0"),
    Kind("f8_e4m3", 1, 0, "f32"),
    Kind("f8_e4m3", 0, 1, "f32"),
    Kind("f8_e4m3", 0, 0, "f32"),
    Kind("f8_e5m2", 1, 0, "f16"),
    Kind("f8_e4m3fnuz", 128, 128, "f32"),
    Kind("f8_e5m2fnuz", 0, 0, "f32"),
    Kind("f4", 1, 32, "f8_e8m0"),
    Kind("f4", 1, 16, "f8_e4m3", "multiply"),
    Kind("f4", 1, 16, "f8_e4m3", "divide"),
    Kind("i4", 1, 32, "bf16"),
    Kind("i4", 1, 128, "f32"),
    Kind("i4", 1, 32, "bf16", "", True),
)


def weights(
    rng: np.random.Generator, shape: tuple[int, int], kinds: Sequence[Kind], untouched: float = 0.0
) -> tuple[Scaled, Scaled, Scaled]:
    """Return (post, base, new_base) such as a model's, with blocks of zeros, of subnormals and of odd sizes."""
    base = rng.normal(0.0, 0.03, shape) * np.exp2(rng.integers(-3, 4, (shape[0], 1)))
    post = base + rng.normal(0.0, 0.003, shape)
    new_base = base + rng.normal(0.0, 0.01, shape)
    for block in range(0, shape[0], 16):
        col = int(rng.integers(0, max(1, shape[1] - 8)))
        where = (slice(block, block + int(rng.integers(1, 17))), slice(col, col + int(rng.integers(1, 200))))
        for values in (post, base, new_base):
            values[where] *= float(rng.choice([0.0, 1e-41, 1e-9, 1.0]))
    matrices = [stored(rng, kind, values) for kind, values in zip(kinds, (post, base, new_base), strict=True)]
    if kinds[0] == kinds[1] and untouched:
        codes = np.where(rng.random((shape[0], 1)) < untouched, matrices[1].codes, matrices[0].codes)
        same = {"scales": matrices[1].scales, "second": matrices[1].second, "zero_points": matrices[1].zero_points}
        matrices[0] = matrices[0]._replace(codes=codes, **same)
    return matrices[0], matrices[1], matrices[2]
