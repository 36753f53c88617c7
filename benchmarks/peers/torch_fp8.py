"""Torch doing the steps of an fp8 merge in blocks of 128×128: dequantise to float32, add the delta, requantise. Run as
``python torch_fp8.py POST BASE NEW_BASE OUT``."""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 128


def open_all(folder: Path, stack: ExitStack) -> dict:
    """Map each tensor's name to the opened file that holds it."""
    files = [stack.enter_context(safe_open(f, framework="pt")) for f in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def value(files: dict, name: str) -> torch.Tensor:
    """Return a tensor as float32, times its scales where it has some."""
    tensor = files[name].get_tensor(name).to(torch.float32)
    if f"{name}_scale_inv" not in files:
        return tensor
    scales = files[f"{name}_scale_inv"].get_tensor(f"{name}_scale_inv")
    rows, cols = tensor.shape
    wide = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return tensor.mul_(wide)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales: amax / 448 of each block."""
    rows, cols = x.shape
    down, across = -(-rows // BLOCK), -(-cols // BLOCK)
    padded = torch.nn.functional.pad(x, (0, across * BLOCK - cols, 0, down * BLOCK - rows))
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(1e-4) / 448.0
    codes = (blocks * (1.0 / scales)).to(torch.float8_e4m3fn).view(down * BLOCK, across * BLOCK)
    return codes[:rows, :cols].contiguous(), scales.view(down, across)


post_dir, base_dir, new_dir, out_dir = map(Path, sys.argv[1:5])
out_dir.mkdir(parents=True)
with ExitStack() as stack:
    post, base, new_base = (open_all(folder, stack) for folder in (post_dir, base_dir, new_dir))
    for shard in sorted(new_dir.glob("*.safetensors")):
        merged = {}
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith("_scale_inv")]  # noqa: SIM118
        for name in names:
            result = value(new_base, name) + (value(post, name) - value(base, name))
            if f"{name}_scale_inv" in new_base:
                merged[name], merged[f"{name}_scale_inv"] = quantised(result)
            else:
                merged[name] = result.to(new_base[name].get_tensor(name).dtype)
        save_file(merged, out_dir / shard.name, metadata={"format": "pt"})
for other in new_dir.iterdir():
    if other.suffix != ".safetensors":
        shutil.copy(other, out_dir / other.name)
