"""Work with variants, given to the engine by hand: the outputs of separate runs, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made_work import sample

from paramdelta import engine
from paramdelta.engine import EngineOptions
from paramdelta.plan.work import EXTENT, Work
from paramdelta.segments import ITEMS, cut

ALPHAS = (0.7, 1.0, 0.0, -3.25)


def build(folder: Path) -> tuple[Work, int]:
    """Return work of all kinds, and ask for the checksum of every span."""
    builder = sample(folder)
    work = builder.build()
    extents = np.zeros(len(work.spans), EXTENT)
    for column, of_span in (("begin", "out_offset"), ("file", "out_file"), ("tensor", "tensor")):
        extents[column] = work.spans[of_span]
    extents["end"] = extents["begin"] + work.spans["count"] * ITEMS[work.spans["out_dtype"]]
    return replace(work, extents=extents), builder.tensors


def with_alpha(work: Work, alpha: float) -> Work:
    terms = work.terms.copy()
    terms["alpha"] = alpha
    return replace(work, terms=terms)


def in_variants(work: Work) -> Work:
    alphas = np.tile(np.array(ALPHAS[1:]), (len(work.terms), 1))
    return with_alpha(work, ALPHAS[0]).with_variants(alphas, np.zeros((0, len(ALPHAS) - 1)))


def files(work: Work, folder: Path, count: int) -> list[Path]:
    made = []
    for variant in range(count):
        for name, size in work.outputs:
            path = folder / f"{variant}-{name}"
            path.write_bytes(bytes(size))
            made.append(path)
    return made


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1 << 17, 1 << 20])
def test_as_separate_runs(tmp_path: Path, threads: int, memory: int) -> None:
    work, tensors = build(tmp_path)
    options = EngineOptions(threads=threads, memory=memory * threads)
    many = files(work, tmp_path, len(ALPHAS))
    result = engine.run(in_variants(work), many, tensors=tensors, options=options)
    (tmp_path / "single").mkdir()
    read = 0
    for variant, alpha in enumerate(ALPHAS):
        single = files(work, tmp_path / "single", 1)
        alone = engine.run(with_alpha(work, alpha), single, tensors=tensors, options=options)
        mine = many[variant * len(single) : (variant + 1) * len(single)]
        assert [path.read_bytes() for path in mine] == [path.read_bytes() for path in single], alpha
        own = result.of_variant(variant, len(ALPHAS), tensors)
        assert (own.counts, own.checksums, own.bytes_written) == (alone.counts, alone.checksums, alone.bytes_written)
        read = alone.bytes_read
    assert result.bytes_read == read


def test_segments_write_to_the_files_of_all(tmp_path: Path) -> None:
    """A segment names every file it writes to, so that it is on disk before it counts as finished."""
    work, tensors = build(tmp_path)
    work = in_variants(work)
    outputs = files(work, tmp_path, len(ALPHAS))
    parts = cut(work, 1 << 20)
    assert len(parts) > 4
    for part in parts:
        before = [path.read_bytes() for path in outputs]
        result = engine.run(part.work, outputs, tensors=tensors)
        changed = {i for i, path in enumerate(outputs) if path.read_bytes() != before[i]}
        assert changed <= set(part.files)
        assert {file % len(work.outputs) for file in part.files} == {i % len(work.outputs) for i in changed}
        assert result.bytes_written == part.nbytes


def refusal(work: Work, outputs: list[Any], tensors: int) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        engine.run(work, outputs, tensors=tensors)
    return str(caught.value)


def test_refused(tmp_path: Path) -> None:
    """The engine trusts no column: what is said of further variants is checked as what is said of the first."""
    plain, tensors = build(tmp_path)
    work, count = in_variants(plain), len(ALPHAS)
    memory = [np.zeros(size, np.uint8) for _ in ALPHAS for _, size in work.outputs]
    assert "variants write to files only" in refusal(work, memory, tensors)
    good = files(work, tmp_path, count)
    wrong = work.terms.copy()
    wrong["more"][3, 1] = np.inf
    assert "alpha is not finite" in refusal(replace(work, terms=wrong), good, tensors)
    assert "expected a contiguous column of 64-byte rows" in refusal(replace(work, terms=plain.terms), good, tensors)
    assert "literals out of range" in refusal(replace(work, own_input=1), good, tensors)
    operand = int(work.terms["post_file"][0])
    padded = replace(work, inputs=(*work.inputs, *(work.inputs[operand],) * count), own_input=len(work.inputs))
    engine.run(padded, good, tensors=tensors)
    shifted = replace(work, inputs=(work.inputs[operand],) * (count + operand), own_input=operand)
    assert "literals that are an operand" in refusal(shifted, good, tensors)
    good[-1].write_bytes(b"short")
    assert "output files of different sizes" in refusal(work, good, tensors)
