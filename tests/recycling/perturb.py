"""Stands for fine-tuning where only what surrounds it matters: ``perturb.py START OUT INDEX`` copies a checkpoint and
flips the lowest bit of some of its bf16 values, which ones the index decides. Without a library, so that it is quick.

Environment: SLEEP (seconds before the work), FAIL (print that many lines and exit with 3), SPOIL (what is left:
nothing, deeper, other-family), ON_SIGNAL (seconds to go on after SIGINT or SIGTERM, then exit 0).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

FLIP = bytes(byte ^ 1 for byte in range(256))


def on_signal(number: int, _frame: object) -> None:
    print(f"told to stop by {signal.Signals(number).name}", flush=True)
    time.sleep(float(os.environ["ON_SIGNAL"]))
    print("stopped in order", flush=True)
    os._exit(0)


def perturb(path: Path, step: int) -> None:
    data = bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    data[begin :: 2 * step] = data[begin :: 2 * step].translate(FLIP)
    path.write_bytes(data)


def main(start: Path, out: Path, index: int) -> None:
    if "ON_SIGNAL" in os.environ:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
    out.mkdir(parents=True, exist_ok=True)
    (out / "half-written").write_text("")
    print(f"working on {start.name}", flush=True)
    time.sleep(float(os.environ.get("SLEEP", 0)))
    for line in range(int(os.environ.get("FAIL", 0))):
        print(f"line {line}", file=sys.stderr)
    if "FAIL" in os.environ:
        (out / "left-behind").write_text("")
        sys.exit(3)
    spoil = os.environ.get("SPOIL")
    if spoil == "nothing":
        shutil.rmtree(out)
        return
    target = out / "checkpoint-8" if spoil == "deeper" else out
    shutil.copytree(start, target, dirs_exist_ok=True)
    (out / "half-written").unlink()
    for path in target.glob("*.safetensors"):
        perturb(path, index + 1)
    if spoil == "other-family":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
