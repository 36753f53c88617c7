"""Merges as the libraries of the formats would do them: read by torch, decoded by a library, merged in binary64,
quantised by a library or a published formula. Nothing here uses the package but the merge itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import families_fp8 as fp8
import families_low_bit as low
import numpy as np
import pytest
from oracle_values import bits, need, rounded, same, tensor
from quantised_merges import Case, Folders, fused, quantised_names

import paramdelta
from paramdelta.dtypes import BF16

torch = need("torch")
need("compressed_tensors")
load_file = need("safetensors.torch").load_file

Tensors = dict[str, Any]


def load(folder: Path) -> Tensors:
    """Return the tensors of a folder as torch has them."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def as_bf16(acc: Any) -> Any:
    """Round binary64 once to bf16: torch's own conversion goes through binary32."""
    return tensor(rounded(acc.numpy(), BF16).astype(np.float32)).to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------ decoding


def blocks_by_library(tensors: Tensors, stem: str, scale: str = ".weight_scale_inv") -> Any:
    """compressed-tensors' dequantiser of fp8 blocks: in binary32, exact for scales of few bits."""
    converters = need("compressed_tensors.entrypoints.convert.converters")
    oracle = converters.FP8BlockDequantizer(targets=["re:.*"], weight_block_size=(128, 128), dtype=torch.float32)
    given = {"x.weight": tensors[stem + ".weight"], "x.weight_scale_inv": tensors[stem + scale]}
    return oracle.process(given)["x.weight"].double()


def blocks(tensors: Tensors, stem: str) -> Any:
    """code · scale in binary64, each scale repeated over its block."""
    codes, scale = tensors[stem + ".weight"].double(), tensors[stem + ".weight_scale_inv"].double()
    spread = scale.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
    return codes * spread


def scheme(preset: str, **changes: Any) -> Any:
    """Return a preset of compressed-tensors, with other arguments for its weights."""
    quantization = need("compressed_tensors.quantization")
    made = quantization.preset_name_to_scheme(preset, ["Linear"])
    return made.model_copy(update={"weights": made.weights.model_copy(update=changes)})


