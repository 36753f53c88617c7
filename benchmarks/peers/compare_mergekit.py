"""Compares a merge by mergekit with ours, element by element, and explains each difference by the two recipes.

``python -m benchmarks.peers.compare_mergekit OURS THEIRS [--post DIR --base DIR --new-base DIR]`` for bf16 folders.
Ours is binary64 throughout, rounded once to bf16. mergekit ``linear`` adds new_base + post - base in this order in
binary32 and rounds that sum to bf16: where the binary32 sum is inexact and lands on a tie, the two may differ by one
unit in the last place. With the three inputs given, both recipes are evaluated for every element that differs.
Exit code 1 if names, shapes or dtypes differ, or if a difference is not explained (``task_arithmetic`` rounds the
deltas to bf16, so its differences are not).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Codes = npt.NDArray[np.uint16]


class Folder:
    """A checkpoint folder opened by the safetensors library: tensors by name, whatever file they lie in."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.files: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(file, framework="np"))
            self.files |= dict.fromkeys(opened.keys(), opened)

    def values(self, name: str) -> npt.NDArray[Any]:
        tensor = self.files[name].get_tensor(name)
        if tensor.dtype != ml_dtypes.bfloat16:
            raise SystemExit(f"{name}: expected bfloat16, got {tensor.dtype}")
        return np.asarray(tensor).reshape(-1)


@dataclass
class Tally:
    """How the elements compare: counts over all tensors."""

    elements: int = 0
    equal: int = 0
    zero_sign: int = 0  # +0 against -0
    by_one: int = 0  # one unit in the last place
    by_more: int = 0
    ours_is_contract: int = 0  # of the differing: our bits are the binary64 recipe's
    theirs_is_binary32: int = 0  # of the differing: their bits are the binary32 recipe's


def ordered(codes: Codes) -> npt.NDArray[np.int32]:
    """Map bf16 codes to integers in the order of their values: neighbours differ by 1, both zeros are 0."""
    magnitude = (codes & 0x7FFF).astype(np.int32)
    return np.where(codes & 0x8000, -magnitude, magnitude)


def bf16_once(values: npt.NDArray[np.float64]) -> Codes:
    """Round binary64 to bf16 once: binary32 by rounding to odd (which keeps ties apart), then to nearest even."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    too_far = np.abs(back) > np.abs(values)
    down = np.where(too_far, bits - 1, bits)  # truncated towards zero
    odd = np.where(back != values, down | 1, bits).astype(np.uint32)
    return ((odd + 0x7FFF + ((odd >> 16) & 1)) >> 16).astype(np.uint16)


def contract(post: npt.NDArray[Any], base: npt.NDArray[Any], new_base: npt.NDArray[Any]) -> Codes:
    """new_base + (post - base) in binary64, rounded once; new_base's own bits where the delta is zero."""
    delta = post.astype(np.float64) - base.astype(np.float64)
    rounded = bf16_once(new_base.astype(np.float64) + delta)
    return np.where(delta == 0, new_base.view(np.uint16), rounded)


def binary32(post: npt.NDArray[Any], base: npt.NDArray[Any], new_base: npt.NDArray[Any]) -> Codes:
    """(new_base + post) - base, each step rounded to binary32, then to bf16: mergekit's linear."""
    total = (new_base.astype(np.float32) + post.astype(np.float32)) - base.astype(np.float32)
    return total.astype(ml_dtypes.bfloat16).view(np.uint16)


def compare(ours: Folder, theirs: Folder, inputs: tuple[Folder, Folder, Folder] | None) -> Tally:
    """Count over all tensors; ``inputs`` are post, base and new_base."""
    tally = Tally()
    for name in ours.files:
        a, b = ours.values(name).view(np.uint16), theirs.values(name).view(np.uint16)
        if a.size != b.size:
            raise SystemExit(f"{name}: {a.size} elements in ours, {b.size} in theirs")
        differs = np.flatnonzero(a != b)
        tally.elements += a.size
        tally.equal += a.size - differs.size
        if differs.size == 0:
            continue
        a, b = a[differs], b[differs]
        distance = np.abs(ordered(a) - ordered(b))
        tally.zero_sign += int((distance == 0).sum())
        tally.by_one += int((distance == 1).sum())
        tally.by_more += int((distance > 1).sum())
        if inputs is not None:
            p, q, n = (folder.values(name)[differs] for folder in inputs)
            tally.ours_is_contract += int((contract(p, q, n) == a).sum())
            tally.theirs_is_binary32 += int((binary32(p, q, n) == b).sum())
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    for role in ("post", "base", "new-base"):
        parser.add_argument(f"--{role}", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    given = (options.post, options.base, options.new_base)
    with ExitStack() as stack:
        ours, theirs = Folder(options.ours, stack), Folder(options.theirs, stack)
        if ours.files.keys() != theirs.files.keys():
            unpaired = sorted(ours.files.keys() ^ theirs.files.keys())
            print(f"names differ: {len(unpaired)} are in one of the two only, such as {unpaired[:3]}")
            return 1
        p, b, n = (Folder(folder, stack) if folder else None for folder in given)
        inputs = (p, b, n) if p and b and n else None
        tally = compare(ours, theirs, inputs)
    differing = tally.elements - tally.equal
    print(f"tensors                {len(ours.files):>14,}")
    print(f"elements               {tally.elements:>14,}")
    print(f"equal bits             {tally.equal:>14,}  ({tally.equal / max(1, tally.elements):.9%})")
    print(f"sign of zero only      {tally.zero_sign:>14,}")
    print(f"one unit in last place {tally.by_one:>14,}")
    print(f"more than one unit     {tally.by_more:>14,}")
    if inputs is None or differing == 0:
        return 0
    print(f"of the {differing:,} that differ:")
    print(f"  ours is the binary64 sum rounded once       {tally.ours_is_contract:>14,}")
    print(f"  theirs is the binary32 sum, rounded again   {tally.theirs_is_binary32:>14,}")
    return 0 if tally.ours_is_contract == differing == tally.theirs_is_binary32 else 1


if __name__ == "__main__":
    sys.exit(main())
