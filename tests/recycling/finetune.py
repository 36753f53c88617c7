"""Fine-tunes a checkpoint with a few steps of SGD: ``finetune.py START OUT``. With ``--stop-parent`` the process that
runs it is killed once the first step is taken."""

from __future__ import annotations

import os
import signal
import sys

import torch
import transformers


def main(start: str, out: str, *, stop_parent: bool) -> None:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    text = torch.arange(24)[None] % 7
    losses = []
    for _ in range(8):
        loss = model(text, labels=text).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
        if stop_parent:
            os.kill(os.getppid(), signal.SIGKILL)
            sys.exit(1)
    print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:3], stop_parent="--stop-parent" in sys.argv)