def compressor(layout: str) -> Any:
    """Return the compressor of a layout."""
    return need("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(layout)


def decompressed(layout: str, preset: str, *parts: str, **changes: Any) -> Callable[[Tensors, str], Any]:
    """Return a decoder that is compressed-tensors' own. Scales are given in binary32, in which it then computes."""

    def decode(tensors: Tensors, stem: str) -> Any:
        state = {part: tensors[f"{stem}.{part}"] for part in parts}
        if state["weight_scale"].dtype == torch.bfloat16:
            state["weight_scale"] = state["weight_scale"].float()
        return compressor(layout).decompress(state, scheme(preset, **changes))["weight"].double()

    return decode


def nvfp4(tensors: Tensors, stem: str) -> Any:
    """code · binary32(scale / global scale), in binary64."""
    packed = tensors[f"{stem}.weight_packed"]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    codes = table[torch.stack([packed & 15, packed >> 4], 2).long()].flatten(1)
    scale = tensors[f"{stem}.weight_scale"].float() / tensors[f"{stem}.weight_global_scale"]
    return codes * scale.double().repeat_interleave(16, 1)


# ---------------------------------------------------------------------------------------------------------- quantising


def deepgemm(acc: dict[str, Any], *, powers: bool = False, scale_dtype: Any = None) -> Tensors:
    """DeepGEMM's per_block_cast_to_fp8; scales rounded to a type where one is given, and then used as stored."""
    out = {}
    for stem, values in acc.items():
        rows, cols = values.shape
        padded = torch.zeros(-(-rows // 128) * 128, -(-cols // 128) * 128)
        padded[:rows, :cols] = values.float()
        cut = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        scale = cut.abs().amax(dim=(1, 3), keepdim=True).clamp(1e-4) / torch.tensor(448.0)
        if powers:
            scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scale = scale.to(scale_dtype or torch.float32)
        codes = (cut * (1.0 / scale.float())).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[f"{stem}.weight"] = codes.view_as(padded)[:rows, :cols]
        out[f"{stem}.weight_scale_inv"] = scale[:, 0, :, 0]
    return out


def compressed(layout: str, preset: str, size: int, **changes: Any) -> Callable[[dict[str, Any]], Tensors]:
    """Return compressed-tensors' quantiser for rows (size 0) or groups: scales in bf16 of weights in bf16. The
    division is given binary32, as its GPU path computes it."""
    utils = need("compressed_tensors.quantization.utils")

    def quantise(acc: dict[str, Any]) -> Tensors:
        out, arguments = {}, scheme(preset, **changes)
        for stem, values in acc.items():
            weight = as_bf16(values) if preset != "MXFP4A16" else values.float()
            groups = weight.reshape(len(weight), -1, size or weight.shape[1])
            scale, _ = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments.weights)
            state = {"weight": weight.float(), "weight_scale": scale if preset == "MXFP4A16" else scale.float()}
            packed = compressor(layout).compress(state, arguments)
            out |= {f"{stem}.{part}": t for part, t in packed.items() if t is not None}
            if preset != "MXFP4A16":
                out[f"{stem}.weight_scale"] = scale
        return out

    return quantise


def compressed_nvfp4(acc: dict[str, Any]) -> Tensors:
    """compressed-tensors' NVFP4: one global scale for q, k, v and one for gate, up; all in binary32."""
    utils = need("compressed_tensors.quantization.utils")
    arguments, out = scheme("NVFP4A16"), {}
    largest: dict[str, Any] = {}
    for stem, values in acc.items():
        top = values.float().abs().amax()
        key = fused(stem + ".")
        largest[key] = torch.maximum(largest.get(key, top), top)
    for stem, values in acc.items():
        weight, top = values.float(), largest[fused(stem + ".")]
        second = utils.generate_gparam(-top, top)
        groups = weight.reshape(len(weight), -1, 16)
        scale, _ = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments.weights, second)
        state = {"weight": weight, "weight_scale": scale, "weight_global_scale": second}
        packed = compressor("nvfp4-pack-quantized").compress(state, arguments)
        out |= {f"{stem}.{part}": t for part, t in packed.items() if t is not None}
    return out


class Pipeline(NamedTuple):
    """A case, and how libraries decode its operands and quantise the result."""

    case: Case
    decode: Callable[[Tensors, str], Any]
    quantise: Callable[[dict[str, Any]], Tensors]


PACKED, INT4 = "pack-quantized", {"group_size": 32}
PIPELINES = {
    "deepseek-v3": Pipeline(fp8.CASES["deepseek-v3"], blocks, deepgemm),
    "deepseek-v3.2": Pipeline(fp8.CASES["deepseek-v3.2"], blocks_by_library, lambda acc: deepgemm(acc, powers=True)),
    "qwen3-fp8": Pipeline(
        fp8.CASES["qwen3-fp8"], blocks_by_library, lambda acc: deepgemm(acc, scale_dtype=torch.bfloat16)
    ),
    "compressed-channel": Pipeline(
        fp8.CASES["compressed-channel"],
        decompressed("float-quantized", "FP8_DYNAMIC", "weight", "weight_scale"),
        compressed("float-quantized", "FP8_DYNAMIC", 0),
    ),
    "compressed-int4": Pipeline(
        low.CASES["compressed-int4"],
        decompressed(PACKED, "W4A16", "weight_packed", "weight_scale", "weight_shape", **INT4),
        compressed(PACKED, "W4A16", 32, **INT4),
    ),
    "compressed-int4-asymmetric": Pipeline(
        low.CASES["compressed-int4-asymmetric"],
        decompressed(
            PACKED, "W4A16_ASYM", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", **INT4
        ),
        compressed(PACKED, "W4A16", 32, **INT4),
    ),
    "compressed-mxfp4": Pipeline(
        low.CASES["compressed-mxfp4"],
        decompressed("mxfp4-pack-quantized", "MXFP4A16", "weight_packed", "weight_scale"),
        compressed("mxfp4-pack-quantized", "MXFP4A16", 32),
    ),
    "compressed-nvfp4": Pipeline(low.CASES["compressed-nvfp4"], nvfp4, compressed_nvfp4),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str, folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """Codes and scales are those that the libraries make of the sum. The sign of a zero, which 0 · scale and a sum
    lose or keep differently in libraries, is not compared in fp8 codes."""
    case, decode, quantise = PIPELINES[name]
    folders = folders_of(case)
    paramdelta.merge(**folders.sources(), out=tmp_path / "out", scale_policy="recompute", **case.options)
    found = load(tmp_path / "out")
    post, base, new_base = (load(folder) for folder in folders)
    stems = [n.rpartition(".")[0] for n in quantised_names(case.new_base, "scale")]
    alpha = case.options.get("alpha", 1.0)
    acc = {s: decode(new_base, s) + alpha * (decode(post, s) - decode(base, s)) for s in stems}
    wanted = quantise(acc)
    planes = {n for n in found if n.rpartition(".")[0] in stems}
    assert planes == set(wanted) | {n for n in planes if n.endswith(".input_scale")}
    for part, want in wanted.items():
        got = found[part]
        if got.dtype == torch.float8_e4m3fn and got.shape == want.shape:
            got, want = got.float() + 0.0, want.float() + 0.0
        assert got.numel() == want.numel(), part
        same(bits(got).reshape(-1), bits(want.to(got.dtype)).reshape(-1), part)


def test_gpt_oss(folders_of: Callable[[Case], Folders], tmp_path: Path) -> None:
    """transformers decodes the blocks of all three; the codes are the nearest to value · 2^-e for the scale that is
    the least power of two with every value within ±6 of it."""
    mxfp4 = need("transformers.integrations.mxfp4")
    case = low.CASES["gpt-oss"]
    folders = folders_of(case)
    paramdelta.merge(**folders.sources(), out=tmp_path / "out", scale_policy="recompute")
    operands = [load(folder) for folder in (*folders, tmp_path / "out")]
    for name in ("gate_up_proj", "down_proj"):
        at = f"model.layers.0.mlp.experts.{name}"
        values = [
            mxfp4.convert_moe_packed_tensors(t[f"{at}_blocks"], t[f"{at}_scales"], dtype=torch.float32).double().mT
            for t in operands
        ]
        post, base, new_base, out = values
        groups = (new_base + (post - base)).float().unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1) / torch.tensor(6.0)
        field = (scale.view(torch.int32) + 0x7FFFFF) >> 23
        same(operands[3][f"{at}_scales"].numpy(), field.clamp(0, 254).to(torch.uint8).numpy(), f"{name}: scales")
        ratio = groups.double() * torch.exp2(127.0 - field.double())[..., None]
        step = torch.where(ratio.abs() < 2, 0.5, torch.where(ratio.abs() < 4, 1.0, 2.0))
        nearest = (ratio / step).round() * step * torch.exp2(field.double() - 127.0)[..., None]
        same(out.numpy() + 0.0, nearest.flatten(-2).numpy() + 0.0, f"{name}: values")
