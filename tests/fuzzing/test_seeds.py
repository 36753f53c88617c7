"""Replays the seeds of every fuzz target, and inputs mutated from them by a plain generator of random numbers, so that
targets keep running where no fuzzer is installed."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import target_columns
import target_folder
import target_header
import target_plan

TARGETS = {"header": target_header, "folder": target_folder, "plan": target_plan, "columns": target_columns}
MUTANTS = {"header": 400, "folder": 100, "plan": 100, "columns": 400}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed)


def mutated(target: ModuleType, count: int) -> list[bytes]:
    """Return seeds with a few bytes replaced, cut out or added, the same on every run."""
    numbers = random.Random(11)
    made = []
    for _ in range(count):
        data = bytearray(numbers.choice(target.seeds()))
        for _ in range(numbers.randint(1, 8)):
            at = numbers.randint(0, len(data))
            data[at : at + numbers.randint(0, 3)] = numbers.randbytes(numbers.randint(0, 3))
        made.append(bytes(data))
    return made


@pytest.mark.parametrize("name", TARGETS)
def test_mutants(name: str) -> None:
    for data in mutated(TARGETS[name], MUTANTS[name]):
        try:
            TARGETS[name].run(data)
        except BaseException as error:
            raise AssertionError(f"the input {data!r} ends in {error!r}") from error
