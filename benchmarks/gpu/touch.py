"""Reaches every kernel, with odd sizes and addresses, and checks it against the reference: what a sanitizer watches.

``python -m benchmarks.gpu.touch --on cuda``. Without PyTorch: each array is an allocation of its own, which ends where
the array ends, so that one byte too many is seen.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import ROOT
from benchmarks.gpu.device import PLACES, use
from paramdelta import backends, merge
from paramdelta.demo import write_demo
from paramdelta.dtypes import BY_NAME
from paramdelta.reference import Array, Term

sys.path.insert(0, str(ROOT / "tests" / "conformance"))


class Driver:
    """The few calls of the CUDA driver that give memory."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} ended with {status}")

    def allocate(self, nbytes: int) -> int:
        at = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(at), ctypes.c_size_t(nbytes))
        return int(at.value)

    def upload(self, to: int, array: np.ndarray[Any, Any]) -> None:
        self.call(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(to), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        )

    def download(self, array: np.ndarray[Any, Any], source: int) -> None:
        self.call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(source),
            ctypes.c_size_t(array.nbytes),
        )

    def free(self, at: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(at))


class ExactMemory:
    """As tests/conformance/cuda_calls.Memory on a device: copies that end where their array ends."""

    driver: Driver

    def __init__(self, kernels: str) -> None:
        self.on_host = False
        self._copies: dict[int, tuple[np.ndarray[Any, Any], int, int]] = {}

    def address(self, array: np.ndarray[Any, Any] | None) -> int:
        """Return where the array's copy is, as far behind a 64-byte boundary as itself; 0 for None."""
        if array is None:
            return 0
        here = int(array.__array_interface__["data"][0])
        if here not in self._copies:
            ahead = here % 64
            room = self.driver.allocate(ahead + max(1, array.nbytes))
            dense = np.frombuffer(array.tobytes(), np.uint8)
            if dense.size:
                self.driver.upload(room + ahead, dense)
            self._copies[here] = (array, room, room + ahead)
        return self._copies[here][2]

    def fetch(self, array: np.ndarray[Any, Any]) -> None:
        """Bring back what the kernels wrote to an array."""
        dense = np.empty(array.nbytes, np.uint8)
        if dense.size:
            self.driver.download(dense, self.address(array))
        array.reshape(-1).view(np.uint8)[...] = dense

    def __del__(self) -> None:
        for _, room, _ in self._copies.values():
            self.driver.free(room)


def plain(kernels: str) -> int:
    """Merge elements of one type and of several, with one delta and with three; return how many merges there were."""
    check = importlib.import_module("kernel_check").check
    weights = importlib.import_module("kernel_values").weights
    rng = np.random.default_rng(5)
    done = 0
    for name in ("bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2"):
        dtype = BY_NAME[name]
        for count in (1, 7, 1000, 5003):
            for shift in (0, 1):
                post, base, new_base = (
                    Array(c[shift : shift + count], dtype) for c in weights(rng, dtype, count + shift)
                )
                for alphas in ((1.0,), (0.7,), (0.5, -1.0, 0.25)):
                    check(new_base, [Term(post, base, alpha) for alpha in alphas], dtype, kernels=kernels)
                    done += 1
    bf16, f32 = BY_NAME["bf16"], BY_NAME["f32"]
    post, base, _ = (Array(c, bf16) for c in weights(rng, bf16, 3001))
    new_base = Array(weights(rng, f32, 3001)[2], f32)
    check(new_base, [Term(post, base, 1.0)], f32, kernels=kernels)
    check(Array(None, bf16), [Term(post, base, 1.0)], bf16, kernels=kernels, count=3001)
    return done + 2


def norms(kernels: str) -> int:
    """Take norms of every type, of one and of several, at odd addresses; return how many there were."""
    check = importlib.import_module("kernel_check").check_norms
    values = importlib.import_module("kernel_values")
    rng = np.random.default_rng(7)
    kinds = [(BY_NAME[name],) * 3 for name in ("bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2")]
    kinds.append((BY_NAME["f32"], BY_NAME["bf16"], BY_NAME["f8_e4m3"]))
    for dtypes in kinds:
        for count in (1, 4096, 9001):
            for shift in (0, 1):
                codes = [values.weights(rng, dtype, count)[k] for k, dtype in enumerate(dtypes)]
                check(*(values.shifted(c, shift) for c in codes), dtypes, kernels)
    return len(kinds) * 6


def scaled(kernels: str) -> int:
    """Merge quantised matrices: every output from fp8 blocks, every kind of input; return how many there were."""
    scaled_check = importlib.import_module("scaled_check")
    rng = np.random.default_rng(6)
    term = scaled_check.ScaledTerm
    blocks = scaled_check.Kind("f8_e4m3", 128, 128, "f32")
    outputs = scaled_check.outputs()
    for output in outputs:
        post, base, new_base = scaled_check.weights(rng, (140, 200), (blocks,) * 3, 0.5)
        scaled_check.check(new_base, [term(post, base)], output, kernels=kernels)
    # Rows on multiples of 16 bytes have a lane of their own, for any alpha and for powers of two.
    target = next(o for o in outputs if o.recipe is not None and (o.rows, o.cols) == (128, 128))
    post, base, new_base = scaled_check.weights(rng, (140, 208), (blocks,) * 3, 0.5)
    for alpha in (1.0, 0.7):
        scaled_check.check(new_base, [term(post, base, alpha)], target, kernels=kernels, gaps=(16, 32, 48))
    # A unit of more than 16384 elements takes other kernels: two passes, and scales chosen between them.
    target = next(o for o in outputs if o.recipe is not None and (o.rows, o.cols) == (0, 0))
    for kind in (*scaled_check.KINDS, blocks):
        post, base, new_base = scaled_check.weights(rng, (133, 261), (kind,) * 3, 0.5)
        scaled_check.check(new_base, [term(post, base, 0.7)], target, kernels=kernels)
    return len(outputs) + len(scaled_check.KINDS) + 3


def stage() -> None:
    """Merge small checkpoints through page-locked slots, and compare with the processor's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        post, base, new_base = write_demo(Path(folder), size="tiny")
        for device in ("cuda", "cpu"):
            report = merge(
                post=post,
                base=base,
                new_base=new_base,
                out=Path(folder) / device,
                device=device,
                threads=2,
                memory=1 << 19,
            )
            assert report.device.partition(":")[0] == device, report.device
        for file in sorted((Path(folder) / "cpu").glob("*.safetensors")):
            assert file.read_bytes() == (Path(folder) / "cuda" / file.name).read_bytes(), f"{file.name} differs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.touch", description=__doc__)
    parser.add_argument("--on", choices=PLACES, default="cuda")
    options = parser.parse_args(arguments)
    use(options.on)
    reason = backends.why_not("cuda")
    if reason:
        print(reason, file=sys.stderr)
        return 2
    kernels = "cuda"
    if options.on != "cuda":
        kernels = "cuda-host"
    else:
        ExactMemory.driver = Driver()
        importlib.import_module("cuda_calls").Memory = ExactMemory
    print(f"{plain(kernels)} merges of elements, {scaled(kernels)} of quantised matrices", flush=True)
    print(f"{norms(kernels)} norms", flush=True)
    stage()
    print("slots through the device: the processor's bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
