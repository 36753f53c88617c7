"""The tensors of a loaded model, as operands and outputs where they lie: a module of torch, or a mapping of names to
tensors or arrays. Whatever cannot be merged in place is complained about here, before anything is changed."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramdelta import backends
from paramdelta.checkpoint import HeldTensor
from paramdelta.dtypes import DType, from_numpy, from_torch
from paramdelta.errors import Complaint, OperandTypeError, shown
from paramdelta.memory import DeviceMemory, Memory
from paramdelta.tensors import is_distributed

NameMap = Mapping[str, str] | Callable[[str], str]

_IN_PLACE = "paramdelta.ops.merge(…, out=tensor) merges one tensor at a time"
_SHARDS = "paramdelta.ops.merge(…, out=tensor) merges the shards of a DTensor, one tensor at a time (docs/gpu.md)"
_QUANTISED = "load the model without quantising it, or write a quantised folder with paramdelta.merge"


@dataclass(frozen=True)
class Loaded:
    """What a model holds: each tensor once, and its config as its config.json would have it."""

    tensors: tuple[HeldTensor, ...]
    config: dict[str, Any]


def read_model(model: Any, names: NameMap | None, wrong: list[Complaint]) -> Loaded:
    """Return the tensors of a model by the names that checkpoints have for them (``names`` says which, where they are
    others). Raises OperandTypeError where it is no model at all; all else is added to ``wrong``."""
    model = _unwrapped(model)
    config = _config_of(model)
    if config.get("quantization_config"):
        text = "is quantised (its config has a quantization_config), and tensors in memory are merged as plain ones"
        wrong.append(Complaint("model", text, _QUANTISED))
        return Loaded((), config)
    by_name = _named(model, names, wrong)
    found: dict[tuple[str, int, int], list[str]] = {}  # names by memory: those of one tensor that is tied
    made: dict[str, HeldTensor] = {}
    for name, value in by_name.items():
        tensor = _read(name, value, wrong)
        if tensor is None:
            continue
        address = _address(tensor)
        place = (tensor.device, address, tensor.memory.nbytes) if address else (name, 0, 0)
        made[name] = tensor
        found.setdefault(place, []).append(name)
    tensors = []
    for tied in found.values():
        first = made[tied[0]]
        for other in (made[name] for name in tied[1:]):
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                text = (
                    f"shares the memory of {shown(first.names[0])}, in another shape or type: it would be merged twice"
                )
                wrong.append(
                    Complaint(shown(other.names[0]), text, "give one of them memory of its own: tensor.clone()")
                )
        tensors.append(
            HeldTensor(
                names=tuple(tied), dtype=first.dtype, shape=first.shape, memory=first.memory, device=first.device
            )
        )
    wrong += _overlaps(tensors)
    wrong += _without_backend(tensors)
    return Loaded(tuple(tensors), config)


def _unwrapped(model: Any) -> Any:
    """Return the module that torch.compile, or DistributedDataParallel, has wrapped: its tensors are the same."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        if inner is None:
            return model
        model = inner


def _config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model of transformers, as its config.json would have it; empty where there is none."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = json.loads(json.dumps(to_dict(), default=str)) if to_dict is not None else {}
    return config if isinstance(config, dict) else {}


