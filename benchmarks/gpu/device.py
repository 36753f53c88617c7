"""Where the GPU's measurements run: on a CUDA device, or on the host, where every line is tried without one.

On the host the kernels are their bodies compiled by the C++ compiler (tests/conformance/cuda_on_host.py) and what
Triton's interpreter makes of them, device memory is memory, and the times mean nothing. ``ptx`` is the host, too, with
nvcc's PTX executed (tests/emulation) in place of the bodies: for the laws, at some ten million elements a second.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from benchmarks.gpu import ROOT
from paramdelta import backends

PLACES = ("cuda", "host", "ptx")
KERNELS = ("cuda", "triton")
LEAST_ROUNDS = 3


class Clock:
    """What is left of a part's time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def over(self) -> bool:
        return self.left() <= 0


def use(on: str) -> None:
    """Make ``paramdelta.backends.cuda`` the kernels' bodies on the host, or their PTX, where those are asked for."""
    if on != "cuda":
        folder, name = {"host": ("conformance", "cuda_on_host"), "ptx": ("emulation", "emulated_cuda")}[on]
        path = str(ROOT / "tests" / folder)
        if path not in sys.path:
            sys.path.insert(0, path)
        cuda = importlib.import_module("paramdelta.backends.cuda")
        build = importlib.import_module(name)
        cuda._extension = build.module if on == "host" else build.module_on_host


def command_line(on: str) -> list[str]:
    """Return the command line of the package on that device."""
    if on == "cuda":
        return [sys.executable, "-m", "paramdelta"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.gpu import device; device.use({on!r}); "
        "from paramdelta.cli import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code]


def environment(on: str) -> dict[str, str]:
    """Return this process's environment for a part: on the host Triton interprets."""
    env = dict(os.environ)
    if on == "host":
        env["TRITON_INTERPRET"] = "1"
    return env


class Device:
    """A CUDA device by way of PyTorch, or the host in its place."""

    def __init__(self, on: str) -> None:
        use(on)
        self.on = on
        self.torch: Any = importlib.import_module("torch")
        self.place: Any = self.torch.device("cuda:0" if on == "cuda" else "cpu")
        if on == "cuda":
            self.torch.cuda.set_device(0)
            self.torch.cuda.init()

    def why_not(self, kernels: str) -> str | None:
        """Return why these kernels cannot run here, or None."""
        return backends.why_not(kernels)

    @property
    def extension(self) -> ModuleType:
        return importlib.import_module("paramdelta.backends.cuda")._extension()  # type: ignore[no-any-return]

    @property
    def stream(self) -> int:
        """PyTorch's current stream as a number."""
        return 0 if self.on != "cuda" else int(self.torch.cuda.current_stream().cuda_stream)

    def finish(self) -> None:
        """Wait until everything enqueued is done."""
        if self.on == "cuda":
            self.torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory of tensors that are gone back to the device."""
        if self.on == "cuda":
            self.torch.cuda.empty_cache()

    def fetch(self, tensor: Any) -> Any:
        """Return the tensor in the host's memory, page-locked: fresh pages would take longer than the copy."""
        return self.host_room(tensor).copy_(tensor)

    def host_room(self, like: Any) -> Any:
        """Return memory of the host for a tensor."""
        return self.torch.empty(like.shape, dtype=like.dtype, pin_memory=self.on == "cuda")

    def copier(self, to: Any, source: Any) -> Callable[[], None]:
        """Return the driver's own copy of one tensor to another, on the current stream."""
        if self.on != "cuda":
            return lambda: ctypes.memmove(to.data_ptr(), source.data_ptr(), to.nbytes) and None
        driver = ctypes.CDLL("libcuda.so.1")
        arguments = [
            ctypes.c_uint64(to.data_ptr()),
            ctypes.c_uint64(source.data_ptr()),
            ctypes.c_size_t(to.nbytes),
            ctypes.c_void_p(self.stream),
        ]

        def copy() -> None:
            status = driver.cuMemcpyDtoDAsync_v2(*arguments)
            if status:
                raise RuntimeError(f"cuMemcpyDtoDAsync ended with {status}")

        return copy

    def take_turns(
        self, functions: Mapping[str, Callable[[], Any]], *, rounds: int, repeat: int, clock: Clock
    ) -> dict[str, list[float]]:
        """Return seconds of each function, one sample a round: ``repeat`` calls between two events, over their number.

        All run once a round, each round beginning with another one. Work is enqueued before the first event, so that
        the device has something to do while the host prepares the launches that count. Rounds end early with the clock,
        but not before LEAST_ROUNDS.
        """
        names = list(functions)
        ahead = self.torch.zeros(32 << 20 if self.on == "cuda" else 1, dtype=self.torch.int32, device=self.place)
        for _ in range(2):
            for function in functions.values():
                function()
        self.finish()
        samples: dict[str, list[float]] = {name: [] for name in names}
        for k in range(rounds):
            if clock.over() and k >= LEAST_ROUNDS:
                break
            turn = names[k % len(names) :] + names[: k % len(names)]
            for name, seconds in self._timed([(name, functions[name]) for name in turn], ahead, repeat):
                samples[name].append(seconds)
        return samples

    def _timed(self, turn: list[tuple[str, Callable[[], Any]]], ahead: Any, repeat: int) -> list[tuple[str, float]]:
        if self.on != "cuda":
            found = []
            for name, function in turn:
                start = time.perf_counter()
                for _ in range(repeat):
                    function()
                found.append((name, max(time.perf_counter() - start, 1e-9) / repeat))
            return found
        events = []
        for name, function in turn:
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(4):
                ahead.add_(1)
            start.record()
            for _ in range(repeat):
                function()
            end.record()
            events.append((name, start, end))
        self.finish()
        return [(name, start.elapsed_time(end) / 1e3 / repeat) for name, start, end in events]

    def wall(self, function: Callable[[], Any]) -> float:
        """Return the seconds of one call until the device is done, launches included."""
        self.finish()
        start = time.perf_counter()
        function()
        self.finish()
        return max(time.perf_counter() - start, 1e-9)


def describe(on: str) -> dict[str, Any]:
    """Return what the devices are, in the words of the driver and of the package."""
    use(on)
    extension_reason = backends.why_not("cuda")
    cuda = importlib.import_module("paramdelta.backends.cuda")
    torch = importlib.import_module("torch")
    found: dict[str, Any] = {
        "on": on,
        "why_not": {name: backends.why_not(name) for name in KERNELS},
        "devices": [] if extension_reason else cuda._extension().devices(),
        "torch_cuda": torch.version.cuda,
        "torch_device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    return found
