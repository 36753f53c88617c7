"""A merge into a model that is loaded: its own tensors are one of the operands and the output, and the others are read
from disk through the engine's slots. Every weight is merged on the device that holds it, where it lies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paramdelta import backends, devices, engine
from paramdelta.checkpoint import HeldTensor, held_checkpoint
from paramdelta.checkpoint.held import LABEL
from paramdelta.errors import Complaint, PartlyMergedError, PlanError, shown
from paramdelta.loaded_tensors import Loaded, NameMap, read_model
from paramdelta.merging import judged, with_data_warnings, without_collector
from paramdelta.report import MergeReport
from paramdelta.streaming import into_memory, referred

if TYPE_CHECKING:
    from paramdelta.checkpoint import Checkpoint
    from paramdelta.deltas import Deltas
    from paramdelta.plan import MergeRequest, Plan
    from paramdelta.plan.deltas import Folders
    from paramdelta.plan.work import Work

# What a failure leaves in doubt is the tensors of one batch.
BATCH_BYTES = 1 << 30
_POLICIES = (
    *("alphas", "include", "exclude", "copy_from", "rename_post", "rename_base", "rename_new_base"),
    *("stacks", "vocab", "allow_unscaled", "allow_nonfinite"),
)
_VOCAB = ("error", "extend")  # both leave every row where it is
_MOST_SHOWN = 20


def merge_into(
    model: Any,
    *,
    post: Folders | None = None,
    base: Folders | None = None,
    new_base: str | Path | None = None,
    delta: Deltas | None = None,
    alpha: float | Mapping[str, float] | Sequence[Any] = 1.0,
    names: NameMap | None = None,
    rehearse: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
    **policies: Any,
) -> MergeReport:
    """Change a loaded model to ``new_base + Σ alpha_k · (post_k − base_k)``, in place.

    The model is the operand that is not named: new_base where ``post`` and ``base`` are, or ``delta``; post where
    ``base`` and ``new_base`` are. Its tensors get the bits that :func:`paramdelta.merge` would write from the same
    operands, in the types that they have. Tied weights are merged once. Every other operand is read once, through the
    engine's slots, and merged on the device that holds the weight: processor, or GPUs (docs/gpu.md).

    Parameters
    ----------
    model : a torch.nn.Module (its parameters and persistent buffers), or a mapping of names to torch tensors or NumPy
        arrays. Plain float tensors in row-major order, on the CPU or CUDA devices, several too; what requires a
        gradient may be changed, autograd is not told
    post, base, new_base : checkpoint folders, or models on the Hub; lists of post and base for several deltas
    delta : a folder that :func:`paramdelta.extract` wrote, or several, as :func:`paramdelta.apply` takes them
    alpha : as in :func:`paramdelta.merge`
    names : what checkpoints call the model's tensors, where that is another name: a mapping, or a function of the
        model's name
    rehearse : read and merge everything before anything is changed, writing nothing. Takes twice the time, and finds
        what cannot be read, and results that are not finite, while the model is still what it was
    threads, memory, isa, io : see :class:`paramdelta.engine.EngineOptions`
    on_progress : called with (bytes read, bytes written) about ten times a second
    **policies : ``alphas``, ``include``, ``exclude``, ``copy_from``, ``rename_post``, ``rename_base``,
        ``rename_new_base``, ``stacks``, ``vocab`` (``error``, ``extend``), ``allow_unscaled``, ``allow_nonfinite``
        as in :func:`paramdelta.merge`

    Returns
    -------
    MergeReport
        ``out`` is None and ``files`` 0; ``tensors`` are those of the merge, and ``bytes_read`` those of the folders.
        The model's config stays as it is: ``warnings`` say where post's differs.

    Raises
    ------
    InputError
        The model, the folders and the request do not fit together. Carries every complaint; nothing was changed.
    NonFiniteError
        Results are NaN, infinite or overflowed and ``allow_nonfinite`` was not given. The model holds them, unless
        ``rehearse`` found them.
    PartlyMergedError
        Reading or merging failed on the way. Says which tensors are merged, which may be in part, and which are as
        they were.

    Notes
    -----
    The sum is ParamΔ (arXiv 2504.21023) and fine-tuning transfer (arXiv 2503.20110).
    """
    started = time.perf_counter()
    wrong: list[Complaint] = []
    loaded = read_model(model, names, wrong)
    role, given = _operands(post, base, new_base, delta, wrong)
    wrong += _too_many(loaded, given)
    allowed = _allowed(policies, wrong)
    if role == "post":  # new_base's types may be others than the model's
        floats = {t.dtype.name for t in loaded.tensors if t.dtype.merges}
        allowed |= {"dtype": floats.pop()} if len(floats) == 1 else {}
    request = _request(given, role, alpha, allowed, wrong)
    each = engine.EngineOptions(threads=threads, memory=memory, isa=isa, io=io)
    options = {device: devices.on(device, each) for device in sorted({t.device for t in loaded.tensors})}
    for device in options:
        if device != "cpu":
            import torch

            torch.cuda.synchronize(device)  # kernels of other streams may be using the weights still
    return merge_held(
        loaded, request, role=role, options=options, rehearse=rehearse, on_progress=on_progress, started=started
    )


def merge_held(
    loaded: Loaded,
    request: MergeRequest,
    *,
    role: str,
    options: Mapping[str, engine.EngineOptions],
    rehearse: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    started: float | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> MergeReport:
    """Carry out a request, whose operand ``role`` is ``loaded``, into the memory of that. ``options`` are those of
    the engine for each device. Returns and raises as :func:`merge_into`."""
    began = time.perf_counter() if started is None else started
    plan = _planned(loaded, request, role)
    batches = _batches(plan, _targets(plan, loaded, role), batch_bytes)
    runs = [True, False] if rehearse else [False]
    for rehearsing in runs:
        result = _run(plan, batches, options, rehearsing, on_progress)
        outcome = "nothing was changed" if rehearsing else "the model holds them"
        remedy = "allow_nonfinite=True lets them pass" + (
            "" if rehearse else "; rehearse=True finds them before anything is changed"
        )
        report, error = judged(plan, result, resumed=0, outcome=outcome, remedy=remedy)
        report = replace(report, out=None, files=0, seconds=time.perf_counter() - began)
        if error is not None:
            error.report = report
            raise error
    return report


def _operands(
    post: Folders | None,
    base: Folders | None,
    new_base: str | Path | None,
    delta: Deltas | None,
    wrong: list[Complaint],
) -> tuple[str, dict[str, Any]]:
    """Return the role of the model, and the operands that are folders."""
    operands = {"post": post, "base": base, "new_base": new_base, "delta": delta}
    given = {name: value for name, value in operands.items() if value is not None}
    roles = {("post", "base"): "new_base", ("delta",): "new_base", ("base", "new_base"): "post"}
    role = roles.get(tuple(given))
    if role is None:
        wrong.append(
            Complaint(
                "operands",
                f"the model is one operand, and {' and '.join(given) or 'none'} given: which one it is cannot be told",
                "give post and base, or delta (the model is new_base); or base and new_base (the model is post)",
            )
        )
    elif role == "post" and isinstance(base, (list, tuple)):
        wrong.append(Complaint("base", "several deltas need posts that are folders", "give post and base"))
    return role or "new_base", given


def _too_many(loaded: Loaded, given: Mapping[str, Any]) -> Iterator[Complaint]:
    """Yield a complaint where there are more deltas than the kernels of a GPU take."""
    deltas = given.get("delta", given.get("post"))
    count = len(deltas) if isinstance(deltas, (list, tuple, Mapping)) else 1
    if all(t.device == "cpu" for t in loaded.tensors) or backends.why_not("cuda") is not None:
        return
    most = devices.most_deltas()
    if count > most:
        yield Complaint(
            "model", f"lies on a GPU, whose kernels add at most {most} deltas, not {count}", "merge in turns"
        )


def _allowed(policies: dict[str, Any], wrong: list[Complaint]) -> dict[str, Any]:
    """Return the policies that a loaded model can follow."""
    from paramdelta.plan import MergeRequest

    for name in policies:
        if name in _POLICIES:
            continue
        if name not in MergeRequest.__dataclass_fields__:
            raise TypeError(f"merge_into() got an unexpected keyword argument {name!r}")
        text = "says how a folder is written; a loaded model keeps its tensors, their shapes and their types"
        wrong.append(Complaint(name, text, "leave it out, or write a folder with paramdelta.merge"))
    if policies.get("vocab", "error") not in _VOCAB:
        text = f"expected one of {', '.join(_VOCAB)}: a loaded model keeps its rows where they are"
        wrong.append(Complaint("vocab", text, "paramdelta.merge writes a folder with other rows"))
    return {name: value for name, value in policies.items() if name in _POLICIES}


def _request(
    given: dict[str, Any], role: str, alpha: Any, policies: dict[str, Any], wrong: list[Complaint]
) -> MergeRequest:
    from paramdelta.deltas import apply_request
    from paramdelta.plan import make_request

    if "delta" in given and len(given) == 1:
        deltas = given["delta"]
        return apply_request(*wrong, new_base=Path(LABEL), deltas=deltas, alpha=alpha, held=role, **policies)
    folders = {name: given.get(name, Path(LABEL)) for name in ("post", "base", "new_base")}
    return make_request(*wrong, held=role, **folders, alpha=alpha, **policies)


def _planned(loaded: Loaded, request: MergeRequest, role: str) -> Plan:
    from paramdelta.plan import make_plan, open_all

    with without_collector():
        opened = dict(zip([r for r in request.folders if r != role], open_all(request, held=role), strict=True))
        held = held_checkpoint(loaded.tensors, _chosen(loaded.tensors, opened), role=role, config=loaded.config)
        every = {**opened, role: held}
        plan = make_plan(request, *(every[r] for r in request.folders))
    return _with_kept_config(with_data_warnings(plan))


def _chosen(tensors: Sequence[HeldTensor], opened: Mapping[str, Checkpoint]) -> list[str]:
    """Return the name that each tensor is merged by: of a tied one, that which the folders have; where they have none
    or several, that of an input embedding before that of the head."""
    from paramdelta.plan.naming import is_head

    chosen = []
    for tensor in tensors:
        ordered = sorted(tensor.names, key=is_head)
        there = [name for name in ordered if any(name in checkpoint.tensors for checkpoint in opened.values())]
        chosen.append((there or ordered)[0])
    return chosen


def _with_kept_config(plan: Plan) -> Plan:
    """Return the plan with a warning about what a folder's config would have taken from post."""
    taken = plan.policies["config_from_post"]
    if not taken or not plan.new_base.config:
        return plan
    text = f"config.json: post changed {', '.join(taken)}; the loaded model keeps its own config"
    return replace(plan, warnings=(*plan.warnings, text))


