"""What is built and installed: versions, and the kernels of the extension's file by architecture."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import ROOT
from benchmarks.gpu.device import KERNELS, Clock, Device
from benchmarks.gpu.sizes import Sizes
from benchmarks.results import Metric, Record

GROUP = "gpu-build"
WANTED = (80, 90, 100, 120)
BUILD = "PARAMDELTA_BUILD_CUDA=1 pip install --no-build-isolation --no-deps ."


def run(device: Device, sizes: Sizes, clock: Clock) -> Iterator[Record]:
    """Yield the kernels of each target, and whether each backend runs."""
    yield from targets()
    for kernels in KERNELS:
        reason = device.why_not(kernels)
        if reason:
            yield Record(GROUP, "backend", kernels, {}, skipped=reason)
        else:
            yield Record(GROUP, "backend", kernels, {"on": device.on}, {"runs": Metric("1", (1,))})


def targets() -> Iterator[Record]:
    """Yield how many kernels the built extension holds for each target, and their names."""
    spec = importlib.util.find_spec("paramdelta._cuda")
    if spec is None or spec.origin is None:
        yield Record(GROUP, "kernels", "paramdelta._cuda", {}, skipped=f"it is not built; build it with: {BUILD}")
        return
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    from cubins import kernels

    found = kernels(Path(spec.origin))
    for target in sorted({*found, *WANTED}):
        names = sorted(found.get(target, ()))
        same = names == sorted(found.get(WANTED[0], ()))
        yield Record(
            GROUP,
            f"kernels for sm_{target}",
            "paramdelta._cuda",
            {"names": names, "as_sm_80": same},
            {"kernels": Metric("1", (len(names),)), "bytes": Metric("B", (Path(spec.origin).stat().st_size,))},
        )
