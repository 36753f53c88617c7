"""A checkpoint folder as transformers writes it, opened by its headers alone: one file, or shards named by an index."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from paramdelta.checkpoint.documents import read_json
from paramdelta.checkpoint.header import Header, read_header
from paramdelta.checkpoint.signature import Signature
from paramdelta.checkpoint.table import TensorTable
from paramdelta.errors import CheckpointError, Complaint, remedy_of, shown
from paramdelta.memory import Memory

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_SHOWN = 20
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pth|pt|ckpt|gguf|h5|msgpack|onnx)$|consolidated\..*")
_PART = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_CONVERT = "convert: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR)"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One safetensors file: its name in the folder, where it really lies, its size, and what its header says.
    ``signature`` was taken before the header was read, so that no later change escapes it. ``data_start`` is the byte
    at which the tensors begin."""

    name: str
    path: Path
    size: int
    metadata: dict[str, str]
    digest: str
    signature: Signature
    data_start: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder's headers and configs. ``tensors`` are in the order of the files and, within one, of the data.

    ``tied`` is what the config says about tied embeddings, None where it says nothing. ``side_files`` are the other
    files of the folder, weights in other formats and hidden files left out. ``notes`` are things worth telling.
    ``zeros``: the tensors stand for zeros, and where the table says they lie is only where an output puts its own.
    ``memory``: what holds the data of each file where it is not on disk (:mod:`paramdelta.checkpoint.held`).
    """

    path: Path
    role: str
    files: tuple[ShardFile, ...]
    tensors: TensorTable
    sharded: bool
    index_metadata: dict[str, Any]
    config: dict[str, Any]
    side_files: tuple[str, ...]
    notes: tuple[str, ...]
    zeros: bool = False
    memory: tuple[Memory, ...] | None = None

    @property
    def inputs(self) -> tuple[ShardFile, ...]:
        """The files whose data is read: none of zeros, and none of what is in memory."""
        return () if self.zeros or self.memory is not None else self.files

    @property
    def sources(self) -> tuple[Path | Memory, ...]:
        """Where the data of the files is: on disk, or in memory; nowhere for zeros."""
        return tuple(f.path for f in self.inputs) if self.memory is None else self.memory

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model: ``text_config`` where the config nests it."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def tied(self) -> bool | None:
        """What the config says about tied embeddings."""
        for config in (self.config, self.text_config):
            value = config.get("tie_word_embeddings")
            if isinstance(value, bool):
                return value
        return None

    @property
    def label(self) -> str:
        """A short name: the folder's, or the repository's where the folder is a snapshot in a hub cache."""
        return self._in_hub_cache[0] or self.path.resolve().name

    @property
    def revision(self) -> str:
        """The commit where the folder is a snapshot in a hub cache, else empty."""
        return self._in_hub_cache[1]

    @property
    def _in_hub_cache(self) -> tuple[str, str]:
        """The repository and the commit of a snapshot in a hub cache, else two empty strings."""
        resolved = self.path.resolve()
        repository = resolved.parent.parent.name
        if resolved.parent.name != "snapshots" or not repository.startswith("models--"):
            return "", ""
        return repository.removeprefix("models--").replace("--", "/"), resolved.name


def open_checkpoint(path: Path | str, *, role: str = "checkpoint") -> Checkpoint:
    """Read the headers, the index and the config of a folder.

    Text that names no folder may name a model on the Hub (:mod:`paramdelta.checkpoint.hub`). ``role`` (post, base,
    new_base) names the folder in complaints. Raises CheckpointError with every complaint.
    """
    if isinstance(path, str):
        from paramdelta.checkpoint import hub

        path = hub.located(path, role)
    folder = Path(path)
    _check_folder(folder, role)
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        _fail(str(folder), f"{role} cannot be read: {error.strerror}", remedy_of(error))
    complaints: list[Complaint] = []
    config = read_json(folder, "config.json", complaints) if "config.json" in entries else {}
    if INDEX in entries:
        index_complaints: list[Complaint] = []
        index = read_json(folder, INDEX, index_complaints)
        weight_map = {} if index_complaints else _weight_map(folder, index, index_complaints)
        names = sorted(set(weight_map.values()))
        complaints += index_complaints
    else:
        index, weight_map, names = {}, None, []
        try:
            names = _single_file(folder, entries, role)
        except CheckpointError as error:
            complaints += error.complaints
    shards: list[tuple[ShardFile, Header]] = []
    for name in names:
        try:
            shards.append(_open_shard(folder, name))
        except CheckpointError as error:
            complaints += error.complaints
    if complaints:
        raise CheckpointError(complaints)
    tensors, notes = _table(folder, shards, weight_map)
    unused = [n for n in entries if n.endswith(".safetensors") and n not in names]
    if unused:
        reason = f"{SINGLE} holds the checkpoint" if weight_map is None else "not named by the index"
        notes.append(f"{role}: {reason}, left out: {shown(', '.join(unused))}")
    metadata = index.get("metadata")
    return Checkpoint(
        path=folder,
        role=role,
        files=tuple(shard for shard, _ in shards),
        tensors=tensors,
        sharded=weight_map is not None,
        index_metadata=metadata if isinstance(metadata, dict) else {},
        config=config,
        side_files=tuple(n for n in entries if _is_side_file(folder, n)),
        notes=tuple(notes),
    )


def _check_folder(folder: Path, role: str) -> None:
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name too long, a parent that may not be entered
        _fail(str(folder), f"{role} cannot be opened: {error.strerror}", remedy_of(error))
    if is_folder:
        return
    if exists:
        _fail(str(folder), f"{role} is a file; a checkpoint is a folder", f"name the folder: {folder.parent}")
    remedy = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        remedy = f"a model on the Hub is named {str(folder)!r}, as text and with no path before it"
    _fail(str(folder), f"{role}: there is no such folder", remedy)


def _single_file(folder: Path, entries: list[str], role: str) -> list[str]:
    found = [name for name in entries if name.endswith(".safetensors") and not name.startswith(".")]
    if SINGLE in found:
        return [SINGLE]
    if "adapter_config.json" in entries and any(name.startswith("adapter_model") for name in found):
        _fail(
            str(folder),
            f"{role} is an adapter (LoRA), not a whole checkpoint",
            "merge it into its own base first: PeftModel.from_pretrained(...).merge_and_unload()",
        )
    found = [name for name in found if not name.startswith("consolidated")]  # other names for the same weights
    if len(found) == 1:
        part = _PART.fullmatch(found[0])
        if part and int(part[1]) != 1:
            _fail(
                str(folder),
                f"{role} has one of {int(part[1])} files, {shown(found[0])}, and no {INDEX}",
                "download the checkpoint again, all of it",
            )
        return found
    if found:
        _fail(
            str(folder),
            f"{role} has {len(found)} safetensors files but no {INDEX}, so which tensor counts is not known",
            "download the index too, or leave only one file in the folder",
        )
    other = [name for name in entries if _OTHER_WEIGHTS.fullmatch(name)]
    if any(name.endswith(".safetensors") for name in other):
        _fail(
            str(folder),
            f"{role} holds only {shown(other[0])}: Mistral's own layout, whose tensors have other names",
            "use the release in the layout of transformers, with model.safetensors or an index",
        )
    if other:
        _fail(
            str(folder),
            f"{role} holds weights as {shown(other[0])}; only safetensors are read",
            _CONVERT,
        )
    raise CheckpointError(Complaint(str(folder), f"{role} holds no safetensors file"))


def _weight_map(folder: Path, index: dict[str, Any], complaints: list[Complaint]) -> dict[str, str]:
    subject = str(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        complaints.append(Complaint(subject, "has no weight_map object"))
        return {}
    if not weight_map:
        complaints.append(Complaint(subject, "has a weight_map that names no tensor"))
    strings = {file for file in weight_map.values() if isinstance(file, str)}
    plain = {file for file in strings if _is_plain_name(file)}
    bad = [(name, file) for name, file in weight_map.items() if not isinstance(file, str) or file not in plain]
    for name, file in bad[:_MOST_SHOWN]:
        complaints.append(
            Complaint(
                f"{subject}: {shown(name)}",
                f"is said to be in {shown(repr(file))}, which is not a plain file name within the folder",
            )
        )
    if len(bad) > _MOST_SHOWN:
        complaints.append(Complaint(subject, f"and {len(bad) - _MOST_SHOWN:,} more entries like these"))
    other = sorted(file for file in plain if _OTHER_WEIGHTS.fullmatch(file) and not file.endswith(".safetensors"))
    if other:
        complaints.append(Complaint(subject, f"names {shown(other[0])}; only safetensors are read", _CONVERT))
    return weight_map if not bad and not other else {}


def _is_plain_name(value: str) -> bool:
    return value not in ("", ".", "..") and not set(value) & {"/", "\\", "\0"}


def _open_shard(folder: Path, name: str) -> tuple[ShardFile, Header]:
    path = folder / name
    try:
        status = path.stat()  # follows the links of a hub cache
    except FileNotFoundError:
        _fail(str(path), "is named, but missing (or what it links to is)", "download the checkpoint again, all of it")
    except OSError as error:
        _fail(str(path), f"cannot be opened: {error.strerror}", remedy_of(error))
    if not stat.S_ISREG(status.st_mode):
        _fail(str(path), "is not a regular file")
    header = read_header(path)
    shard = ShardFile(
        name=name,
        path=path.resolve(),
        size=status.st_size,
        metadata=header.metadata,
        digest=header.digest,
        signature=Signature.of(status),
        data_start=header.data_start,
    )
    return shard, header


def _table(
    folder: Path, shards: list[tuple[ShardFile, Header]], weight_map: dict[str, str] | None
) -> tuple[TensorTable, list[str]]:
    """Join the headers; where an index says which file a tensor is in, only that one counts."""
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    columns: list[tuple[Any, ...]] = [tuple(np.empty(0, t) for t in (np.uint8, np.int32, np.int64, np.int64))]
    unlisted = 0
    for number, (shard, header) in enumerate(shards):
        if weight_map is None:
            keep = range(len(header.names))
        else:
            keep = [i for i, name in enumerate(header.names) if weight_map.get(name) == shard.name]  # type: ignore[assignment]
            unlisted += sum(name not in weight_map for name in header.names)
        rows = np.fromiter(keep, np.int64)
        names += [header.names[i] for i in keep]
        shapes += [header.shapes[i] for i in keep]
        columns.append(
            (
                header.dtypes[rows],
                np.full(len(rows), number, np.int32),
                header.begin[rows] + header.data_start,
                header.nbytes[rows],
            )
        )
    if weight_map is not None and len(names) < len(weight_map):
        _refuse_absent(folder, weight_map, set(names))
    dtype, file, offset, nbytes = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    notes = [f"{folder.name}: {unlisted} tensors are in shards but not in the index, left out"] if unlisted else []
    return TensorTable(names=names, dtype=dtype, shapes=shapes, file=file, offset=offset, nbytes=nbytes), notes


def _refuse_absent(folder: Path, weight_map: dict[str, str], present: set[str]) -> NoReturn:
    absent = [(name, file) for name, file in weight_map.items() if name not in present]
    complaints = [
        Complaint(f"{folder / file}: {shown(name)}", "the index says it is in this file, but it is not")
        for name, file in absent[:_MOST_SHOWN]
    ]
    if len(absent) > _MOST_SHOWN:
        complaints.append(Complaint(str(folder / INDEX), f"and {len(absent) - _MOST_SHOWN:,} more like these"))
    raise CheckpointError(complaints)


def _is_side_file(folder: Path, name: str) -> bool:
    if name.startswith(".") or name == INDEX or name.endswith((".safetensors", ".index.json")):
        return False
    return not _OTHER_WEIGHTS.fullmatch(name) and (folder / name).is_file()


def _fail(subject: str, problem: str, remedy: str = "") -> NoReturn:
    raise CheckpointError(Complaint(subject, problem, remedy))
