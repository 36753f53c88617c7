"""How each tensor of the output is stored: what a wanted format reaches, its variants, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from plan_folders import complaint, plan
from quantised_folders import folder_of
from quantised_toys import (
    HEAD,
    LINEAR,
    MODULES,
    RAGGED,
    ROUTER,
    STORAGES,
    Tensors,
    folders,
    formats_of,
    planned,
)

from paramdelta.errors import PlanError
from paramdelta.formats import COMPRESSED_F32, DEEPGEMM, DEEPGEMM_UE8M0, INT4, INT4_F32
from paramdelta.plan import MergeRequest, Plan
from paramdelta.plan.request import FORMATS

GROUPED = ("mxfp8", "mxfp4", "nvfp4", "int4")
QUANTISING = tuple(f for f in FORMATS if f not in ("like-post", "bf16", "f16", "f32"))


def dtypes_of(made: Plan) -> dict[str, str]:
    """Return the dtype of each output tensor."""
    return {name: made.dtype_of(i).name for i, name in enumerate(made.names)}


# ------------------------------------------------------------------------------------------- what a format reaches


@pytest.mark.parametrize("format_", QUANTISING)
def test_linear_layers_of_plain_checkpoints(format_: str, tmp_path: Path) -> None:
    """Matrices of linear layers, but no embedding, head, norm, router, convolution, bias or table; of grouped formats,
    none that does not go in whole groups."""
    made = planned(tmp_path, "plain", "plain", "plain", format=format_)
    reached = set(LINEAR) if format_ in GROUPED else {*LINEAR, RAGGED}
    assert formats_of(made) == dict.fromkeys(reached, format_)
    assert made.stored.like is None
    before = {n: d for n, (d, _) in STORAGES["plain"].tensors().items()}
    after = {name: dtype for name, dtype in dtypes_of(made).items() if name in before and name[:-7] not in reached}
    assert after == {name: before[name].lower() for name in after}
    assert {f"{HEAD}.weight", f"{ROUTER}.weight", "model.embed_tokens.weight"} <= after.keys()


@pytest.mark.parametrize("format_", ["bf16", "f16", "f32", "like-post"])
def test_plain_formats_leave_plain_tensors_alone(format_: str, tmp_path: Path) -> None:
    made = planned(tmp_path, "plain", "plain", "plain", format=format_)
    assert dtypes_of(made) == {n: d.lower() for n, (d, _) in STORAGES["plain"].tensors().items()}


NEVER = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "lm_head.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.feed_forward.router.weight",
    "model.layers.0.q_norm.weight",
    "model.vision.patch_embed.proj.weight",
    "model.layers.0.self_attn.rel_bias",
)


@pytest.mark.parametrize("name", NEVER)
def test_matrices_that_no_loader_expects_quantised(name: str, tmp_path: Path) -> None:
    tensors = {"a.up_proj.weight": ("BF16", (64, 64)), name: ("BF16", (64, 64))}
    made = plan(written(tmp_path, dict.fromkeys(ROLES, tensors)), format="fp8-block")
    assert formats_of(made) == {"a.up_proj": "fp8-block"}


ROLES = ("post", "base", "new_base")


def written(root: Path, tensors: Mapping[str, Tensors], config: Mapping[str, Any] | None = None) -> dict[str, Path]:
    """Write a folder for each role."""
    for role, held in tensors.items():
        (root / role).mkdir()
        folder_of(root / role, held, (config or {}).get(role, {"model_type": "toy"}))
    return {role: root / role for role in tensors}


@pytest.mark.parametrize("format_", QUANTISING)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("storage", ["blocks", "channels", "mxfp8", "modelopt nvfp4"])
def test_where_one_checkpoint_is_quantised_its_choice_is_followed(
    storage: str, role: str, format_: str, tmp_path: Path
) -> None:
    """What that checkpoint quantises is what the output quantises; in the format's own variant where it has that."""
    roles = {**dict.fromkeys(ROLES, "plain"), role: storage}
    made = planned(
        tmp_path, *roles.values(), format=format_, activation_scales="post" if role == "post" else "new-base"
    )
    stored = STORAGES[storage]
    reached = set(stored.quantised()) & (set(LINEAR) if format_ in GROUPED else set(MODULES))
    assert formats_of(made) == dict.fromkeys(reached, format_)


