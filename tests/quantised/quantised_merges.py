"""Three folders of a quantised family, their merge, and what it must be: every operand decoded to binary64, merged
there, and quantised by the family's reference quantiser."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from checkpoint_files import file_bytes
from safetensors import deserialize
from stored_forms import Form, Tensor, Values, Weight

from paramdelta import reference
from paramdelta import reference_scaled as scaled
from paramdelta.dtypes import BY_NAME
from paramdelta.reference_scaled import Output, Scaled, ScaledTerm

ROLES = ("post", "base", "new_base")
INDEX = "model.safetensors.index.json"
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a folder holds: weights by name with shape and form, calibration tensors by name with dtype and shape,
    integer tensors, config.json and other files. ``shards`` deals the sorted tensors out in turn, so that a weight and
    its scale are in different files."""

    weights: Mapping[str, tuple[Shape, Form]]
    config: Mapping[str, Any]
    files: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)
    integers: Mapping[str, Shape] = field(default_factory=dict)
    shards: int = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A merge of three layouts with the same weights under the same names; ``options`` are those of the merge."""

    post: Layout
    base: Layout
    new_base: Layout
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, **options: Any) -> Case:
        """Return the merge of three folders of one layout."""
        return cls(post=layout, base=layout, new_base=layout, options=options)

    @property
    def converts(self) -> bool:
        """Whether the output is not stored as new_base is: zero points are read, not written."""
        return any(form.zero_suffix for _, form in self.new_base.weights.values())

    def layout(self, role: str) -> Layout:
        """Return the layout of a role."""
        layout: Layout = getattr(self, role)
        return layout


class Folders(NamedTuple):
    """Three folders on disk."""

    post: Path
    base: Path
    new_base: Path

    def sources(self) -> dict[str, Path]:
        """Return the folders by role."""
        return self._asdict()


# ------------------------------------------------------------------------------------------------- values and folders


def weight_values(number: int, shape: Shape, seed: int) -> Values:
    """Return values of the size of weights whose rows differ in magnitude; some rows are zeros or nearly so."""
    rng = np.random.default_rng([seed, number])
    if len(shape) < 2:
        return rng.normal(1.0, 0.1, shape)
    values = rng.normal(size=shape) * 0.02 * 2.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    if shape[-2] < 8:
        return values
    values[..., 1, :] = 0.0
    values[..., 2, :] *= 1e-6
    values[..., 3, ::7] = -0.0
    values[..., 4, 9] *= 300.0
    return values


def deltas(number: int, shape: Shape) -> Values:
    """Return what post differs by from base: nothing in a fourth of the weights, in a third of the rows, and in the
    first block of 128×128."""
    made = np.random.default_rng([77, number]).normal(size=shape) * 0.003
    if number % 4 == 3:
        return np.zeros(shape)
    if len(shape) > 1 and shape[-2] >= 8:
        made[..., ::3, :] = 0.0
        made[..., :128, :128] = 0.0
        made[..., 5, :] *= 40.0  # this row outgrows its scale
    return made


def values_of(layout: Layout, role: str) -> dict[str, Values]:
    """Return the values of a role's weights, by name, as they are before they are stored."""
    out = {}
    for number, (name, (shape, _)) in enumerate(sorted(layout.weights.items())):
        values = weight_values(number, shape, seed=1)
        if role == "post":
            values = values + deltas(number, shape)
        if role == "new_base":
            values = values * 0.9 + weight_values(number, shape, seed=2) * 0.3
        out[name] = values
    return out


def fused(name: str) -> str:
    """Return one name for the weights that must share a second scale: q, k, v; gate, up."""
    name = re.sub(r"\.[qkv]_proj\.", ".qkv.", name)
    return re.sub(r"\.(gate_proj|up_proj|w1|w3)\.", ".gate_up.", name)


