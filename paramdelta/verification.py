"""Checks a merged folder against its record (:mod:`paramdelta.integrity`), and against its sources, where they are
given, by another way than it was made: tensors are read through the safetensors library, by name, and recomputed by
:mod:`paramdelta.reference`. Only the plan's decisions (what happens to which tensor) are shared with the merge, and
those come from the request that the folder itself records."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from paramdelta import JSON_VERSION, integrity, reference
from paramdelta.checkpoint import INDEX, Checkpoint, open_checkpoint
from paramdelta.dtypes import DTYPES, DType
from paramdelta.engine import EngineOptions
from paramdelta.errors import CheckpointError, Complaint, InputError, shown
from paramdelta.merging import prepare
from paramdelta.plan import Kind, MergeRequest, Plan, make_request
from paramdelta.plan.deltas import Folders
from paramdelta.plan.gathers import AS_START, IN_NEW_BASE, ZEROS, Gather
from paramdelta.plan.outputs import Making
from paramdelta.plan.pairing import NONE
from paramdelta.plan.samples import read_bytes
from paramdelta.plan.sidefiles import REBUILD, RECORD, with_checksums, with_losses
from paramdelta.recompute import Readers, Recomputed

SAMPLE_ROWS = 8  # of each tensor, spread over it; the first and the last are always among them
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared and what is wrong; ``problems`` is empty where everything is bit-equal. ``elements`` were
    recomputed from the sources, a ``fraction`` of all; ``checksums`` counts the tensors whose CRC-32 was compared with
    the record."""

    out: Path
    tensors: int
    elements: int
    fraction: float
    files: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    checksums: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"version": JSON_VERSION, "kind": "verify", **asdict(self), "out": str(self.out)}


