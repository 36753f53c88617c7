"""Bit equality on very many random elements: cuda, triton and the processor, lane by lane, and the identities.

Operands are made on the device, a piece at a time, by turns weights, exponents far apart, and any bits at all; every
second piece lies at addresses of its own for each operand, no multiples of 16. What one backend makes is compared
with what another makes in every bit, and so are the counts; norms, which are four numbers, with the processor's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.device import KERNELS, Clock, Device
from benchmarks.gpu.operands import TORCH_NAMES, VALUES, Blocks, Plain, Source, shifted
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record
from paramdelta import backends, device_norms, device_tensors, dtypes, ops
from paramdelta.tensors import read_operand

GROUP = "gpu-laws"
SHIFTS = (1, 3, 5, 7, 2, 6, 1, 4, 3)
OUT_SHIFT = 9


@dataclass(frozen=True)
class Lane:
    """A merge of operands of one type."""

    name: str
    dtype: dtypes.DType
    alphas: tuple[float, ...]


LANES = (
    Lane("bf16, alpha 1", dtypes.BF16, (1.0,)),
    Lane("f16, alpha 1", dtypes.F16, (1.0,)),
    Lane("f32, alpha 1", dtypes.F32, (1.0,)),
    Lane("bf16, alpha 0.7", dtypes.BF16, (0.7,)),
    Lane("bf16, 4 deltas", dtypes.BF16, (0.5, 0.25, -0.125, 0.3)),
)
BLOCKS = "fp8 blocks"


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield strides and identities, then each lane; what time is left is shared by the lanes to come."""
    present = [kernels for kernels in KERNELS if device.why_not(kernels) is None]
    for kernels in KERNELS:
        if kernels not in present:
            yield Record(GROUP, "all", kernels, {}, skipped=device.why_not(kernels))
    for lane in LANES:
        yield from identities(device, sizes, lane, present)
        yield strides(device, lane, present)
        yield norms(device, sizes, lane, present)
    for i, name in enumerate([BLOCKS, *(lane.name for lane in LANES)]):
        share = Clock(clock.left() / (len(LANES) + 1 - i))
        device.free()
        if name == BLOCKS:
            yield blocks(device, sizes, share, present)
        else:
            yield elements(device, sizes, share, LANES[i - 1], present)


def elements(device: Device, sizes: Sizes, clock: Clock, lane: Lane, present: list[str]) -> Record:
    """Compare pieces of one lane until the elements asked for, or the time, are used up."""
    found = Comparison()
    piece = 0
    while found.elements < sizes.law_elements and not (clock.over() and piece):
        source = Source(device, 1000 + piece)
        kind = VALUES[piece % len(VALUES)]
        made = source.operands(kind, torch_dtype(device, lane.dtype), sizes.law_piece, len(lane.alphas))
        apart = piece % 2
        made = [shifted(t, shift * apart) for t, shift in zip(made, SHIFTS, strict=False)]
        job = Plain(device, lane.dtype, made, lane.alphas)
        want, wanted_counts = job.on_cpu()
        for kernels in present:
            out, counts = job.room(OUT_SHIFT * apart)
            job.enqueue(kernels, out, counts)
            found.take(kernels, differing(out, want), counts[:3].tolist() != wanted_counts)
        found.elements += job.count
        piece += 1
    return found.record(f"{lane.name}: random elements", {"pieces": piece, "wanted": sizes.law_elements})


def blocks(device: Device, sizes: Sizes, clock: Clock, present: list[str]) -> Record:
    """Compare matrices of fp8 codes in blocks: codes, scales and counts."""
    found = Comparison()
    piece = 0
    while found.elements < sizes.law_elements and not (clock.over() and piece):
        job = Blocks.of(Source(device, 2000 + piece), VALUES[piece % len(VALUES)], sizes.law_side, sizes.law_side)
        want, want_scales, wanted_counts = job.on_cpu()
        for kernels in present:
            out, scales, report = job.room()
            job.enqueue(kernels, out, scales, report)
            bad = differing(out, want) + differing(scales, want_scales)
            found.take(kernels, bad, report[:3].tolist() != wanted_counts)
        found.elements += out.numel() if present else want.numel()
        piece += 1
    return found.record(f"{BLOCKS}: random elements", {"pieces": piece, "wanted": sizes.law_elements})


