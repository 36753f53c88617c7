"""Reading machine code: the ordinary path through a small kernel, and what it costs; and real kernels where nvcc is."""

from __future__ import annotations

import os

import pytest

from benchmarks.gpu import instructions, machine_code

# A loop over 16 bytes with a call where something is odd, and a narrow way that is longer.
CODE = """
\t.section\t.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   F2F.F64.F32 R12, R4 ;
        /*0050*/                   DADD R12, R12, R12 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   CALL.REL.NOINC `(odd) ;
        /*0080*/                   LOP3.LUT R0, R0, R1, RZ, 0xc0, !PT ;
        /*0090*/                   LOP3.LUT R0, R0, R1, RZ, 0xc0, !PT ;
.L_x_1:
        /*00a0*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00e0*/                   FADD R4, R4, R4 ;
        /*00f0*/                   FADD R4, R4, R4 ;
        /*0100*/                   EXIT ;
\t.section\t.nv.info,"",@SHT_CUDA_INFO
"""


def test_the_ordinary_path_turns_with_wide_accesses_and_does_without_calls() -> None:
    function = machine_code.parse(CODE)["kernel"]
    path = machine_code.ordinary_path(function, 4)
    names = [instruction.name for instruction, _ in path]
    assert names == ["S2R", "BRA", "LDG", "LDG", "F2F", "DADD", "BRA", "STG", "BRA", "EXIT"]
    assert [times for _, times in path] == [1, 1, 4, 4, 4, 4, 4, 4, 4, 1]
    body = machine_code.ordinary_path(function, body=True)
    assert [x.name for x, _ in body] == ["LDG", "LDG", "F2F", "DADD", "BRA", "STG", "BRA"]


def test_costs_by_unit() -> None:
    path = machine_code.ordinary_path(machine_code.parse(CODE)["kernel"], body=True)
    costs = instructions.counts(path, 1)
    assert costs[instructions.ISSUE] == 7
    assert costs[instructions.FP64] == 1
    assert costs[instructions.CONVERT64] == 1
    assert costs[instructions.MEMORY] == 12  # words
    assert instructions.bytes_under_way(path) == 32


def test_kernels_are_within_what_an_h100_can_issue() -> None:
    """Of the kernels that are built: an aim that instructions alone rule out is a loss that no GPU is needed to see."""
    reason = machine_code.why_not()
    if reason is not None:
        pytest.skip(f"machine code cannot be read: {reason}")
    if os.environ.get("PARAMDELTA_EMULATE") != "all":
        pytest.skip("compiling the kernels once more takes half a minute: make emulate does")
    for case in instructions.CASES:
        prediction = instructions.predict(case, 90)
        assert prediction.of_copy() >= case.aim, f"{case.name}: {prediction.binding}"
        assert prediction.under_way >= prediction.chip.bytes_needed
