"""The extension paramdelta._cuda on an emulated GPU: nvcc's host code and nvcc's PTX, with neither a GPU nor a driver.

``module()`` compiles csrc/cuda with nvcc, translates the PTX of its kernels to C++ (``translate.py``), and links both
with an emulated device and runtime (``device.cpp``, ``runtime.cpp``) in place of CUDA's. It lies in build/emulated/ and
is made again when a source is newer. ``library()`` is the emulated device alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import ptx
import translate

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "conformance"))
import cuda_on_host  # noqa: E402

ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "emulated"
NAME = "_cuda_emulated"
TARGET = os.environ.get("PARAMDELTA_EMULATED_TARGET", "90")  # whose PTX
# Arithmetic as it is written, and little time for what is run once.
CXX_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-pthread"]


def why_not() -> str | None:
    """Return why there can be no emulation here, or None."""
    sys.path.insert(0, str(ROOT))
    if not (ROOT / "csrc").is_dir():
        return "the C++ sources are only in the source tree"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if shutil.which(_compiler()) is None:
        return "there is no C++ compiler"
    return None if _setup().find_nvcc() else "there is no nvcc, whose PTX is emulated"


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the emulated device: CUDA's runtime, and what runtime.cpp says that tests may ask of it."""
    target = FOLDER / "libemulated.so"
    sources = [HERE / "device.cpp", HERE / "runtime.cpp"]
    make_once(target, [*sources, *HERE.glob("*.hpp")], lambda to: _shared(to, _objects(sources, [_includes()])))
    loaded = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    loaded.emulated_memory.restype = loaded.emulated_pinned.restype = ctypes.c_size_t
    loaded.cudaGetErrorString.restype = ctypes.c_char_p
    return loaded


def module() -> ModuleType:
    """Return the extension, made where need be. What fails once is not tried again."""
    made = _module()
    if isinstance(made, Exception):
        raise made
    return made


@functools.lru_cache(maxsize=1)
def _module() -> ModuleType | Exception:
    library()
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    binding = ROOT / "csrc" / "python" / "bind_cuda.cpp"
    target = FOLDER / f"sm_{TARGET}" / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [
        *kernels,
        *(ROOT / "csrc" / "python").glob("*.cpp"),
        *(ROOT / "csrc").rglob("*.hpp"),
        *HERE.glob("*.hpp"),
    ]
    sources += [HERE / name for name in ("ptx.py", "translate.py", "instructions.py")]
    try:
        make_once(target, sources, lambda to: _extension(kernels, binding, to))
    except (subprocess.CalledProcessError, ValueError) as error:
        return error
    return cuda_on_host.load(NAME, target)


@functools.lru_cache(maxsize=1)
def module_on_host() -> ModuleType:
    """Return the extension as if it were built for the host: from then on all memory is the device's, and a launch
    returns when it is done."""
    loaded = module()
    library().emulated_become_host()
    vars(loaded)["on_host"] = lambda: True
    return loaded


class Copy:
    """Bytes in the emulated device's memory, `behind` bytes behind a 64-byte boundary; it ends where they do."""

    def __init__(self, data: bytes, behind: int) -> None:
        self._room = ctypes.c_void_p()
        self._bytes = len(data)
        check(library().cudaMalloc(ctypes.byref(self._room), ctypes.c_size_t(behind + len(data))))
        self.address = (self._room.value or 0) + behind
        ctypes.memmove(self.address, data, len(data))

    def fetch(self) -> bytes:
        """Wait for all that the device does, and return what is there."""
        check(library().cudaDeviceSynchronize())
        return ctypes.string_at(self.address, self._bytes)

    def __del__(self) -> None:
        library().cudaFree(self._room)


def check(code: int) -> None:
    """Raise what an emulated call says, and mend the device for the next."""
    if code:
        text = library().cudaGetErrorString(code).decode()
        library().emulated_reset()
        raise RuntimeError(f"{text} ({code})")


