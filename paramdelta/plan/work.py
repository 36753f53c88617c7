"""The work a plan hands to the engine: every byte of the output files' data, as columns, never as objects per tensor.

A *span* is a run of consecutive elements of one output tensor that are all computed the same way:

    out[i] = encode(new_base[i] + Σ_k alpha_k · (post_k[i] − base_k[i]))        for i in 0 … count − 1

with the K terms in ``terms[first_term : first_term + n_terms]``. K = 0 and equal dtypes is a copy. A file number of −1
stands for an operand of zeros (vocabulary rows that a checkpoint lacks). Most tensors are one span.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Layouts are those of `Span` and `TermRef` in csrc/io/work.hpp; the extension checks the item sizes and the bounds.
SPAN = np.dtype(
    [
        ("out_offset", "<i8"),  # absolute byte offset in the output file
        ("count", "<i8"),  # elements
        ("new_offset", "<i8"),  # absolute byte offset of new_base's first element
        ("tensor", "<i4"),  # index into Plan.names, for the counts
        ("out_file", "<i4"),  # index into Work.outputs
        ("new_file", "<i4"),  # index into Work.inputs, −1: zeros
        ("first_term", "<i4"),
        ("n_terms", "<i4"),
        ("out_dtype", "u1"),  # DType.code
        ("new_dtype", "u1"),
        ("_pad", "V2"),
    ]
)
TERM = np.dtype(
    [
        ("alpha", "<f8"),
        ("post_offset", "<i8"),
        ("base_offset", "<i8"),
        ("post_file", "<i4"),
        ("base_file", "<i4"),
        ("post_dtype", "u1"),
        ("base_dtype", "u1"),
        ("_pad", "V6"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Columns of spans and terms, and the files they refer to.

    ``inputs`` are the input files by number; ``outputs`` the output files by number, as (name, size in bytes);
    ``headers`` the bytes each output file starts with. ``spans`` is sorted by (out_file, out_offset) and covers every
    byte behind the headers exactly once.
    """

    inputs: tuple[Path, ...]
    outputs: tuple[tuple[str, int], ...]
    headers: tuple[bytes, ...]
    spans: np.ndarray[Any, np.dtype[np.void]]
    terms: np.ndarray[Any, np.dtype[np.void]]
