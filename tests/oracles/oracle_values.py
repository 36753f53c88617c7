"""What the comparisons with independent libraries share: hard values, conversions to torch, equality by bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from paramdelta import reference
from paramdelta.dtypes import BF16, DType

_E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
FP8_TIES = (_E4M3[1:] + _E4M3[:-1]) / 2  # the middles between neighbouring codes
FP4_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
INT4_TIES = np.arange(-7, 7) + 0.5
LARGEST = {id(FP8_TIES): 448.0, id(FP4_TIES): 6.0, id(INT4_TIES): 7.5}


def need(module: str) -> Any:
    """Return an oracle, or skip with the reason: what is not installed cannot be compared with."""
    return pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed: nothing to compare with")


def edge_maxima(largest: float, lowest: int = -149, highest: int = 127) -> NDArray[np.float32]:
    """Return maxima of units: largest · 2^e and its neighbours in binary32 for every e, multiples of the codes' values,
    random ones, 0, the smallest and largest of binary32."""
    rng = np.random.default_rng(5)
    with np.errstate(over="ignore", under="ignore"):
        powers = np.float32(largest) * np.ldexp(np.float32(1), np.arange(lowest, highest + 1)).astype(np.float32)
        edges = np.concatenate([np.nextafter(powers, np.float32(0)), powers, np.nextafter(powers, np.float32(np.inf))])
        scattered = (2.0 ** rng.uniform(lowest, highest, 1500)).astype(np.float32)
        usual = np.abs(rng.normal(size=1500)).astype(np.float32)
    ends = np.array([0, 2.0**-149, 2.0**-127, 2.0**-126, 1, largest], np.float32)
    out = np.concatenate([edges, scattered, usual, ends])
    return out[np.isfinite(out) & (out < np.float32(2.0**highest))]


def units(maxima: NDArray[np.float32], size: int, ties: NDArray[np.float64], seed: int = 0) -> NDArray[np.float32]:
    """Return a matrix with a unit [1, size] for each maximum: random fractions of it, values whose quotient by the
    scale is a middle between codes or up to 2 steps of binary32 beside one, zeros, and the maximum once."""
    rng = np.random.default_rng(seed)
    shape = (len(maxima), size)
    fraction = rng.uniform(-1, 1, shape)
    middle = rng.choice(ties, shape) / LARGEST[id(ties)] * rng.choice([-1, 1], shape)
    with np.errstate(under="ignore"):
        x = (fraction * maxima[:, None]).astype(np.float32)
        near = (middle * maxima[:, None].astype(np.float64)).astype(np.float32)
        for step in (1, 2):
            near = np.where(rng.random(shape) < 0.4, np.nextafter(near, np.float32(0 if step == 1 else 3e38)), near)
    x = np.where(rng.random(shape) < 0.6, near, x).clip(-maxima[:, None], maxima[:, None])
    x[rng.random(shape) < 0.05] = 0.0
    where = rng.integers(0, size, len(maxima))
    x[np.arange(len(maxima)), where] = maxima * rng.choice(np.array([-1, 1], np.float32), len(maxima))
    return x + np.float32(0)  # no −0: what libraries do with its sign differs


def group_weights(power: int, spread: float, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a matrix of groups of 16 for two levels of scales. Its amax is near 2^power; the groups' maxima lie up to
    ``spread`` binades lower, half of them where the group's scale is a middle between two e4m3 values or beside one."""
    rng = np.random.default_rng(power + 200)
    count = shape[0] * shape[1] // 16
    top = np.float32(2.0**power * rng.uniform(1, 2))
    scattered = top * 2.0 ** -rng.uniform(0, spread, count)
    middles = FP8_TIES[448 * 2.0**-spread < FP8_TIES] if spread else np.array([448.0])
    maxima = np.where(rng.random(count) < 0.5, scattered, rng.choice(middles, count) / 448 * top).astype(np.float32)
    for toward in (0, 1e38):
        maxima = np.where(rng.random(count) < 0.4, np.nextafter(maxima, np.float32(toward)), maxima).clip(0, top)
    maxima[0], maxima[5] = top, 0
    return units(maxima, 16, FP4_TIES, seed=power + 300).reshape(shape)


def as_bf16(x: NDArray[Any]) -> NDArray[np.float32]:
    """Return x rounded to bf16."""
    return rounded(x.astype(np.float64), BF16).astype(np.float32)


def tensor(x: NDArray[Any]) -> Any:
    """Return a torch tensor of the array's elements."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


def typed(codes: NDArray[Any], dtype: str) -> Any:
    """Return a torch tensor of this dtype with these bits."""
    import torch

    signed = np.ascontiguousarray(codes).view(f"i{codes.dtype.itemsize}")
    return torch.from_numpy(signed).view(getattr(torch, dtype))


def bits(t: Any) -> NDArray[Any]:
    """Return the bits of a torch tensor as unsigned integers."""
    import torch

    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    out = t.detach().contiguous().view(signed).numpy()
    return out.view(f"u{t.element_size()}")


def same(got: NDArray[Any], want: NDArray[Any], what: str) -> None:
    """Assert equality of codes or values (NaN equal to NaN), naming the first place that differs."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    wrong = ~((got == want) | ((got != got) & (want != want)))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {got.size} differ, {at} first: {got[at]!r}, not {want[at]!r}"
        )


def rounded(values: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    """Return values rounded once to a type."""
    return reference.decode(reference.encode(values, dtype)[0], dtype)
