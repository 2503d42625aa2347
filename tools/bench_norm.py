"""Times of the fused batch norm kernels and of complete passes beside torch's; for `gpu_suite`."""

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
KERNELS, PASSES = "Fused norms, each kernel alone", "Batch norm, forward and backward pass"


def measure(results: Results, device: torch.device, budget: float) -> None:
    """Measure the norms of a ResNet-50 on 512 views of 224 px, in bf16; toy sizes on a CPU."""
    on_gpu = device.type == "cuda"
    n, width, side, num_stages, bits = (512, 64, 56, 4, 27) if on_gpu else (2, 8, 2, 1, 16)
    source = torch.randn(2**bits, device=device)
    seconds, _ = seconds_per_call(partial(torch.empty_like(source).copy_, source), device, budget)
    bandwidth = 2 * source.nbytes / seconds

    def record(row: str, seconds: float, num_bytes: int) -> None:
        figures = {"us": 1e6 * seconds, "MB": num_bytes / 1e6, "GB/s": num_bytes / seconds / 1e9}
        results.record(KERNELS, row, figures | {"of the copy": num_bytes / seconds / bandwidth})

    def figures(row: str, form: str, shape: tuple[int, ...]) -> dict[str, float]:
        with Calls() as calls:
            for part in passes(form, shape, device, is_fused=True):
                part()
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        calls.found.append(("copy of x", partial(torch.empty_like(x).copy_, x), 2 * x.nbytes))
        times = seconds_of_parts([call for _, call, _ in calls.found], device, budget)
        for (name, _, num_bytes), (seconds, _) in zip(calls.found, times, strict=True):
            record(f"{row}: {name}", seconds, num_bytes)
        found: dict[str, float] = {}
        for name, is_fused in (("fused", True), ("torch's", False)):
            times = seconds_of_parts(passes(form, shape, device, is_fused), device, budget)
            for direction, (seconds, _) in zip(("forward", "backward"), times, strict=True):
                found[f"{name}, {direction} ms"] = 1e3 * seconds
        a, b, c, d = found.values()
        return found | {"times as fast": (c + d) / (a + b)}

    record("copy", seconds, 2 * source.nbytes)
    cases = {("stem", "pool"): (n, width, 2 * side, 2 * side)}
    for stage in range(num_stages):
        for form in ("relu", *RESIDUAL):
            channels = (width if form == "relu" else 4 * width) << stage
            cases[f"stage {stage + 1}", form] = n, channels, side >> stage, side >> stage
    for (where, form), shape in cases.items():
        results.measure(PASSES, row := f"{where}, {form}", partial(figures, row, form, shape))


class Calls(TorchDispatchMode):
    """Calls of bt-fast's operators: (name, call, bytes of its tensor arguments and results)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Callable[[], object], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "bt_fast":
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            num_bytes = sum(t.nbytes for t in tensors)
            self.found.append((func.name().partition("::")[2], partial(func, *args), num_bytes))
        return result


def passes(
    form: str, shape: tuple[int, ...], device: torch.device, is_fused: bool
) -> list[Callable[[], object]]:
    """Forward and backward pass, fused or by torch's batch norm of each view, sum, ReLU, pool."""

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
    num_consumers = 1 if form == "relu" else 2  # of y
    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2) if form == "pool" else shape
    pool = nn.MaxPool2d(3, 2, 1) if form == "pool" else None
    gradients = [activation(pooled) for _ in range(num_consumers)]
    outputs: list[Tensor] = []

    def forward() -> None:
        y = batch_norm.norm_act(
            layers[0], inputs[0], pool=pool, two_consumers=num_consumers == 2, **options
        )
        outputs[:] = batch_norm.as_pair(y)[:num_consumers]

    return [forward, lambda: torch.autograd.grad(outputs, leaves, gradients)]
