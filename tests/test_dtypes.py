"""The dtype lists of Python, C++ and the reference agree, and the extension is what its stub says."""

from __future__ import annotations

import ast
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from paramdelta import _cpu, reference
from paramdelta.dtypes import BY_NAME, BY_SAFETENSORS, DTYPES, MERGE_DTYPES, DType, from_numpy, from_torch

STUB = Path(__file__).parent.parent / "paramdelta" / "_cpu.pyi"


def test_the_lists_of_python_and_cpp_agree() -> None:
    assert _cpu.dtypes() == [(d.name, d.bits, d.merges) for d in DTYPES]
    assert [d.code for d in DTYPES] == list(range(len(DTYPES)))


def test_every_dtype_with_arithmetic_has_a_format() -> None:
    assert list(reference.FORMATS) == [d.name for d in MERGE_DTYPES]
    assert BY_NAME.keys() == {d.name for d in DTYPES}
    assert BY_SAFETENSORS.keys() == {d.safetensors for d in DTYPES}


@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=lambda d: d.name)
def test_formats_are_those_of_numpy(dtype: DType) -> None:
    form, info = reference.FORMATS[dtype.name], ml_dtypes.finfo(dtype.to_numpy())
    assert dtype.to_numpy().itemsize == dtype.itemsize
    assert from_numpy(dtype.to_numpy()) == dtype
    assert (form.mantissa, form.emin) == (info.nmant, info.minexp)
    largest = np.array(form.largest, reference.code_type(dtype)).view(dtype.to_numpy())
    assert largest == info.max


def test_dtypes_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for dtype in DTYPES:
        theirs = getattr(torch, dtype.torch or "", None)
        assert theirs is None or from_torch(theirs) == dtype
    assert from_torch(torch.bool) == BY_NAME["bool"]
    assert from_torch(torch.complex128) is None


def test_the_stub_is_the_module() -> None:
    tree = ast.parse(STUB.read_text())
    functions = {n.name: [a.arg for a in n.args.kwonlyargs] for n in tree.body if isinstance(n, ast.FunctionDef)}
    classes = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    values = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    public = {n for n in vars(_cpu) if not n.startswith("_")}
    assert public == functions.keys() | classes | values
    for name, keywords in functions.items():
        signature = (getattr(_cpu, name).__doc__ or "").splitlines()[0]
        for keyword in keywords:
            assert f"{keyword}:" in signature, f"{name} takes no {keyword}: {signature}"


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.merges], ids=lambda d: d.name)
def test_the_extension_refuses_dtypes_without_arithmetic(dtype: DType) -> None:
    with pytest.raises(ValueError, match="no arithmetic"):
        _cpu.merge(new_base=(0, dtype.code), terms=[], out=(1, 0), count=0, streamed=False, threads=1, isa=None)
