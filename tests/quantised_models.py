"""Tiny real models for tests of quantised merges: made by transformers, saved as post, base and new_base, and loaded
again from the folders that a merge writes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from paramdelta import reference
from paramdelta import reference_scaled as scaled
from paramdelta.checkpoint import Checkpoint, QuantisedWeight, open_checkpoint, recognise
from paramdelta.dtypes import BF16
from paramdelta.formats import DEEPGEMM, MXFP4_OPENAI
from paramdelta.reference_scaled import Scaled

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)


def gpt_oss() -> Any:
    sizes = SIZES | {"intermediate_size": 96}
    return transformers.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "qwen3-moe": qwen3_moe,
    "gpt-oss": gpt_oss,
}


def make_models(name: str, folder: Path) -> dict[str, Path]:
    """Save base, post = base + a delta, and new_base = base + another, in bf16; return the folders."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    for role, spread in (("base", 0.0), ("post", 0.01), ("new_base", 0.02)):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(original[n] + torch.randn_like(p) * spread)
        model.save_pretrained(folder / role)
    return {role: folder / role for role in ("post", "base", "new_base")}


def load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder, its weights in bf16, and what transformers says about the loading."""
    with on_a_cpu():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **dequantised(folder), **options)
    return model.eval(), info


def dequantised(folder: Path) -> dict[str, Any]:
    """Return the options with which transformers loads the weights of a folder as bf16, and says how."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    quantised = {"quantization_config": DEQUANTISING[config["quant_method"]]()} if config else {}
    return {"output_loading_info": True, "dtype": torch.bfloat16, **quantised}


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """The loader asks for accelerate, and on a CPU uses nothing of it; it warns that the folder has a config too."""
    from transformers.quantizers import quantizer_finegrained_fp8 as fp8

    with mock.patch.object(fp8, "is_accelerate_available", return_value=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield


DEQUANTISING: dict[str, Callable[[], Any]] = {
    "fp8": lambda: transformers.FineGrainedFP8Config(dequantize=True),
    "mxfp8": lambda: transformers.FineGrainedFP8Config(dequantize=True),
    "compressed-tensors": lambda: transformers.CompressedTensorsConfig(dequantize=True),
    "mxfp4": lambda: transformers.Mxfp4Config(dequantize=True),
}


def assert_complete(info: dict[str, Any]) -> None:
    """Every parameter was found in the files, and every tensor of the files is a parameter."""
    wrong = {what: names for what, names in info.items() if names}
    assert not wrong, wrong


def logits(model: Any) -> Any:
    """Return the logits of a fixed text, computed in binary32 so that weights alone make the difference."""
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        return model(torch.arange(1, 33)[None] * 3 % SIZES["vocab_size"]).logits


def distance(a: Any, b: Any) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def tensors_of(folder: Path) -> dict[str, Any]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def values_of(checkpoint: Checkpoint, weight: QuantisedWeight) -> np.ndarray[Any, Any]:
    """Return what the reference decodes a stored weight to, [matrices, rows, columns]."""
    spelled = weight.format
    *stack, rows, cols = weight.shape

    def raw(row: int) -> np.ndarray[Any, Any]:
        spec = checkpoint.tensors.spec(checkpoint.tensors.names[row])
        with open(checkpoint.files[spec.file].path, "rb") as file:
            file.seek(spec.offset)
            return np.frombuffer(file.read(spec.nbytes), np.uint8)

    many = int(np.prod(stack, dtype=int))
    grid = scaled.grid_shape((rows, cols), spelled.rows, spelled.cols)
    item = spelled.scale.itemsize
    codes = raw(weight.codes).reshape(many, rows, -1)
    scales = raw(weight.scale).view(f"<u{item}").reshape(many, *grid)
    seconds = raw(weight.second).view("<f4") if weight.second >= 0 else [None]
    return np.stack(
        [
            scaled.decode(
                Scaled(
                    scaled.unpack(codes[e], spelled.codec, cols),
                    spelled.codec,
                    scales[e],
                    spelled.scale.name,
                    spelled.rows,
                    spelled.cols,
                    None if weight.second < 0 else float(seconds[e % len(seconds)]),
                    spelled.second,
                )
            )
            for e in range(many)
        ]
    )


def decoded(folder: Path, out: Path) -> Path:
    """Write a folder without quantisation: each weight as the reference decodes it, as bf16 of its binary32 value.

    gpt-oss stores its plain stacks the other way round than its blocks.
    """
    checkpoint = open_checkpoint(folder)
    found, wrong = recognise(checkpoint)
    assert not wrong
    assert found.weights
    parts = {checkpoint.tensors.names[row] for row in found.parts}
    plain = {n: t for n, t in tensors_of(folder).items() if n not in parts}
    for name, weight in found.weights.items():
        value = torch.from_numpy(values_of(checkpoint, weight)).float().bfloat16()
        value = value.transpose(1, 2) if weight.format.spelling.stacked_codes == "_blocks" else value
        plain[name] = (value if len(weight.shape) == 3 else value[0]).contiguous()
    out.mkdir()
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def bf16_of(values: np.ndarray[Any, Any]) -> Any:
    """Return values as a tensor, rounded once to bf16."""
    return torch.from_numpy(reference.encode(values, BF16)[0].view(np.int16)).view(torch.bfloat16)


def quantise_gpt_oss(folder: Path) -> None:
    """Turn a gpt-oss folder's stacks of experts into blocks and scales, by the reference."""
    tensors: dict[str, Any] = {}
    for name, tensor in tensors_of(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        stack = tensor.transpose(1, 2).double().numpy()  # [E, out, in]
        made = [scaled.quantise(matrix, MXFP4_OPENAI, 1, 32, "f8_e8m0") for matrix in stack]
        blocks = np.stack([scaled.pack(m.codes, "f4") for m in made])
        tensors[f"{name}_blocks"] = torch.from_numpy(blocks.reshape(*stack.shape[:2], -1, 16))
        tensors[f"{name}_scales"] = torch.from_numpy(np.stack([m.scales for m in made]))
    _replace(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]})


def quantise_fp8(folder: Path, *, theirs: bool) -> None:
    """Turn a folder's linear layers into fp8 in blocks, by transformers' quantiser or by the reference."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantiser = Fp8Quantize(SimpleNamespace(quantization_config=transformers.FineGrainedFP8Config()))
    tensors: dict[str, Any] = {}
    for name, tensor in tensors_of(folder).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
        elif theirs:
            tensors |= quantiser.convert({name: tensor})
        else:
            made = scaled.quantise(tensor.double().numpy(), DEEPGEMM, 128, 128, "f32")
            tensors[name] = torch.from_numpy(made.codes).view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.from_numpy(made.scales.view(np.float32))
    _replace(folder, tensors, config | {"modules_to_not_convert": ["lm_head", "mlp.gate"]})


def _replace(folder: Path, tensors: dict[str, Any], quantisation: dict[str, Any]) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
