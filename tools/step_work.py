"""FLOP and bytes of one rank's training step, counted, for a profile's rates.

augmentation   3 H W bytes read twice, 3 H W values written, per view
norm           fused with ReLU and residual sum, values of a batch norm's output: x read twice
               and y written, then x and g read twice and the gradient of x written; a residual
               read, then its gradient written
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bt_fast.plan.step_costs import lars_bytes


def augment_bytes(num_views: int, size: int, dtype: torch.dtype) -> int:
    return num_views * 3 * size * size * (2 + dtype.itemsize)


def norm_bytes(num_normalised: int, num_residual: int, itemsize: int) -> int:
    """Least bytes that batch norm, ReLU and residual sums move, forwards and backwards, if the
    statistics take a separate pass. Implementations that are not fused move more.

    Args:
        num_normalised: values of all batch norms' outputs.
        num_residual: values of all residual blocks' outputs.
    """
    return itemsize * (8 * num_normalised + 2 * num_residual)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """FLOP and bytes of one rank's step, without the loss."""

    forward: float  # FLOP of encoder and projector
    backward: float
    flop: dict[str, float]  # of convolutions and of matrix products
    bytes: dict[str, float]  # of norm, optimizer and augmentation


def count_work(model: nn.Module, views: torch.Tensor, autocast: torch.autocast) -> Work:
    """Count on four views, in training mode, uncompiled, on one rank; clears the gradients."""
    sample, values = views[:4], {"normalised": 0, "residual": 0}
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused", False)]
    for module in fused:
        module.fused = False
    scale = len(views) / len(sample)

    def count_values(module: nn.Module, _, output: torch.Tensor) -> None:
        values["residual" if hasattr(module, "downsample") else "normalised"] += output.numel()

    hooks = [
        module.register_forward_hook(count_values)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "downsample")
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            with autocast:
                z = model(sample)
            forward = counter.get_total_flops()
            z.sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
        for module in fused:
            module.fused = True
    flop = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    convolutions = sum(value for name, value in flop.items() if "convolution" in name)
    norm = norm_bytes(values["normalised"], values["residual"], views.element_size())
    return Work(
        forward=scale * forward,
        backward=scale * (sum(flop.values()) - forward),
        flop={
            "convolutions": scale * convolutions,
            "products": scale * (sum(flop.values()) - convolutions),
        },
        bytes={
            "norm": scale * norm,
            "optimizer": lars_bytes(sum(p.numel() for p in model.parameters())),
            "augmentation": augment_bytes(len(views), views.shape[-1], views.dtype),
        },
    )
