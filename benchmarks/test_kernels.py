"""Kernel bandwidth under pytest-benchmark: ``python -m pytest benchmarks/test_kernels.py``. Same cases and the same
interleaved roofline as ``benchmarks.run``; the share of the bound goes to ``extra_info``. No test asserts a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import bound, kernels

CASES = list(kernels.plan())
ROUNDS = 7


@pytest.fixture(scope="module")
def benches() -> Iterator[dict[kernels.Case, kernels.Bench]]:
    """The memory of the case at hand, kept while consecutive tests ask for the same case."""
    kept: dict[kernels.Case, kernels.Bench] = {}
    yield kept
    kept.clear()


@pytest.mark.parametrize(("case", "isa", "threads"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_bandwidth(
    benchmark: Any, benches: dict[kernels.Case, kernels.Bench], case: kernels.Case, isa: str, threads: int
) -> None:
    reason = bound.why_not()
    if reason:
        pytest.skip(reason)
    if case not in benches:
        benches.clear()
        benches[case] = kernels.Bench(case, kernels.STREAM_BYTES)
    bench = benches[case]
    roofline = bound.Bound(bench.buffers, threads)
    roofline.choose()
    bench.merge(isa, threads)
    limits: list[float] = []
    rates: list[float] = []
    benchmark.group = f"{isa}, {threads} threads"
    benchmark.pedantic(
        lambda: rates.append(bench.merge(isa, threads)),
        setup=lambda: limits.append(roofline.next_pass()),
        rounds=ROUNDS * len(roofline.names),
    )
    record = kernels.make_record(bench, isa, threads, rates, limits, roofline.names)
    benchmark.extra_info.update(record.parameters | record.ratios)
    benchmark.extra_info["bytes_per_second"] = list(record.metrics["bandwidth"].samples)
    benchmark.extra_info["bound_bytes_per_second"] = list(record.metrics["bound"].samples)
    assert record.ratios.keys() == {"of_bound", "of_bound_best"}