def _named(model: Any, names: NameMap | None, wrong: list[Complaint]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in _stated(model):
        new = name if names is None else names(name) if callable(names) else names.get(name, name)
        if new in renamed:
            wrong.append(Complaint("names", f"give {shown(new)} to {shown(name)} and to another tensor of the model"))
        renamed.setdefault(new, value)
    return renamed


def _stated(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and the buffers that a checkpoint has. Not from ``state_dict()``, whose hooks may return
    copies, and what is written to a copy is lost."""
    if isinstance(model, Mapping):
        yield from model.items()
        return
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise OperandTypeError(
            f"model: expected a torch.nn.Module, or a mapping of names to tensors, got {type(model).__qualname__}"
        )
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set
        own = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in passing}}
        for name, value in own.items():
            if value is not None:
                yield f"{prefix}.{name}" if prefix else name, value


def _read(name: str, value: Any, wrong: list[Complaint]) -> HeldTensor | None:
    """Return a tensor where it lies, or None with a complaint."""
    torch = sys.modules.get("torch")
    if isinstance(value, np.ndarray):
        problem, remedy = _wrong_with_array(value)
        dtype = from_numpy(value.dtype)
    elif torch is not None and isinstance(value, torch.Tensor):
        problem, remedy = _wrong_with_tensor(value, torch)
        dtype = from_torch(value.dtype)
    else:
        problem, remedy, dtype = f"expected a tensor, got {type(value).__qualname__}", "", None
    if not problem and dtype is None:
        problem = f"has the type {value.dtype}, which no checkpoint stores"
    if not problem and dtype is not None and dtype.merges and dtype.bits == 8:
        problem, remedy = f"holds {dtype}, codes whose scales lie elsewhere", _QUANTISED
    if problem:
        wrong.append(Complaint(shown(name), problem, remedy))
        return None
    assert dtype is not None
    if isinstance(value, np.ndarray):
        return _of_array(name, value, dtype)
    return _of_tensor(name, value, dtype, torch)


def _wrong_with_array(value: np.ndarray[Any, Any]) -> tuple[str, str]:
    if not value.flags.c_contiguous:
        return "is not in row-major order", "pass a copy: numpy.ascontiguousarray"
    return ("is read-only", "pass a copy") if not value.flags.writeable else ("", "")


def _wrong_with_tensor(value: Any, torch: Any) -> tuple[str, str]:
    if is_distributed(value):
        return "is a DTensor, of which this process holds a shard", _SHARDS
    if value.is_meta:
        return "is on the device meta, without data: offloaded, or not loaded yet", "load all of the model first"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__qualname__}, not a plain tensor", _QUANTISED
    if value.layout != torch.strided:
        return f"has the layout {value.layout}", "tensor.to_dense()"
    if value.device.type not in ("cpu", "cuda"):
        return f"is on {value.device}; the CPU and CUDA devices are supported", "model.to('cpu')"
    if value.grad_fn is not None:
        return "is the result of a computation that autograd follows", "pass tensor.detach(), or parameters"
    if not value.is_contiguous():
        return "is not in row-major order", f"tensor.contiguous() makes a copy; {_IN_PLACE}"
    return "", ""


def _of_array(name: str, value: np.ndarray[Any, Any], dtype: DType) -> HeldTensor:
    flat = value.reshape(-1).view(np.uint8)
    memory = Memory(place=flat, nbytes=flat.nbytes, read=lambda at, count: flat[at : at + count].tobytes())
    return HeldTensor(names=(name,), dtype=dtype, shape=value.shape, memory=memory)


def _of_tensor(name: str, value: Any, dtype: DType, torch: Any) -> HeldTensor:
    flat = value.detach().reshape(-1).view(torch.uint8)
    on_device = value.device.type != "cpu"
    memory = Memory(
        place=DeviceMemory(flat.data_ptr(), flat.nbytes) if on_device else flat.numpy(),
        nbytes=flat.nbytes,
        read=lambda at, count: flat[at : at + count].cpu().numpy().tobytes(),
    )
    device = f"cuda:{value.device.index}" if on_device else "cpu"
    return HeldTensor(names=(name,), dtype=dtype, shape=tuple(value.shape), memory=memory, device=device)


def _address(tensor: HeldTensor) -> int:
    """Return where a tensor begins, 0 where it has no elements."""
    place = tensor.memory.place
    address = place.address if isinstance(place, DeviceMemory) else place.__array_interface__["data"][0]
    return int(address) if tensor.memory.nbytes else 0


def _overlaps(tensors: list[HeldTensor]) -> Iterator[Complaint]:
    """Yield a complaint about each tensor that shares a part of its memory with another."""
    placed = sorted(((t.device, _address(t), t) for t in tensors if t.memory.nbytes), key=lambda p: p[:2])
    for (device, address, tensor), (other_device, other, following) in itertools.pairwise(placed):
        if device == other_device and other < address + tensor.memory.nbytes:
            text = f"shares a part of its memory with {shown(tensor.names[0])}: it would be merged twice"
            yield Complaint(shown(following.names[0]), text, "give it memory of its own: tensor.clone()")


def _without_backend(tensors: list[HeldTensor]) -> Iterator[Complaint]:
    """Yield a complaint where tensors lie on a device that cannot compute here."""
    places = {t.device for t in tensors} - {"cpu"}
    reason = backends.why_not("cuda") if places else None
    if reason is not None:
        yield Complaint("model", f"has tensors on {', '.join(sorted(places))}, but {reason}", "model.to('cpu')")
