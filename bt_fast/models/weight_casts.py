"""Weights of convolutions, cast for autocast many at a time.

Autocast casts the float32 weight of every convolution in the forward pass, and its gradient back in
the backward pass: two kernels for each, most of them over in a microsecond. `forward` casts all
weights of a part of a network in one launch and their gradients in another. Values and memory
formats are autocast's, so the step is the same bit for bit.

Their gradients are there when the backward pass has left the part; so a part is one stage of an
encoder, and those of later stages travel to other ranks meanwhile. Large linear layers are left to
autocast: one of them is a launch of its own either way.

A compiled layer casts as it is generated: there nothing changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def forward(part: nn.Module, x: Any) -> Any:
    """part(x), the weights of its convolutions cast together where autocast would cast each."""
    weights = {} if torch.compiler.is_compiling() else _to_cast(part)
    if not weights:
        return part(x)
    first = next(iter(weights.values()))
    cast = _Cast.apply(torch.get_autocast_dtype(first.device.type), *weights.values())
    narrow = dict(zip(weights, cast, strict=True))
    return functional_call(part, narrow, (x,), tie_weights=False)


def _to_cast(part: nn.Module) -> dict[str, torch.Tensor]:
    """By name, the weights that autocast would cast and that are trained."""
    if not part.training:
        return {}
    return {
        f"{name}.weight": layer.weight
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Conv2d)
        and layer.weight.requires_grad
        and layer.weight.dtype == torch.float32
        and not layer.weight.is_meta  # which autocast does not know
        and torch.is_autocast_enabled(layer.weight.device.type)
    }


class _Cast(torch.autograd.Function):
    """Tensors in another dtype."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_copies(tensors, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        there = [g for g in gradients if g is not None]
        cast = iter(_copies(there, ctx.dtype))
        return None, *[None if g is None else next(cast) for g in gradients]


def _copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """In another dtype, each in its own memory format."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    # On a GPU one launch for up to 64 tensors and 320 pieces of 65,536 elements, if every copy lies
    # in memory as its source; far more with CUDA 13 (torch's MultiTensorApply.cuh).
    torch._foreach_copy_(copies, list(tensors))
    return copies