def test_of_several_sources_with_the_format_new_base_is_followed(tmp_path: Path) -> None:
    made = planned(tmp_path, "blocks", "blocks of 64", "blocks with bf16 scales", format="fp8-block")
    assert made.stored.like is made.names_by_role["new_base"]
    assert {f.scale_dtype.name for f in made.stored.formats if f} == {"bf16"}


def test_like_post_takes_dtypes_of_plain_tensors_too(tmp_path: Path) -> None:
    sources = folders(tmp_path, "blocks", "plain", "plain")
    tensors = STORAGES["blocks"].tensors() | {"model.norm.weight": ("F32", (256,))}
    sources["post"] = STORAGES["blocks"].write(tmp_path / "other", tensors=tensors)
    made = plan(sources, format="like-post")
    assert dtypes_of(made) == {n: d.lower() for n, (d, _) in tensors.items()}


def test_formats_are_shared_objects(tmp_path: Path) -> None:
    """A plan of 100,000 weights holds a handful of formats."""
    for number, (storage, format_) in enumerate([("blocks", None), ("plain", "nvfp4"), ("blocks", "fp8-channel")]):
        (tmp_path / str(number)).mkdir()
        made = planned(tmp_path / str(number), storage, storage, storage, format=format_)
        assert len({id(f) for f in made.stored.formats if f is not None}) == 1


# --------------------------------------------------------------------------------------------------- variants

VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, int], str, Any]] = {
    "blocks of 64": ({"format": "fp8-block", "block_size": "64x64"}, (64, 64), "f32", DEEPGEMM),
    "rows of blocks": ({"format": "fp8-block", "block_size": "1x128"}, (1, 128), "f32", DEEPGEMM),
    "bf16 scales": ({"format": "fp8-block", "scale_type": "bf16"}, (128, 128), "bf16", DEEPGEMM),
    "powers of two": ({"format": "fp8-block", "scale_type": "ue8m0"}, (128, 128), "f32", DEEPGEMM_UE8M0),
    "E8M0": ({"format": "fp8-block", "scale_type": "e8m0"}, (128, 128), "f8_e8m0", DEEPGEMM_UE8M0),
    "channels": ({"format": "fp8-channel", "scale_type": "f32"}, (1, 0), "f32", COMPRESSED_F32),
    "tensors": ({"format": "fp8-tensor", "scale_type": "f32"}, (0, 0), "f32", COMPRESSED_F32),
    "groups of 128": ({"format": "int4", "block_size": 128}, (1, 128), "bf16", INT4),
    "f32 groups": ({"format": "int4", "block_size": "1x64", "scale_type": "f32"}, (1, 64), "f32", INT4_F32),
}


