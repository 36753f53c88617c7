"""Limits of the process: files, sizes, memory, threads. Each ends in one error that names the limit."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable

import pytest
from faulty_runs import SHARDS, Workshop


def limit(which: int, value: int) -> Callable[[], None]:
    """Return what sets a limit in a process about to run a command."""
    return lambda: resource.setrlimit(which, (value, value))


def test_a_file_that_may_not_grow(workshop: Workshop) -> None:
    """RLIMIT_FSIZE: the signal it sends (SIGXFSZ) must not kill the process without a word."""
    said = workshop.must_fail(
        saying=[f"output/{SHARDS[0]}: cannot be created: File too large", "ulimit -f", "--max-shard-size"],
        preexec_fn=limit(resource.RLIMIT_FSIZE, 1 << 20),
    )
    assert not workshop.partial.exists()
    assert not workshop.out.exists()
    assert "continues" not in said


def test_too_few_open_files(workshop: Workshop) -> None:
    workshop.must_fail(
        saying=["files at once", "may open only 40", "ulimit -n"],
        preexec_fn=limit(resource.RLIMIT_NOFILE, 40),
    )
    assert not workshop.partial.exists()


def test_a_soft_limit_on_open_files_is_raised(workshop: Workshop) -> None:
    def soft() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))

    workshop.must_merge(preexec_fn=soft)


def test_too_little_memory_for_the_slots(workshop: Workshop) -> None:
    extra = ["--memory=64GiB"]
    saying = ["slots of 1,073,741,824 bytes could not be allocated", "--memory", "--threads"]
    options = {"extra": [*extra, "--threads=40"], "preexec_fn": limit(resource.RLIMIT_AS, 16 << 30)}
    workshop.must_fail(saying=saying, **options)
    assert not workshop.partial.exists()


def test_too_little_memory_for_the_stacks_of_threads(workshop: Workshop) -> None:
    """Some threads start, then one cannot: those that run are stopped, and nothing of them stays."""
    extra = ["--threads=600", "--memory=80MiB"]
    saying = ["600 threads could not be started: Resource temporarily unavailable", "--threads"]
    workshop.must_fail(saying=saying, extra=extra, preexec_fn=limit(resource.RLIMIT_AS, 3 << 30))
    assert not workshop.partial.exists()


def test_too_little_memory_for_the_inputs(workshop: Workshop) -> None:
    config = workshop.root / "post" / "config.json"
    config.write_text('{"x": "' + "x" * (90 << 20) + '"}')
    saying = ["error: this process may have no more memory", "--memory"]
    options = {"preexec_fn": limit(resource.RLIMIT_AS, 300 << 20), "env": no_threads(workshop)}
    workshop.must_fail(saying=saying, **options)
    done = workshop.merge(extra=["--json"], **options)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "ResourceError"


@pytest.mark.parametrize("mib", [48, 60, 80, 100])
def test_too_little_memory_to_start(workshop: Workshop, mib: int) -> None:
    """Where memory ends is not ours to choose, nor always what is said of it: within the interpreter, the linker, or
    OpenBLAS, which NumPy brings. The exit code is."""
    done = workshop.merge(preexec_fn=limit(resource.RLIMIT_AS, mib << 20), env=no_threads(workshop))
    if done.returncode != 0:
        assert done.stderr
        assert not workshop.out.exists()


def no_threads(workshop: Workshop) -> dict[str, str]:
    """OpenBLAS takes memory for each of its threads when it is imported."""
    return workshop.environment() | {"OPENBLAS_NUM_THREADS": "1"}