@dataclass(frozen=True)
class _Batch:
    """Tensors of one device, by their numbers in the plan; the tensors of the model that they are; and the work that
    makes them. ``work`` is None where all stay as they are."""

    device: str
    numbers: tuple[int, ...]
    targets: tuple[HeldTensor, ...]
    work: Work | None


def _targets(plan: Plan, loaded: Loaded, role: str) -> list[HeldTensor]:
    """Return the tensor of the model that each output tensor is. Raises PlanError."""
    wrong: list[Complaint] = []
    rows = plan.names_by_role[role].rows
    found = []
    for number, name in enumerate(plan.names):
        i = int(plan.layout.order[number])
        logical, part = plan.layout.outputs.logical[i], plan.layout.outputs.parts[i]
        row = rows.get(plan.pairing.names[logical]) if logical >= 0 and not part else None
        if row is None:
            text = f"would be a tensor of its own in the merge's folder, which {LABEL} does not have"
            wrong.append(Complaint(shown(name), text, f"exclude={name!r} leaves it out; or paramdelta.merge"))
            continue
        target = loaded.tensors[row]
        made, there = ((plan.dtype_of(number), plan.shape_of(number)), (target.dtype, target.shape))
        if made != there:
            text = f"expected {_spelled(*made)}, the merge's result, but {LABEL} has {_spelled(*there)}"
            wrong.append(Complaint(shown(name), text, "load the model in that type and shape"))
        elif role != "new_base" and logical in plan.pairing.bridges:
            text = f"lies in another structure in {LABEL} than in new_base: its elements would have to move"
            wrong.append(Complaint(shown(name), text, "paramdelta.merge writes a folder"))
        found.append(target)
    if wrong:
        more = len(wrong) - _MOST_SHOWN
        rest = [Complaint(LABEL, f"and {more:,} more tensors like these")] if more > 0 else []
        raise PlanError([*wrong[:_MOST_SHOWN], *rest])
    return found