@pytest.mark.parametrize(("options", "grid", "scale", "recipe"), VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("storage", ["plain", "blocks", "channels", "int4"])
def test_variants(
    storage: str, options: dict[str, Any], grid: tuple[int, int], scale: str, recipe: Any, tmp_path: Path
) -> None:
    """A variant asked for by name is written, also where a source has another variant of that format."""
    made = planned(tmp_path, storage, storage, storage, **options)
    (format_,) = {f for f in made.stored.formats if f is not None}
    assert ((format_.rows, format_.cols), format_.scale.name, format_.recipe) == (grid, scale, recipe)
    scales = {n: made.shape_of(i) for i, n in enumerate(made.names) if n.startswith("model.layers.0.mlp.down_proj")}
    rows, cols = (-(-256 // grid[0]) if grid[0] else 1, -(-384 // grid[1]) if grid[1] else 1)
    suffix = format_.spelling.scale
    assert scales["model.layers.0.mlp.down_proj" + suffix] == ((1,) if grid == (0, 0) else (rows, cols))


# ------------------------------------------------------------------------------------------------------- --dtype


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("storage", ["plain", "blocks", "nvfp4", "int4", "modelopt fp8"])
def test_dtype_is_about_every_tensor(storage: str, dtype: str, tmp_path: Path) -> None:
    made = planned(tmp_path, storage, storage, storage, dtype=dtype)
    tensors = STORAGES["plain"].tensors()
    assert dtypes_of(made) == {name: d.lower() if d == "I64" else dtype for name, (d, _) in tensors.items()}


# ---------------------------------------------------------------------------------------------------- complaints


@pytest.mark.parametrize("format_", GROUPED)
def test_nothing_can_be_quantised(format_: str, tmp_path: Path) -> None:
    tensors = {"a.up_proj.weight": ("BF16", (64, 100)), "model.norm.weight": ("BF16", (64,))}
    text = complaint(written(tmp_path, dict.fromkeys(ROLES, tensors)), format=format_)
    groups = {"nvfp4": 16}.get(format_, 32)
    assert f"no weight can be stored as {format_}: " in text
    assert "do not go in whole groups of" in text
    assert f"groups of {groups}" in text


def test_nothing_is_left_to_be_quantised(tmp_path: Path) -> None:
    text = complaint(folders(tmp_path, "plain", "plain", "plain"), format="fp8-block", no_quantise="*")
    assert "no weight can be stored as fp8-block" in text
    assert "--no-quantise matches every weight that could be" in text
    text = complaint({r: tmp_path / r for r in ROLES}, format="fp8-block", no_quantise=["*_proj*", "*expert*"])
    assert "--no-quantise matches every weight that could be" in text


def test_formats_of_two_methods_cannot_be_mixed(tmp_path: Path) -> None:
    """Only post has the tensor, in its own family's format: no config could describe that beside new_base's."""
    sources = folders(tmp_path, "channels", "blocks", "blocks")
    tensors = dict(STORAGES["channels"].tensors())
    tensors |= {"extra.up_proj.weight": ("F8_E4M3", (64, 64)), "extra.up_proj.weight_scale": ("BF16", (64, 1))}
    sources["post"] = STORAGES["channels"].write(tmp_path / "more", tensors=dict(sorted(tensors.items())))
    text = complaint(sources, copy_from="post")
    assert "the output would mix the formats of compressed-tensors and fp8, which no config can describe" in text
    assert "--format writes all in one format, for example bf16 or fp8-block" in text
    made = plan(sources, copy_from="post", format="fp8-block")
    assert formats_of(made) == dict.fromkeys([*STORAGES["blocks"].quantised(), "extra.up_proj"], "fp8-block")


def test_every_wrong_option_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        MergeRequest.build(
            **{role: tmp_path / role for role in ROLES},
            format="fp9",
            block_size="0x128",
            scale_type="f8",
            scale_policy="never",
            activation_scales="base",
            max_quant_error="much",
            stacks=["middle=straight", "post=upright"],
        )
    subjects = [c.subject for c in caught.value.complaints]
    assert sorted(subjects) == sorted(
        [
            *("--format", "--block-size", "--scale-type", "--scale-policy", "--activation-scales"),
            *("--max-quant-error", "--stacks", "--stacks"),
        ]
    )


MEANINGLESS = {
    "block size": {"block_size": "128x128"},
    "scale type": {"scale_type": "f32"},
    "globs": {"no_quantise": "*"},
}


@pytest.mark.parametrize("options", MEANINGLESS.values(), ids=MEANINGLESS.keys())
@pytest.mark.parametrize("format_", [None, "bf16", "like-post"])
def test_options_that_only_a_format_gives_a_meaning(
    format_: str | None, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="says how --format quantises, and no such format is given"):
        MergeRequest.build(**{role: tmp_path / role for role in ROLES}, format=format_, **options)


@pytest.mark.parametrize("storage", ["plain", "blocks", "nvfp4"])
def test_dtype_beside_a_quantised_format_is_about_the_rest(storage: str, tmp_path: Path) -> None:
    made = planned(tmp_path, storage, storage, storage, dtype="f16", format="fp8-channel")
    quantised = {f"{name}.weight" for name in formats_of(made)}
    plain = {n: d for n, d in dtypes_of(made).items() if n not in quantised and not n.endswith(".weight_scale")}
    assert set(plain.values()) == {"f16", "i64"}
    assert formats_of(made).keys() >= set(LINEAR)


@pytest.mark.parametrize("format_", ["like-post", "f32"])
def test_dtype_and_format_contradict(format_: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="says how every tensor is stored, and so does --format"):
        MergeRequest.build(**{role: tmp_path / role for role in ROLES}, format=format_, dtype="bf16")


IMPOSSIBLE = {
    "blocks of channels": ({"format": "fp8-channel", "block_size": "128x128"}, "only fp8-block and int4 vary"),
    "groups of 12": ({"format": "int4", "block_size": 12}, "a multiple of 8"),
    "scale of mxfp4": ({"format": "mxfp4", "scale_type": "f32"}, "there are only f8_e8m0"),
    "scale of channels": ({"format": "fp8-channel", "scale_type": "e8m0"}, "there are bf16, f32"),
}


@pytest.mark.parametrize(("options", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_variants_that_do_not_exist(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in complaint(folders(tmp_path, "plain", "plain", "plain"), **options)
