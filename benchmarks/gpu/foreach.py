"""Very many small tensors: one call against a loop of PyTorch's operations, launches included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu.device import KERNELS, Clock, Device
from benchmarks.gpu.operands import Source
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record, peer_ratios
from paramdelta import backends, dtypes, ops
from paramdelta.backends import cuda, triton

GROUP = "gpu-foreach"
CALL = "paramdelta.ops.merge_many"
MADE = "paramdelta.ops.merge_many, outputs allocated"
LOOP = "loop of torch operations, binary32"


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield one record for each way to merge the same tensors."""
    torch = device.torch
    each = sizes.tensor_bytes // 2
    new_base, post, base = (
        list(t.view(sizes.tensors, each).unbind())
        for t in Source(device, 3).operands("weights", torch.bfloat16, sizes.tensors * each, 1)
    )
    outs = list(torch.empty(sizes.tensors, each, dtype=torch.bfloat16, device=device.place).unbind())
    case = f"{sizes.tensors} tensors of {sizes.tensor_bytes} bytes, bf16"
    parameters = {"tensors": sizes.tensors, "tensor_bytes": sizes.tensor_bytes}

    def loop() -> None:
        for out, p, b, n in zip(outs, post, base, new_base, strict=True):
            out.copy_(n.float() + (p.float() - b.float()))

    def rounded_loop() -> None:
        for out, p, b, n in zip(outs, post, base, new_base, strict=True):
            torch.add(n, p - b, out=out)

    functions: dict[str, Callable[[], Any]] = {LOOP: loop, "loop of torch operations, bf16": rounded_loop}
    functions["torch._foreach_sub, _foreach_add, bf16"] = lambda: torch._foreach_add(
        new_base, torch._foreach_sub(post, base)
    )
    reasons = {kernels: device.why_not(kernels) for kernels in KERNELS}
    if reasons["cuda"] is None:
        functions = {
            CALL: lambda: many(device, post, base, new_base, outs),
            MADE: lambda: many(device, post, base, new_base, None),
        } | functions
    for kernels in KERNELS:
        name = f"backend {kernels}, addresses given"
        if reasons[kernels] is None:
            functions[name] = batch(device, kernels, post, base, new_base, outs)
        else:
            yield Record(GROUP, case, name, parameters, skipped=reasons[kernels])
    if CALL not in functions:
        yield Record(GROUP, case, CALL, parameters, skipped=reasons["cuda"])
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        for out in outs:
            out.zero_()
        device.wall(function)
        if name == CALL or name.startswith("backend"):
            got = torch.stack(outs).cpu()
            want = ops.merge(*(torch.stack(tensors).cpu() for tensors in (post, base, new_base))).out
            if not torch.equal(got.view(torch.int16), want.view(torch.int16)):
                raise RuntimeError(f"{name}: what it made is not the processor's merge")
    for k in range(sizes.foreach_rounds):
        if clock.over() and k:
            break
        for name, function in functions.items():
            samples[name].append(device.wall(function))
    for name, seconds in samples.items():
        metrics = {"wall": Metric("s", tuple(seconds))}
        ratios = peer_ratios(metrics["wall"], Metric("s", tuple(samples[CALL]))) if CALL in samples else {}
        yield Record(GROUP, case, name, parameters, metrics, {} if name == CALL else ratios)


def many(device: Device, post: Any, base: Any, new_base: Any, outs: Any) -> None:
    """Merge by the public function; on the host it is told to take the backend whose kernels run there."""
    with named_backend(device):
        ops.merge_many(list(zip(post, base, new_base, strict=True)), outs=outs)


@contextmanager
def named_backend(device: Device) -> Iterator[None]:
    """Name the backend ``cuda`` for CPU memory, where its kernels take that."""
    kept = os.environ.get(backends.VARIABLE)
    if device.on != "cuda":
        os.environ[backends.VARIABLE] = "cuda"
    try:
        yield
    finally:
        if device.on != "cuda":
            del os.environ[backends.VARIABLE]
            if kept is not None:
                os.environ[backends.VARIABLE] = kept


def batch(device: Device, kernels: str, *tensors: Sequence[Any]) -> Callable[[], None]:
    """Return a call of one backend whose addresses are known beforehand."""
    counts = device.torch.zeros(8, dtype=device.torch.int64, device=device.place)
    at = int(counts.data_ptr())
    rows = [
        (int(n.data_ptr()), (int(p.data_ptr()), int(b.data_ptr())), int(o.data_ptr()), int(o.numel()), at)
        for p, b, n, o in zip(*tensors, strict=True)
    ]
    bf16, where = dtypes.BF16, {"device": 0, "stream": device.stream}
    if kernels == "cuda":
        listed = [cuda.Tensor(*row) for row in rows]
        return lambda kept=counts: cuda.merge(bf16, [cuda.TermTypes(bf16, bf16, 1.0)], bf16, listed, **where)
    return lambda kept=counts: triton.merge(bf16, [(bf16, bf16, 1.0)], bf16, rows, **where)
