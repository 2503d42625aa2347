"""Resources of the Triton kernels, compiled for GPUs that need not be installed.

    python tools/kernel_report.py [sm ...]       sm = 80 89 90 by default (A100; RTX 4090, L4; H100)

Each kernel is compiled with the options and alignments of its launch. The report contains registers
per thread, bytes of local memory, stack (spilled registers) and shared memory; and for the main
loop the machine instructions, the bytes per thread of its loads and stores of global memory, and
the widths of the narrowest and widest access. Without such a loop, the complete kernel is counted.

The exit status is 1 if a kernel spills or needs more registers than its options allow, or if the
main loop of a memory-bound kernel has an access narrower than 16 bytes or takes more than 3
instructions per byte. `KERNELS` lists the exemptions from the last two rules, with reasons.
"""

import _checkout  # noqa: F401  # isort: skip

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

from bt_fast import lars_triton
from bt_fast.models import batch_norm_triton
from pipelines.augment import triton as augment_triton
from tools.machine_code import main_loop, parse

ARCHITECTURES = (80, 89, 90)
SUPPORTED = (80, 86, 87, 89, 90, 100, 120)  # earlier ones have no bf16
WIDTH = "width"  # every access in the main loop moves MIN_WIDTH bytes or more
INSTRUCTIONS = "instructions"  # the main loop takes MAX_INSTRUCTIONS per byte or fewer
MIN_WIDTH = 16
MAX_INSTRUCTIONS = 3.0


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel and its launch parameters. Pointers are aligned to 16 bytes."""

    function: triton.JITFunction
    types: dict[str, str]
    """Type of each non-constant argument; names of other arguments are ignored."""
    constants: dict[str, object]
    options: dict[str, int]
    """num_warps, num_stages, maxnreg."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16, for which Triton specialises the kernel."""
    exempt: dict[str, str] = field(default_factory=dict)
    """Rules (WIDTH, INSTRUCTIONS) that do not apply, with reasons."""
    narrow: dict[int, str] = field(default_factory=dict)
    """Permitted widths below MIN_WIDTH, with reasons."""
    variant: str = ""
    """Name of this row among those of the same kernel."""
    launched_on: Callable[[int], bool] = lambda capability: True
    """Whether a GPU of a compute capability (90 is sm_90) launches this variant."""

    @property
    def name(self) -> str:
        module = self.function.fn.__module__.removeprefix("bt_fast.").removeprefix("pipelines.")
        return f"{module}.{self.function.fn.__name__} {self.variant}".rstrip()


def _blur_tile(capability: int) -> int:
    return augment_triton.blur_tiling(divmod(capability, 10))[0]


_IMAGES = {"images": "*u8", "table": "*fp32", "sums": "*fp32", "views": "*bf16"} | dict.fromkeys(
    ("num_pixels", "height", "width"), "i32"
)
_TABLES = (
    {"addresses": "*i64", "table": "*fp32", "tensors": "*i32", "first": "*i32"}
    | {"numel": "*i64", "sums": "*fp32", "ratios": "*fp32", "guard": "*fp32", "applied": "*i1"}
    | dict.fromkeys(("num_tensors", "num_chunks"), "i32")
)
_CHUNKS = {"CHUNK": lars_triton.CHUNK, "BLOCK": lars_triton.BLOCK, "ALIGNED": True}
_AUGMENT = [("", 0, (augment_triton.TILE, augment_triton.OPTIONS), lambda capability: True)]
for _major in (8, 9):
    _tiling = augment_triton.blur_tiling((_major, 0))
    _AUGMENT.append(
        (
            f"blur, {_tiling[0]} px",
            augment_triton.HALO,
            _tiling,
            lambda capability, tile=_tiling[0]: _blur_tile(capability) == tile,
        )
    )
_COLOUR = "compute-bound: the colour operations take dozens of instructions per byte of a pixel"
_FEW = "reads two sums for every 16,384 parameters; its time is that of a launch"

