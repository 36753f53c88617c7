"""The obvious torch script on a GPU: new_base + (post - base) in float32, tensors loaded to the device, one output file
per file of new_base. Run as ``python torch_gpu_script.py POST BASE NEW_BASE OUT [DEVICE]``."""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

post_dir, base_dir, new_dir, out_dir = map(Path, sys.argv[1:5])
device = sys.argv[5] if len(sys.argv) > 5 else "cuda:0"


def open_all(folder: Path, stack: ExitStack) -> dict:
    """Map each tensor's name to the opened file that holds it."""
    files = [
        stack.enter_context(safe_open(f, framework="pt", device=device)) for f in sorted(folder.glob("*.safetensors"))
    ]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


out_dir.mkdir(parents=True)
with ExitStack() as stack:
    post, base = open_all(post_dir, stack), open_all(base_dir, stack)
    for shard in sorted(new_dir.glob("*.safetensors")):
        merged = {}
        with safe_open(shard, framework="pt", device=device) as new_base:
            for name in new_base.keys():  # noqa: SIM118
                value = new_base.get_tensor(name)
                delta = post[name].get_tensor(name).to(torch.float32) - base[name].get_tensor(name).to(torch.float32)
                merged[name] = (value.to(torch.float32) + delta).to(value.dtype).cpu()
        save_file(merged, out_dir / shard.name, metadata={"format": "pt"})
for file in new_dir.iterdir():
    if file.suffix != ".safetensors":
        shutil.copy(file, out_dir / file.name)
