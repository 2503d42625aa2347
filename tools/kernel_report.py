"""Resources of the Triton kernels, compiled for GPUs that need not be installed.

    python tools/kernel_report.py [sm ...]       sm = 80 89 90 by default (A100; RTX 4090, L4; H100)

Each kernel is compiled with the options and alignments of its launch. The report contains registers
per thread, bytes of local memory, stack (spilled registers) and shared memory; and for the main
loop the machine instructions, the bytes per thread of its loads and stores of global memory, and
the widths of the narrowest and widest access. Without such a loop, the complete kernel is counted.

The exit status is 1 if a kernel spills or needs more registers than its options allow, or if the
main loop of a memory-bound kernel has an access narrower than 16 bytes or takes more than 3
instructions per byte.
"""

import _checkout  # noqa: F401  # isort: skip

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

from bt_fast import lars_triton as lars
from bt_fast.models import batch_norm_triton as norm
from pipelines.augment import triton as augment

MIN_WIDTH = 16  # bytes of an access
MAX_INSTRUCTIONS = 3.0  # per byte
DIVISIBLE = {"num_pixels", "height", "width", "num_images", "num_rows", "rows_per_part"}
DIVISIBLE |= {"channels", "count"}  # by 16, as the pointers: Triton specialises the kernels
ARGUMENTS = {
    "*u8": "images bits argmax",
    "*i1": "applied",
    "*i32": "tensors first finished",
    "*i64": "addresses numel",
    "*bf16": "views x residual y g second_g masked grad_x grad_residual maxima",
    "*fp32": "table means sums ratios guard moments weight bias residual_weight residual_bias"
    " partials grad_weights grad_biases",
    "fp32": "eps",
    "i32": "num_tensors num_chunks pooled_height pooled_width " + " ".join(DIVISIBLE),
}
TYPES = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel and its launch parameters."""

    function: triton.JITFunction
    variant: str
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int]  # num_warps, num_stages, maxnreg
    narrow: int | None  # a permitted width below MIN_WIDTH; None if not memory-bound

    @property
    def name(self) -> str:
        module = self.function.fn.__module__.removeprefix("bt_fast.").removeprefix("pipelines.")
        return f"{module}.{self.function.fn.__name__} {self.variant}".rstrip()


def kernels(capability: int) -> list[Kernel]:
    """The kernels that a GPU of a compute capability (90 is sm_90) launches.

    Augmentation is compute-bound: the colour operations take dozens of instructions per byte. The
    ratios of LARS read two sums for every 16,384 parameters and take the time of a launch. A mask
    of batch norm has one bit per value: a byte for the 8 channels (16 bytes) of a thread. The
    argmax of a window has one byte per value: 8 bytes.
    """
    blur_tile, blur_options = augment.blur_tiling(divmod(capability, 10))
    constants = {"CHUNK": lars.CHUNK, "ALIGNED": True, "CHECKED": True, "TENSORS": 256}
    constants |= {"VIEWS": 2, "RELU": True, "NORMS": 1, "RESIDUAL": False, "BITS": False}
    constants |= {"FIRST_ROWS": norm.FIRST_ROWS, "ROWS": norm.POOL_ROWS, "PARTS": augment.PARTS}
    sums, lars_warps = {"num_warps": augment.SUM_WARPS}, {"num_warps": lars.NUM_WARPS}
    pool = {"BLOCK": norm.POOL_BLOCK, "BLOCK_CHANNELS": norm.BLOCK_CHANNELS}

    def of_norm(function, variant: str, tiling: norm.Tiling, narrow: int = 0, **own):
        return function, variant, tiling.options, narrow, tiling.constants | own

    def two(function, narrow: int = 0, **own):
        return of_norm(function, "two norms", norm.TWO_NORMS, narrow, NORMS=2, **own)

    in_float64 = norm._norm_moments, norm._norm_forward, norm._norm_pool_forward
    return [
        Kernel(
            function=function,
            variant=variant,
            types=TYPES | ({"sums": "*fp64"} if function in in_float64 else {}),
            constants={k: v for k, v in (constants | own).items() if k in function.arg_names},
            options=options,
            narrow=narrow,
        )
        for function, variant, options, narrow, own in (
            (augment._contrast_sums, "", sums, None, {"BLOCK": augment.BLOCK}),
            (augment._augment, "", augment.OPTIONS, None, {"TILE": augment.TILE, "HALO": 0}),
            (
                augment._augment,
                f"blur, {blur_tile} px",
                blur_options,
                None,
                {"TILE": blur_tile, "HALO": augment.HALO},
            ),
            (lars._sums, "", lars_warps, 0, {"BLOCK": lars.BLOCK}),
            (lars._ratios, "", {"num_warps": 4}, None, {"BLOCK": lars.RATIO_BLOCK}),
            (lars._apply, "", lars_warps, 0, {"BLOCK": lars.BLOCK}),
            of_norm(norm._norm_moments, "", norm.MOMENTS),
            of_norm(norm._norm_forward, "", norm.FORWARD),
            of_norm(norm._norm_forward, "residual", norm.FORWARD, 1, RESIDUAL=True),
            two(norm._norm_forward, narrow=1, RESIDUAL=True),
            of_norm(norm._norm_sums, "", norm.SUMS, GRADIENTS=1),
            of_norm(norm._norm_sums, "two gradients", norm.SUMS, GRADIENTS=2),
            of_norm(norm._norm_sums, "residual", norm.SUMS, 1, BITS=True, GRADIENTS=2),
            of_norm(norm._norm_sums, "residual, last", norm.SUMS, 1, BITS=True, GRADIENTS=1),
            two(norm._norm_sums, narrow=1, BITS=True, GRADIENTS=2),
            of_norm(norm._norm_backward, "", norm.BACKWARD),
            of_norm(norm._norm_backward, "residual", norm.BACKWARD, RELU=False),
            two(norm._norm_backward, RELU=False),
            (norm._norm_pool_forward, "", norm.POOL_OPTIONS, 8, pool),
            (norm._norm_pool_backward, "", norm.POOL_OPTIONS, 8, pool),
        )
    ]


def measure(kernel: Kernel, capability: int) -> tuple[str, list[str]]:
    """Compile a kernel for a compute capability; returns its resources and the rules it breaks."""
    names = kernel.function.arg_names
    signature = {n: "constexpr" if n in kernel.constants else kernel.types[n] for n in names}
    attributes = {
        (index,): BaseBackend.parse_attr("D")  # divisible by 16
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in DIVISIBLE
    }
    compiled = triton.compile(
        ASTSource(kernel.function, signature, kernel.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=kernel.options,
    )
    cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump(cubin, "--dump-resource-usage"))
    usage = {name: int(value) for name, value in found}
    registers, local, stack = usage["REG"], usage["LOCAL"], usage["STACK"]
    opcodes, is_loop = main_loop(_cuobjdump(cubin, "--dump-sass"))
    widths = [num_bytes(opcode) for opcode in opcodes if num_bytes(opcode)]
    per_byte = len(opcodes) / sum(widths) if widths else math.inf
    text = (
        f"{registers} registers, {local} B local, {stack} B stack, {shared} B shared memory;"
        f" {'main loop' if is_loop else 'no loop'}: {len(opcodes)} instructions,"
        f" {sum(widths)} B, {per_byte:.2f} per B, accesses"
        f" {f'{min(widths)} to {max(widths)} B wide' if widths else 'none'}"
    )
    defects = []
    if local or stack:
        defects.append(f"spills {local + stack} B")
    if registers > (limit := kernel.options.get("maxnreg", 255)):
        defects.append(f"{registers} registers, more than {limit}")
    if kernel.narrow is not None:
        if min((w for w in widths if w != kernel.narrow), default=0) < MIN_WIDTH:
            defects.append(f"accesses narrower than {MIN_WIDTH} B")
        if per_byte > MAX_INSTRUCTIONS:
            defects.append(f"more than {MAX_INSTRUCTIONS:g} instructions per B")
    return text, defects


def _cuobjdump(cubin: bytes, flag: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def num_bytes(opcode: str) -> int:
    """Bytes per thread of a load or store of global memory; 0 for other instructions."""
    name, *modifiers = opcode.split(".")
    if name not in ("LDG", "STG", "LDGSTS", "LD", "ST"):
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[m] for m in modifiers if m in widths), 4)


def main_loop(listing: str) -> tuple[list[str], bool]:
    """Returns the opcodes of the main loop and True, or of the program and False.

    listing: output of `cuobjdump --dump-sass` for one kernel.
    A loop extends from the target of a backward branch to the branch, without an unconditional exit
    between them: behind it are blocks that the compiler moved out of a loop, which do not count.
    The main loop is the innermost loop with accesses to global memory that moves most bytes per
    thread. Predicated instructions count once; NOP does not count.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);", listing)
    addresses = [int(address, 16) for address, *_ in lines]
    opcodes = [opcode for _, _, opcode, _ in lines]
    exits = [
        i for i, (_, predicate, name, _) in enumerate(lines) if name == "EXIT" and not predicate
    ]

    def bytes_in(loop: range) -> int:
        return sum(num_bytes(opcodes[i]) for i in loop)

    loops: dict[int, range] = {}  # by the first instruction
    for last, (_, _, opcode, operands) in enumerate(lines):
        if opcode.partition(".")[0] == "BRA":
            first = addresses.index(int(operands.split()[-1], 16))
            loop = range(first, last + 1)
            if bytes_in(loop) and not any(i in loop for i in exits):
                loops[first] = loop
    innermost = [loop for f, loop in loops.items() if not any(o in loop for o in loops if o != f)]
    counted = max(innermost, key=bytes_in, default=range(len(lines)))
    return [opcodes[i] for i in counted if opcodes[i] != "NOP"], bool(innermost)


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    defective = False
    for capability in map(int, arguments or (80, 89, 90)):
        for kernel in kernels(capability):
            text, defects = measure(kernel, capability)
            for line in text, *(f"DEFECT: {defect}" for defect in defects):
                print(f"sm_{capability} {kernel.name:>50}: {line}")
            defective |= bool(defects)
    return int(defective)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
