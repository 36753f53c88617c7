"""Everything else: mixed dtypes, several terms, any alpha, zeros in an operand's place, conversions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_check import apart, check, equal, run, special
from kernel_values import adversarial, cross, uniform, weights

from paramdelta import reference
from paramdelta.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGE_DTYPES, DType

ALPHAS = [1.0, 0.7, -1.0, 1 / 3, 0.0, 2.0**-40, 1e-310, 1e300, 5e-324]


def ids(value: object) -> str:
    return value.name if isinstance(value, DType) else str(value)


def mixture(rng: np.random.Generator, dtype: DType, size: int) -> np.ndarray:
    """Codes of which some are adversarial, some weights, some anything; in the first half, nothing large or odd."""
    codes = np.concatenate(
        [rng.choice(adversarial(dtype), size), uniform(rng, dtype, size), weights(rng, dtype, size)[0]]
    )
    tame = codes[np.abs(reference.decode(codes, dtype)) < 50]
    return np.concatenate([rng.choice(tame, size // 2), rng.choice(codes, size - size // 2)])


def test_every_triple_of_f8_e4m3(kernels: str) -> None:
    """All 256³ of them. The reference is asked once for each new_base and difference of codes."""
    codes = np.arange(256, dtype=np.uint8)
    post, base = cross(codes, codes)
    kind = F8_E4M3
    for new in range(256):
        new_base = reference.Array(np.full(65536, new, np.uint8), kind)
        terms = [reference.Term(reference.Array(post, kind), reference.Array(base, kind))]
        if new not in _E4M3:
            want = reference.merge(new_base, terms, kind)
            _E4M3[new] = apart(new_base, terms, want, special(new_base, terms, want, kind))
        new_base, terms, want = _E4M3[new]
        equal(run(new_base, terms, kind, kernels=kernels), want, new_base, terms)


_E4M3: dict[int, tuple[reference.Array, list[reference.Term], reference.Merged]] = {}


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F8_E5M2, F64], ids=ids)
@pytest.mark.parametrize("alpha", [0.7, -1.0])
def test_adversarial_products(kernels: str, dtype: DType, alpha: float) -> None:
    codes = adversarial(dtype)
    codes = codes[:: max(1, codes.size // 48)]
    post, base, new_base = cross(codes, codes, codes)
    new, terms = (
        reference.Array(new_base, dtype),
        [reference.Term(reference.Array(post, dtype), reference.Array(base, dtype), alpha)],
    )
    want = reference.merge(new, terms, dtype)
    new, terms, want = apart(new, terms, want, special(new, terms, want, dtype))
    check(new, terms, dtype, kernels=kernels, want=want)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(MERGE_DTYPES, MERGE_DTYPES)), ids=ids)
def test_every_pair_of_dtypes(kernels: str, source: DType, target: DType) -> None:
    rng = np.random.default_rng([source.code, target.code])
    arrays = [reference.Array(mixture(rng, source, 6000), source) for _ in range(3)]
    check(arrays[2], [reference.Term(arrays[0], arrays[1], 0.7)], target, kernels=kernels)
    check(arrays[2], [reference.Term(arrays[0], arrays[1])], target, kernels=kernels)
    check(arrays[2], [], target, kernels=kernels)


@pytest.mark.parametrize("n_terms", [1, 2, 3, 4])
def test_mixed_operands(kernels: str, n_terms: int) -> None:
    rng = np.random.default_rng(n_terms)
    for _ in range(30):
        size = int(rng.integers(1, 3000))
        kinds = [MERGE_DTYPES[int(rng.integers(6))] for _ in range(2 * n_terms + 2)]
        arrays = [reference.Array(mixture(rng, kind, size), kind) for kind in kinds]
        terms = [reference.Term(arrays[2 * k], arrays[2 * k + 1], float(rng.choice(ALPHAS))) for k in range(n_terms)]
        check(arrays[-1], terms, arrays[-2].dtype, kernels=kernels)


@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alphas(kernels: str, dtype: DType, alpha: float) -> None:
    rng = np.random.default_rng(dtype.code)
    post, base, new_base = (reference.Array(mixture(rng, dtype, 4000), dtype) for _ in range(3))
    check(new_base, [reference.Term(post, base, alpha)], dtype, kernels=kernels)
    check(new_base, [reference.Term(post, base, alpha), reference.Term(base, post, 0.5)], dtype, kernels=kernels)


@pytest.mark.parametrize("zeros", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=ids)
def test_operands_of_zeros(kernels: str, dtype: DType, zeros: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(3)
    arrays = [reference.Array(None if z else mixture(rng, dtype, 1500), dtype) for z in zeros]
    for alpha in (1.0, 0.5):
        check(arrays[2], [reference.Term(arrays[0], arrays[1], alpha)], dtype, kernels=kernels, count=1500)


@pytest.mark.parametrize("dtype", [d for d in MERGE_DTYPES if d != F64], ids=ids)  # f64 rounds nothing
def test_encode_near_every_boundary(kernels: str, dtype: DType) -> None:
    """The middle of every two neighbouring codes (or of many), one step of binary64 to both sides, tiny offsets."""
    form = reference.FORMATS[dtype.name]
    count = form.largest + 1
    codes = (
        np.arange(count, dtype=np.uint64) if count <= 1 << 16 else np.random.default_rng(5).integers(0, count, 1 << 16)
    )
    low = reference.decode(codes.astype(reference.code_type(dtype)), dtype)
    quantum = np.ldexp(1.0, np.maximum(np.frexp(low)[1] - 1, form.emin) - form.mantissa)
    middle = low + quantum / 2
    values = [low, middle, np.nextafter(middle, np.inf), np.nextafter(middle, 0.0), middle * (1 + 2.0**-30)]
    values += [
        middle * (1 - 2.0**-30),
        np.nextafter(low, np.inf),
        np.nextafter(low, 0.0),
        low + quantum * 2.0**-40,
    ]
    every = np.concatenate([*values, *(-v for v in values)])
    new_base = reference.Array(every.view(np.uint64), F64)
    want = reference.merge(new_base, [], dtype)
    new_base, _, want = apart(new_base, [], want, special(new_base, [], want, dtype))
    check(new_base, [], dtype, kernels=kernels, want=want)


def test_counts_of_overflow(kernels: str) -> None:
    """448 + 16 is the last value that f8_e4m3 does not count; 65520, the first of f16."""
    for dtype, values, overflow, inf in (
        (F8_E4M3, [448.0, 464.0, np.nextafter(464.0, 500.0), -480.0, np.inf, -np.inf], 4, 0),
        (F16, [65504.0, np.nextafter(65520.0, 0.0), 65520.0, -65520.0, np.inf, 1e300], 3, 1),
        (F8_E5M2, [57344.0, np.nextafter(61440.0, 0.0), 61440.0, -61440.0, -np.inf, 1.0], 2, 1),
        (F32, [3.4028234663852886e38, 3.4028235677973366e38, -1e39, np.inf, 0.0, 1.0], 2, 1),
    ):
        new_base = reference.Array(np.array(values).view(np.uint64), F64)
        merged = run(new_base, [], dtype, kernels=kernels)
        assert (merged.nan, merged.inf, merged.overflow) == (0, inf, overflow), dtype.name
        check(new_base, [], dtype, kernels=kernels)
