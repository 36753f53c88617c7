"""Tensors to merge on a device, and the same merge by each backend: elements of one type, and fp8 codes in blocks."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.device import Device
from paramdelta import _cpu, dtypes
from paramdelta.backends import Operand, Term, cpu, cuda, triton
from paramdelta.backends.threads import default_threads
from paramdelta.dtypes import DType
from paramdelta.formats import CODECS, RECIPES, RULES

BLOCK = 128
RECIPE = RECIPES["deepgemm"]
VALUES = ("weights", "spread", "bits")
TORCH_NAMES = {dtypes.BF16: "bfloat16", dtypes.F16: "float16", dtypes.F32: "float32"}
_NOTHING_REPORTED = 8  # int64: room for what either kind of kernel reports


class Source:
    """Random numbers on a device, the same for the same seed."""

    def __init__(self, device: Device, seed: int) -> None:
        self.device, self.torch = device, device.torch
        self._generator = self.torch.Generator(device.place).manual_seed(seed)

    def normal(self, count: int) -> Any:
        return self.torch.randn(count, generator=self._generator, device=self.device.place)

    def bits(self, nbytes: int) -> Any:
        """Return bytes, any as likely as any other."""
        room = self.torch.empty(-(-nbytes // 4), dtype=self.torch.int32, device=self.device.place)
        return room.random_(-(2**31), 2**31, generator=self._generator).view(self.torch.uint8)[:nbytes]

    def exponents(self, count: int, reach: int) -> Any:
        return self.torch.randint(-reach, reach + 1, (count,), generator=self._generator, device=self.device.place)

    def operands(self, kind: str, dtype: Any, count: int, deltas: int) -> list[Any]:
        """Return new_base, then post and base of each delta.

        ``weights``: normal numbers, those of one element near each other; ``spread``: exponents far apart; ``bits``:
        anything, NaN and Inf included.
        """
        if kind == "bits":
            size = self.torch.empty(0, dtype=dtype).element_size()
            return [self.bits(count * size).view(dtype) for _ in range(1 + 2 * deltas)]
        base = self.normal(count) * 0.02
        if kind == "spread":
            base = base * self.torch.exp2(self.exponents(count, 24).float())
        made = [(base * (1 + self.normal(count) * 0.2)).to(dtype)]
        for _ in range(deltas):
            made += [(base * (1 + self.normal(count) * 0.05)).to(dtype), base.to(dtype)]
        return made


def shifted(tensor: Any, shift: int) -> Any:
    """Return the tensor's elements in memory that begins ``shift`` elements behind a boundary of the allocator's."""
    if shift == 0:
        return tensor
    room = tensor.new_empty(tensor.numel() + shift)
    room[shift:].copy_(tensor)
    return room[shift:]


@dataclass
class Plain:
    """One tensor: out = new_base + Σ alpha · (post − base). ``operands`` as ``Source.operands`` gives them."""

    device: Device
    dtype: DType
    operands: Sequence[Any]
    alphas: Sequence[float]

    @property
    def count(self) -> int:
        return int(self.operands[0].numel())

    @property
    def nbytes(self) -> int:
        """Bytes that a merge reads and writes."""
        return int(sum(t.nbytes for t in self.operands)) + int(self.operands[0].nbytes)

    def room(self, shift: int = 0) -> tuple[Any, Any]:
        """Return memory for an output, and for the counts."""
        torch, place = self.device.torch, self.device.place
        out = torch.empty(self.count + shift, dtype=self.operands[0].dtype, device=place)[shift:]
        return out, torch.zeros(_NOTHING_REPORTED, dtype=torch.int64, device=place)

    def enqueue(self, kernels: str, out: Any, counts: Any) -> None:
        """Merge with one backend on the current stream."""
        addresses = [int(t.data_ptr()) for t in self.operands]
        tensor = (addresses[0], tuple(addresses[1:]), int(out.data_ptr()), self.count, int(counts.data_ptr()))
        where = {"device": 0, "stream": self.device.stream}
        if kernels == "cuda":
            terms = [cuda.TermTypes(self.dtype, self.dtype, alpha) for alpha in self.alphas]
            cuda.merge(self.dtype, terms, self.dtype, [cuda.Tensor(*tensor)], **where)
        else:
            triton.merge(self.dtype, [(self.dtype, self.dtype, a) for a in self.alphas], self.dtype, [tensor], **where)

    def on_cpu(self) -> tuple[Any, list[int]]:
        """Merge on the processor; return the output there, and the counts."""
        here = [self.device.fetch(t) for t in self.operands]
        out = self.device.host_room(here[0])
        at = [Operand(int(t.data_ptr()), self.dtype) for t in here]
        terms = [Term(at[1 + 2 * k], at[2 + 2 * k], alpha) for k, alpha in enumerate(self.alphas)]
        where = Operand(int(out.data_ptr()), self.dtype)
        return out, list(cpu.merge(at[0], terms, where, self.count, threads=default_threads()))

    def in_torch(self) -> Any:
        """Return the same expression in binary32, as one writes it in PyTorch, as a function of the operands."""
        alphas = list(self.alphas)

        def merge(new_base: Any, *pairs: Any) -> Any:
            total = new_base.float()
            for k, alpha in enumerate(alphas):
                delta = pairs[2 * k].float() - pairs[2 * k + 1].float()
                total = total + (delta if alpha == 1.0 else alpha * delta)
            return total.to(new_base.dtype)

        return merge


@dataclass
class Blocks:
    """Matrices of fp8 codes with a binary32 scale for each block of 128 × 128, requantised in the same blocks.

    ``codes`` and ``scales`` are those of new_base, post and base; codes are bytes [rows, cols].
    """

    device: Device
    codes: Sequence[Any]
    scales: Sequence[Any]

    @classmethod
    def of(cls, source: Source, kind: str, rows: int, cols: int) -> Blocks:
        """Make matrices: of ``bits``, NaN included, or of numbers."""
        torch = source.torch
        grid = (rows // BLOCK, cols // BLOCK)
        codes, scales = [], []
        for _ in range(3):
            if kind == "bits":
                codes.append(source.bits(rows * cols).view(rows, cols))
            else:
                values = source.normal(rows * cols).mul_(60.0).clamp_(-448.0, 448.0)
                codes.append(values.to(torch.float8_e4m3fn).view(torch.uint8).view(rows, cols))
            spread = torch.exp2(source.exponents(grid[0] * grid[1], 12 if kind == "spread" else 1).float())
            scales.append((source.normal(grid[0] * grid[1]).abs() + 0.5).mul_(1e-4).mul_(spread).view(grid))
        return cls(source.device, codes, scales)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes[0].shape[0]), int(self.codes[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that a merge reads and writes, scales included."""
        return 4 * int(self.codes[0].nbytes + self.scales[0].nbytes)

    def room(self) -> tuple[Any, Any, Any]:
        """Return memory for codes, scales, and what is reported."""
        torch = self.device.torch
        report = torch.zeros(_NOTHING_REPORTED, dtype=torch.int64, device=self.device.place)
        return torch.empty_like(self.codes[0]), torch.empty_like(self.scales[0]), report

    def _job(self, codes: Sequence[Any], scales: Sequence[Any]) -> dict[str, Any]:
        """Return the keywords of ``merge_scaled`` but for the output."""
        rows, cols = self.shape
        codec, scale = CODECS.index("f8_e4m3"), dtypes.F32.code
        new_base, post, base = (
            (
                int(c.data_ptr()),
                codec,
                cols,
                (int(s.data_ptr()), scale, cols // BLOCK, BLOCK, BLOCK, 0, 0, 0, 1.0, 0, 0),
            )
            for c, s in zip(codes, scales, strict=True)
        )
        r = RECIPE
        recipe = (codec, scale, RULES.index(r.rule), r.reciprocal, r.values == "bf16", r.largest, r.floor, r.zero)
        job = {"new_base": new_base, "terms": [(post, base, 1.0)], "rows": rows, "cols": cols}
        return {**job, "recipe": recipe, "grid": (BLOCK, BLOCK)}

    def enqueue(self, kernels: str, out: Any, out_scales: Any, report: Any) -> None:
        """Merge with one backend on the current stream."""
        rows, cols = self.shape
        if kernels == "cuda":
            cuda.merge_scaled(
                **self._job(self.codes, self.scales),
                out=(int(out.data_ptr()), cols),
                out_scales=(int(out_scales.data_ptr()), cols // BLOCK),
                totals=int(report.data_ptr()),
                workspace=0,
                device=0,
                stream=self.device.stream,
            )
            return
        launch = importlib.import_module("paramdelta.kernels.launch_blocks")

        def plane(codes: Any, scales: Any) -> Any:
            grid = launch.Scales(int(scales.data_ptr()), "f32", cols // BLOCK, BLOCK, BLOCK)
            return launch.Plane(int(codes.data_ptr()), "f8_e4m3", cols, grid)

        new_base, post, base = (plane(c, s) for c, s in zip(self.codes, self.scales, strict=True))
        r = RECIPE
        quantiser = launch.Quantiser(
            r.rule, r.largest, r.floor, r.zero, r.reciprocal, r.values, BLOCK, BLOCK, "f32"
        )  # fmt: skip
        launch.merge(
            new_base, [(post, base, 1.0)], rows, cols, plane(out, out_scales), int(report.data_ptr()),
            quantiser=quantiser,
        )  # fmt: skip

    def on_cpu(self) -> tuple[Any, Any, list[int]]:
        """Merge on the processor; return codes and scales there, and the counts."""
        codes, scales = [self.device.fetch(c) for c in self.codes], [self.device.fetch(s) for s in self.scales]
        out, out_scales = self.device.host_room(codes[0]), self.device.host_room(scales[0])
        cols = self.shape[1]
        result = _cpu.merge_scaled(
            **self._job(codes, scales),
            out=(int(out.data_ptr()), cols),
            out_scales=(int(out_scales.data_ptr()), cols // BLOCK),
            isa=None,
            threads=default_threads(),
        )
        return out, out_scales, [int(n) for n in result[:3]]

    def in_torch(self) -> Any:
        """Return the steps in PyTorch, as a function of codes and scales: dequantise to binary32, add, quantise."""
        torch = self.device.torch
        down, across = (n // BLOCK for n in self.shape)

        def value(codes: Any, scales: Any) -> Any:
            tiles = codes.view(torch.float8_e4m3fn).float().view(down, BLOCK, across, BLOCK)
            return tiles * scales.view(down, 1, across, 1)

        def merge(new_base: Any, s: Any, post: Any, post_s: Any, base: Any, base_s: Any) -> Any:
            x = value(new_base, s) + (value(post, post_s) - value(base, base_s))
            made = x.abs().amax(dim=(1, 3), keepdim=True).clamp(1e-4) / 448.0
            codes = (x * (1.0 / made)).to(torch.float8_e4m3fn).view(new_base.shape)
            return codes, made.view(down, across)

        return merge
