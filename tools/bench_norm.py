"""The fused kernels of batch norm, each alone, and whole forms beside torch's; for `gpu_suite`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bt_fast.models import batch_norm
from tools.results import Results
from tools.timing import seconds_of_parts, seconds_per_call

LAYOUT, RESIDUAL = torch.channels_last, ("residual", "two norms")  # forms
KERNELS, WHOLE = "Fused norms, each kernel alone", "Batch norm, forward and backward pass"


def measure(results: Results, device: torch.device, budget: float) -> None:
    """The norms of a ResNet-50 on 512 views of 224 px, in bf16; toy sizes on a CPU."""
    on_gpu = device.type == "cuda"
    n, width, side, num_stages, bits = (512, 64, 56, 4, 27) if on_gpu else (2, 8, 2, 1, 16)
    source = torch.randn(2**bits, device=device)
    seconds, _ = seconds_per_call(partial(torch.empty_like(source).copy_, source), device, budget)
    bandwidth = 2 * source.nbytes / seconds

    def record(row: str, seconds: float, moved: int) -> None:
        figures = {"us": 1e6 * seconds, "MB": moved / 1e6, "GB/s": moved / seconds / 1e9}
        results.record(KERNELS, row, figures | {"of the copy": moved / seconds / bandwidth})

    def figures(row: str, form: str, shape: tuple[int, ...]) -> dict[str, float]:
        with Calls() as calls:
            for part in passes(form, shape, device, is_fused=True):
                part()
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        calls.found.append(("copy of x", partial(torch.empty_like(x).copy_, x), 2 * x.nbytes))
        times = seconds_of_parts([call for _, call, _ in calls.found], device, budget)
        for (name, _, moved), (seconds, _) in zip(calls.found, times, strict=True):
            record(f"{row}: {name}", seconds, moved)
        found: dict[str, float] = {}
        for name, is_fused in (("fused", True), ("torch's", False)):
            times = seconds_of_parts(passes(form, shape, device, is_fused), device, budget)
            for which, (seconds, _) in zip(("forward", "backward"), times, strict=True):
                found[f"{name}, {which} ms"] = 1e3 * seconds
        a, b, c, d = found.values()
        return found | {"times as fast": (c + d) / (a + b)}

    record("copy", seconds, 2 * source.nbytes)
    cases = {("stem", "pool"): (n, width, 2 * side, 2 * side)}
    for stage in range(num_stages):
        for form in ("relu", *RESIDUAL):
            channels = (width if form == "relu" else 4 * width) << stage
            cases[f"stage {stage + 1}", form] = n, channels, side >> stage, side >> stage
    for (where, form), shape in cases.items():
        results.measure(WHOLE, row := f"{where}, {form}", partial(figures, row, form, shape))


class Calls(TorchDispatchMode):
    """The calls of bt-fast's operators: (name, call, bytes of all tensors it takes and returns)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Callable[[], object], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "bt_fast":
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            moved = sum(t.nbytes for t in tensors)
            self.found.append((func.name().partition("::")[2], partial(func, *args), moved))
        return result


def passes(
    form: str, shape: tuple[int, ...], device: torch.device, is_fused: bool
) -> list[Callable[[], object]]:
    """Forward and backward pass; not fused: torch's batch norm for each view, sum, ReLU, pool."""

    def activation(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16, memory_format=LAYOUT)

    layers = [batch_norm.BatchNorm2d(shape[1]).to(device) for _ in range(1 + (form == "two norms"))]
    for layer in layers:
        layer.updated_externally = True  # as in training
        if is_fused:
            batch_norm.fuse(layer)
    inputs = [activation(shape).requires_grad_() for _ in range(1 + (form in RESIDUAL))]
    leaves = inputs + [p for layer in layers for p in layer.parameters()]
    options = dict(zip(("residual", "residual_norm"), (*inputs[1:], *layers[1:]), strict=False))
    ways = 1 if form == "relu" else 2  # on which y goes on
    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2) if form == "pool" else shape
    pool = nn.MaxPool2d(3, 2, 1) if form == "pool" else None
    gradients = [activation(pooled) for _ in range(ways)]
    outputs: list[Tensor] = []

    def forward() -> None:
        y = batch_norm.norm_act(layers[0], inputs[0], pool=pool, twice=ways == 2, **options)
        outputs[:] = batch_norm.ways(y)[:ways]

    return [forward, lambda: torch.autograd.grad(outputs, leaves, gradients)]