def store(layout: Layout, values: Mapping[str, Values], role: str) -> dict[str, Tensor]:
    """Return the tensors of a folder."""
    largest: dict[Any, float] = {}
    matrices = {n: values[n].reshape(-1, *_last_two(shape)) for n, (shape, _) in layout.weights.items()}
    for name, stack in matrices.items():
        for e, matrix in enumerate(stack):
            largest[fused(name), e] = max(largest.get((fused(name), e), 0.0), float(np.abs(matrix).max(initial=0.0)))
    out: dict[str, Tensor] = {}
    for name, (shape, form) in layout.weights.items():
        made = []
        for e, matrix in enumerate(matrices[name]):
            top = float(np.float32(largest[fused(name), e]))
            made.append(form.quantised(matrix, scaled.second_of(top, form.kind) if form.kind else None))
        out |= form.tensors(name, Weight(made), shape)
    rng = np.random.default_rng(ROLES.index(role) + 50)
    for name, (dtype, shape) in layout.statistics.items():
        item = {"F32": np.float32, "BF16": np.uint16}[dtype]
        data = rng.uniform(0.5, 2, shape).astype(np.float32)
        out[name] = Tensor(
            dtype, shape, (data if dtype == "F32" else data.view(np.uint32) >> 16).astype(item).tobytes()
        )
    for name, shape in layout.integers.items():
        out[name] = Tensor("I64", shape, np.arange(int(np.prod(shape)), dtype=np.int64).tobytes())
    return out


