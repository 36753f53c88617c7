"""Analyses of deltas whose answers are known: the sums of the reference, ratios, places, cosines, whatever the threads,
instruction set and cuts; quantised and real checkpoints too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_folders import BF16, SIDE, base_tensors, moved, noise, write
from safetensors.numpy import load_file

import paramdelta
from paramdelta import dtypes, reference
from paramdelta.analysis import Analysis, loads
from paramdelta.errors import InputError, StorageError

UP = "model.layers.1.mlp.up_proj.weight"


def tensor(found: Analysis, name: str) -> Any:
    return next(t for t in found.tensors if t.name == name)


def array(values: np.ndarray[Any, Any]) -> reference.Array:
    name = {"bfloat16": "bf16", "float32": "f32"}[values.dtype.name]
    return reference.Array(values.reshape(-1).view(f"u{values.itemsize}"), dtypes.BY_NAME[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    base = base_tensors()
    return {
        "base": write(root / "base", base),
        "post": write(root / "post", moved(base, noise(base, 0.01, 1))),
        "new_base": write(root / "new_base", moved(base, noise(base, 0.02, 2))),
    }


def numbers(found: Analysis) -> list[Any]:
    """Return everything but times and threads."""
    return [t.to_dict() for t in (*found.tensors, *found.layers, *found.modules, found.total)]


def test_sums_are_those_of_the_reference(folders: dict[str, Path]) -> None:
    found = paramdelta.analyze(**folders)
    base = base_tensors()
    post, new = moved(base, noise(base, 0.01, 1)), moved(base, noise(base, 0.02, 2))
    assert {t.name for t in found.tensors} == set(base)
    for t in found.tensors:
        arrays = [array(x[t.name]) for x in (post, base, new)]
        want = reference.gram(arrays, [(0, 1), (2, 1), (1, -1)], [(0, 0), (1, 1), (0, 1), (2, 2), (0, 2), (1, 2)])
        d, (largest, at, nonfinite, unchanged) = t.deltas[0], want.facts[0]
        sums = (d.delta_squared, d.drift_squared, d.delta_drift, d.base_squared, d.delta_base, d.drift_base)
        assert sums == want.products, t.name
        assert (d.largest, d.nonfinite, d.unchanged, d.elements) == (largest, nonfinite, unchanged, base[t.name].size)
        assert t.where[0] == tuple(np.unravel_index(at, base[t.name].shape))
    assert found.total.deltas[0].elements == sum(x.size for x in base.values())


@pytest.mark.parametrize("options", [{"threads": 3}, {"isa": "scalar"}, {"io": "direct"}], ids=str)
def test_the_same_numbers_whatever_the_machine(folders: dict[str, Path], options: dict[str, Any]) -> None:
    assert numbers(paramdelta.analyze(**folders, **options)) == numbers(paramdelta.analyze(**folders, threads=1))


def test_many_loads_a_tensor(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums have no rounding between leaves, so even the size of loads leaves no trace."""
    whole = numbers(paramdelta.analyze(**folders))
    monkeypatch.setattr(loads, "LOAD", 4096)
    assert numbers(paramdelta.analyze(**folders, threads=2)) == whole


def test_half_of_the_elements_untouched(tmp_path: Path) -> None:
    base = base_tensors()
    step = np.zeros((3 * SIDE, SIDE), np.float32)
    step[::2] = 0.5
    found = paramdelta.analyze(write(tmp_path / "post", moved(base, {UP: step})), write(tmp_path / "base", base))
    delta = tensor(found, UP).deltas[0]
    assert delta.unchanged_fraction == 0.5
    assert delta.drift_norm is delta.cosine_to_drift is None
    layer = next(g for g in found.layers if g.name == "model.layers.1")
    assert layer.deltas[0].unchanged == layer.deltas[0].elements - step.size // 2
    assert [g.name for g in found.modules if g.deltas[0].delta_squared] == ["mlp.up_proj"]
    assert found.new_base is None


def test_the_largest_change_and_where(tmp_path: Path) -> None:
    base = {name: t * 0 for name, t in base_tensors().items()}
    step = np.zeros((3 * SIDE, SIDE), np.float32)
    step[200, 77] = step[300, 1] = -4.0
    found = paramdelta.analyze(write(tmp_path / "post", moved(base, {UP: step})), write(tmp_path / "base", base))
    assert tensor(found, UP).deltas[0].largest == 4.0
    assert tensor(found, UP).where == ((200, 77),)  # the first of the two
    assert tensor(found, "lm_head.weight").where == (None,)
    assert tensor(found, UP).deltas[0].relative_norm is None  # base is zero


