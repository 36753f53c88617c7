"""A merge as a model of transformers, without an output folder: ``load_merged`` computes each tensor when transformers'
own loader asks for it, and puts it where ``from_pretrained`` would."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramdelta.errors import Complaint, InputError
from paramdelta.mapping import MergedTensors
from paramdelta.publish import write_files
from paramdelta.tensors import parse_dtype

if TYPE_CHECKING:
    from paramdelta.plan import Plan
    from paramdelta.plan.deltas import Folders

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"
_READ = ("config.json", "generation_config.json")


def load_merged(
    model: str | type = "AutoModelForCausalLM",
    *,
    post: Folders,
    base: Folders,
    new_base: str | Path,
    dtype: Any = None,
    device: Any = None,
    model_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    **policies: Any,
) -> Any:
    """Return a model of transformers with the weights ``new_base + alpha · (post − base)``.

    It is what ``from_pretrained`` makes of the folder that :func:`paramdelta.merge` writes for the same arguments, bit
    for bit: parameters, buffers, tied weights, config and generation config. transformers' own loader places, renames
    and stacks the tensors. In memory are the model, the engine's buffers, one tensor, at most 64 MiB of small ones, and
    where transformers stacks experts the parts of one stack.

    Parameters
    ----------
    model : name of a class in transformers, or a class with its ``from_pretrained``
    post, base, new_base : checkpoint folders, or models on the Hub; lists of post and base for several deltas
    dtype : every float tensor is rounded once to it, as with :func:`paramdelta.merge`; default: as in new_base
    device : where the model goes, as in ``torch.device``; default: the CPU. transformers needs accelerate for it
    model_options : further arguments of ``from_pretrained``, such as ``attn_implementation`` or ``device_map``
    threads, memory, isa, io : see :class:`paramdelta.engine.EngineOptions`
    **policies : as in :func:`paramdelta.merge`, except ``overwrite``

    Raises
    ------
    InputError, StorageError, NonFiniteError : as :func:`paramdelta.stream`
    ImportError : transformers 5 or torch is missing (extra ``transformers``)
    """
    transformers = _library()
    options = {"dtype": "auto", **(model_options or {})}
    if device is not None:
        options.setdefault("device_map", device)
    if dtype is not None:
        policies["dtype"] = dtype if isinstance(dtype, str) else parse_dtype("dtype", dtype)
    tensors = MergedTensors.open(
        post, base, new_base, framework="pt", threads=threads, memory=memory, isa=isa, io=io, **policies
    )
    model_class = _model_class(model, transformers)
    with tempfile.TemporaryDirectory(prefix="paramdelta-") as folder, _sequential():
        _write_configs(tensors.plan, Path(folder))
        trusted = {k: v for k, v in options.items() if k == "trust_remote_code"}
        config = transformers.AutoConfig.from_pretrained(folder, **trusted)
        model_class, config = _resolved(model_class, config, trusted)
        try:
            made = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), **options)
        finally:  # transformers reports what goes wrong while it converts a weight, and then raises its own error
            if tensors.failure is not None:
                raise tensors.failure from None
        loaded = made[0] if isinstance(made, tuple) else made  # with output_loading_info
        if loaded.can_generate() and (Path(folder) / _READ[1]).exists():
            loaded.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    loaded.config.name_or_path = tensors.plan.new_base.label
    return made


def _library() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'paramdelta[transformers]'") from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        text = f"transformers {transformers.__version__} cannot load tensors one by one, 5.0 and later can"
        raise ImportError(f"{text}: pip install 'paramdelta[transformers]'")
    return transformers


def _model_class(model: str | type, transformers: Any) -> Any:
    found = getattr(transformers, model, None) if isinstance(model, str) else model
    if not hasattr(found, "from_pretrained"):
        raise InputError(
            Complaint("model", f"expected a class of transformers or its name, got {model!r}", "AutoModelForCausalLM")
        )
    return found


def _resolved(model_class: Any, config: Any, trusted: dict[str, Any]) -> tuple[Any, Any]:
    """Return the class that an Auto class stands for, and the config it takes: of a model of several parts, that of the
    language model, where the class is for that alone. An Auto class itself would look for a folder of weights."""
    import torch

    if not hasattr(model_class, "from_config"):
        return model_class, config
    with torch.device("meta"):
        skeleton = model_class.from_config(copy.deepcopy(config), **trusted)
    if type(skeleton.config) is type(config):
        return type(skeleton), config
    part = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        part.quantization_config = config.quantization_config
    return type(skeleton), part


def _write_configs(plan: Plan, folder: Path) -> None:
    """Write the files that say what the model is: a few kilobytes, which transformers reads from a folder only."""
    files = dict(plan.written_files())
    if _READ[0] not in files:
        raise InputError(
            Complaint(f"{plan.new_base.path}/{_READ[0]}", "is missing, so no model can be made", "paramdelta.stream")
        )
    wanted = {name: data for name, data in files.items() if name in _READ or name.endswith(".py")}
    write_files(folder, wanted.items())


@contextmanager
def _sequential() -> Iterator[None]:
    """Have transformers ask for one tensor after the other, when it is to be placed: threads of its own would ask for
    whole models ahead of what has been stacked, and the engine has threads."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before
