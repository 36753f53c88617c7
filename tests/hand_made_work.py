"""Work for the engine made by hand, and what must come of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paramdelta import dtypes, reference
from paramdelta.plan.work import SPAN, TERM, Work

RNG = np.random.default_rng(7)


class WorkBuilder:
    """Lays tensors out in input files and output files, and remembers what must come out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: list[bytearray] = []
        self.outputs: list[bytearray] = []
        self.spans: list[tuple[object, ...]] = []
        self.terms: list[tuple[object, ...]] = []
        self.tensors = 0

    def store(self, file: int, dtype: dtypes.DType, count: int) -> tuple[int, int, np.ndarray]:
        """Append random finite elements to an input file; return (file, offset, codes)."""
        while len(self.inputs) <= file:
            self.inputs.append(bytearray(RNG.bytes(int(RNG.integers(1, 30)))))
        values = RNG.standard_normal(count)
        codes, _ = reference.encode(values, dtype)
        offset = len(self.inputs[file])
        self.inputs[file] += codes.tobytes()
        return file, offset, codes

    def add(
        self,
        out_file: int,
        out: dtypes.DType,
        count: int,
        terms: list[tuple[dtypes.DType, dtypes.DType | None, float]],
        new: dtypes.DType | None = None,
    ) -> None:
        """Append a tensor with the given (post, base, alpha) terms; a dtype of None is an operand of zeros."""
        while len(self.outputs) <= out_file:
            self.outputs.append(bytearray(b"header"))
        new_file, new_offset, new_codes = self.store(0, new, count) if new else (-1, 0, None)
        first = len(self.terms)
        reference_terms = []
        for post, base, alpha in terms:
            post_file, post_offset, post_codes = self.store(1, post, count)
            base_file, base_offset, base_codes = self.store(2, base, count) if base else (-1, 0, None)
            base = base or post
            self.terms.append((alpha, post_offset, base_offset, post_file, base_file, post.code, base.code, b""))
            reference_terms.append(
                reference.Term(reference.Array(post_codes, post), reference.Array(base_codes, base), alpha)
            )
        new = new or out
        merged = reference.merge(reference.Array(new_codes, new), reference_terms, out, count)
        expected = self.outputs[out_file]
        self.spans.append(
            (
                len(expected),
                count,
                new_offset,
                self.tensors,
                out_file,
                new_file,
                first,
                len(terms),
                out.code,
                new.code,
                b"",
            )
        )
        expected += merged.codes.tobytes()
        self.tensors += 1

    def copy(self, out_file: int, count: int) -> None:
        """Append bytes that are carried over."""
        while len(self.outputs) <= out_file:
            self.outputs.append(bytearray(b"header"))
        if not self.inputs:
            self.inputs.append(bytearray())
        data, offset = RNG.bytes(count), len(self.inputs[0])
        self.inputs[0] += data
        u8 = dtypes.BY_NAME["u8"].code
        self.spans.append((len(self.outputs[out_file]), count, offset, self.tensors, out_file, 0, 0, 0, u8, u8, b""))
        self.outputs[out_file] += data
        self.tensors += 1

    def build(self) -> Work:
        paths = []
        for i, data in enumerate(self.inputs):
            path = self.folder / f"in{i}"
            path.write_bytes(data)
            paths.append(path)
        return Work(
            inputs=tuple(paths),
            outputs=tuple((f"out{i}", len(o)) for i, o in enumerate(self.outputs)),
            headers=tuple(b"header" for _ in self.outputs),
            spans=np.array(self.spans, SPAN),
            terms=np.array(self.terms, TERM),
        )


def sample(folder: Path) -> WorkBuilder:
    """Two output files with large, small, empty, copied, mixed and zero-extended tensors."""
    bf16, f16, f32, f64, e4m3, e5m2 = dtypes.MERGE_DTYPES
    work = WorkBuilder(folder)
    work.add(0, bf16, 300_001, [(bf16, bf16, 1.0)], bf16)
    for count in range(40):
        work.add(0, bf16, count, [(bf16, bf16, 1.0)], bf16)
    work.copy(0, 77_777)
    for _ in range(3):
        work.copy(0, 3)
    work.add(0, f32, 5_000, [(bf16, f16, 0.7), (e4m3, e5m2, -1.5)], f64)
    work.add(0, bf16, 9_999, [(bf16, None, 1.0)], None)
    work.add(0, bf16, 777, [(bf16, bf16, 1.0)], None)
    work.add(1, f16, 100_000, [(f16, f16, 1.0)], f16)
    work.add(1, e4m3, 12_345, [(e4m3, e4m3, 0.5)], e4m3)
    work.add(1, bf16, 50_000, [], f32)
    work.add(1, f32, 70_000, [(f32, f32, 1.0)], f32)
    return work
