"""One training step by class of device work, from a trace of torch.profiler.

    convolutions    the encoder's, with changes of layout
    norm            batch norm, ReLU, residual sums, max-pool
    products        matrix products of projector and loss
    optimizer       LARS
    augmentation    both branches
    communication   collectives between ranks
    other           casts, copies, everything else
    gaps            the rest of the step: nothing runs on the device

Kernels are told apart by name and, where it is ambiguous, by the operators and named ranges that
were open on the host at the launch. On a CPU operators are the work. The elementwise part of the
loss is other; of its compiled backward pass, whose kernels look like the encoder's, it is norm.
"""

import bisect
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bt_fast.config import Config
from bt_fast.plan import step_costs
from bt_fast.runtime import Runtime, has_bf16
from tools.timing import Ceilings, Stage

AUGMENT, LOSS = "bt-fast: augment", "bt-fast: loss"  # named ranges
CLASSES = (
    *("convolutions", "norm", "products", "optimizer", "augmentation", "communication", "other"),
    "gaps",
)

# The first that matches decides. cuDNN's convolutions may have `relu` or `gemm` in their names.
_NAMES = [
    ("communication", r"nccl|^gloo:|c10d"),
    ("other", r"^Memcpy|^Memset"),
    ("augmentation", rf"^_contrast_means|^_augment|^{AUGMENT}"),
    ("optimizer", r"^_sums|^_ratios|^_apply|^Optimizer\.step"),
    ("norm", r"^_norm_|batch_?norm|\bbn_(fw|bw)|_Normalise"),
    ("convolutions", r"^triton_tem_\w*convolution"),
    ("products", r"^triton_tem_"),
    ("other", r"^triton_\w+?_fused_(_to_copy|convert_element_type|clone|copy|view|permute|_|\d)+$"),
    ("norm", r"^triton_"),
    ("convolutions", r"convolution|conv\dd|cudnn|fprop|dgrad|wgrad|implicit_gemm|winograd"),
    ("convolutions", r"n(chw|hwc)ton(hwc|chw)"),
    ("products", r"gemm|gemv|nvjet|cublas|splitk|cutlass|^aten::(mm|bmm|addmm|linear|matmul)\b"),
    ("products", r"(\b|add|b)mmBackward"),
    ("other", r"^aten::(_to_copy|copy_|clone)\b"),
    ("norm", r"relu|threshold|clamp_min|max_?pool|CUDAFunctor_add"),
    ("norm", r"^aten::(add_?|cat|var_mean)$"),
]
_PATTERNS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _NAMES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Something the device does without a break: a kernel, a copy; a part of a CPU's operator."""

    name: str
    start: float  # seconds
    end: float
    ranges: tuple[str, ...] = ()  # open where it was launched, outermost first


def classify(name: str, ranges: Sequence[str] = ()) -> str:
    """The class of a kernel or operator launched within these ranges, outermost first."""
    kind = _class_of(name) or "norm" * ("CompiledFxGraph" in name)  # the generated loops of a CPU
    if kind == "communication" or name.startswith(("Memcpy", "Memset")):
        return kind
    kinds = [_class_of(entered) for entered in ranges]
    for stage in ("augmentation", "optimizer"):
        if stage in (kind, *kinds):
            return stage
    if LOSS in ranges:
        return "products" if "products" in (kind, *kinds) else "other"
    if kind == "products" and "convolutions" in kinds:  # 1x1 convolutions are matrix products, too
        return "convolutions"
    return kind or next(filter(None, reversed(kinds)), "other")


@functools.cache
def _class_of(name: str) -> str:
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "")


