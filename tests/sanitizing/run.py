"""`make sanitize`: builds the extension with a sanitizer, in a folder of its own, runs the tests that reach its C++,
and ends with 1 on any report or failure.

Twice: AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer. Python itself is not instrumented: the
runtime is preloaded, with libstdc++ behind it, because the runtime looks for the exception handling at its start.
Reports go to files, so that one in a subprocess of a test counts although the test may not look at it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"


@dataclass(frozen=True)
class Sanitizer:
    """One build: what the compiler is asked for, the runtime to preload, its options, and the tests to run."""

    flags: str
    runtime: str
    options: dict[str, str]
    tests: tuple[str, ...]
    wrapper: tuple[str, ...] = ()


# detect_leaks=0: CPython keeps most of what it allocates until it ends, and every allocation of the extension has
# frames of CPython above it, so that no suppression tells one from the other. Ownership in C++ is by RAII throughout.
# quarantine_size_mb: most of the time went into memory that was held back.
# allocator_may_return_null: tests ask for more memory than there is and expect MemoryError.
_ADDRESS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:quarantine_size_mb=16",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
# ignore_noninstrumented_modules: CPython and NumPy synchronise by means that an uninstrumented build does not show;
# what the extension's own code reads and writes is watched. die_after_fork=0: tests start subprocesses from threads.
_THREAD = {"TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1"}

SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        "libasan.so",
        _ADDRESS,
        (
            "test_engine.py",
            "test_stages.py",
            "test_loaded.py",
            "test_variants.py",
            "test_storage.py",
            "conformance/test_crc32.py",
            "test_ops.py",
            "test_scaled.py",
            "test_resuming.py",
            "test_publish.py",
            "conformance/test_ranges.py",
            "conformance/test_gram.py",
            "conformance/test_scaled_formats.py",
            "quantised/test_mixes.py",
            "quantised/test_partly_merged.py",
            "fuzzing",
        ),
    ),
    "thread": Sanitizer(
        "thread",
        "libtsan.so",
        _THREAD,
        (
            "test_engine.py",
            "test_stages.py",
            "test_loaded.py",
            "test_variants.py",
            "test_storage.py",
            "conformance/test_crc32.py",
            "test_scaled.py",
            "test_resuming.py",
            "conformance/test_ranges.py",
            "quantised/test_mixes.py",
        ),
        ("setarch", "-R"),  # its shadow memory wants the addresses of a process without randomisation
    ),
}


def main(names: list[str]) -> int:
    """Run the sanitizers of these names, all of them where none is named; return the exit code."""
    unknown = set(names) - set(SANITIZERS)
    if unknown:
        print(f"there is no sanitizer {', '.join(sorted(unknown))}: {', '.join(SANITIZERS)}", file=sys.stderr)
        return 2
    failed = [name for name in names or SANITIZERS if not _clean(name, SANITIZERS[name])]
    print(f"sanitize: {'reports or failures under ' + ', '.join(failed) if failed else 'clean'}")
    return 1 if failed else 0


def _clean(name: str, sanitizer: Sanitizer) -> bool:
    """Build, run and look for reports."""
    started = time.monotonic()
    library, reports = BUILD / name / "lib", BUILD / name / "reports"
    _build(name, sanitizer.flags, library)
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    env = _environment(sanitizer, library, reports)
    _check_module(library, env, sanitizer.wrapper)
    command = (*sanitizer.wrapper, sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider")
    code = subprocess.run((*command, *sanitizer.tests), cwd=ROOT / "tests", env=env, check=False).returncode
    found = sorted(reports.iterdir())
    for report in found:
        print(f"--- {report}\n{report.read_text(errors='replace')}")
    print(f"sanitize {name}: pytest ended with {code}, {len(found)} reports, {time.monotonic() - started:.0f} s")
    return code == 0 and not found


def _build(name: str, flags: str, library: Path) -> None:
    """Build the package with its extension into ``library``."""
    for stale in (library / "paramdelta").rglob("*.py"):  # a file that has gone must not live on in the build
        stale.unlink()
    env = os.environ | {"PARAMDELTA_SANITIZE": flags}
    temporary = BUILD / name / "temp"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(library)]
    command += ["build_ext", "--build-lib", str(library), "--build-temp", str(temporary)]
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def _environment(sanitizer: Sanitizer, library: Path, reports: Path) -> dict[str, str]:
    compiler = os.environ.get("CC", "gcc")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={file}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for file in (sanitizer.runtime, "libstdc++.so")
    ]
    options = {key: f"{value}:log_path={reports / 'report'}" for key, value in sanitizer.options.items()}
    # One thread for NumPy's own library, whose locks are not to be seen.
    return (
        os.environ
        | options
        | {
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONPATH": str(library),
            "OPENBLAS_NUM_THREADS": "1",
        }
    )


def _check_module(library: Path, env: dict[str, str], wrapper: tuple[str, ...]) -> None:
    """A run of the plain build would find nothing and look clean."""
    command = (*wrapper, sys.executable, "-c", "from paramdelta import _cpu; print(_cpu.__file__)")
    loaded = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=False)
    if loaded.returncode or not Path(loaded.stdout.strip()).is_relative_to(library):
        raise SystemExit(f"sanitize: the instrumented extension is not the one loaded: {loaded.stdout}{loaded.stderr}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
