"""Kernel launches of a training step without the compiler, counted without a GPU.

    python tools/launches.py [--norm fused] [--ranks 8]

Runs `train.update` with ResNet-50 (or another encoder) and the paper's projector on tensors without
memory and counts the operators that torch dispatches. Views and allocations launch no kernel. The
backward pass of a convolution launches one kernel per gradient; an operator of `batch_norm_triton`
launches its kernels and one copy per activation that is not channels-last; a multi-tensor copy
launches one kernel per chunk of torch's `multi_tensor_apply` with CUDA 12; any other operator
launches one. Additional launches by libraries within an operator (split products, workspace
initialisation) are not counted. The optimizer's three kernels and the copies of its two tables to
the GPU are added as a constant, which `tests/bt_fast/test_lars.py` checks.

The tensors are on the CPU, whose autocast treats every operator of a step as on a GPU. Across
ranks, collectives are counted, but not the copies of gradients into DDP's buckets.
"""

import _checkout  # noqa: F401  # isort: skip

import functools
import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bt_fast import lars_triton, train
from bt_fast.lars import LARS, parameter_groups
from bt_fast.loss_variants import objective_function
from bt_fast.models import batch_norm
from bt_fast.models import networks as models
from bt_fast.runtime import Runtime
from pipelines.common.flags import parse_flags
from tools.lowering import group_of, replace_tensors

GROUPS = {
    "convolutions": {"convolution", "convolution_backward"},
    "products": {"mm", "bmm"},
    "norm": {
        *("native_batch_norm", "native_batch_norm_backward", "relu_", "threshold_backward"),
        *("max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
    },
    "casts": {"_to_copy", "_foreach_copy_"},
}
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}
# From torch's MultiTensorApply.cuh, for two lists of tensors; 448 and 2240 with CUDA 13.
MAX_TENSORS, MAX_CHUNKS, CHUNK = 64, 320, 65_536


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kernel launches of a training step without the compiler, counted without a GPU."""

    encoder: models.Encoder = "resnet50"
    """Encoder of the step."""
    norm: Literal["compiled", "fused"] = "fused"
    """Implementation of batch norm, as --norm of pretrain; here, compiled is torch's batch norm."""
    ranks: int = 1
    """Number of ranks with common batch statistics."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"--ranks must be at least 1, got {self.ranks}")


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse_flags(Options, "launches", arguments)
    except ValueError as error:
        print(f"launches: {error}", file=sys.stderr)
        return 2
    counted = count(options.encoder, fused=options.norm == "fused", num_ranks=options.ranks)
    for group, launches in counted.items():
        print(f"{group:14} {launches:5}")
    print(f"{'all':14} {counted.total():5}")
    return 0


def count(encoder: str = "resnet50", *, fused: bool = True, num_ranks: int = 1) -> Counter[str]:
    """Launches of a step by group: those of `GROUPS`, statistics, optimizer, collectives, other.

    fused: whether batch norm runs as the kernels of `batch_norm_triton`.
    """
    runtime = Runtime(device=torch.device("cpu"), precision="bf16", compile="off")
    with group_of(num_ranks) as group, FakeTensorMode():
        model = _model(encoder)
        batch_norm.set_process_group(model, group)
        if fused:
            batch_norm.fuse(model)
        optimizer = LARS(parameter_groups(model.parameters()), lr=0.1, fused=True)
        for p in model.parameters():
            optimizer.momentum_buffer(p)
        launches = Launches()
        setup: Any = SimpleNamespace(
            config=SimpleNamespace(lambd=5e-3, grad_scale=1 / 16),
            world=SimpleNamespace(size=num_ranks),
            autocast=runtime.autocast(),
            embed=model,
            objective=objective_function("barlow-twins", group=group),
            optimizer=launches.within("optimizer", optimizer),
            statistics=launches.within("statistics", batch_norm.RunningStatistics(model)),
        )
        views = torch.empty(512, 3, 224, 224, dtype=torch.bfloat16)
        views = views.to(memory_format=torch.channels_last)
        update = functools.partial(_update, launches.counted)
        with mock.patch.object(lars_triton, "update", update), launches:
            train.update(setup, views)
    return launches.counted


class Launches(TorchDispatchMode):
    """Counts the launches of a GPU, by group."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self._within: str | None = None

    def within(self, group: str, part: Any) -> Any:
        """Wraps a part of a setup: launches of its step or update are counted in this group."""

        def method(name):
            def call(*arguments, **keywords):
                self._within = group
                try:
                    return getattr(part, name)(*arguments, **keywords)
                finally:
                    self._within = None

            return call

        methods = {name: method(name) for name in ("step", "update") if hasattr(part, name)}
        zero_grad = getattr(part, "zero_grad", None)
        return SimpleNamespace(**methods, zero_grad=zero_grad)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        number = _launches_of(func, args)
        if number:
            self.counted[self._within or _group(func)] += number
        return func(*args, **(kwargs or {}))


def _group(func) -> str:
    name = func.overloadpacket.__name__
    namespaces = {"bt_fast": "norm", "c10d": "collectives"}
    for group, names in GROUPS.items():
        if func.namespace == "aten" and name in names:
            return group
    return namespaces.get(func.namespace, "other")


def _launches_of(func, args) -> int:
    name = func.overloadpacket.__name__
    if func.namespace in ("prim", "profiler") or func.is_view or name in NO_LAUNCH:
        return 0
    if name == "convolution_backward":
        return sum(args[-1])  # mask of the requested gradients
    if name == "_foreach_copy_":
        return _multi_tensor_launches([t.numel() for t in args[0]])
    if func.namespace == "bt_fast":
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        images = [t for t in tensors if t.ndim == 4 and t.is_floating_point()]
        images = [t for t in images if t.dtype == torch.bfloat16]  # float32: sums per channel
        copies = sum(not t.is_contiguous(memory_format=torch.channels_last) for t in images)
        return copies + (len(args[0]) if name == "norm_moments" else 1)
    return 1


def _multi_tensor_launches(sizes: list[int]) -> int:
    """Number of launches, each limited to MAX_TENSORS tensors and MAX_CHUNKS chunks."""
    launches = tensors = chunks = 0
    for size in sizes:
        tensors += 1
        for _ in range(-(-size // CHUNK)):
            chunks += 1
            if chunks == MAX_CHUNKS:
                launches, chunks, tensors = launches + 1, 0, 1
        if tensors == MAX_TENSORS:
            launches, chunks, tensors = launches + 1, 0, 0
    return launches + (chunks > 0)


def _update(counted, params, momenta, groups, guard) -> torch.Tensor:
    """Replaces `lars_triton.update`, which needs addresses."""
    for p in params:
        lars_triton.match_strides(p, p.grad)  # copies a gradient whose strides differ
    counted["optimizer"] += 3 + 2
    return torch.empty((), dtype=torch.bool)


def _model(encoder: str) -> nn.Module:
    """The model with tensors without memory, channels-last."""

    def like(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

    with torch.device("meta"), torch.utils._python_dispatch._disable_current_modes():
        model = models.BarlowTwins(encoder, (8192, 8192, 8192))
        model.to(memory_format=torch.channels_last)
    replace_tensors(model, like)
    return model


if __name__ == "__main__":
    sys.exit(main())