def activities(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> list[Activity]:
    """What the device did, of the events of a Chrome trace by torch.profiler."""
    host: dict[int, list[tuple[float, float, str]]] = defaultdict(list)  # by thread
    launched: dict[int, tuple[int, float]] = {}  # thread and time, by correlation id
    device = []
    for event in events:
        if event.get("ph") != "X":
            continue
        kind, arguments = event.get("cat"), event.get("args", {})
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        if kind in ("cpu_op", "user_annotation"):
            host[event["tid"]].append((start, end, event["name"]))
        elif kind in ("cuda_runtime", "cuda_driver"):
            launched[arguments.get("correlation")] = event["tid"], start
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            device.append((event["name"], start, end, arguments))
    nested = {thread: slices(operators) for thread, operators in host.items()}
    if not on_gpu:
        every = [piece for pieces in nested.values() for piece in pieces]
        return [piece for piece in every if _computes(piece.name)]
    found = []
    for name, start, end, arguments in device:
        thread, time = launched.get(arguments.get("correlation"), (None, 0.0))
        pieces = nested.get(thread, [])
        at = bisect.bisect_right(pieces, time, key=lambda piece: piece.start) - 1
        inside = at >= 0 and time <= pieces[at].end
        ranges = (*pieces[at].ranges, pieces[at].name) if inside else ()
        found.append(Activity(name=name, start=start, end=end, ranges=ranges))
    return found


def _computes(name: str) -> bool:
    """Whether the time of this operator or range of a CPU's is work, and not Python's or a wait."""
    if re.match(rf"{AUGMENT}|gloo:|## Call CompiledFxGraph", name):
        return True
    return "::" in name and "autograd::" not in name


def slices(operators: Iterable[tuple[float, float, str]]) -> list[Activity]:
    """A thread's time, cut wherever one of its nested operators (start, end, name) begins or ends:
    each piece with the innermost operator's name, those around it as its ranges, in order."""
    pieces: list[Activity] = []
    nest: list[tuple[float, str]] = []  # end, name
    now = 0.0

    def go_on(until: float) -> None:
        nonlocal now
        if nest and until > now:
            *ranges, name = (name for _, name in nest)
            pieces.append(Activity(name=name, start=now, end=until, ranges=tuple(ranges)))
        now = until

    in_order = sorted(operators, key=lambda operator: (operator[0], -operator[1]))
    for start, end, name in [*in_order, (math.inf, math.inf, "")]:
        while nest and nest[-1][0] <= start:
            go_on(nest[-1][0])
            nest.pop()
        go_on(start)
        nest.append((end, name))
    return pieces


def busy(work: Iterable[Activity]) -> float:
    """Seconds in which at least one of them goes on."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((activity.start, activity.end) for activity in work):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """A step's classes, in the order of `CLASSES`, without those that do not occur."""

    step: float  # seconds of a step that was not traced
    parts: dict[str, Stage]
    kernels: dict[str, Any]  # per step: ms, launches, and the longest {name, ms, launches, share}
    fused_norm: bool  # whether batch norm has kernels of its own


def breakdown(
    work: Sequence[Activity], num_steps: int, step: float, flop: dict, moved: dict
) -> Breakdown:
    """Break a step down.

    Args:
        work: what the device did in `num_steps` steps.
        step: seconds of a step without tracing, which delays launches.
        flop, moved: of a step, FLOP and bytes of the classes where they can be counted.
    """
    classes: dict[str, list[Activity]] = {name: [] for name in CLASSES}
    by_name: dict[str, list[Activity]] = defaultdict(list)
    for activity in work:
        classes[classify(activity.name, activity.ranges)].append(activity)
        by_name[activity.name].append(activity)
    whole = busy(work)
    gaps = max(step - whole / num_steps, 0.0)
    parts = {}
    for name, members in classes.items():
        others = [a for other, some in classes.items() if other != name for a in some]
        if members:
            parts[name] = Stage(
                name=name,
                seconds=busy(members) / num_steps,
                flop=flop.get(name, 0.0),
                bytes=moved.get(name, 0.0),
                ceiling="flops" if name in flop else "memory" if name in moved else "",
                alone=(whole - busy(others)) / num_steps,
                launches=len(members) / num_steps,
            )
    parts["gaps"] = Stage(name="gaps", seconds=gaps, alone=gaps)
    ms = {n: 1e3 * sum(a.end - a.start for a in some) / num_steps for n, some in by_name.items()}
    total = sum(ms.values())
    longest = [
        {"name": name, "ms": ms[name], "launches": len(by_name[name]) / num_steps,
         "share": ms[name] / total}
        for name in sorted(ms, key=lambda name: -ms[name])[:20]
    ]  # fmt: skip
    return Breakdown(
        step=step,
        parts=parts,
        kernels={"ms": total, "launches": len(work) / num_steps, "longest": longest},
        fused_norm=any(name.startswith("_norm_") for name in by_name),
    )


def advice(
    config: Config,
    runtime: Runtime,
    found: Breakdown,
    ceilings: Ceilings | None,
    *,
    world_size: int = 1,
    waiting: float = 0.0,
    for_loader: str = "",
) -> list[str]:
    """What takes more than a twentieth of a step and the switches that would help, a line each, the
    largest first.

    Args:
        found: of a step with all ranks' collectives.
        waiting: share of a step from JPEGs in which the device waits for data.
        for_loader: what helps against that.
    """
    on_gpu, off = runtime.device.type == "cuda", runtime.compile == "off"
    parts = {name: Stage(name=name, seconds=0.0) for name in CLASSES} | found.parts
    share = {name: part.seconds / found.step for name, part in parts.items()}
    larger = ["a larger --batch-size"]
    launching = ["--compile default launches fewer kernels"] * off + larger
    if runtime.compile == "default":
        launching = ["--compile reduce-overhead replays CUDA graphs", *larger]
    slow_norm = on_gpu and not found.fused_norm and parts["norm"].reached(ceilings) < 0.7
    over_ranks = ["--compress-gradients sends half"] * (not config.compress_gradients)
    if world_size > step_costs.RANKS_PER_MACHINE and not config.bn_group:
        over_ranks += [f"--bn-group {step_costs.RANKS_PER_MACHINE} keeps batch norm on a machine"]
    over_ranks += ["--separate-communicators"] * (not config.separate_communicators) + larger
    fusing = ["--compile default fuses them"] * (on_gpu and off)
    rules = [
        (waiting, "the device waits for data", [for_loader]),
        (share["gaps"], "no kernel runs for", launching * on_gpu),
        (share["convolutions"], "convolutions take", _for_convolutions(config, runtime)),
        (share["norm"], "batch norm and ReLU take", ["--norm fused"] * slow_norm),
        (share["products"], "matrix products take", ["a narrower --projector"]),
        (share["optimizer"], "the optimizer takes", larger),
        (share["other"], "casts, copies and small kernels take", fusing),
        (parts["communication"].alone / found.step, "exposed communication takes", over_ranks),
    ]
    return [
        f"{what} {100 * of_step:.0f} % of the step: {', or '.join(switches)}"
        for of_step, what, switches in sorted(rules, key=lambda rule: -rule[0])
        if of_step > 0.05 and switches
    ]


def _for_convolutions(config: Config, runtime: Runtime) -> list[str]:
    if runtime.precision == "fp32" and has_bf16(runtime.device.type):
        return ["--precision bf16"]
    if runtime.device.type == "cpu":
        return ["a GPU", "a smaller --size or --encoder"]
    if config.deterministic:
        return ["kernels chosen by trial, without --deterministic"]
    if config.resolution is None and config.size >= 128 and config.size % 32 == 0:
        low = 32 * round(config.size * 0.7 / 32)
        return [f"--resolution {low}:{config.size} saves a quarter", "more GPUs"]
    return ["more GPUs"]
