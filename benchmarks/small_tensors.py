"""What a merge of a small tensor costs beside its arithmetic: ``python -m benchmarks.small_tensors``.

Microseconds of the calling thread's processor time a tensor, one thread, CPU tensors, for ``ops.merge_many`` and
``ops.merge``, for the same by the general way (which reads each tensor in Python), and for loops of torch operations;
all in turns, the median of each, and how many times longer than ``ops.merge_many`` each takes. With ``--kernels host``
the CUDA kernels' bodies, compiled for the host, stand in for a device's: what is left when they have next to nothing
to do (``--elements 1``) is what a call costs the host.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from paramdelta import backends, ops, tensor_lists

ROUNDS = 7


@contextmanager
def general_way() -> Any:
    """Take from the package the reading of tensors by the extension."""
    kept = tensor_lists.merge
    tensor_lists.merge = lambda *_: None
    try:
        yield
    finally:
        tensor_lists.merge = kept


def ways(tensors: int, elements: int) -> dict[str, Callable[[], Any]]:
    """Return the contenders, by name, each of which merges all tensors once."""
    import torch

    torch.set_num_threads(1)
    post, base, new = ([torch.randn(elements).bfloat16() for _ in range(tensors)] for _ in range(3))
    outs = [torch.empty_like(x) for x in new]
    merges = list(zip(post, base, new, strict=True))

    def loop() -> None:
        for out, (p, b, n) in zip(outs, merges, strict=True):
            out.copy_(n.float() + (p.float() - b.float()))

    def rounded_loop() -> None:
        for out, (p, b, n) in zip(outs, merges, strict=True):
            torch.add(n, p - b, out=out)

    def one_by_one() -> None:
        for out, (p, b, n) in zip(outs, merges, strict=True):
            ops.merge(p, b, n, out=out, threads=1)

    def generally(run: Callable[[], Any]) -> Callable[[], Any]:
        def inner() -> None:
            with general_way():
                run()

        return inner

    def given() -> None:
        ops.merge_many(merges, outs=outs, threads=1)

    return {
        "ops.merge_many, outs given": given,
        "ops.merge_many": lambda: ops.merge_many(merges, threads=1),
        "ops.merge, out given": one_by_one,
        "ops.merge_many, outs given, the general way": generally(given),
        "ops.merge, out given, the general way": generally(one_by_one),
        "loop of torch operations, binary32": loop,
        "loop of torch operations, bf16": rounded_loop,
    }


def main() -> None:
    """Measure, and print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=10_000)
    parser.add_argument("--elements", type=int, nargs="+", default=[1, 2048])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kernels", choices=("cpu", "host"), default="cpu")
    options = parser.parse_args()
    if options.kernels == "host":
        from benchmarks.gpu import device

        device.use("host")
        os.environ[backends.VARIABLE] = "cuda"
    for elements in options.elements:
        contenders = ways(options.tensors, elements)
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, way in contenders.items():
                started = time.thread_time()
                way()
                samples[name].append((time.thread_time() - started) / options.tensors * 1e6)
        ours = statistics.median(next(iter(samples.values())))
        print(f"\n| {options.tensors} tensors of {2 * elements} bytes, bf16 | µs a tensor | times the first |")
        print("|---|---:|---:|")
        for name, taken in samples.items():
            print(f"| {name} | {statistics.median(taken):.2f} | {statistics.median(taken) / ours:.1f} |")


if __name__ == "__main__":
    main()
