"""Plans making post again, byte for byte, from its base and a lossless delta: its files begin with the headers that
they had, and every tensor is base + delta but for single elements, or a copy of what was kept whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramdelta.checkpoint import Checkpoint, ShardFile
from paramdelta.checkpoint.documents import MAX_BYTES, read_json
from paramdelta.checkpoint.header import Header, parse_header, read_header
from paramdelta.checkpoint.signature import Signature
from paramdelta.dtypes import BY_NAME, DTYPES
from paramdelta.errors import CheckpointError, Complaint, PlanError, shown, storage_errors
from paramdelta.plan.layout import Layout, Tables
from paramdelta.plan.lossless import DOCUMENTS, FILE, HEADER, MANIFEST, POSITIONS, VALUES, WHOLE
from paramdelta.plan.naming import Names
from paramdelta.plan.outputs import Making, Outputs
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.samples import read_bytes
from paramdelta.plan.sidefiles import BASE_CONFIG, CARD, REBUILD, RECORD, SideFile, fingerprint
from paramdelta.plan.work import EXTENT, SPAN, TERM, Work

_RAW = BY_NAME["u8"].code
_REMEDY = "extract the delta again, with --lossless"

Column = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The file of a lossless delta from which post is made again: its header, and the manifest in it."""

    file: ShardFile
    header: Header
    rows: dict[str, int]
    manifest: dict[str, Any]

    def offset(self, name: str) -> int:
        return int(self.header.begin[self.rows[name]]) + self.header.data_start

    def data(self, name: str) -> bytes:
        return read_bytes(self.file.path, self.offset(name), int(self.header.nbytes[self.rows[name]]))

    def document(self, name: str) -> bytes:
        """Return a document or a header, which is refused where it is larger than one that was read could be."""
        if int(self.header.nbytes[self.rows[name]]) > MAX_BYTES + 8:
            raise ValueError(f"{name} holds more than {MAX_BYTES:,} bytes")
        return self.data(name)


def open_kept(delta: Checkpoint) -> Kept:
    """Open that file in a delta's folder. Raises CheckpointError where the delta is not lossless, or it is damaged."""
    path = delta.path / REBUILD
    if not path.is_file():
        text = "is a delta without what making post again needs: it is not lossless"
        raise CheckpointError(Complaint(str(delta.path), text, _REMEDY))
    with storage_errors(path, "cannot be read"):
        status = path.stat()
    header = read_header(path)
    file = ShardFile(
        name=REBUILD,
        path=path.resolve(),
        size=status.st_size,
        metadata=header.metadata,
        digest=header.digest,
        signature=Signature.of(status),
        data_start=header.data_start,
    )
    kept = Kept(file=file, header=header, rows={name: row for row, name in enumerate(header.names)}, manifest={})
    try:
        manifest = json.loads(kept.document(MANIFEST))
        files, tensors = manifest["files"], manifest["tensors"]
        plain = all(isinstance(f, str) and f.endswith(".safetensors") and not set(f) & {"/", "\0"} for f in files)
        named = all(isinstance(row[key], str) for row in tensors.values() for key in ("delta", "base", "crc32"))
        if not plain or not named or len(set(files)) != len(files):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _damaged(path, "has a manifest that cannot be understood") from None
    return replace(kept, manifest=manifest)


def _damaged(path: Any, problem: str) -> CheckpointError:
    return CheckpointError(Complaint(str(path), problem, _REMEDY))


def is_base_of(delta: Checkpoint, candidate: Checkpoint) -> str:
    """Return how a checkpoint differs from the base that a delta was taken from, as the delta's record has it: sizes,
    headers and a sample of the data; an empty string where it does not."""
    document = read_json(delta.path, RECORD, [])
    try:
        files = {file["name"]: dict(file) for file in document["inputs"]["base"]["files"]}
    except (KeyError, TypeError, ValueError):
        return "the delta does not record its base"
    for file in candidate.files:
        wanted, found = files.pop(file.name, None), fingerprint(file, sampled=True)
        if wanted is None:
            return f"it has a file {shown(file.name)}"
        for key, what in (("bytes", "size"), ("header_sha256", "header"), ("sample_sha256", "data")):
            if wanted.get(key) != found[key]:
                return f"its {shown(file.name)} has another {what}"
    return f"it has no {shown(str(next(iter(files))))}" if files else ""


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """What the plan of a rebuild consists of; ``sums`` are the CRC-32 that tensors must have in the end."""

    pairing: Pairing
    layout: Layout
    side_files: tuple[SideFile, ...]
    sums: dict[str, str]