def compile_ptx(text: str, target: Path) -> None:
    """Make a library of a PTX file's kernels, which :func:`library` then knows by their names."""
    source = target.with_suffix(".cpp")
    source.write_text(translate.translate(ptx.read(text)))
    _shared(target, _objects([source], []))
    source.unlink()


def _extension(kernels: Sequence[Path], binding: Path, target: Path) -> None:
    import pybind11

    nvcc = _setup().find_nvcc()
    names = [f"-DPARAMDELTA_CUDA_MODULE={NAME}", f"-I{ROOT / 'csrc'}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def both(source: Path) -> list[Path]:
        """Return nvcc's object of the host's code, and that of the PTX which nvcc made on the way, if of kernels."""
        made = FOLDER / f"{source.stem}.host.o"
        flags = [f"-gencode=arch=compute_{TARGET},code=compute_{TARGET}", "-I" + str(ROOT / "csrc")]
        with tempfile.TemporaryDirectory() as folder:
            keep = ["--keep", f"--keep-dir={folder}"]
            subprocess.run([nvcc, *_setup().FLAGS, *flags, *keep, "-c", source, "-o", made], check=True)
            (text,) = (read.read_text() for read in Path(folder).glob("*.ptx"))
        if ".entry" not in text:
            return [made]
        translated = FOLDER / f"{source.stem}.device.cpp"
        translated.write_text(translate.translate(ptx.read(text)))
        device = _objects([translated], [])
        translated.unlink()
        return [made, *device]

    with ThreadPoolExecutor(_jobs()) as pool:
        largest_first = sorted(kernels, key=lambda source: source.name != "scaled.cu")
        objects = [each for made in pool.map(both, largest_first) for each in made]
    _shared(target, [*objects, *_objects([binding], [*names, *python])])


def _shared(target: Path, objects: Sequence[Path]) -> None:
    """Link objects, which go, to a library beside the emulated device."""
    other = [] if target.stem.startswith("libemulated.") else [str(FOLDER / "libemulated.so"), f"-Wl,-rpath,{FOLDER}"]
    subprocess.run([_compiler(), "-shared", "-pthread", *objects, *other, "-o", target], check=True)
    for each in objects:
        each.unlink()


def _objects(sources: Sequence[Path], flags: Sequence[str]) -> list[Path]:
    def one(source: Path) -> Path:
        made = FOLDER / f"{source.stem}.o"
        # Registers that are read before they are written, and their like, are what they are.
        quiet = ["-w"] if source.suffix == ".cpp" and source.parent != HERE else ["-Wall", "-Wextra", "-Werror"]
        subprocess.run([_compiler(), *CXX_FLAGS, *quiet, f"-I{HERE}", *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(_jobs()) as pool:
        return list(pool.map(one, sources))


def make_once(target: Path, sources: Sequence[Path], make: Callable[[Path], None]) -> None:
    """Make a file where a source is newer, or it is not there: of several workers that come here at once, one does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() or target.stat().st_mtime < max((s.stat().st_mtime for s in sources), default=0.0):
            made = target.with_name(f"{target.stem}.made{target.suffix}")  # what is cut short leaves no half of a file
            make(made)
            made.replace(target)


def _includes() -> str:
    """Return the compiler's flag for CUDA's headers: beside the runtime that nvcc knows."""
    runtime: Path = _setup().Build._runtime()
    for folder in (runtime.parents[1] / "include", runtime.parents[1] / "targets" / "x86_64-linux" / "include"):
        if (folder / "cuda_runtime_api.h").exists():
            return f"-isystem{folder}"
    raise FileNotFoundError(f"there is no cuda_runtime_api.h beside {runtime}")


@functools.lru_cache(maxsize=1)
def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _jobs() -> int:
    return int(os.environ.get("PARAMDELTA_BUILD_JOBS", "2"))