KERNELS = [
    Kernel(
        function=augment_triton._contrast_sums,
        types=_IMAGES,
        constants={"PARTS": augment_triton.PARTS, "BLOCK": augment_triton.BLOCK},
        options={"num_warps": augment_triton.SUM_WARPS},
        divisible=("num_pixels",),
        exempt={WIDTH: _COLOUR, INSTRUCTIONS: _COLOUR},
    ),
    *(
        Kernel(
            function=augment_triton._augment,
            types=_IMAGES,
            constants={"PARTS": augment_triton.PARTS, "TILE": tile, "HALO": halo},
            options=options,
            divisible=("height", "width"),
            exempt={WIDTH: _COLOUR, INSTRUCTIONS: _COLOUR},
            variant=variant,
            launched_on=launched_on,
        )
        for variant, halo, (tile, options), launched_on in _AUGMENT
    ),
    Kernel(
        function=lars_triton._sums,
        types=_TABLES,
        constants=_CHUNKS,
        options={"num_warps": lars_triton.NUM_WARPS},
    ),
    Kernel(
        function=lars_triton._ratios,
        types=_TABLES,
        constants={"CHECKED": True, "BLOCK": lars_triton.RATIO_BLOCK},
        options={"num_warps": 4},
        exempt={WIDTH: _FEW, INSTRUCTIONS: _FEW},
    ),
    Kernel(
        function=lars_triton._apply,
        types=_TABLES,
        constants=_CHUNKS | {"CHECKED": True, "TENSORS": 256},
        options={"num_warps": lars_triton.NUM_WARPS},
    ),
]

_ACTIVATIONS = dict.fromkeys(
    ("x", "residual", "y", "g", "second_g", "masked", "grad_x", "grad_residual", "maxima"),
    "*bf16",
)
_OF_CHANNELS = dict.fromkeys(
    ("moments", "weight", "bias", "residual_weight", "residual_bias", "partials", "grad_weights")
    + ("grad_biases",),
    "*fp32",
)
_COUNTS = ("num_rows", "channels", "rows_per_part", "count")
_SIDES = ("num_images", "channels", "height", "width", "count")
_NORM_TYPES = (
    _ACTIVATIONS
    | _OF_CHANNELS
    | {"bits": "*u8", "argmax": "*u8", "finished": "*i32", "eps": "fp32"}
    | dict.fromkeys((*_COUNTS, *_SIDES, "pooled_height", "pooled_width"), "i32")
)
_BITS = {1: "one bit per value: a byte for the 8 channels (16 bytes) of a thread"}
_ARGMAX = {8: "one byte per value: 8 bytes for the 8 channels (16 bytes) of a thread"}


def _norm(function, variant: str, *, sums: str, narrow=None, **constants) -> Kernel:
    """A kernel of batch norm; `sums` is the dtype of its sums."""
    names = function.arg_names
    if tiling := _tiling_of_norm(function, constants.get("NORMS", 1)):
        shared = tiling.constants | {"FIRST_ROWS": batch_norm_triton.FIRST_ROWS}
        options = tiling.options
    else:
        shared = {"ROWS": batch_norm_triton.POOL_ROWS, "BLOCK": batch_norm_triton.POOL_BLOCK}
        shared["BLOCK_CHANNELS"] = batch_norm_triton.BLOCK_CHANNELS
        options = batch_norm_triton.POOL_OPTIONS
    constants |= {"VIEWS": 2}
    return Kernel(
        function=function,
        types=_NORM_TYPES | {"sums": sums},
        constants={k: v for k, v in (shared | constants).items() if k in names},
        options=options,
        divisible=_SIDES if "height" in names else _COUNTS,
        narrow=narrow or {},
        variant=variant,
    )


def _tiling_of_norm(function, num_norms: int) -> batch_norm_triton.Tiling | None:
    """None for the kernels with max-pool."""
    if num_norms == 2:
        return batch_norm_triton.TWO_NORMS
    return {
        batch_norm_triton._norm_moments: batch_norm_triton.MOMENTS,
        batch_norm_triton._norm_forward: batch_norm_triton.FORWARD,
        batch_norm_triton._norm_sums: batch_norm_triton.SUMS,
        batch_norm_triton._norm_backward: batch_norm_triton.BACKWARD,
    }.get(function)


