"""Time of a training step by class of device work, from a trace of torch.profiler.

    convolutions    convolutions of the encoder and changes of memory layout
    norm            batch norm, ReLU, residual sums, max-pool
    products        matrix products of projector and loss
    optimizer       LARS
    augmentation    both branches
    communication   collectives between ranks
    other           casts, copies, all other work
    gaps            time in which the device is idle

Kernels are classified by name and, if the name is ambiguous, by the operators and named ranges that
were open on the host at the launch. On a CPU, operators are classified. The elementwise part of the
loss, which takes little time, is norm or other.
"""

import bisect
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bt_fast.plan.step_costs import lars_bytes
from tools.timing import Stage

AUGMENT = "bt-fast: augment"  # a named range
CLASSES = (
    *("convolutions", "norm", "products", "optimizer", "augmentation", "communication", "other"),
    "gaps",
)

# The first match counts. Names of cuDNN's convolutions may contain `relu` or `gemm`.
_NAMES = [
    ("communication", r"nccl|^gloo:|c10d"),
    ("other", r"^Memcpy|^Memset"),
    ("augmentation", rf"^_contrast_sums|^_augment|^{AUGMENT}"),
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
_PATTERNS = [(work, re.compile(pattern, re.IGNORECASE)) for work, pattern in _NAMES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """A kernel or copy on the device, or an uninterrupted part of an operator on a CPU."""

    name: str
    start: float  # seconds
    end: float
    ranges: tuple[str, ...] = ()  # open at the launch, outermost first


def classify(name: str, ranges: Sequence[str] = ()) -> str:
    """The class of a kernel or operator launched within these ranges, outermost first."""
    work = _class_of(name) or "norm" * ("CompiledFxGraph" in name)  # generated loops on a CPU
    if work == "communication" or name.startswith(("Memcpy", "Memset")):
        return work
    classes = [_class_of(entered) for entered in ranges]
    for stage in ("augmentation", "optimizer"):
        if stage in (work, *classes):
            return stage
    if work == "products" and "convolutions" in classes:  # 1x1 convolutions are matrix products
        return "convolutions"
    return work or next(filter(None, reversed(classes)), "other")


@functools.cache
def _class_of(name: str) -> str:
    return next((work for work, pattern in _PATTERNS if pattern.search(name)), "")


def activities(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> list[Activity]:
    """Activities of the device, from the events of a Chrome trace by torch.profiler."""
    host: dict[int, list[tuple[float, float, str]]] = defaultdict(list)  # by thread
    launched: dict[int, tuple[int, float]] = {}  # thread and time, by correlation id
    device = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category, arguments = event.get("cat"), event.get("args", {})
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        if category in ("cpu_op", "user_annotation"):
            host[event["tid"]].append((start, end, event["name"]))
        elif category in ("cuda_runtime", "cuda_driver"):
            launched[arguments.get("correlation")] = event["tid"], start
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            device.append((event["name"], start, end, arguments))
    nested = {thread: slices(operators) for thread, operators in host.items()}
    if not on_gpu:
        return [piece for pieces in nested.values() for piece in pieces if _computes(piece.name)]
    found = []
    for name, start, end, arguments in device:
        thread, time = launched.get(arguments.get("correlation"), (None, 0.0))
        pieces = nested.get(thread, [])
        index = bisect.bisect_right(pieces, time, key=lambda piece: piece.start) - 1
        is_inside = index >= 0 and time <= pieces[index].end
        ranges = (*pieces[index].ranges, pieces[index].name) if is_inside else ()
        found.append(Activity(name=name, start=start, end=end, ranges=ranges))
    return found


def _computes(name: str) -> bool:
    """Whether this operator or range on a CPU is work, not Python overhead or a wait."""
    if re.match(rf"{AUGMENT}|gloo:|## Call CompiledFxGraph", name):
        return True
    return "::" in name and "autograd::" not in name


def slices(operators: Iterable[tuple[float, float, str]]) -> list[Activity]:
    """The time of a thread, cut where a nested operator (start, end, name) begins or ends. A piece
    has the name of the innermost operator, and the enclosing operators as its ranges."""
    pieces: list[Activity] = []
    nest: list[tuple[float, str]] = []  # end, name
    now = 0.0

    def advance(until: float) -> None:
        nonlocal now
        if nest and until > now:
            *ranges, name = (name for _, name in nest)
            pieces.append(Activity(name=name, start=now, end=until, ranges=tuple(ranges)))
        now = until

    in_order = sorted(operators, key=lambda operator: (operator[0], -operator[1]))
    for start, end, name in [*in_order, (math.inf, math.inf, "")]:
        while nest and nest[-1][0] <= start:
            advance(nest[-1][0])
            nest.pop()
        advance(start)
        nest.append((end, name))
    return pieces


def busy(work: Iterable[Activity]) -> float:
    """Seconds in which at least one activity is running."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((activity.start, activity.end) for activity in work):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Classes of a step that occur, in the order of `CLASSES`."""

    step: float  # seconds of a step without tracing
    parts: dict[str, Stage]
    kernels: dict[str, Any]  # per step: ms, launches, and the longest {name, ms, launches, share}


def breakdown(
    work: Sequence[Activity], num_steps: int, step: float, flop: dict, moved: dict
) -> Breakdown:
    """Break a step down.

    Args:
        work: activities of the device in `num_steps` steps.
        step: seconds of a step without tracing, because tracing delays launches.
        flop, moved: FLOP and bytes per step of the classes that can be counted.
    """
    classes: dict[str, list[Activity]] = {name: [] for name in CLASSES}
    by_name: dict[str, list[Activity]] = defaultdict(list)
    for activity in work:
        classes[classify(activity.name, activity.ranges)].append(activity)
        by_name[activity.name].append(activity)
    total_busy = busy(work)
    gaps = max(step - total_busy / num_steps, 0.0)
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
                alone=(total_busy - busy(others)) / num_steps,
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
    kernels = {"ms": total, "launches": len(work) / num_steps, "longest": longest}
    return Breakdown(step=step, parts=parts, kernels=kernels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """FLOP and bytes that one rank's step requires, without the loss."""

    forward: float  # FLOP of encoder and projector
    backward: float
    flop: dict[str, float]  # of convolutions and of matrix products
    bytes: dict[str, float]  # of norm, optimizer and augmentation


def count_work(model: nn.Module, views: torch.Tensor, autocast: torch.autocast) -> Work:
    """Count on four views, in training mode, uncompiled, on one rank; clears the gradients.

    Augmentation reads 3 H W bytes twice and writes 3 H W values per view. Norm, fused with ReLU and
    residual sum, reads x twice and writes y, reads x and g twice and writes the gradient; it reads
    a residual and writes its gradient.
    """
    sample, values = views[:4], {"normalised": 0, "residual": 0}
    scale = len(views) / len(sample)
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused", False)]

    def count_values(module: nn.Module, _, output: torch.Tensor) -> None:
        values["residual" if hasattr(module, "downsample") else "normalised"] += output.numel()

    hooks = [
        module.register_forward_hook(count_values)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "downsample")
    ]
    for module in fused:
        module.fused = False
    with FlopCounterMode(display=False) as counter:
        with autocast:
            z = model(sample)
        forward = counter.get_total_flops()
        z.sum().backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    for module in fused:
        module.fused = True
    flop = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    total = sum(flop.values())
    convolutions = sum(value for name, value in flop.items() if "convolution" in name)
    num_values = 8 * values["normalised"] + 2 * values["residual"]
    return Work(
        forward=scale * forward,
        backward=scale * (total - forward),
        flop={"convolutions": scale * convolutions, "products": scale * (total - convolutions)},
        bytes={
            "norm": scale * num_values * views.element_size(),
            "optimizer": lars_bytes(sum(p.numel() for p in model.parameters())),
            "augmentation": views.numel() * (2 + views.element_size()),
        },
    )