def test_cosines_between_deltas(tmp_path: Path) -> None:
    """The same, the opposite and an orthogonal delta; exact, for every step is exact in bf16."""
    base = {name: np.ones(t.shape, BF16) for name, t in base_tensors().items()}
    step = np.tile(np.array([0.5, 0.25], np.float32), SIDE * SIDE * 3 // 2).reshape(3 * SIDE, SIDE)
    turned = np.tile(np.array([0.25, -0.5], np.float32), SIDE * SIDE * 3 // 2).reshape(3 * SIDE, SIDE)
    steps = (step, step, -step, turned)
    posts = [write(tmp_path / str(k), moved(base, {UP: s})) for k, s in enumerate(steps)]
    origin = write(tmp_path / "base", base)
    drifted = write(tmp_path / "new_base", moved(base, {UP: -step}))
    found = paramdelta.analyze(posts, [origin] * 4, drifted)
    for group in (tensor(found, UP), found.total):
        cosines = [group.cosine(0, k) for k in range(4)]
        assert cosines == [1.0, 1.0, -1.0, 0.0]
        assert [d.cosine_to_drift for d in group.deltas] == [-1.0, -1.0, 1.0, 0.0]
        assert [d.drift_to_delta for d in group.deltas] == [1.0] * 4
    assert tensor(found, "lm_head.weight").cosine(0, 1) is None  # zero deltas have no direction
    assert {(f.code, f.weight) for f in found.findings} >= {("same-deltas", "caution"), ("opposed-deltas", "caution")}


def test_deltas_with_bases_of_their_own(tmp_path: Path) -> None:
    first, second = base_tensors(0), base_tensors(5)
    bases = [write(tmp_path / "b1", first), write(tmp_path / "b2", second)]
    posts = [
        write(tmp_path / "p1", moved(first, noise(first, 0.01, 1))),
        write(tmp_path / "p2", moved(second, noise(second, 0.01, 2))),
    ]
    new = write(tmp_path / "new", base_tensors(9))
    both = paramdelta.analyze(posts, bases, new)
    for k in range(2):
        alone = paramdelta.analyze(posts[k], bases[k], new)
        assert [t.deltas[k] for t in both.tensors] == [t.deltas[0] for t in alone.tensors]


def test_what_is_not_finite_is_counted_and_left_out(tmp_path: Path) -> None:
    base = base_tensors()
    post = {name: t.copy() for name, t in base.items()}
    post[UP][0, :3] = np.nan, np.inf, 1.0
    found = paramdelta.analyze(write(tmp_path / "post", post), write(tmp_path / "base", base))
    delta = tensor(found, UP).deltas[0]
    assert delta.nonfinite == 2
    assert delta.norm == pytest.approx(abs(1.0 - float(base[UP][0, 2])))
    finding = next(f for f in found.findings if f.code == "nonfinite")
    assert UP in finding.text


def test_a_vocabulary_that_grew_is_compared_where_all_have_rows(tmp_path: Path) -> None:
    base = base_tensors()
    post = {n: np.concatenate([t, t[:8]]) if t.shape[0] == 64 else t for n, t in moved(base, noise(base, 1, 3)).items()}
    found = paramdelta.analyze(write(tmp_path / "post", post), write(tmp_path / "base", base))
    embedding = tensor(found, "lm_head.weight")
    assert embedding.deltas[0].elements == 64 * SIDE
    want = reference.gram([array(post["lm_head.weight"][:64]), array(base["lm_head.weight"])], [(0, 1)], [(0, 0)])
    assert embedding.deltas[0].delta_squared == want.products[0]


def test_tensors_without_a_partner_are_listed(tmp_path: Path) -> None:
    base = base_tensors()
    post = {n: t for n, t in base.items() if n != UP}
    found = paramdelta.analyze(write(tmp_path / "post", post), write(tmp_path / "base", base))
    assert any(UP in name for name in found.unpaired)
    assert len(found.tensors) == len(base) - 1


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    base = base_tensors()
    other = {f"tower.{i}.odd": t for i, t in enumerate(base.values())}
    with pytest.raises(InputError, match="none of its 12 tensors can be compared"):
        paramdelta.analyze(write(tmp_path / "post", other), write(tmp_path / "base", base))
    with pytest.raises(InputError, match="no matrix matches"):
        paramdelta.analyze(tmp_path / "base", tmp_path / "base", spectrum="*nothing*")


def test_a_file_that_shrinks_ends_the_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    from paramdelta.analysis import plan_of, run_analysis

    post = write(tmp_path / "post", base_tensors(3))
    plan = plan_of(post=post, base=folders["base"], new_base=None)
    file = post / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        run_analysis(plan, drift=False)


@pytest.mark.parametrize("form", ["fp8-block", "fp8-channel", "mxfp4", "nvfp4", "int4"])
def test_quantised_checkpoints_by_their_values(
    folders: dict[str, Path], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """post and base quantised, new_base plain: the sums over what the engine decodes them to, in bands of rows."""
    monkeypatch.setattr(loads, "LOAD", 64 * SIDE)
    base = base_tensors()
    post = moved(base, noise(base, 0.01, 1))
    post[UP][300, 5] = 4.0  # far down, in a band behind others
    plain = {"post": write(tmp_path / "plain", post), "base": folders["base"]}
    for role, same in plain.items():
        paramdelta.merge(post=same, base=same, new_base=same, out=tmp_path / role, format=form)
    found = paramdelta.analyze(tmp_path / "post", tmp_path / "base", folders["new_base"])

    def decoded(folder: Path) -> dict[str, Any]:
        return dict(paramdelta.stream(folder, folder, folder, format="f32"))

    post, base, new = (decoded(f) for f in (tmp_path / "post", tmp_path / "base", folders["new_base"]))
    delta = tensor(found, UP).deltas[0]
    p, b, n = (x[UP].astype(np.float64) for x in (post, base, new))
    assert delta.unchanged == int((p.astype(np.float32).view("u4") == b.astype(np.float32).view("u4")).sum())
    assert delta.elements == p.size
    # Lanes add 16 squares in binary32 each: below 16 · 2^-24 of the sum of magnitudes.
    for got, x, y in (
        (delta.delta_squared, p - b, p - b),
        (delta.drift_squared, n - b, n - b),
        (delta.delta_drift, p - b, n - b),
    ):
        assert abs(got - (x * y).sum()) <= 32 * 2.0**-24 * np.abs(x * y).sum()
    assert delta.largest == np.abs(p.astype(np.float32) - b.astype(np.float32)).max()
    assert tensor(found, UP).where == ((300, 5),)


def test_zero_points_of_every_band(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same int4 codes, with zero points that differ from row to row."""
    monkeypatch.setattr(loads, "LOAD", 64 * SIDE)
    same, made = folders["base"], tmp_path / "int4"
    paramdelta.merge(post=same, base=same, new_base=same, out=made, format="int4")
    tensors = load_file(made / "model.safetensors")
    points = np.random.default_rng(0).integers(0, 2**32, (3 * SIDE // 8, SIDE // 32), np.uint64).astype(np.uint32)
    prefix = UP.removesuffix("weight")
    config = json.loads((made / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["symmetric"] = False
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        rows, groups = tensors[name].shape
        own = points if name.startswith(prefix) else np.full((rows // 8, groups), 0x88888888, np.uint32)
        tensors[name.replace("scale", "zero_point")] = own.view(np.int32)
    asked = write(tmp_path / "asymmetric", tensors)
    (asked / "config.json").write_text(json.dumps(config))
    found = paramdelta.analyze(asked, made, singular_values=1)
    first, second = (dict(paramdelta.stream(f, f, f, format="f32"))[UP] for f in (asked, made))
    difference = first.astype(np.float64) - second
    assert np.abs(difference).min(axis=1).max() > 0.0
    assert tensor(found, UP).deltas[0].delta_squared == pytest.approx((difference**2).sum(), rel=1e-6)


def test_real_checkpoints_of_other_structures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss by transformers: experts in blocks that lie the other way round than the plain stacks they came from."""
    models = pytest.importorskip("quantised_models")
    made = models.make_models("gpt-oss", tmp_path)
    plain = paramdelta.analyze(**made)
    experts = [t for t in plain.tensors if "gate_up_proj" in t.name and len(t.shape) == 3]
    assert experts
    models.quantise_gpt_oss(made["base"])
    opened = models.decoded(made["base"], tmp_path / "opened")
    monkeypatch.setattr(loads, "LOAD", 64 * 128)
    quantised = paramdelta.analyze(made["post"], made["base"], made["new_base"])
    equal = paramdelta.analyze(opened, made["base"], made["new_base"])
    for t in experts:
        packed = next(q for q in quantised.tensors if q.name == t.name)
        assert packed.deltas[0].elements == t.deltas[0].elements
        assert packed.deltas[0].delta_squared > 1.01 * t.deltas[0].delta_squared  # the loss of quantising is in it
        assert next(q for q in equal.tensors if q.name == t.name).deltas[0].unchanged_fraction == 1.0


def test_products_of_a_group_are_those_of_its_tensors(folders: dict[str, Path]) -> None:
    found = paramdelta.analyze(**folders)
    group = next(g for g in found.modules if g.name == "self_attn.q_proj")
    members = [t.deltas[0] for t in found.tensors if t.place.module == "self_attn.q_proj"]
    assert group.tensors == len(members) == 3
    for field in dataclasses.fields(group.deltas[0]):
        values = [getattr(m, field.name) for m in members]
        total = max(values) if field.name == "largest" else sum(values)
        assert getattr(group.deltas[0], field.name) == pytest.approx(total, rel=1e-14)