def verify(
    out: str | Path,
    *,
    post: Folders | None = None,
    base: Folders | None = None,
    new_base: str | Path | None = None,
    delta: Folders | None = None,
    everything: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    isa: str | None = None,
    io: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check the folder ``out`` against its own record and, where they are given, the folders it was made from: post,
    base and new_base of a merge, post and base of a delta, ``delta`` and new_base of what it was applied to.

    Without them, the files, their sizes, names, types and shapes, and the CRC-32 of every tensor must be those that the
    merge recorded. With them, names, types, shapes, the index and the side files must be those the recorded request
    gives; the values of every tensor, or of rows spread over it unless ``everything``, must be bit-equal to the
    reference; and checksums are compared where the record has any. Of a merge of several deltas ``post`` and ``base``
    are lists, in the order of the merge. ``threads``, ``memory``, ``isa`` and ``io`` say how
    tensors are read for their checksums (:class:`paramdelta.engine.EngineOptions`); ``on_progress(bytes_read, 0)`` is
    called about ten times a second meanwhile.

    Raises InputError where ``out`` is no merged folder, where it has no checksums and no sources are given, or where
    these cannot be merged; StorageError where a file cannot be read.
    """
    out = Path(out)
    options = EngineOptions(threads=threads, memory=memory, isa=isa, io=io)
    sources = {"post": post, "base": base, "new_base": new_base, "delta": delta}
    given = {role: folders for role, folders in sources.items() if folders is not None}
    if not given:
        return _against_record(out, options, on_progress)
    request = recorded_request(out, **given)
    if request.kind == "rebuild":
        what = "is a model made again, whose every tensor was compared with the checksums that its delta has of it"
        raise InputError(Complaint(str(out), what, "verify it without its sources"))
    found = integrity.recorded(out)
    report = _against_sources(out, prepare(request), found, everything=everything)
    if found is None:
        return report
    sums = integrity.check_weights(out, found, options=options, on_progress=on_progress)
    new = tuple(problem for problem in sums.problems if problem not in report.problems)
    return replace(report, checksums=sums.tensors, problems=(*report.problems, *new))


def bytes_to_read(out: str | Path) -> int:
    """Return about how many bytes the checksums of a folder are made of."""
    return sum(path.stat().st_size for path in Path(out).glob("*.safetensors") if path.is_file())


def _against_record(out: Path, options: EngineOptions, on_progress: Callable[[int, int], None] | None) -> VerifyReport:
    checked = integrity.check(out, options=options, on_progress=on_progress)
    return VerifyReport(
        out=out,
        tensors=checked.tensors,
        elements=0,
        fraction=0.0,
        files=checked.files,
        problems=checked.problems,
        notes=checked.notes,
        checksums=checked.tensors,
    )


def _against_sources(out: Path, plan: Plan, found: integrity.Recorded | None, *, everything: bool) -> VerifyReport:
    try:
        made = open_checkpoint(out, role="out")
    except CheckpointError as error:
        problems = [str(c) for c in error.complaints]
        return VerifyReport(
            out=out, tensors=0, elements=0, fraction=0.0, files=0, problems=tuple(problems), notes=plan.warnings
        )
    problems = [*_file_problems(plan, out, found), *_header_problems(plan, made), *_kept_problems(plan, out)]
    elements = 0
    if not problems:
        with Readers() as readers:
            weights = Recomputed(plan, made, readers, everything=everything)
            for checked, problem in (*_plain_tensors(plan, made, readers, everything), *weights.check_all()):
                elements += checked
                problems += [problem] if problem else []
    return VerifyReport(
        out=out,
        tensors=len(plan.names),
        elements=elements,
        fraction=elements / max(plan.parameters, 1),
        files=len(plan.work.outputs) + len(plan.side_files) + (plan.index is not None),
        problems=tuple(problems),
        notes=plan.warnings,
    )


_SOURCES = {"extract": ("post", "base"), "apply": ("delta", "new_base"), "rebuild": ("delta", "new_base")}


def recorded_request(out: Path, **sources: Folders) -> MergeRequest:
    """Return the request that a merged folder records, for these sources. Raises InputError."""
    path, document = out / RECORD, integrity.read_record(out)
    try:
        recorded = dict(document["request"])
        wanted = _SOURCES.get(recorded.get("kind", "merge"), ("post", "base", "new_base"))
        if set(sources) != set(wanted):
            _refuse_sources(wanted, sources)
        recorded = {k: [tuple(r) for r in v] if k.startswith("rename_") else v for k, v in recorded.items()}
        folders: dict[str, Any] = {"post" if role == "delta" else role: given for role, given in sources.items()}
        return make_request(**folders, **recorded)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            Complaint(
                str(path), f"does not say how the folder was made: {shown(error)}", "verify takes folders merge wrote"
            )
        ) from error


def _refuse_sources(wanted: Sequence[str], given: Iterable[str]) -> NoReturn:
    named, others = (
        " and ".join((", ".join([*names][:-1]), [*names][-1])).removeprefix(" and ") for names in (wanted, given)
    )
    raise InputError(
        Complaint(
            "sources",
            f"the folder was made from {named}, and given are {others}"
            if set(given) - set(wanted)
            else f"only some of {named} are given",
            f"all of {named} recompute the folder; none of them checks it against the checksums it records",
        )
    )


def _file_problems(plan: Plan, out: Path, found: integrity.Recorded | None) -> Iterator[str]:
    """Compare index and side files byte for byte, and look for files that should not be there."""
    expected = {name for name, _ in plan.work.outputs}
    for name, content in plan.written_files():
        expected.add(name)
        path = out / name
        if name == RECORD and found is not None:  # the sums are not compared here, but with the tensors
            assert isinstance(content, bytes)
            lost = integrity.read_record(out).get("lost")  # so are these
            content = with_checksums(with_losses(content, lost) if lost else content, found.document)
        if not path.is_file():
            yield f"{shown(name)}: missing"
        elif not _holds(path, content):
            yield f"{shown(name)}: is not what the sources give"
    for path in sorted(out.iterdir()):
        if path.name not in expected:
            yield f"{shown(path.name)}: was not written by the merge"


def _holds(path: Path, content: bytes | Path) -> bool:
    """Whether a file holds these bytes, or those of another file; whoever made it chose its size."""
    if isinstance(content, Path):
        return filecmp.cmp(path, content, shallow=False)
    return path.stat().st_size == len(content) and path.read_bytes() == content


def _header_problems(plan: Plan, made: Checkpoint) -> Iterator[str]:
    table = made.tensors
    sizes = {f.name: f.size for f in made.files}
    for name, size in plan.work.outputs:
        if sizes.get(name) != size and name != REBUILD:
            yield f"{shown(name)}: {sizes.get(name, 0):,} bytes, expected {size:,}"
    for tensor, name in enumerate(plan.names):
        if _kept(plan, tensor):
            continue
        if name not in table:
            yield f"{shown(name)}: missing"
            continue
        spec = table.spec(name)
        expected = (plan.dtype_of(tensor), plan.shape_of(tensor), plan.work.outputs[plan.out_files[tensor]][0])
        found = (spec.dtype, spec.shape, made.files[spec.file].name)
        if found != expected:
            yield f"{shown(name)}: is {_placed(found)}, expected {_placed(expected)}"
    extra = set(table.names) - {name for tensor, name in enumerate(plan.names) if not _kept(plan, tensor)}
    if extra:
        yield f"{len(extra)} tensors that the merge does not make: {shown(sorted(extra)[0])}"
    if plan.index is not None and not (made.path / INDEX).is_file():
        yield f"{INDEX}: missing"


def _kept(plan: Plan, tensor: int) -> bool:
    """Whether a tensor is in the file that a lossless delta keeps beside its own."""
    name, _ = plan.work.outputs[int(plan.out_files[tensor])]
    return name == REBUILD


def _kept_problems(plan: Plan, out: Path) -> Iterator[str]:
    """Compare the file that a lossless delta keeps with what post gives."""
    names = [name for name, _ in plan.work.outputs]
    if REBUILD not in names or not (out / REBUILD).is_file():
        return
    number, spans = names.index(REBUILD), plan.work.spans
    with open(out / REBUILD, "rb") as stored:
        if stored.read(len(plan.work.headers[number])) != plan.work.headers[number]:
            yield f"{REBUILD}: its header is not what the sources give"
        for span in spans[spans["out_file"] == number]:
            source, count = plan.work.inputs[span["new_file"]], int(span["count"])
            for at in range(0, count, _CHUNK_ELEMENTS):
                size, begin = min(_CHUNK_ELEMENTS, count - at), int(span["new_offset"]) + at
                stored.seek(int(span["out_offset"]) + at)
                wanted = read_bytes(source, begin, size) if isinstance(source, Path) else source[begin : begin + size]
                if stored.read(size) != wanted:
                    yield f"{REBUILD}: {shown(plan.names[span['tensor']])} is not what the sources give"
                    break


def _placed(found: tuple[DType, tuple[int, ...], str]) -> str:
    dtype, shape, file = found
    return f"{dtype} {list(shape)} in {file}"


def _row_ranges(shape: tuple[int, ...], everything: bool) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows to compare, of at most a million elements each."""
    rows = shape[0] if shape else 1
    width = int(np.prod(shape[1:])) if shape else 1
    if rows * width == 0:
        return
    if everything or rows * width <= SAMPLE_ROWS * 4096:
        step = max(1, _CHUNK_ELEMENTS // max(width, 1))
        for first in range(0, rows, step):
            yield first, min(first + step, rows)
    else:
        count = max(1, min(SAMPLE_ROWS, rows)) if width > 1 else 1
        run = 1 if width > 1 else 4096
        for first in np.unique(np.linspace(0, rows - run, max(count, 2)).astype(int)).tolist():
            yield first, first + run


def _plain_tensors(
    plan: Plan, made: Checkpoint, readers: Readers, everything: bool
) -> Iterator[tuple[int, str | None]]:
    """Compare the tensors that are no planes of a recomputed weight; yield elements compared and what is wrong."""
    for tensor in range(len(plan.names)):
        making = plan.layout.outputs.making[int(plan.layout.order[tensor])]
        if making in (Making.SPANS, Making.COPY) and not _kept(plan, tensor):
            checked, problem = _check_tensor(plan, made, tensor, readers, everything)
            yield _parameters_among(plan, tensor, checked), problem


def _parameters_among(plan: Plan, tensor: int, checked: int) -> int:
    """Return how many parameters of the model ``checked`` elements of a tensor are: of copied planes the codes count,
    which may be packed; scales and calibration are no parameters."""
    outputs, number = plan.layout.outputs, int(plan.layout.order[tensor])
    if outputs.making[number] == Making.SPANS:
        return checked
    if outputs.parts[number] != "codes":
        return 0
    return checked * math.prod(plan.pairing.shapes[outputs.logical[number]]) // max(plan.elements_of(tensor), 1)


def _check_tensor(
    plan: Plan, made: Checkpoint, tensor: int, readers: Readers, everything: bool
) -> tuple[int, str | None]:
    """Compare one tensor; return the number of elements compared and what is wrong."""
    shape, row = plan.shape_of(tensor), made.tensors.row(plan.names[tensor])
    width = int(np.prod(shape[1:])) if shape else 1
    checked = 0
    for first, last in _row_ranges(shape, everything):
        expected = _expected(plan, tensor, readers, first, last)
        found = readers.codes(made, row, first, last)
        checked += (last - first) * width
        wrong = np.flatnonzero(expected != found)
        if len(wrong):
            at = first * width + int(wrong[0])
            return checked, (
                f"{shown(plan.names[tensor])}: {len(wrong):,} of {len(found):,} elements differ in rows "
                f"{first}…{last - 1}, the first at element {at:,}: "
                f"expected bits {int(expected[wrong[0]]):x}, found {int(found[wrong[0]]):x}"
            )
    return checked, None


def _expected(plan: Plan, tensor: int, readers: Readers, first: int, last: int) -> NDArray[Any]:
    """Recompute rows of an output tensor from the sources."""
    number = int(plan.layout.order[tensor])
    outputs, pairing, dtype = plan.layout.outputs, plan.pairing, plan.dtype_of(tensor)
    if outputs.making[number] == Making.COPY:
        donor = plan.names_by_role[outputs.donors[number]].checkpoint
        return readers.codes(donor, outputs.rows[number], first, last)
    i = outputs.logical[number]
    kind = pairing.kinds[i]
    donor, row = (plan.post, pairing.post[i]) if kind == Kind.FROM_POST else (plan.new_base, pairing.new_base[i])
    if kind in (Kind.FROM_NEW_BASE, Kind.FROM_POST):
        codes = readers.codes(donor, row, first, last)
        stored = donor.tensors.dtype_of(row)
        if stored == dtype:
            return codes
        return reference.merge(reference.Array(codes, stored), [], dtype).codes
    gather = pairing.gathers.get(i)
    if gather is not None:
        return _gathered(plan, readers, i, gather, dtype, first, last)
    terms = [
        reference.Term(
            _operand(readers, plan.checkpoints[delta.post_role], delta.post, first, last),
            _operand(readers, plan.checkpoints[delta.base_role], delta.base, first, last),
            delta.alpha,
        )
        for delta in pairing.deltas(i)
    ]
    return reference.merge(_operand(readers, plan.new_base, row, first, last), terms, dtype).codes


def _operand(readers: Readers, checkpoint: Checkpoint, row: int, first: int, last: int) -> reference.Array:
    assert row != NONE
    return reference.Array(readers.codes(checkpoint, row, first, last), DTYPES[checkpoint.tensors.dtype[row]])


def _gathered(
    plan: Plan, readers: Readers, i: int, gather: Gather, dtype: DType, first: int, last: int
) -> NDArray[Any]:
    """Recompute rows of a tensor whose rows are paired one by one: together, those that have the same operands."""
    width = math.prod(plan.pairing.shapes[i][1:])
    deltas = plan.pairing.deltas(i)

    def rows_of(role: str, row: int, wanted: NDArray[np.int64]) -> reference.Array:
        checkpoint = plan.checkpoints[role]
        stored = DTYPES[checkpoint.tensors.dtype[row]]
        codes = np.zeros((len(wanted), width), np.dtype(f"u{stored.itemsize}"))
        breaks = np.flatnonzero(np.diff(wanted) != (wanted[:-1] >= 0)) + 1
        for at, run in zip([0, *breaks.tolist()], np.split(wanted, breaks), strict=True):
            if run[0] >= 0:
                found = readers.codes(checkpoint, row, int(run[0]), int(run[-1]) + 1)
                codes[at : at + len(run)] = found.reshape(len(run), width)
        return reference.Array(codes.reshape(-1), stored)

    # What post lacks has no delta; of base it matters whether the row that the sum starts from stands for its own.
    pairs = [tuple(column[first:last] for column in gather.deltas[d.number]) for d in deltas]
    kinds = [np.where(post == ZEROS, 0, np.where(base == AS_START, 2, 1)) for post, base in pairs]
    states = np.array([gather.start_in[first:last], *kinds])
    starts = {d.number: (d.base_role, d.base) for d in deltas} | {IN_NEW_BASE: ("new_base", plan.pairing.new_base[i])}
    out = np.zeros((last - first, width), np.dtype(f"u{dtype.itemsize}"))
    for state in np.unique(states, axis=1).T:
        chosen = (states == state[:, None]).all(axis=0)
        start = rows_of(*starts[int(state[0])], gather.start[first:last][chosen])
        terms = []
        for d, (in_post, in_base), kind in zip(deltas, pairs, state[1:].tolist(), strict=True):
            if kind:
                post = rows_of(d.post_role, d.post, in_post[chosen])
                base = start if kind == 2 else rows_of(d.base_role, d.base, in_base[chosen])
                terms.append(reference.Term(post, base, d.alpha))
        out[chosen] = reference.merge(start, terms, dtype).codes.reshape(-1, width)
    return out.reshape(-1)
