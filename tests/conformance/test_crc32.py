"""CRC-32 by every instruction set, against zlib: every length, every alignment, any cut and any order."""

from __future__ import annotations

import itertools
import random
import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdelta import _cpu

DATA = np.random.default_rng(3).integers(0, 256, 6000, np.uint8)
SPECIAL = [np.zeros(4096, np.uint8), np.full(4096, 255, np.uint8), np.tile(np.arange(256, dtype=np.uint8), 16)]
ISAS = _cpu.available_isas()


def crc32(data: np.ndarray, isa: str) -> int:
    return _cpu.crc32_of_raw(_cpu.crc32_raw(data, isa=isa), len(data))


def test_every_length(isa: str) -> None:
    for length in range(5001):
        start = length % 61
        data = DATA[start : start + length]
        assert crc32(data, isa) == zlib.crc32(data), (start, length)


def test_every_alignment(isa: str) -> None:
    for start in range(130):
        for length in (15, 64, 257, 1024, 5333):
            data = DATA[start : start + length]
            assert crc32(data, isa) == zlib.crc32(data), (start, length)


def test_plain_patterns(isa: str) -> None:
    for data in SPECIAL:
        for length in (0, 1, 16, 31, 255, 256, 4096):
            assert crc32(data[:length], isa) == zlib.crc32(data[:length])


def test_products_agree(isa: str) -> None:
    rng = random.Random(5)
    one = 1 << 31
    for _ in range(2000):
        a, b, c = (rng.getrandbits(32) for _ in range(3))
        product = _cpu.crc32_multiplied(a, b, isa=isa)
        assert product == _cpu.crc32_multiplied(a, b, isa="scalar") == _cpu.crc32_multiplied(b, a, isa=isa)
        assert _cpu.crc32_multiplied(a, one, isa=isa) == a
        assert _cpu.crc32_multiplied(a ^ c, b, isa=isa) == product ^ _cpu.crc32_multiplied(c, b, isa=isa)


def test_shifting_is_appending_zeros() -> None:
    raw = _cpu.crc32_raw(DATA[:100])
    for zeros in (0, 1, 255, 256, 4097, 70_000, 1 << 20):
        longer = np.concatenate([DATA[:100], np.zeros(zeros, np.uint8)])
        assert _cpu.crc32_shifted(raw, zeros) == _cpu.crc32_raw(longer)
    # Over distances that no memory holds, by the law of powers.
    for a, b in ((1 << 40, 3), (1 << 50, (1 << 50) + 7), ((1 << 61) - 1, 1 << 60)):
        assert _cpu.crc32_shifted(_cpu.crc32_shifted(raw, a), b) == _cpu.crc32_shifted(raw, a + b)
    assert _cpu.crc32_shifted(raw, (1 << 32) - 1) == raw  # the order of x


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=3000),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    seed=st.integers(0, 1 << 20),
    isa=st.sampled_from(ISAS),
)
def test_pieces_in_any_order(data: bytes, cuts: list[int], seed: int, isa: str) -> None:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = list(itertools.pairwise(ends))
    random.Random(seed).shuffle(pieces)
    total = 0
    for begin, end in pieces:
        total ^= _cpu.crc32_shifted(_cpu.crc32_raw(data[begin:end], isa=isa), len(data) - end)
    assert _cpu.crc32_of_raw(total, len(data)) == zlib.crc32(data)
