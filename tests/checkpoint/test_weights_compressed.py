"""What compressed-tensors itself writes, config and tensors, is recognised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantised_folders import recognised

N, K = 256, 512
# scheme: (layout, shape of its scale, name of the format, its grid)
SCHEMES = {
    "FP8": ("float-quantized", (1,), "fp8-tensor", (0, 0)),
    "FP8_DYNAMIC": ("float-quantized", (N, 1), "fp8-channel", (1, 0)),
    "FP8_BLOCK": ("float-quantized", (2, 4), "fp8-block", (128, 128)),
    "NVFP4": ("nvfp4-pack-quantized", (N, K // 16), "nvfp4", (1, 16)),
    "NVFP4A16": ("nvfp4-pack-quantized", (N, K // 16), "nvfp4", (1, 16)),
    "MXFP4": ("mxfp4-pack-quantized", (N, K // 32), "mxfp4", (1, 32)),
    "MXFP8": ("mxfp8-quantized", (N, K // 32), "mxfp8", (1, 32)),
    "W4A16": ("pack-quantized", (N, K // 128), "int4", (1, 128)),
    "W4A16_ASYM": ("pack-quantized", (N, K // 128), "int4", (1, 128)),
}
DTYPES = {
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.uint8": "U8",
    "torch.int32": "I32",
    "torch.int64": "I64",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_library_writes(tmp_path: Path, scheme: str) -> None:
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    library = pytest.importorskip("compressed_tensors.quantization")
    layout, scale, name, grid = SCHEMES[scheme]
    arguments = library.preset_name_to_scheme(scheme, ["Linear"])
    config = library.QuantizationConfig(config_groups={"group_0": arguments}, format=layout, ignore=["lm_head"])
    state = {
        "weight": torch.ones(N, K, dtype=torch.bfloat16),
        "weight_scale": torch.full(scale, 0.5, dtype=torch.bfloat16),
    }
    if scheme.startswith("NVFP4"):
        state["weight_global_scale"] = torch.ones(1)
    if scheme == "W4A16_ASYM":
        state["weight_zero_point"] = torch.zeros(scale, dtype=torch.int8)
    written = compressors.BaseCompressor.get_value_from_registry(layout).compress(state, arguments)
    tensors = {f"up.{part}": (DTYPES[str(t.dtype)], tuple(t.shape)) for part, t in written.items()}

    found = recognised(tmp_path, tensors, json.loads(config.model_dump_json()))
    assert list(found.weights) == ["up.weight"]
    weight = found.weights["up.weight"]
    assert weight.shape == (N, K)
    assert (weight.format.name, weight.format.rows, weight.format.cols) == (name, *grid)
    assert weight.format.method == found.method == "compressed-tensors"
    assert weight.format.zero_points == (scheme == "W4A16_ASYM")
    assert len(found.parts) == len(tensors), "every tensor the library writes is a part of the weight"
    assert found.dynamic == (scheme not in ("FP8", "NVFP4"))
    assert found.ignored == ("lm_head",)