def rebuild(names: Mapping[str, Names], kept: Kept) -> Rebuilt:
    """Lay post out again. ``names`` has the delta, with the kept file behind its own, as post, and its base as
    new_base. Raises PlanError."""
    delta, base = names["post"].checkpoint, names["new_base"].checkpoint
    problem = is_base_of(delta, base)
    if problem:
        text = f"is not the base that {delta.label} was taken from: {problem}"
        raise PlanError(Complaint(str(base.path), text, "without --rebuild the delta is added to any base"))
    maker = _Maker(dict(names), kept)
    try:
        return maker.run()
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise _damaged(kept.file.path, f"does not fit the delta or its base: {shown(error)}") from None


class _Maker:
    def __init__(self, names: dict[str, Names], kept: Kept) -> None:
        self.names, self.kept = names, kept
        self.tables = Tables(names)
        self.delta, self.base = names["post"].checkpoint, names["new_base"].checkpoint
        self.kept_file = len(self.delta.files) - 1
        self.outputs, self.pairing = Outputs(), Pairing()
        self.files: list[int] = []
        self.offsets: list[int] = []
        self.spans: list[Column] = []
        self.terms: list[Any] = []

    def run(self) -> Rebuilt:
        manifest = self.kept.manifest
        headers, sizes = [], []
        for number, name in enumerate(manifest["files"]):
            start = self.kept.document(HEADER + name)
            size = len(start) + self.data_size(start)
            parsed = parse_header(start[8:], file_size=size, subject=name)
            headers.append(start)
            sizes.append((name, size))
            for row in np.argsort(parsed.begin, kind="stable").tolist():
                self.tensor(number, parsed, row, parsed.data_start)
        return Rebuilt(
            pairing=self.pairing,
            layout=self.layout(headers, sizes),
            side_files=tuple(self.side_files()),
            sums={name: row["crc32"] for name, row in manifest["tensors"].items()},
        )

    @staticmethod
    def data_size(start: bytes) -> int:
        """Return how many bytes of tensors follow a header: where the last one ends."""
        document = json.loads(start[8:])
        return max((int(row["data_offsets"][1]) for name, row in document.items() if name != "__metadata__"), default=0)

    def tensor(self, file: int, parsed: Header, row: int, data_start: int) -> None:
        name, shape = parsed.names[row], parsed.shapes[row]
        dtype = DTYPES[int(parsed.dtypes[row])]
        i, place = len(self.outputs.names), int(parsed.begin[row]) + data_start
        computed = self.kept.manifest["tensors"].get(name)
        nbytes = int(parsed.nbytes[row])
        if computed is None:
            self.pairing.add(name, Kind.FROM_POST, shape, NONE, NONE, NONE)
            self.outputs.add(name, dtype, shape, Making.COPY, logical=i, donor="post")
            self.check(int(self.kept.header.nbytes[self.kept.rows[WHOLE + name]]) == nbytes, name)
            self.spans.append(self.copied(i, file, place, self.kept.offset(WHOLE + name), nbytes))
        else:
            delta, base = self.delta.tensors.row(computed["delta"]), self.base.tensors.row(computed["base"])
            self.pairing.add(name, Kind.MERGED, shape, base, delta, NONE, 1.0)
            self.outputs.add(name, dtype, shape, Making.SPANS, logical=i)
            count = nbytes // dtype.itemsize
            for table, there in ((self.delta.tensors, delta), (self.base.tensors, base)):
                stored = table.dtype_of(there)
                fits = dtype.merges and stored.merges and int(table.nbytes[there]) == count * stored.itemsize
                self.check(fits, name)
            self.summed(i, file, place, dtype.code, count, delta, base)
        self.files.append(file)
        self.offsets.append(place)

    def check(self, fits: bool, name: str) -> None:
        if not fits:
            raise ValueError(f"{name} has another size or type")

    def copied(self, i: int, file: int, place: int, offset: int, nbytes: int) -> Column:
        """Return a span that copies bytes of the kept file."""
        span = np.zeros(1, SPAN)
        span["tensor"], span["out_file"], span["out_offset"], span["count"] = i, file, place, nbytes
        span["new_file"], span["new_offset"] = self.kept_file, offset
        span["out_dtype"] = span["new_dtype"] = _RAW
        return span

    def summed(self, i: int, file: int, place: int, code: int, count: int, delta: int, base: int) -> None:
        """Add the spans of base + delta, cut where single elements were kept."""
        name = self.outputs.names[i]
        positions = np.zeros(0, np.int64)
        if POSITIONS + name in self.kept.rows:
            positions = np.frombuffer(self.kept.data(POSITIONS + name), "<i8")
        item = DTYPES[code].itemsize
        if len(positions):
            values = self.kept.rows[VALUES + name]
            fits = (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < count
            self.check(bool(fits) and int(self.kept.header.nbytes[values]) == len(positions) * item, name)
        new_run = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        first = positions[new_run]  # of each run of kept elements
        sizes = np.diff(np.append(new_run, len(positions)))
        begins, ends = np.append(0, first + sizes), np.append(first, count)
        sums = np.zeros(len(begins), SPAN)
        sums["tensor"], sums["out_file"], sums["out_dtype"] = i, file, code
        sums["out_offset"], sums["count"] = place + begins * item, ends - begins
        in_base, in_delta = self.base.tensors, self.delta.tensors
        from_base, from_delta = in_base.dtype_of(base), in_delta.dtype_of(delta)
        sums["new_file"] = in_base.file[base] + self.tables.first_files["new_base"]
        sums["new_offset"], sums["new_dtype"] = in_base.offset[base] + begins * from_base.itemsize, from_base.code
        sums["n_terms"] = 1
        sums["first_term"] = sum(map(len, self.terms)) + np.arange(len(begins))
        terms = np.zeros(len(begins), TERM)
        terms["alpha"], terms["base_file"], terms["base_dtype"] = 1.0, -1, from_delta.code
        terms["post_file"], terms["post_dtype"] = in_delta.file[delta], from_delta.code
        terms["post_offset"] = in_delta.offset[delta] + begins * from_delta.itemsize
        self.terms.append(terms)
        self.spans.append(sums[sums["count"] > 0])
        if len(first):
            kept = np.repeat(self.copied(i, file, place, self.kept.offset(VALUES + name), 0), len(first))
            kept["out_offset"], kept["count"] = place + first * item, sizes * item
            kept["new_offset"] += new_run * item
            self.spans.append(kept)

    def layout(self, headers: list[bytes], sizes: list[tuple[str, int]]) -> Layout:
        spans = np.concatenate([np.zeros(0, SPAN), *self.spans])
        spans = spans[spans["count"] > 0]
        nbytes = self.outputs.nbytes()
        files, offsets = np.array(self.files, np.int64), np.array(self.offsets, np.int64)
        extents = np.zeros(len(files), EXTENT)
        extents["file"], extents["begin"], extents["end"] = files, offsets, offsets + nbytes
        extents["tensor"] = np.arange(len(files))
        work = Work(
            inputs=self.tables.inputs(),
            outputs=tuple(sizes),
            headers=tuple(headers),
            spans=spans[np.lexsort((spans["out_offset"], spans["out_file"]))],
            terms=np.concatenate([np.zeros(0, TERM), *self.terms]),
            extents=extents[np.lexsort((extents["begin"], extents["file"]))],
        )
        return Layout(
            outputs=self.outputs,
            order=np.arange(len(files)),
            dtypes=np.array(self.outputs.dtypes, np.uint8),
            nbytes=nbytes,
            files=files,
            work=work,
            index=None,
        )

    def side_files(self) -> list[SideFile]:
        """Return the files beside the weights: those that were kept, and those that the delta carries as they were."""
        kept = {
            name: SideFile(name=name, source=None, data=self.kept.document(FILE + name), origin="post")
            for name in DOCUMENTS
            if FILE + name in self.kept.rows
        }
        made = {CARD, RECORD, BASE_CONFIG, REBUILD, *DOCUMENTS}
        carried = {
            name: SideFile(name=name, source=self.delta.path / name, data=None, origin="post")
            for name in self.delta.side_files
            if name not in made
        }
        files = carried | kept
        return [files[name] for name in sorted(files)]