def write(folder: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> Path:
    """Write a folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2) + "\n")
    for name, content in layout.files.items():
        (folder / name).write_text(json.dumps(content, indent=4))
    names = sorted(tensors)
    if layout.shards == 1:
        _write_file(folder / "model.safetensors", names, tensors)
        return folder
    count = layout.shards
    weight_map = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        _write_file(folder / file, [n for n in names if weight_map[n] == file], tensors)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}, indent=2) + "\n")
    return folder


def _write_file(path: Path, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    path.write_bytes(file_bytes(json.dumps(header), b"".join(tensors[name].data for name in names)))


def make_folders(root: Path, case: Case) -> Folders:
    """Write the three folders of a case."""
    return Folders(*(write(root / r, lay, store(lay, values_of(lay, r), r)) for r in ROLES for lay in [case.layout(r)]))


def read_files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a folder by file, through the safetensors library."""
    return {
        path.name: {
            name: Tensor(info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in deserialize(path.read_bytes())
        }
        for path in sorted(folder.glob("*.safetensors"))
    }


def places(folder: Path) -> dict[str, list[str]]:
    """Return the names of the tensors of each file, in the order in which they lie there."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert header.pop("__metadata__") == {"format": "pt"}
        out[path.name] = sorted(header, key=lambda name: header[name]["data_offsets"])
    return out


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name; its index, where it has one, must agree with its files."""
    files = read_files(folder)
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        assert weight_map == {name: file for file, names in files.items() for name in names}
    else:
        assert len(files) == 1
    return tensors


# ------------------------------------------------------------------------------------------------------- the expected


def operands(case: Case, folders: Folders) -> dict[str, dict[str, Weight]]:
    """Return the weights of the three folders as stored matrices, by role and name."""
    out = {}
    for role, folder in folders.sources().items():
        tensors = read(folder)
        out[role] = {name: form.read(name, tensors, shape) for name, (shape, form) in case.layout(role).weights.items()}
    return out


class Operands(NamedTuple):
    """What one matrix is made of."""

    new_base: Scaled
    post: Scaled
    base: Scaled
    alpha: float


def merged_values(new_base: Scaled, post: Scaled, base: Scaled, alpha: float) -> tuple[Values, np.ndarray[Any, Any]]:
    """Return new_base + alpha · (post − base) in binary64 and where a delta is not zero."""
    start = scaled.decode(new_base)
    delta = scaled.decode(post) - scaled.decode(base)
    touched = (delta != 0.0) & (alpha != 0.0)
    return np.where(touched, start + alpha * delta, start), touched


def expected(case: Case, folders: Folders, policy: str) -> dict[str, Tensor]:
    """Return the tensors of the merge, computed without the package's plan and kernels."""
    alpha, excluded = float(case.options.get("alpha", 1.0)), case.options.get("exclude", "")
    stored = operands(case, folders)
    jobs: dict[Any, list[tuple[str, int, Operands]]] = {}
    for name, weight in stored["new_base"].items():
        form = case.new_base.weights[name][1]
        for e, new in enumerate(weight.matrices):
            unit = (fused(name), e) if form.kind else (name, e)
            scale = 0.0 if fnmatch.fnmatchcase(name, excluded) else alpha
            given = Operands(new, stored["post"][name].matrices[e], stored["base"][name].matrices[e], scale)
            jobs.setdefault(unit, []).append((name, e, given))
    made: dict[tuple[str, int], Scaled] = {}
    for members in jobs.values():
        form = replace(case.new_base.weights[members[0][0]][1], zero_suffix="")
        results = _merged([given for _, _, given in members], form, keep=policy == "keep")
        made |= {(name, e): result for (name, e, _), result in zip(members, results, strict=True)}
    out: dict[str, Tensor] = {}
    for name, (shape, form) in case.new_base.weights.items():
        matrices = [made[name, e] for e in range(len(stored["new_base"][name].matrices))]
        out |= replace(form, zero_suffix="").tensors(name, Weight(matrices), shape)
    new_base = read(folders.new_base)
    donor = new_base if case.options.get("activation_scales") == "new-base" else read(folders.post)
    return out | {n: donor[n] for n in case.new_base.statistics} | {n: new_base[n] for n in case.new_base.integers}


def _merged(members: list[Operands], form: Form, *, keep: bool) -> list[Scaled]:
    """Return the merges of matrices that share a scale, or of one matrix."""
    if not form.recipe:
        (three,) = members
        acc, touched = merged_values(*three)
        codes = reference.encode(acc, BY_NAME[form.codec])[0]
        if three.new_base.scales is None and three.new_base.codec == form.codec:
            codes = np.where(touched, codes, three.new_base.codes)
        return [Scaled(codes, form.codec)]
    recipe, grid = form.made_by, (form.rows, form.cols)
    if keep:
        output = Output(form.codec, recipe, *grid, form.scale)
        terms = [(new, [ScaledTerm(post, base, alpha)]) for new, post, base, alpha in members]
        if form.whole:
            return [form.matrix(done) for done in scaled.merge_shared(terms, output, keep=True)]
        return [form.matrix(scaled.merge_scaled(new, term, output, keep=True)) for new, term in terms]
    sums = [merged_values(*three)[0] for three in members]
    second = None
    if form.kind:
        largest = max(float(np.abs(scaled.round_values(acc, recipe)).max()) for acc in sums)
        second = scaled.second_of(largest, form.kind)
    return [form.matrix(scaled.quantise(acc, recipe, *grid, form.scale, second)) for acc in sums]


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Assert that two folders hold the same tensors to the bit, naming every one that differs."""
    assert sorted(found) == sorted(wanted)
    wrong = [_differs(name, found[name], wanted[name]) for name in wanted if found[name] != wanted[name]]
    assert not wrong, "\n".join(wrong)


def _differs(name: str, found: Tensor, wanted: Tensor) -> str:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{name}: {found.dtype} {found.shape}, expected {wanted.dtype} {wanted.shape}"
    a, b = (np.frombuffer(t.data, np.uint8) for t in (found, wanted))
    at = np.flatnonzero(a != b)
    return f"{name}: {len(at)} of {len(a)} bytes differ, the first at {at[0]}: {a[at[0]]:02x}, expected {b[at[0]]:02x}"


def _last_two(shape: Shape) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) < 2 else (shape[-2], shape[-1])


def decoded(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Values]:
    """Return the values of the weights of an output, by name."""
    out = {}
    for name, (shape, form) in case.new_base.weights.items():
        weight = replace(form, zero_suffix="").read(name, dict(tensors), shape)
        out[name] = np.stack([scaled.decode(m) for m in weight.matrices])
    return out


def quantised_names(layout: Layout, part: str) -> list[str]:
    """Return the names that a part (codes, scale, second) has in an output of this layout, of every weight with it."""
    every = (form.names(name).get(part) for name, (_, form) in layout.weights.items())
    return [name for name in every if name is not None]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
