"""Which device a merge is computed on: estimates follow the formulas, and what is asked for is what is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hand_made_work import sample

from paramdelta import backends, devices, engine
from paramdelta.devices import Rates, decide, on_device, on_processor
from paramdelta.errors import BackendError, OperandError

GB = 10**9


def rates(**changed: float) -> Rates:
    speeds = {"read": 40.0, "merge": 60.0, "up": 50.0, "down": 50.0, "device_merge": 1500.0, **changed}
    waits, setup = bool(speeds.pop("waits", 0)), speeds.pop("setup", 0.5)
    return Rates(**{name: speed * GB for name, speed in speeds.items()}, waits=waits, setup_seconds=setup)


def test_the_processor_reads_then_merges_what_is_in_memory() -> None:
    assert on_processor(rates(), 120 * GB) == (120 / 40 + 120 / 60, "memory")
    assert on_processor(rates(merge=20), 120 * GB) == (120 / 40 + 120 / 20, "merging")
    assert on_processor(rates(merge=40), 120 * GB) == (6.0, "memory")


def test_while_storage_is_waited_for_others_merge() -> None:
    assert on_processor(rates(waits=1, read=6), 120 * GB) == (20.0, "storage")
    assert on_processor(rates(waits=1, merge=3), 120 * GB) == (40.0, "merging")


@pytest.mark.parametrize(
    ("changed", "seconds", "bound"),
    [
        ({}, 120 / 40, "memory"),
        ({"waits": 1, "read": 10}, 12.0, "storage"),
        ({"up": 24}, 5.0, "the link to it"),
        ({"down": 4}, 10.0, "the link back"),
        ({"device_merge": 2}, 60.0, "merging"),
    ],
)
def test_a_gpu_overlaps_everything(changed: dict[str, float], seconds: float, bound: str) -> None:
    assert on_device(rates(**changed), 120 * GB, 40 * GB) == (seconds + 0.5, bound)


def test_the_lesser_estimate_wins_and_says_why() -> None:
    gpu = decide(rates(), 120 * GB, 40 * GB, "cuda:0")
    assert gpu.device == "cuda:0"
    assert gpu.why == "estimated 5.00 s on the processor (bound by memory), 3.50 s on cuda:0 (bound by memory)"
    assert decide(rates(setup=10), 120 * GB, 40 * GB, "cuda:0").device == "cpu"
    slow = decide(rates(waits=1, read=2), 120 * GB, 40 * GB, "cuda:0")
    assert slow.device == "cpu", "where storage decides, nothing is gained by a GPU"
    assert "bound by storage" in slow.why


def test_a_gpu_has_to_save_a_tenth() -> None:
    assert (
        decide(rates(read=60, merge=15, up=60, setup=7), 120 * GB, 40 * GB, "cuda:0").device == "cpu"
    )  # 9 s against 10 s
    assert decide(rates(read=60, merge=15, up=60, setup=6.99), 120 * GB, 40 * GB, "cuda:0").device == "cuda:0"


@pytest.mark.parametrize(
    ("reason", "why"), [(None, "estimated "), ("the driver is too old", "no GPU can be used: the driver is too old")]
)
def test_rates_decide_where_there_is_a_gpu(
    reason: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is measured to be stands for it here; what it takes to begin is longer than such a small merge."""
    monkeypatch.setattr(devices, "_SMALL_BYTES", 0)
    monkeypatch.setattr(devices, "measure", lambda options, work: rates())
    monkeypatch.setattr(backends, "why_not", lambda name: reason)
    chosen = devices.resolved(engine.EngineOptions(device="auto"), sample(tmp_path).build())
    assert chosen.device == "cpu"
    assert chosen.device_why.startswith(why)


def test_reading_is_measured_on_files_alone(tmp_path: Path) -> None:
    work = sample(tmp_path).build()
    beside = replace(work, inputs=(*work.inputs, bytes(1 << 20)))
    assert devices.read_rate(engine.EngineOptions(), beside) > 1e6


def test_rates_are_measured_on_the_inputs(tmp_path: Path) -> None:
    work = sample(tmp_path).build()
    assert devices.read_rate(engine.EngineOptions(), work) > 1e6
    assert devices.merge_rate(engine.EngineOptions(threads=1), work) > 1e7


def test_what_is_asked_for_is_taken(tmp_path: Path) -> None:
    work = sample(tmp_path).build()
    assert devices.resolved(engine.EngineOptions(), work).stage is None
    assert devices.resolved(None, work) == engine.EngineOptions()
    chosen = devices.resolved(engine.EngineOptions(device="auto"), work)
    assert (chosen.stage, chosen.device) == (None, "cpu")
    assert chosen.device_why.startswith("a merge that reads 0.00 GB is done before")
    stage = object()
    assert devices.resolved(engine.EngineOptions(stage=stage, device="cuda"), work).stage is stage


def test_a_device_that_is_not_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    if backends.why_not("cuda") is None:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=r"--device cuda: .*--device cpu gives the same bytes"):
        devices.resolved(engine.EngineOptions(device="cuda"), sample(tmp_path).build())


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda0", "", "CUDA", "cpu:1"])
def test_devices_of_no_known_name(name: str) -> None:
    with pytest.raises(OperandError, match="expected auto, cpu, cuda or cuda:N"):
        engine.EngineOptions(device=name)