_FORWARD, _BACKWARD = {"sums": "*fp64"}, {"sums": "*fp32"}
KERNELS += [
    _norm(batch_norm_triton._norm_moments, "", **_FORWARD),
    *(
        _norm(
            batch_norm_triton._norm_forward,
            variant,
            narrow=_BITS if residual else {},
            RELU=True,
            RESIDUAL=residual,
            NORMS=norms,
            **_FORWARD,
        )
        for variant, residual, norms in (
            ("", False, 1),
            ("residual", True, 1),
            ("two norms", True, 2),
        )
    ),
    *(
        _norm(
            batch_norm_triton._norm_sums,
            variant,
            narrow=_BITS if bits else {},
            RELU=True,
            BITS=bits,
            GRADIENTS=gradients,
            NORMS=norms,
            **_BACKWARD,
        )
        for variant, bits, gradients, norms in (
            ("", False, 1, 1),
            ("two gradients", False, 2, 1),
            ("residual", True, 2, 1),
            ("residual, last", True, 1, 1),
            ("two norms", True, 2, 2),
        )
    ),
    *(
        _norm(batch_norm_triton._norm_backward, variant, RELU=relu, NORMS=norms, **_BACKWARD)
        for variant, relu, norms in (("", True, 1), ("residual", False, 1), ("two norms", False, 2))
    ),
    _norm(batch_norm_triton._norm_pool_forward, "", narrow=_ARGMAX, **_FORWARD),
    _norm(batch_norm_triton._norm_pool_backward, "", narrow=_ARGMAX, **_BACKWARD),
]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Resources of a compiled kernel."""

    registers: int
    local: int  # bytes
    stack: int  # bytes
    shared: int  # bytes
    loop: bool  # instructions and widths are those of the main loop, not of the complete kernel
    instructions: int
    widths: tuple[int, ...]  # bytes of each access to global memory

    @property
    def per_byte(self) -> float:
        """Machine instructions per byte of global memory."""
        return self.instructions / sum(self.widths) if self.widths else float("inf")

    def __str__(self) -> str:
        widths = f"{min(self.widths)} to {max(self.widths)} B wide" if self.widths else "none"
        return (
            f"{self.registers} registers, {self.local} B local, {self.stack} B stack,"
            f" {self.shared} B shared memory;"
            f" {'main loop' if self.loop else 'no loop'}: {self.instructions} instructions,"
            f" {sum(self.widths)} B, {self.per_byte:.2f} per B, accesses {widths}"
        )


def measure(kernel: Kernel, capability: int) -> Usage:
    """Compile a kernel for a compute capability (90 is sm_90) and count its resources."""
    names = kernel.function.arg_names
    if unknown := set(names) - set(kernel.types) - set(kernel.constants):
        raise ValueError(f"{kernel.name}: missing types of {', '.join(sorted(unknown))}")
    signature = {name: kernel.types.get(name, "constexpr") for name in names}
    attributes = {
        (index,): BaseBackend.parse_attr("D")  # divisible by 16
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in kernel.divisible
    }
    compiled = triton.compile(
        ASTSource(kernel.function, signature, kernel.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=kernel.options,
    )
    usage = {
        name: int(value)
        for name, value in re.findall(
            r"(REG|STACK|LOCAL):(\d+)", _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
        )
    }
    loop, found = main_loop(parse(_cuobjdump(compiled.asm["cubin"], "--dump-sass")))
    return Usage(
        registers=usage["REG"],
        local=usage["LOCAL"],
        stack=usage["STACK"],
        shared=compiled.metadata.shared,
        loop=found,
        instructions=len(loop),
        widths=tuple(filter(None, (instruction.num_bytes for instruction in loop))),
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def defects(kernel: Kernel, usage: Usage) -> Iterator[str]:
    """Descriptions of the rules that a kernel breaks."""
    if usage.local or usage.stack:
        yield f"spills {usage.local + usage.stack} B"
    if usage.registers > (limit := kernel.options.get("maxnreg", 255)):
        yield f"{usage.registers} registers, more than {limit}"
    wide = [width for width in usage.widths if width not in kernel.narrow]
    if WIDTH not in kernel.exempt and min(wide, default=0) < MIN_WIDTH:
        yield f"accesses narrower than {MIN_WIDTH} B"
    if INSTRUCTIONS not in kernel.exempt and usage.per_byte > MAX_INSTRUCTIONS:
        yield f"more than {MAX_INSTRUCTIONS:g} instructions per B"


def main() -> int:
    if "-h" in sys.argv or "--help" in sys.argv:
        print(__doc__)
        return 0
    for argument in sys.argv[1:]:
        if argument not in map(str, SUPPORTED):
            supported = ", ".join(map(str, SUPPORTED))
            print(f"kernel_report.py: {argument} is not one of {supported}", file=sys.stderr)
            return 2
    defective = False
    for capability in map(int, sys.argv[1:] or ARCHITECTURES):
        for kernel in KERNELS:
            if not kernel.launched_on(capability):
                continue
            usage = measure(kernel, capability)
            print(f"sm_{capability} {kernel.name:>50}: {usage}")
            for defect in defects(kernel, usage):
                defective = True
                print(f"sm_{capability} {kernel.name:>50}: DEFECT: {defect}")
    exempt: dict[tuple[str, str], list[str]] = {}
    for kernel in KERNELS:
        for rule, reason in kernel.exempt.items():
            exempt.setdefault((rule, reason), []).append(kernel.name)
        for width, reason in kernel.narrow.items():
            exempt.setdefault((f"accesses of {width} B", reason), []).append(kernel.name)
    for (rule, reason), names in exempt.items():
        print(f"exempt from the rule on {rule}: {', '.join(names)}: {reason}")
    return int(defective)


if __name__ == "__main__":
    sys.exit(main())
