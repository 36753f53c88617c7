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
    made = kernels.Measurement(isa, threads)
    benchmark.group = f"{isa}, {threads} threads"
    benchmark.pedantic(bench.merge, args=(isa, threads), setup=lambda: made.take(bench, 1), rounds=ROUNDS)
    record = kernels.record_of(case, made)
    benchmark.extra_info.update(record.parameters | record.ratios)
    for name, metric in record.metrics.items():
        benchmark.extra_info[name] = list(metric.samples)
    assert record.ratios.keys() == {"of_bound", "of_bound_best"}
