"""Machine code of the Triton kernels for GPUs of three architectures."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_python

triton = pytest.importorskip("triton")

from tools.kernel_report import main_loop, num_bytes  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NO_PTXAS = "this triton comes without ptxas and cuobjdump"
compiles = pytest.mark.skipif(not CUOBJDUMP.exists(), reason=NO_PTXAS)


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return run_python(*arguments, env=environment, cwd=ROOT)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_no_kernel_spills_or_wastes_bandwidth(capability):
    done = report("tools/kernel_report.py", str(capability))
    assert done.returncode == 0 and "DEFECT" not in done.stdout, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"sm_{capability} ")]
    assert all("0 B local, 0 B stack" in row for row in rows)
    (sums,) = (row for row in rows if " lars_triton._sums:" in row)
    (apply,) = (row for row in rows if " lars_triton._apply:" in row)
    augment = [row for row in rows if " augment.triton._augment" in row]
    # So few that two or four programs share an SM.
    assert len(augment) == 2  # without blur, with blur
    assert all(int(re.search(r"(\d+) registers", row)[1]) <= 128 for row in augment)
    # A block of 2,048 elements on 256 threads: 8 float32 of each tensor, two accesses of 16 bytes.
    # _sums reads two tensors (p, g), _apply three (and m), of which it writes two.
    for row, moved in ((sums, 64), (apply, 160)):
        assert f" {moved} B, " in row and row.endswith("accesses 16 to 16 B wide"), row


@compiles
def test_a_broken_rule_is_reported():
    program = """
from dataclasses import replace
import sys
sys.path.append("tools")
import kernel_report as report
(apply,) = (kernel for kernel in report.kernels(90) if kernel.name == "lars_triton._apply")
unaligned = replace(apply, constants=apply.constants | {"ALIGNED": False})
limited = replace(apply, options=apply.options | {"maxnreg": 24})
report.kernels = lambda capability: [unaligned, limited]
print(report.main(["90"]))
"""
    done = report("-c", program)
    assert done.stdout.endswith("\n1\n"), done.stdout + done.stderr
    assert done.stdout.count("DEFECT: spills") == 1, done.stdout
    assert done.stdout.count("DEFECT: accesses narrower than 16 B") == 1, done.stdout


def listing(*instructions: str) -> str:
    """In cuobjdump's format: 16 bytes per instruction, the second half of each on a second line."""
    return "\tFunction : _kernel\n" + "".join(
        f"        /*{16 * index:04x}*/                   {text} ;    /* 0x00000a00ff017b82 */\n"
        f"{'':80}/* 0x000fe20000000800 */\n"
        for index, text in enumerate(instructions)
    )


def analyse(*instructions: str) -> tuple[list[str], list[int], bool]:
    """(opcodes of the main loop, bytes of its memory accesses, whether there is a loop)."""
    opcodes, found = main_loop(listing(*instructions))
    return opcodes, [num_bytes(opcode) for opcode in opcodes if num_bytes(opcode)], found


def test_the_main_loop_is_the_one_that_moves_most_bytes():
    opcodes, widths, found = analyse(
        "S2R R0, SR_TID.X",
        "LDG.E.LTC128B R9, desc[UR4][R2.64]",  # 0x10: outer loop
        "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x20: inner loop
        "@!P1 STG.E.128 desc[UR4][R2.64], R4",
        "ISETP.LT.AND P0, PT, R0, R1, PT",
        "@P0 BRA 0x20",
        "FADD R7, R7, R7",  # 0x60: a loop without memory accesses, within the outer one
        "@P2 BRA 0x60",
        "@P3 BRA 0x10",
        "LDG.E R4, desc[UR4][R2.64]",  # 0x90: a later loop with narrower accesses
        "@!UP0 BRA 0x90",
        "EXIT",
        "BRA 0xc0",
    )
    assert opcodes == ["LDG.E.128", "STG.E.128", "ISETP.LT.AND", "BRA"]
    assert widths == [16, 16] and found


def test_an_out_of_line_block_that_jumps_back_is_no_loop():
    opcodes, widths, found = analyse(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "BRA.DIV UR4, 0x50",
        "SHFL.BFLY PT, R6, R7, 0x8, 0x1f",
        "STG.E.128 desc[UR4][R2.64], R4",  # 0x30
        "EXIT",
        "MOV R8, R9",  # 0x50: for a divergent warp
        "BRA 0x30",
    )
    assert opcodes[-2:] == ["MOV", "BRA"] and widths == [16, 16] and not found