def identities(device: Device, sizes: Sizes, lane: Lane, present: list[str]) -> Iterator[Record]:
    """Hold that post = base, and alpha = 0, give new_base byte for byte, whatever the bits are."""
    source = Source(device, 77)
    dtype = torch_dtype(device, lane.dtype)
    made = source.operands("bits", dtype, sizes.law_piece, len(lane.alphas))
    same = [made[0], *(made[1 + 2 * (k // 2)] for k in range(2 * len(lane.alphas)))]
    found = Comparison()
    for operands, alphas in ((same, lane.alphas), (made, (0.0,) * len(lane.alphas))):
        job = Plain(device, lane.dtype, operands, alphas)
        for kernels in present:
            out, counts = job.room()
            job.enqueue(kernels, out, counts)
            found.take(kernels, differing(out, operands[0]), False)
        found.elements += job.count
    yield found.record(f"{lane.name}: new_base where no delta is", {})


def strides(device: Device, lane: Lane, present: list[str]) -> Record:
    """Compare merges of transposed, stepped and overhanging views, to an output that has gaps."""
    torch, source = device.torch, Source(device, 78)
    dtype = torch_dtype(device, lane.dtype)
    rows, cols = 18, 45
    count = 1 + 2 * len(lane.alphas)
    views = []
    for k, flat in enumerate(source.operands("weights", dtype, 4 * rows * cols, len(lane.alphas))):
        wide = flat.view(2 * rows, 2 * cols)
        turned = flat.view(2 * cols, 2 * rows).t()
        views.append((wide[::2, :cols], turned[:rows, 1 : 2 * cols : 2], wide[rows:, cols:])[k % 3])
    deltas = [(views[1 + 2 * k], views[2 + 2 * k], alpha) for k, alpha in enumerate(lane.alphas)]
    want = ops.merge_deltas(views[0].cpu(), [(p.cpu(), b.cpu(), alpha) for p, b, alpha in deltas])
    found = Comparison(elements=rows * cols)
    for kernels in present:
        room = torch.zeros(2 * cols, rows + 3, dtype=dtype, device=device.place)
        out = room.t()[:rows, ::2]
        counts = torch.zeros(8, dtype=torch.int64, device=device.place)
        if kernels == "cuda":
            new, *others = (read_operand("x", view) for view in views)
            terms = [(others[2 * k], others[2 * k + 1], alpha) for k, alpha in enumerate(lane.alphas)]
            counts = device_tensors.merge(new, terms, out, None)[1].tensor
        else:
            launch = importlib.import_module("paramdelta.kernels.launch")
            at = [int(view.data_ptr()) for view in views]
            launch.merge(
                at[0],
                [(at[1 + 2 * k], at[2 + 2 * k], alpha) for k, alpha in enumerate(lane.alphas)],
                int(out.data_ptr()),
                int(counts.data_ptr()),
                rows * cols,
                lane.dtype.name,
                shape=(rows, cols),
                strides=[list(v.stride()) for v in (views[0], out, *views[1:count])],
            )
        bad = differing(out.contiguous(), want.out.contiguous())
        bad += int(room[1::2].count_nonzero()) + int(room[:, rows:].count_nonzero())
        found.take(kernels, bad, counts[:3].tolist() != list(want.counts))
    return found.record(f"{lane.name}: strides", {})


def norms(device: Device, sizes: Sizes, lane: Lane, present: list[str]) -> Record:
    """Compare the norms of a delta, of every kind of values, with the processor's."""
    found = Comparison()
    for k, kind in enumerate(VALUES):
        operands = Source(device, 79 + k).operands(kind, torch_dtype(device, lane.dtype), sizes.law_piece, 1)
        new_base, post, base = (shifted(t, shift * (k % 2)) for t, shift in zip(operands, SHIFTS, strict=False))
        want = ops.norms(post.cpu(), base.cpu(), new_base.cpu())
        for kernels in present:
            if backends.get(kernels).capabilities().supports("norms"):
                names = zip(("post", "base", "new_base"), (post, base, new_base), strict=True)
                got = device_norms.norms([read_operand(name, t) for name, t in names]).wait()
                found.take(kernels, int(repr(got) != repr(want)), False)  # NaN is one NaN here, too
        found.elements += new_base.numel()
    return found.record(f"{lane.name}: norms", {})


class Comparison:
    """How many elements were compared, how many of each backend's differ, and whose counts do."""

    def __init__(self, elements: int = 0) -> None:
        self.elements = elements
        self.differ: dict[str, int] = {}
        self.counts_differ: dict[str, int] = {}

    def take(self, kernels: str, bad: int, counts_differ: bool) -> None:
        self.differ[kernels] = self.differ.get(kernels, 0) + bad
        self.counts_differ[kernels] = self.counts_differ.get(kernels, 0) + int(counts_differ)

    def record(self, case: str, parameters: dict[str, Any]) -> Record:
        """Return a record: ``differing_cuda`` … are elements, ``counts_cuda`` … pieces whose counts differ."""
        if not self.differ:
            return Record(GROUP, case, "cuda, triton, cpu", parameters, skipped="no backend runs here")
        metrics = {"elements": Metric("1", (self.elements,))}
        metrics |= {f"differing_{name}": Metric("1", (bad,)) for name, bad in self.differ.items()}
        metrics |= {f"counts_{name}": Metric("1", (bad,)) for name, bad in self.counts_differ.items()}
        for name in self.differ:
            if self.differ[name] or self.counts_differ[name]:
                print(f"DIFFERENCE: {case}, {name}: {self.differ[name]} elements, {self.counts_differ[name]} counts",
                      file=sys.stderr)  # fmt: skip
        return Record(GROUP, case, ", ".join((*self.differ, "cpu")), parameters, metrics)


def differing(got: Any, want: Any) -> int:
    """Return how many elements differ in any bit; what is compared with is brought to the other's device."""
    kind = {1: "uint8", 2: "int16", 4: "int32"}[got.element_size()]
    torch = sys.modules["torch"]
    bits = getattr(torch, kind)
    return int((got.view(bits) != want.to(got.device).view(bits)).sum())


def torch_dtype(device: Device, dtype: dtypes.DType) -> Any:
    return getattr(device.torch, TORCH_NAMES[dtype])
