"""The Triton backend says why it cannot run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil

import pytest

from paramdelta import backends
from paramdelta.backends import triton
from paramdelta.errors import BackendError

HERE = all(importlib.util.find_spec(module) is not None for module in ("torch", "triton"))


@pytest.fixture(autouse=True)
def _asked_afresh(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton.why_not.cache_clear()
    yield
    triton.why_not.cache_clear()


def test_it_is_listed() -> None:
    assert "triton" in backends.names()


@pytest.mark.parametrize("module", ["torch", "triton"])
def test_what_is_not_installed(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found("os"))
    assert backends.why_not("triton") == f"{module} is not installed; install it with: pip install 'paramdelta[triton]'"
    with pytest.raises(BackendError, match=f"{module} is not installed"):
        backends.get("triton")


@pytest.mark.skipif(not HERE, reason="torch or triton is not installed: pip install 'paramdelta[triton]'")
def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "triton 3.5.1 is too old for its kernels: it must be 3.6 or later" in str(backends.why_not("triton"))


@pytest.mark.skipif(not HERE, reason="torch or triton is not installed: pip install 'paramdelta[triton]'")
def test_where_there_is_no_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "triton finds no C compiler" in str(backends.why_not("triton"))


@pytest.mark.skipif(not HERE, reason="torch or triton is not installed: pip install 'paramdelta[triton]'")
def test_where_there_is_no_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES"):
        pytest.skip("a CUDA device is here")
    assert "torch finds no CUDA device" in str(backends.why_not("triton"))
