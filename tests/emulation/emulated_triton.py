"""Triton's compiled kernels on the emulated device: Triton's own compiler makes PTX, which is translated and run.

``active()`` gives Triton a driver that launches on the emulated device (``emulated_cuda``), and the backend ``triton``
to believe in it. Everything up to the PTX is what a GPU of the same architecture would be given.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any

import emulated_cuda

from paramdelta.backends import triton as backend

ARCHITECTURE = 90
INTEGERS = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
}


def why_not() -> str | None:
    """Return why Triton's kernels cannot be emulated here, or None."""
    for module in ("torch", "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install 'paramdelta[triton]'"
    if backend.interpreted():
        return "TRITON_INTERPRET=1 is set: there is no compiler in this process"
    return emulated_cuda.why_not()


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Within it, Triton launches on the emulated device, and addresses are of its memory."""
    import pytest  # here alone: what imports this may do without tests
    from triton.backends import backends
    from triton.runtime import driver

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends, "nvidia", type(backends["nvidia"])(_compiler(), backends["nvidia"].driver))
        patch.setattr(backend, "interpreted", lambda: True)  # no stream and no device of torch's
        patch.setattr(driver, "_active", Driver())
        yield


@functools.lru_cache(maxsize=1)
def _compiler() -> Any:
    """Return Triton's compiler for NVIDIA's GPUs, ending with PTX."""
    from triton.backends.nvidia.compiler import CUDABackend

    class ToPtx(CUDABackend):  # type: ignore[misc]
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def add_stages(self, stages: dict[str, Any], *given: Any) -> None:
            super().add_stages(stages, *given)
            del stages["cubin"]

        def hash(self) -> str:
            return "emulated"

    return ToPtx


class Driver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.utils = self
        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, str, int, int, int]:
        return None, _load(kernel.decode()), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class Launcher:
    """Launches one kernel: packs arguments as the kernel's parameters are."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature = list(source.signature.values())
        self._threads = metadata.num_warps * 32
        self._shared = metadata.shared
        assert (metadata.global_scratch_size, metadata.profile_scratch_size, metadata.num_ctas) == (0, 0, 1)

    def __call__(self, across: int, down: int, deep: int, stream: int, function: str, *rest: Any) -> None:
        assert down == deep == 1
        packed = [*_packed(self._signature, rest[-len(self._signature) :]), *(ctypes.c_void_p(None) for _ in range(2))]
        pointers = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(each) for each in packed))
        emulated_cuda.check(
            emulated_cuda.library().emulated_launch(
                function.encode(), across, self._threads, ctypes.c_size_t(self._shared), pointers
            )
        )


def _packed(signature: Sequence[Any], values: Sequence[Any]) -> Iterator[Any]:
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from _packed(kind, value)
        elif kind != "constexpr":
            yield INTEGERS[kind](value)


@functools.cache
def _load(text: str) -> str:
    """Make a kernel known under a name of its own, and return that."""
    (name,) = re.findall(r"\.visible \.entry (\w+)", text)
    code = re.sub(r"^\s*\.(loc|file)\b.*$", "", text.split(".section", 1)[0], flags=re.M)  # without debuggers' lines
    own = f"{name}_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    emulated_cuda.library()
    target = emulated_cuda.FOLDER / f"{own}.so"
    renamed = re.sub(rf"\b{name}(_param_\d+)?\b", rf"{own}\1", code)
    emulated_cuda.make_once(target, [], lambda to: emulated_cuda.compile_ptx(renamed, to))
    ctypes.CDLL(str(target))
    return own