def _spelled(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _batches(plan: Plan, targets: Sequence[HeldTensor], batch_bytes: int) -> list[_Batch]:
    """Cut the tensors of each device into batches of about ``batch_bytes``, in the order of the output."""
    made: list[_Batch] = []
    for device in sorted({target.device for target in targets}):
        numbers = [number for number, target in enumerate(targets) if target.device == device]
        sizes = np.cumsum([targets[number].memory.nbytes for number in numbers])
        for group in np.unique(sizes // batch_bytes):
            chosen = [n for n, at in zip(numbers, sizes // batch_bytes, strict=True) if at == group]
            own = tuple(targets[n] for n in chosen)
            made.append(_Batch(device, tuple(chosen), own, _in_place(plan, chosen, own)))
    return made


def _in_place(plan: Plan, numbers: Sequence[int], targets: Sequence[HeldTensor]) -> Work | None:
    """Return the work that makes some tensors, without the copies that would copy a tensor to itself."""
    work = into_memory(plan.work, numbers, [target.memory.nbytes for target in targets])
    places = {id(target.memory): output for output, target in enumerate(targets)}
    of_input = np.array([places.get(id(source), -1) for source in work.inputs] + [-1])  # the last: of no file
    if any(_lie_elsewhere(work, of_input)):
        raise AssertionError("an operand in the model's memory lies elsewhere than what is made of it")
    spans = work.spans
    work = replace(work, spans=spans[(of_input[spans["new_file"]] < 0) | (spans["n_terms"] > 0)])
    return work if len(work.spans) or len(work.regions) else None


def _lie_elsewhere(work: Work, of_input: NDArray[np.int64]) -> Iterator[bool]:
    """Yield whether operands lie in the memory of an output, at another place than what is made of them; ``of_input``
    is the output whose memory an input is, −1 for none."""
    spans, regions, views = work.spans, work.regions, work.views
    of_spans, of_regions = (np.repeat(rows, rows["n_terms"]) for rows in (spans, regions))
    terms, region_terms = work.terms[referred(spans)], work.region_terms[referred(regions)]
    operands = [
        (spans["new_file"], spans["new_offset"], spans),
        *((terms[f"{role}_file"], terms[f"{role}_offset"], of_spans) for role in ("post", "base")),
    ]
    for numbers, rows in (
        (regions["new_view"], regions),
        *((region_terms[f"{role}_view"], of_regions) for role in ("post", "base")),
    ):
        found = views[numbers]
        operands.append((found["file"], found["offset"], rows))
        yield bool(((of_input[found["file"]] >= 0) & (found["row_stride"] != rows["out_pitch"])).any())
    for files, offsets, rows in operands:
        output = of_input[files]
        yield bool(((output >= 0) & ((output != rows["out_file"]) | (offsets != rows["out_offset"]))).any())


def _run(
    plan: Plan,
    batches: Sequence[_Batch],
    options: Mapping[str, engine.EngineOptions],
    rehearsing: bool,
    on_progress: Callable[[int, int], None] | None,
) -> engine.RunResult:
    """Carry out batch after batch; while rehearsing, into nothing."""
    total = engine.NOTHING
    used: list[str] = []
    for at, batch in enumerate(batches):
        if batch.work is None:
            continue
        outputs = [t.memory.nbytes if rehearsing else t.memory.place for t in batch.targets]
        begun = False
        try:
            with plan.watched_inputs():
                running = engine.start(batch.work, outputs, tensors=len(plan.names), options=options[batch.device])
                begun = True
                result = engine.completed(running, before=total, on_progress=on_progress)
        except BaseException as error:
            if rehearsing or not (begun or used):
                raise
            raise _partly(plan, batches, at, begun, error) from error
        total = replace(result, counts=total.counts + result.counts)
        used += [batch.device] if batch.device not in used else []
    return replace(total, device=", ".join(used) or "cpu")


def _partly(plan: Plan, batches: Sequence[_Batch], failed: int, begun: bool, error: BaseException) -> BaseException:
    """Return the error that says what a failure has left of the model; ``begun``: of the batch that failed, too."""

    def names(some: Sequence[_Batch]) -> tuple[str, ...]:
        return tuple(plan.names[number] for batch in some for number in batch.numbers)

    behind = failed + begun
    done, in_part, rest = names(batches[:failed]), names(batches[failed:behind]), names(batches[behind:])
    text = (
        f"{error}\n  {LABEL} is changed in part: {len(done):,} tensors are merged, {len(in_part):,} may be in part, "
        f"{len(rest):,} are as they were (from {shown((in_part + rest)[0])} on)"
    )
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(text)
    return PartlyMergedError(text, done=done, in_part=in_part, untouched=rest)
