"""Singular values of delta matrices: all of them where the matrix is small, else the largest ones by Lanczos steps.

Golub-Kahan bidiagonalisation (SIAM J. Numer. Anal. 2, 1965) builds orthonormal U_j, V_j and a bidiagonal B_j with
A V_j = U_j B_j from products with A and Aᵀ alone. The singular values of B_j approach those of A from below, the
largest first, and the last row of B_j's left singular vectors says how far each is off: |σ − σ̂| ≤ β_j |u_j|. Every
vector is made orthogonal to all before it, twice, in binary64; the products are binary32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from paramdelta.analysis.loads import Load, Survey
from paramdelta.analysis.measures import Spectrum
from paramdelta.analysis.reading import Files, Reader, Stored
from paramdelta.dtypes import DTYPES
from paramdelta.engine import EngineOptions

SMALL = 384  # rows or columns up to which all singular values are computed
# Of the largest singular value: below what rounding weights to bf16 puts into a delta, and beyond what a plot shows.
ACCURACY = 1e-4
MOST_STEPS = 300
_SEED = 20
_NOTHING = 1e-6  # of the largest entry: the rounding of products in binary32

Matrix = NDArray[np.float32]
Vectors = NDArray[np.float64]


def singular_values(matrix: Matrix, count: int) -> tuple[tuple[float, ...], float]:
    """Return the ``count`` largest singular values of a matrix, and a bound of their error but for rounding.

    Up to 384 rows or columns they are LAPACK's, computed in binary64. Beyond that, Lanczos steps end when every wanted
    value is within 1e-4 of the largest one, or after 300; the bound says what was reached. Products in binary32 add
    about 1e-6 of the largest value (a sum of n products errs by √n · 2^-24 of its size, n below 10⁵).
    """
    if min(matrix.shape) <= SMALL:
        values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:count]
        return tuple(values.tolist()), 0.0
    return _by_lanczos(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, count)


def _by_lanczos(matrix: Matrix, count: int) -> tuple[tuple[float, ...], float]:
    rows, cols = matrix.shape
    scale = float(np.abs(matrix).max(initial=0.0))
    if scale == 0.0:
        return (0.0,) * count, 0.0
    steps = min(MOST_STEPS, cols)
    left, right = np.zeros((steps, rows)), np.zeros((steps + 1, cols))
    diagonal, above = np.zeros(steps), np.zeros(steps)
    random = np.random.default_rng(_SEED)
    start = random.standard_normal(cols)
    right[0] = start / np.linalg.norm(start)
    values, error = np.zeros(count), np.inf
    for j in range(steps):
        u = _product(matrix, right[j], scale)
        diagonal[j] = _orthonormal(u, left[:j], diagonal.max(), random)
        left[j] = u
        v = _product(matrix.T, u, scale)
        above[j] = _orthonormal(v, right[: j + 1], diagonal.max(), random)
        right[j + 1] = v
        used = j + 1
        if used != steps and (used < count or used % 10):
            continue
        bidiagonal = np.diag(diagonal[:used]) + np.diag(above[: used - 1], 1)
        u_of, found, _ = np.linalg.svd(bidiagonal)
        values, error = found[:count], float(np.max(above[j] * np.abs(u_of[-1, :count])))
        if error <= ACCURACY * found[0]:
            break
    return tuple((values * scale).tolist()), error * scale


def _product(matrix: Matrix, vector: Vectors, scale: float) -> Vectors:
    product: Vectors = (matrix @ vector.astype(np.float32)).astype(np.float64) / scale
    return product


def _orthonormal(vector: Vectors, basis: Vectors, largest: float, random: np.random.Generator) -> float:
    """Make ``vector`` orthogonal to the rows of ``basis`` and of length 1, in place; return the length it had.

    Where nothing but rounding is left, against the ``largest`` length so far, the basis has what the steps can reach
    from their start: they go on from a random vector, and the length is 0.
    """
    length = _orthogonal(vector, basis)
    if length > _NOTHING * largest:
        vector /= length
        return length
    vector[:] = random.standard_normal(len(vector))
    vector /= _orthogonal(vector, basis) or 1.0
    return 0.0


def _orthogonal(vector: Vectors, basis: Vectors) -> float:
    for _ in range(2):
        vector -= basis.T @ (basis @ vector)
    return float(np.linalg.norm(vector))


def spectra(
    survey: Survey, tensors: dict[int, tuple[int, ...]], count: int, options: EngineOptions
) -> Iterator[tuple[int, Spectrum]]:
    """Yield (tensor, spectrum) of every delta of each of ``tensors``, which are matrices of the given shapes. One
    tensor at a time is in memory, and one delta of it for each that there are."""
    loads: dict[int, list[Load]] = {}
    for load in survey.loads():
        if load.tensor in tensors:
            loads.setdefault(load.tensor, []).append(load)
    files = Files(survey, options)
    with files.opened():
        reader = Reader(survey, files, options)
        for tensor, parts in loads.items():
            for k, matrix in _matrices(survey, reader, parts, tensors[tensor]).items():
                values, error = singular_values(matrix, min(count, *matrix.shape))
                square = float(np.sum(np.square(matrix, dtype=np.float64)))
                yield tensor, Spectrum(delta=k, values=values, error=error, frobenius_squared=square)


def _matrices(survey: Survey, reader: Reader, parts: list[Load], shape: tuple[int, ...]) -> dict[int, Matrix]:
    """Return the deltas of a tensor; what is not finite is 0, and so is what is not compared."""
    found: dict[int, Matrix] = {}
    for load in parts:
        operands = reader.operands(load)
        base_of = [len(load.comparison.deltas) + base for base in load.comparison.bases]
        for at, (k, base) in enumerate(zip(load.comparison.deltas, base_of, strict=True)):
            with np.errstate(all="ignore"):
                delta = _values(operands[at]) - _values(operands[base])
            delta[~np.isfinite(delta)] = 0.0
            flat = found.setdefault(k, np.zeros(shape, np.float32)).reshape(-1)
            if not load.of_region:
                start = survey.place(load, 0)
                flat[start : start + load.size] = delta
                continue
            for row, line in enumerate(delta.reshape(load.size, -1)):
                start = survey.place(load, row * line.size)
                flat[start : start + line.size] = line
    return found


def _values(stored: Stored) -> NDArray[np.float32]:
    data, code = stored
    return data.view(DTYPES[code].to_numpy()).astype(np.float32)
