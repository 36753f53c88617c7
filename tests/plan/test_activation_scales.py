"""Calibration statistics: whose are taken, what is missing, and what the config says where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from consumers import check_promises, folder_json
from plan_folders import complaint, plan
from quantised_toys import MODULES, STORAGES, Tensors, compressed, folders, skeleton

from paramdelta.plan import Plan
from paramdelta.plan.outputs import Making

STATIC = [name for name, storage in STORAGES.items() if storage.statistics]
MODELOPT = [name for name in STATIC if STORAGES[name].method == "modelopt"]
CACHE = {f"model.layers.{layer}.self_attn.{which}_scale": ("F32", ()) for layer in (0, 1) for which in "kv"}


def statistics_of(made: Plan) -> dict[str, str]:
    """Return the donor of each output tensor that is copied calibration."""
    outputs = made.layout.outputs
    rows = [i for i, logical in enumerate(outputs.logical) if logical < 0]
    assert all(outputs.making[i] == Making.COPY for i in rows)
    return {outputs.names[i]: outputs.donors[i] for i in rows}


def expected_names(storage: str) -> set[str]:
    stored = STORAGES[storage]
    return {module + suffix for module in stored.quantised() for suffix in stored.statistics}


@pytest.mark.parametrize(("option", "donor"), [("post", "post"), ("new-base", "new_base")])
@pytest.mark.parametrize("storage", STATIC)
def test_the_donor(storage: str, option: str, donor: str, tmp_path: Path) -> None:
    """One named checkpoint gives all of them; each is a copy of that checkpoint's bytes."""
    sources = folders(tmp_path, storage, storage, storage)
    made = plan(sources, activation_scales=option)
    assert statistics_of(made) == dict.fromkeys(expected_names(storage), donor)
    spans = {made.names[int(s["tensor"])]: s for s in made.work.spans}
    for name in expected_names(storage):
        table = (made.post if donor == "post" else made.new_base).tensors
        span = spans[name]
        assert made.work.inputs[span["new_file"]] == sources[donor] / "model.safetensors"
        assert span["new_offset"] == table.offset[table.row(name)]


def test_post_is_the_donor_unless_told(tmp_path: Path) -> None:
    made = plan(folders(tmp_path, "nvfp4", "nvfp4", "nvfp4"))
    assert set(statistics_of(made).values()) == {"post"}


@pytest.mark.parametrize("format_", ["bf16", "fp8-block", "mxfp8"])
@pytest.mark.parametrize("storage", STATIC)
def test_formats_that_need_none_have_none(storage: str, format_: str, tmp_path: Path) -> None:
    assert statistics_of(plan(folders(tmp_path, storage, storage, storage), format=format_)) == {}


@pytest.mark.parametrize("storage", STATIC)
@pytest.mark.parametrize(
    ("roles", "options", "lacking", "other"),
    [
        (("plain", "plain", ""), {}, "post", "new-base"),
        (("", "", "plain"), {"format": "like-post", "activation_scales": "new-base"}, "new_base", "post"),
    ],
    ids=["post lacks them", "new_base lacks them"],
)
def test_a_donor_that_lacks_them(
    storage: str, roles: tuple[str, ...], options: dict[str, Any], lacking: str, other: str, tmp_path: Path
) -> None:
    sources = folders(tmp_path, *(role or storage for role in roles))
    text = complaint(sources, **options)
    assert str(sources[lacking]) in text
    assert f"{lacking} lacks {len(expected_names(storage))} scales of activations or of the cache" in text
    assert f"--activation-scales {other} takes them from there; --activation-scales drop leaves them out" in text


def test_a_donor_with_other_shapes_lacks_them(tmp_path: Path) -> None:
    sources = folders(tmp_path, "nvfp4", "nvfp4", "nvfp4")
    tensors: Tensors = STORAGES["nvfp4"].tensors()
    tensors["model.layers.0.mlp.up_proj.input_global_scale"] = ("F32", (2,))
    sources["post"] = STORAGES["nvfp4"].write(tmp_path / "other", tensors=tensors)
    assert "post lacks 1 scales of activations or of the cache" in complaint(sources)


@pytest.mark.parametrize("storage", [name for name in STATIC if name not in MODELOPT])
@pytest.mark.parametrize("roles", ["same", "plain post"])
def test_dropped_ones_make_the_config_dynamic(storage: str, roles: str, tmp_path: Path) -> None:
    post = storage if roles == "same" else "plain"
    made = plan(folders(tmp_path, post, post, storage), activation_scales="drop")
    assert statistics_of(made) == {}
    check_promises(skeleton(made, tmp_path / "out"), MODULES, statistics=set())
    before, after = (folder_json(tmp_path / f)["quantization_config"] for f in ("new_base", "out"))
    assert before != after
    if storage == "static fp8":
        assert after == {**before, "activation_scheme": "dynamic"}
        return
    inputs = [config["config_groups"]["group_0"].pop("input_activations") for config in (before, after)]
    assert before == after
    assert inputs[1] == (None if storage == "nvfp4" else {**inputs[0], "dynamic": True})


@pytest.mark.parametrize("storage", MODELOPT)
def test_modelopt_cannot_do_without(storage: str, tmp_path: Path) -> None:
    text = complaint(folders(tmp_path, storage, storage, storage), activation_scales="drop")
    assert "needs scales of activations that were measured beforehand: keep the donor's" in text


def with_cache(storage: str, **config: Any) -> dict[str, Any]:
    """Return how to write a toy whose key-value cache is calibrated."""
    return {"tensors": dict(sorted((STORAGES[storage].tensors() | CACHE).items())), **config}


def cached(root: Path, storage: str) -> dict[str, Path]:
    """Write three toys with scales of the cache, and say so in the configs."""
    return {role: STORAGES[storage].write(root / role, **with_cache(storage)) for role in ("post", "base", "new_base")}


@pytest.mark.parametrize("storage", ["blocks", "nvfp4", "modelopt fp8"])
def test_scales_of_the_cache_go_with_the_others(storage: str, tmp_path: Path) -> None:
    sources = cached(tmp_path, storage)
    donors = statistics_of(plan(sources))
    assert donors == dict.fromkeys({*expected_names(storage), *CACHE}, "post")
    if storage in MODELOPT:
        return
    assert statistics_of(plan(sources, activation_scales="drop")) == {}


def test_scales_of_the_cache_stay_where_weights_become_plain(tmp_path: Path) -> None:
    """They belong to no weight: q, k and v kept plain do not change what the cache is scaled by."""
    made = plan(cached(tmp_path, "nvfp4"), format="nvfp4", no_quantise="*self_attn*")
    names = set(statistics_of(made))
    assert set(CACHE) <= names
    assert {n for n in names if "self_attn" in n} == set(CACHE)


def test_without_its_scales_the_cache_is_not_quantised(tmp_path: Path) -> None:
    """Dropping them takes the cache's scheme out of the config, too."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config = {**compressed("float-quantized", weights), "ignore": STORAGES["channels"].ignored()}
    sources = {
        role: STORAGES["channels"].write(
            tmp_path / role, **with_cache("channels"), quantization_config={**config, "kv_cache_scheme": scheme}
        )
        for role in ("post", "base", "new_base")
    }
    kept = skeleton(plan(sources), tmp_path / "kept")
    dropped = skeleton(plan(sources, activation_scales="drop"), tmp_path / "dropped")
    assert kept.config["quantization_config"]["kv_cache_scheme"] == scheme
    assert dropped.config["quantization_config"] == {**config, "kv_cache_scheme": None}
