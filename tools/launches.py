"""Kernel launches of a training step without the compiler, counted without a GPU.

    python tools/launches.py [--norm compiled] [--ranks 8]

Runs `train.update` with ResNet-50 and the paper's projector on tensors without memory and counts
the operators that torch dispatches. Views and allocations launch no kernel. The backward pass of a
convolution launches one kernel per gradient; an operator of `batch_norm_triton` launches its
kernels and one copy per activation that is not channels-last; any other operator launches one, also
the copies of a stage's weights, which are below the limits of torch's `multi_tensor_apply`.
Additional launches by libraries within an operator are not counted. The optimizer's three kernels
and the copies of its two tables to the GPU are a constant, which `tests/bt_fast/test_lars.py`
checks. Across ranks, collectives are counted, but not the copies of gradients into DDP's buckets.

The tensors are on the CPU, whose autocast treats every operator of a step as on a GPU.
"""

import _checkout  # noqa: F401  # isort: skip

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bt_fast import lars_triton, train
from bt_fast.cli import run_command
from bt_fast.lars import LARS, parameter_groups
from bt_fast.loss_variants import objective_function
from bt_fast.models import batch_norm
from bt_fast.models.library_encoders import DropPaths
from bt_fast.runtime import Runtime
from pipelines.common.flags import parse_flags
from tools.compiled_traffic import build, group_of, to_fake

GROUPS = {  # by the beginning of an operator's name
    **dict.fromkeys(("native_batch_norm", "relu_", "threshold_backward", "max_pool2d"), "norm"),
    **{"convolution": "convolutions", "mm": "products", "bmm": "products"},
    **{"_to_copy": "casts", "_foreach_copy_": "casts"},
}
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kernel launches of a training step without the compiler, counted without a GPU."""

    norm: Literal["compiled", "fused"] = "fused"
    """Implementation of batch norm, as --norm of pretrain; here, compiled is torch's batch norm."""
    ranks: int = 1
    """Number of ranks with common batch statistics."""


def main() -> int:
    options = parse_flags(Options, "launches.py", None)
    counted = count(fused=options.norm == "fused", num_ranks=options.ranks)
    for group, launches in (counted | {"all": counted.total()}).items():
        print(f"{group:14} {launches:5}")
    return 0


def count(*, fused: bool = True, num_ranks: int = 1) -> Counter[str]:
    """Launches of a step by group.

    fused: whether batch norm runs as the kernels of `batch_norm_triton`.
    """
    runtime = Runtime(device=torch.device("cpu"), precision="bf16", compile="off")
    model, launches = build(), Launches()
    with group_of(num_ranks) as group, FakeTensorMode():
        to_fake(model, "cpu")
        batch_norm.set_process_group(model, group)
        if fused:
            batch_norm.fuse(model)
        statistics = batch_norm.RunningStatistics(model)
        statistics.update = launches.within("statistics", statistics.update)
        optimizer: Any = LARS(parameter_groups(model.parameters()), lr=0.1, fused=True)
        optimizer.step = launches.within("optimizer", optimizer.step)
        for p in model.parameters():
            optimizer.momentum_buffer(p)
        setup: Any = SimpleNamespace(
            config=SimpleNamespace(lambd=5e-3, grad_scale=1 / 16, accumulate=1),
            world=SimpleNamespace(size=num_ranks),
            autocast=runtime.autocast(),
            embed=model,
            objective=objective_function("barlow-twins", group=group),
            optimizer=optimizer,
            statistics=statistics,
            drop_paths=DropPaths(model, seed=0),
        )
        views = torch.empty(512, 3, 224, 224, dtype=torch.bfloat16)
        views = views.to(memory_format=torch.channels_last)
        with mock.patch.object(lars_triton, "update", launches.update), launches:
            train.update(setup, views)
    return launches.counted


class Launches(TorchDispatchMode):
    """Counts the launches of a GPU, by group."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.group: str | None = None

    def within(self, group: str, function: Callable) -> Callable:
        """A function whose launches are counted in a group."""

        def counted(*arguments, **keywords):
            self.group = group
            result = function(*arguments, **keywords)
            self.group = None
            return result

        return counted

    def update(self, params, momenta, groups, guard) -> torch.Tensor:
        """Replaces `lars_triton.update`, which needs addresses."""
        for p in params:
            lars_triton.match_strides(p, p.grad)  # copies a gradient whose strides differ
        self.counted["optimizer"] += 3 + 2
        return torch.empty((), dtype=torch.bool)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if number := launches_of(func, args):
            name = func.overloadpacket.__name__
            group = next((GROUPS[start] for start in GROUPS if name.startswith(start)), "other")
            namespaces = {"bt_fast": "norm", "c10d": "collectives"}
            self.counted[self.group or namespaces.get(func.namespace, group)] += number
        return func(*args, **(kwargs or {}))


def launches_of(func, args) -> int:
    name = func.overloadpacket.__name__
    if func.namespace in ("prim", "profiler") or func.is_view or name in NO_LAUNCH:
        return 0
    if name == "convolution_backward":
        return sum(args[-1])  # mask of the requested gradients
    if func.namespace == "bt_fast":
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        images = [t for t in tensors if t.ndim == 4 and t.dtype == torch.bfloat16]
        copies = sum(not t.is_contiguous(memory_format=torch.channels_last) for t in images)
        return copies + (len(args[0]) if name == "norm_moments" else 1)
    return 1


if __name__ == "__main__":
    sys.exit(run_command("launches.py", main))
