"""Inputs on which a fuzz target once ended in anything but a refusal, as plain tests."""

from __future__ import annotations

import numpy as np
import pytest
import target_columns
import target_header
import target_plan

from paramdelta import _cpu
from paramdelta.plan.work import REGION, VIEW

DEEP = b'{"a":{"dtype":' + b'{"a":' * 500 + b"1" + b"}" * 500 + b',"shape":[],"data_offsets":[0,0]}}'
HEADERS = {
    "a type nested deeper than Python prints": b"\0\0" + DEEP,
    "more dimensions than NumPy has": b'\1\0{"a":{"dtype":"U8","shape":[' + b"1," * 99 + b'1],"data_offsets":[0,1]}}',
}
PLANS = {
    "scales of whole tensors where blocks are wanted that reach beyond them": (
        "0296639f4a9269c57a44c9f2f88e0d53b5104c396159b7466226360df6e7f4deda5557ebe9bf04b628ad008798d2230d985cde8342fae4"
        "b3bdc18a21fbe967014da1e00d7fd002464044aa5d2b6afd2d0951b3fbfbc9fb0ef7f1b88bf9fbc58fb74e1ca3e37d99a1f6ed04675149"
        "16bfae245f75187a011d1606"
    ),
    "codes without scales in new_base, scaled ones elsewhere": (
        "00a32c66e9c7e858d7515eae6290c4c879424f5164800fadae803516da125338b8b0bc4b32172000052cc1615d891ee62feae44bdec90f"
        "77296c7cd4417f7f7f7f7f7f7f2e19c2f3eee810c203bc4d4e2a16d6e672d300aeb6d2b115656cc7514ccd6ef8540595aff54e49ec2ffd"
        "a5a6ddddc72e76f2788f0922e969769a4f5ef386245fe45a2a"
    ),
    "rows of an odd number of four-bit codes, in the format that is asked for": (
        "022b72b9be860a09d014fa3e97042fea21c2675309afdeb90059ca9e40445d63022b72b9be860a09d014fa3e97042fea21c2675309afde"
        "b90059ca9e40445da08ddc19a374a0308cafed8aa4ea00b78b1bc71250e399ccfaafb1efab8b9f20f12df53cba0346e3fe6d011644c730"
        "5bbace4dd07f6dfad84a988e425d93a27063b0275d4bb5575c09f4ea2cdaa1fbfa1ba6056d5c7becb0275d4bb5575c09f4ea2cdaa1fbfa"
        "1ba6056d5c7bec4bd3db"
    ),
    "second scales of 0 and of a negative number, by which unlike scales divide to the same infinity": (
        "f8009f4d4d4d4d4d4d4d4d4d4dffffffffffffff1b4d4d4d4d4d4d4d4d4d4d4d4d4d284d4d4d4d4d4d4d4d4d009f4d4d4d4d4d4d4d4d4d"
        "4d4c000000000000004d4d4d4d4d4d4d4d4d4d4b4d4d4d4d4d8d"
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(kind: str) -> None:
    target_header.run(HEADERS[kind])


@pytest.mark.parametrize("kind", PLANS)
def test_plans(kind: str) -> None:
    target_plan.run(bytes.fromhex(PLANS[kind]))


def test_zeros_of_an_unknown_codec() -> None:
    columns = {name: np.zeros(0, dtype) for name, dtype in target_columns.COLUMNS.items()}
    columns["regions"], columns["views"] = np.zeros(1, REGION), np.zeros(1, VIEW)
    columns["regions"]["rows"] = columns["regions"]["cols"] = columns["regions"]["end_row"] = 1
    for field in ("out_file", "scale_out_file", "given_file", "second_file", "recipe"):
        columns["regions"][field] = -1
    for field in ("file", "scale_file", "zero_file", "second_file"):
        columns["views"][field] = -1
    columns["views"]["codec"] = 255
    limits = {"tensors": 1, "units": 0, "inputs": [], "outputs": [], "threads": 1, "slot_bytes": 1 << 20, "isa": None}
    with pytest.raises(ValueError, match="region 0: unknown codec"):
        _cpu.Engine(columns=columns, **limits)
