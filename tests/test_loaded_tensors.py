"""What of a loaded module of torch can be merged in place, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paramdelta import backends, dtypes
from paramdelta.loaded_tensors import read_model
from paramdelta.memory import DeviceMemory

torch = pytest.importorskip("torch", reason="the modules of this test are torch's")


def test_parameters_and_persistent_buffers_where_they_lie() -> None:
    """Not what state_dict() returns: a hook may have made copies of it."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
            self.again = self.inner
            self.scale = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
            self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
            self.register_buffer("cache", torch.zeros(4), persistent=False)
            self.register_buffer("absent", None)
            self.register_state_dict_post_hook(self.copies)

        @staticmethod
        def copies(_: Any, state: dict[str, Any], *others: Any) -> None:
            state.update({name: value.clone() for name, value in state.items()})

    module = Module()
    wrong: list[Any] = []
    found = {t.names: t for t in read_model(module, None, wrong).tensors}
    assert not wrong
    assert list(found) == [("scale",), ("seen",), ("inner.weight", "again.weight")]
    weight = found["inner.weight", "again.weight"]
    assert (weight.dtype, weight.shape, weight.device) == (dtypes.BF16, (2, 3), "cpu")
    weight.memory.place[:] = 0
    assert not module.again.weight.any()
    assert found[("scale",)].memory.read(0, 4) == np.float32(2).tobytes()


class Subclass(torch.Tensor):  # type: ignore[misc]
    """As quantising libraries make them: what it shows is not what it stores."""


def meta() -> Any:
    return torch.zeros(3, device="meta")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (meta, "without data: offloaded, or not loaded yet → load all"),
    "subclass": (lambda: torch.zeros(3).as_subclass(Subclass), "is a Subclass, not a plain tensor"),
    "transposed": (lambda: torch.zeros(3, 4).T, "is not in row-major order"),
    "expanded": (lambda: torch.zeros(1).expand(4), "is not in row-major order"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "has the layout torch.sparse_coo"),
    "graph": (lambda: torch.zeros(3, requires_grad=True) * 2, "autograd follows"),
    "fp8": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "holds f8_e4m3, codes whose scales lie elsewhere"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex128), "torch.complex128, which no checkpoint stores"),
    "number": (lambda: 3.0, "expected a tensor, got float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, expected = REFUSED[name]
    wrong: list[Any] = []
    found = read_model({"x": make(), "y": torch.zeros(2)}, None, wrong)
    assert [t.names for t in found.tensors] == [("y",)]
    assert len(wrong) == 1
    assert str(wrong[0]).startswith("x: ")
    assert expected in " → ".join((str(wrong[0].problem), wrong[0].remedy))


def test_shards_are_refused() -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        tensor = DTensor.from_local(torch.zeros(4), init_device_mesh("cpu", (1,)), [Replicate()])
        wrong: list[Any] = []
        read_model({"x": tensor}, None, wrong)
        assert "is a DTensor" in str(wrong[0])
        assert "ops.merge" in wrong[0].remedy
    finally:
        torch.distributed.destroy_process_group()


def test_names_that_meet() -> None:
    wrong: list[Any] = []
    model = {"a.x": torch.zeros(1), "b.x": torch.zeros(1), "c": torch.zeros(1)}
    read_model(model, lambda name: name.removeprefix("a.").removeprefix("b."), wrong)
    assert "give x to b.x and to another tensor" in str(wrong[0])
    found = read_model(model, {"c": "d"}, [])
    assert [t.names for t in found.tensors] == [("a.x",), ("b.x",), ("d",)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes a GPU")
def test_tensors_of_a_gpu() -> None:
    value = torch.arange(6, device="cuda", dtype=torch.float32)
    wrong: list[Any] = []
    (tensor,) = read_model({"x": value}, None, wrong).tensors
    assert tensor.device == f"cuda:{value.device.index}"
    assert tensor.memory.place == DeviceMemory(value.data_ptr(), 24)
    assert tensor.memory.read(4, 4) == np.float32(1).tobytes()
    assert bool(wrong) == (backends.why_not("cuda") is not None)
