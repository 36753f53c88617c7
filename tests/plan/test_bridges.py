"""Weights that the three store in different structures, at the level of plans: what pairs, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_folders import complaint, plan
from quantised_folders import folder_of
from quantised_toys import Tensors

from paramdelta.plan import Kind

EXPERTS = "model.layers.0.mlp.experts"
MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPT_OSS = {"quant_method": "mxfp4"}
ROLES = ("post", "base", "new_base")


def fp8(name: str, n: int, k: int) -> Tensors:
    return {name: ("F8_E4M3", (n, k)), f"{name}_scale_inv": ("F32", (-(-n // 128), -(-k // 128)))}


def singles(inner: int, hidden: int, experts: int = 2) -> Tensors:
    made: Tensors = {}
    for e in range(experts):
        for part in ("gate", "up"):
            made[f"{EXPERTS}.{e}.{part}_proj.weight"] = ("BF16", (inner, hidden))
        made[f"{EXPERTS}.{e}.down_proj.weight"] = ("BF16", (hidden, inner))
    return made


def stacks(inner: int, hidden: int, experts: int = 2, transposed: bool = False) -> Tensors:
    both, down = (2 * inner, hidden), (hidden, inner)
    if transposed:
        both, down = both[::-1], down[::-1]
    return {f"{EXPERTS}.gate_up_proj": ("BF16", (experts, *both)), f"{EXPERTS}.down_proj": ("BF16", (experts, *down))}


def nibbles(inner: int, hidden: int, experts: int = 2) -> Tensors:
    made: Tensors = {}
    for name, n, k in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        made[f"{EXPERTS}.{name}_blocks"] = ("U8", (experts, n, k // 32, 16))
        made[f"{EXPERTS}.{name}_scales"] = ("U8", (experts, n, k // 32))
    return made


def written(root: Path, post: Tensors, base: Tensors, new_base: Tensors) -> dict[str, Path]:
    """Write three folders; what is quantised says so in its config."""
    for role, tensors in zip(ROLES, (post, base, new_base), strict=True):
        (root / role).mkdir()
        config: dict[str, Any] = {"model_type": "toy", "tie_word_embeddings": True}
        if any(name.endswith("_blocks") for name in tensors):
            config["quantization_config"] = GPT_OSS
        elif any(name.endswith("_scale_inv") for name in tensors):
            config["quantization_config"] = BLOCKS
        folder_of(root / role, {"model.norm.weight": ("BF16", (8,)), **tensors}, config)
    return {role: root / role for role in ROLES}


FUSED: dict[str, tuple[Tensors, Tensors]] = {
    "gate and up": (
        {f"{MLP}.gate_up_proj.weight": ("BF16", (256, 96))},
        {f"{MLP}.gate_proj.weight": ("BF16", (128, 96)), f"{MLP}.up_proj.weight": ("BF16", (128, 96))},
    ),
    "q, k and v": (
        {f"{ATTENTION}.qkv_proj.weight": ("BF16", (192, 96))},
        {f"{ATTENTION}.{p}_proj.weight": ("BF16", (128 if p == "q" else 32, 96)) for p in "qkv"},
    ),
    "experts": (stacks(48, 80), singles(48, 80)),
    "experts, transposed": (stacks(48, 80, transposed=True), singles(48, 80)),
}


@pytest.mark.parametrize("roles", ["fss", "sff", "fsf", "sfs", "ffs", "ssf"])
@pytest.mark.parametrize(("fused", "separate"), FUSED.values(), ids=FUSED.keys())
def test_fused_against_separate(fused: Tensors, separate: Tensors, roles: str, tmp_path: Path) -> None:
    """Every tensor of new_base is merged, and nothing of post or base is left over."""
    stored = [fused if role == "f" else separate for role in roles]
    made = plan(written(tmp_path, *stored))
    assert set(made.pairing.kinds) == {Kind.MERGED}
    assert made.names == sorted({*stored[2], "model.norm.weight"}, key=made.names.index)
    assert (made.pairing.dropped, made.pairing.unpaired) == ([], [])


@pytest.mark.parametrize("option", ["exclude", "include"])
@pytest.mark.parametrize("roles", ["sff", "fss", "ffs", "ssf"])
@pytest.mark.parametrize(("fused", "separate"), FUSED.values(), ids=FUSED.keys())
def test_what_is_left_alone_leaves_nothing_over(
    fused: Tensors, separate: Tensors, roles: str, option: str, tmp_path: Path
) -> None:
    sources = written(tmp_path, *(fused if role == "f" else separate for role in roles))
    made = plan(sources, **({"exclude": "*proj*"} if option == "exclude" else {"include": "*norm*"}))
    assert made.policies["tensors"]["merged"] == 1
    assert made.pairing.dropped == []


def test_alpha_of_a_bridged_tensor_goes_by_its_name_in_new_base(tmp_path: Path) -> None:
    made = plan(written(tmp_path, singles(48, 80), singles(48, 80), stacks(48, 80)), alphas=["0.5", "*down_proj=0.25"])
    assert dict(zip(made.pairing.names, made.pairing.alphas, strict=True)) == {
        f"{EXPERTS}.gate_up_proj": 0.5,
        f"{EXPERTS}.down_proj": 0.25,
        "model.norm.weight": 0.5,
    }


@pytest.mark.parametrize(("copy_from", "kind"), [("new-base", Kind.FROM_NEW_BASE), ("post", None)])
def test_a_part_that_is_missing(copy_from: str, kind: Kind | None, tmp_path: Path) -> None:
    """Where one expert lacks, the whole stack cannot be merged; --copy-from says what becomes of it."""
    lacking = singles(48, 80)
    del lacking[f"{EXPERTS}.1.up_proj.weight"]
    sources = written(tmp_path, lacking, singles(48, 80), stacks(48, 80))
    assert f"post lacks 1 tensors that new_base has:\n      {EXPERTS}.gate_up_proj" in complaint(sources)
    if kind is None:
        assert f"post lacks 1 of the tensors:\n      {EXPERTS}.gate_up_proj" in complaint(sources, copy_from=copy_from)
        return
    made = plan(sources, copy_from=copy_from)
    kinds = dict(zip(made.pairing.names, made.pairing.kinds, strict=True))
    assert kinds[f"{EXPERTS}.gate_up_proj"] == kind
    assert kinds[f"{EXPERTS}.down_proj"] == Kind.MERGED


@pytest.mark.parametrize("role", ROLES)
def test_square_stacks_must_be_told_apart(role: str, tmp_path: Path) -> None:
    stored = [stacks(40, 80) if r == role else singles(40, 80) for r in ROLES]
    sources = written(tmp_path, *stored)
    text = complaint(sources)
    assert f"{EXPERTS}.gate_up_proj [2, 80, 80] in {role}" in text
    assert "--stacks ROLE=straight (or transposed), for example --stacks post=transposed" in text
    for kind in ("straight", "transposed"):
        pieces = plan(sources, stacks=f"{role}={kind}").pairing.bridges
        (turned,) = {
            getattr(p, "out" if role == "new_base" else role).transposed
            for ps in pieces.values()
            for p in ps
            if p.out.rows == 40
        }
        assert turned == (kind == "transposed")


CANNOT: dict[str, tuple[tuple[Tensors, Tensors, Tensors], dict[str, Any], str]] = {
    "a border within a block": (
        (
            singles(96, 256),
            singles(96, 256),
            {
                f"{EXPERTS}.gate_up_proj": ("F8_E4M3", (2, 192, 256)),
                f"{EXPERTS}.gate_up_proj_scale_inv": ("F32", (2, 2, 2)),
                f"{EXPERTS}.down_proj": ("F8_E4M3", (2, 256, 96)),
                f"{EXPERTS}.down_proj_scale_inv": ("F32", (2, 2, 1)),
            },
        ),
        {},
        "the border between its parts lies within a block that shares a scale",
    ),
    "alternating rows of blocks": (
        (
            singles(128, 256),
            singles(128, 256),
            {
                f"{EXPERTS}.gate_up_proj": ("F8_E4M3", (2, 256, 256)),
                f"{EXPERTS}.gate_up_proj_scale_inv": ("F32", (2, 2, 2)),
                f"{EXPERTS}.down_proj": ("F8_E4M3", (2, 256, 128)),
                f"{EXPERTS}.down_proj_scale_inv": ("F32", (2, 2, 1)),
            },
        ),
        {"stacks": "new_base=interleaved"},
        "its parts alternate in rows, which share scales in blocks of 128",
    ),
    "alternating columns": (
        (singles(48, 80), singles(48, 80), stacks(48, 80, transposed=True)),
        {"stacks": "new_base=interleaved"},
        "its parts alternate in columns",
    ),
}


@pytest.mark.parametrize(("stored", "options", "words"), CANNOT.values(), ids=CANNOT.keys())
def test_structures_that_cannot_be_written(
    stored: tuple[Tensors, Tensors, Tensors], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in complaint(written(tmp_path, *stored), **options)


LIKE_POST: dict[str, tuple[Tensors, Tensors]] = {
    "blocks of nibbles for separate experts": (nibbles(64, 96), singles(64, 96)),
}


@pytest.mark.parametrize(("post", "others"), LIKE_POST.values(), ids=LIKE_POST.keys())
def test_formats_that_another_structure_cannot_have(post: Tensors, others: Tensors, tmp_path: Path) -> None:
    text = complaint(written(tmp_path, post, others, others), format="like-post")
    assert "cannot be stored like post, which holds their parts otherwise than new_base" in text


def test_blocks_of_separate_experts_in_a_stack(tmp_path: Path) -> None:
    """fp8 blocks look the same either way round, and stacks have a name for them."""
    post: Tensors = {}
    for name, (_, (n, k)) in singles(128, 256).items():
        post |= fp8(name, n, k)
    made = plan(
        written(tmp_path, post, singles(128, 256), stacks(128, 256, transposed=True)),
        format="like-post",
        stacks="new_base=transposed",
    )
    held = {name: made.shape_of(i) for i, name in enumerate(made.names)}
    assert held[f"{EXPERTS}.gate_up_proj_scale_inv"] == (2, 2, 2)
    assert held[f"{EXPERTS}.down_proj_scale_inv"] == (2, 1, 2)
