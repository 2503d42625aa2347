"""Compile the Triton kernels for a GPU that need not be there, and report what they use.

    python tools/kernel_report.py [sm]        sm = 90 by default (H100, H200)

Registers per thread, bytes of local memory (spilled registers) and of shared memory, as ptxas and
cuobjdump see them. Compiled with the options the kernels are launched with. A kernel that spills
or needs more registers than those options allow is a defect: the exit status is then 1.
"""

import _checkout  # noqa: F401  # isort: skip

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bt_fast import lars_triton
from pipelines import augment_triton
from pipelines.augment_triton import (
    BLOCK,
    INNER,
    MAX_REGISTERS,
    NUM_WARPS,
    NUM_WARPS_MEANS,
    REACH,
    TILE,
)

POINTERS = {"images": "*u8", "table": "*fp32", "means": "*fp32"}
TABLES = (
    {"addresses": "*i64", "table": "*fp32", "tensors": "*i32", "first": "*i32"}
    | {"numel": "*i64", "sums": "*fp32", "ratios": "*fp32", "guard": "*fp32", "applied": "*i1"}
    | dict.fromkeys(("num_tensors", "num_chunks"), "i32")
)
SIZES = {"CHUNK": lars_triton.CHUNK, "BLOCK": lars_triton.BLOCK, "ALIGNED": True}
LARS_OPTIONS = {"num_warps": lars_triton.NUM_WARPS}
# Of each kernel: the types of its arguments, its constants, and the options it is launched with.
KERNELS = {
    augment_triton._contrast_means: (
        POINTERS | {"num_pixels": "i32"},
        {"BLOCK": BLOCK},
        {"num_warps": NUM_WARPS_MEANS},
    ),
    augment_triton._augment: (
        POINTERS | {"views": "*bf16", "height": "i32", "width": "i32"},
        {"TILE": TILE, "REACH": REACH, "INNER": INNER},
        {"num_warps": NUM_WARPS, "maxnreg": MAX_REGISTERS},
    ),
    lars_triton._sums: (TABLES, SIZES, LARS_OPTIONS),
    lars_triton._ratios: (
        TABLES,
        {"CHECKED": True, "BLOCK": lars_triton.RATIO_BLOCK},
        {"num_warps": 4},
    ),
    lars_triton._apply: (TABLES, SIZES | {"CHECKED": True, "TENSORS": 256}, LARS_OPTIONS),
}


def resources(kernel, capability: int) -> dict[str, int]:
    """{"REG": registers per thread, "STACK": ..., "LOCAL": ..., "SHARED": bytes} of one kernel."""
    types, constants, options = KERNELS[kernel]
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage | {"SHARED": compiled.metadata.shared}


def main() -> int:
    if len(sys.argv) > 2 or not all(argument.isdecimal() for argument in sys.argv[1:]):
        print(__doc__)
        return 2
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    defective = False
    for kernel, (_, _, options) in KERNELS.items():
        usage = resources(kernel, capability)
        defective |= usage["STACK"] > 0 or usage["LOCAL"] > 0
        defective |= usage["REG"] > options.get("maxnreg", 255)
        print(
            f"sm_{capability} {kernel.__name__:>16}: {usage['REG']} registers, {usage['LOCAL']} B"
            f" local, {usage['STACK']} B stack, {usage['SHARED']} B shared memory"
        )
    return int(defective)


if __name__ == "__main__":
    sys.exit(main())
