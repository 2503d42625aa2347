"""LARS (You et al. 2017) as the Barlow Twins reference uses it.

For a parameter p with gradient g, momentum buffer m and learning rate lr:

    ndim > 1:    u = g + weight_decay * p
                 u = u * trust_coefficient * |p| / |u|      (unchanged if either norm is 0)
    ndim <= 1:   u = g                                      (biases and norm parameters)
    m = momentum * m + u
    p = p - lr * m

The trust ratio's norm includes weight decay; there is no epsilon and no clipping.

`_update` is the definition, in torch's foreach operations. On a GPU the same arithmetic runs in
three kernel launches for all parameters together (`lars_triton`).
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bt_fast.runtime import is_interpreted, runs_triton


def parameter_groups(
    parameters: Iterable[torch.nn.Parameter | torch.Tensor],
    biases: Iterable[torch.nn.Parameter | torch.Tensor] = (),
) -> list[dict]:
    """Parameter groups "weights" (ndim > 1) and "biases" (and norm parameters), whose learning
    rates differ in the reference.

    Args:
        parameters: those to optimize, of any number of dimensions.
        biases: further ones of the second group, such as embeddings of positions.

    Returns:
        [{"name": "weights", "params": [...]}, {"name": "biases", "params": [...]}].
    """
    parameters, ids = list(parameters), {id(p) for p in biases}
    is_weight = [p.ndim > 1 and id(p) not in ids for p in parameters]
    pairs = list(zip(parameters, is_weight, strict=True))
    return [
        {"name": "weights", "params": [p for p, weight in pairs if weight]},
        {"name": "biases", "params": [p for p, weight in pairs if not weight]},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; every hyper-parameter may differ between groups.

    Args:
        params: parameters, or groups of them, as for any torch optimizer.
        lr: learning rate.
        momentum: coefficient of the momentum buffer, without dampening or Nesterov.
        weight_decay: applied to parameters with ndim > 1 only.
        trust_coefficient: eta of the paper.
        fused: update all parameters in three kernel launches. Default: in steps whose parameters
            are all float32 on one GPU.

    Raises:
        ValueError: momentum outside [0, 1), or another value that is negative or not finite; by
            `step`, a fused update that is not possible.
    """

    fused: bool | None = None  # not in the state, so that copies choose for themselves

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)
        for name, group in itertools.product(defaults, self.param_groups):
            if name == "momentum" and not 0 <= group[name] < 1:
                raise ValueError(f"{name} must be in [0, 1), got {group[name]}")
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {group[name]}")
        self.fused = fused

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], torch.Tensor] | None = None,
        *,
        guard: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the gradients and returns the loss; called before the update.
            guard: a scalar on the parameters' device, such as the loss. If it or any gradient is
                not finite, parameters and momentum are unchanged. None: no check.

        Returns:
            with a closure, its loss; else with a guard, a bool scalar on the same device: whether
            the update was applied. The fused update does not synchronise with the device; the
            definition does.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._update_all(guard)
            return loss
        return self._update_all(guard)

    def _update_all(self, guard: torch.Tensor | None) -> torch.Tensor | None:
        groups = [
            ([p for p in group["params"] if p.grad is not None], group)
            for group in self.param_groups
        ]
        all_params = [p for params, _ in groups for p in params]
        fused = can_fuse(all_params) if self.fused is None else self.fused
        if fused and all_params:
            if self.fused and not (can_fuse(all_params) or is_interpreted()):
                raise ValueError(
                    "fused=True needs triton and float32 parameters on one NVIDIA GPU of sm_80 or"
                    " newer"
                )
            from bt_fast import lars_triton  # triton comes with torch's CUDA builds only

            with torch.cuda.device_of(all_params[0]):
                return lars_triton.update(
                    all_params,
                    [self.momentum_buffer(p) for p in all_params],
                    [group for params, group in groups for _ in params],
                    guard,
                )
        applied = None
        if guard is not None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in all_params if p.grad is not None])
            applied = torch.isfinite(guard) & torch.isfinite(norm)
            if not applied:
                return applied
        for params, group in groups:
            _update(params, [self.momentum_buffer(p) for p in params], group)
        return applied

    def momentum_buffer(self, p: torch.Tensor) -> torch.Tensor:
        """The momentum buffer of a parameter, in its memory layout; zeros at first."""
        momentum = self.state[p].get("momentum")
        if momentum is None:
            momentum = self.state[p]["momentum"] = torch.zeros_like(p)
        elif momentum.stride() != p.stride():  # loaded, or the model's memory format has changed
            momentum = self.state[p]["momentum"] = torch.empty_like(p).copy_(momentum)
        return momentum


def can_fuse(params: list[torch.Tensor]) -> bool:
    """Whether one kernel can update all of them: float32, on one GPU that Triton compiles for."""
    devices = {p.device for p in params}
    return (
        len(devices) == 1
        and runs_triton(*devices)
        and all(p.dtype == torch.float32 for p in params)
    )


def _update(params: list[torch.Tensor], momenta: list[torch.Tensor], group: dict) -> None:
    """Update one group's parameters from their gradients, in place: the definition."""
    updates: list = [p.grad for p in params]
    indices = [i for i, p in enumerate(params) if p.ndim > 1]
    if indices:
        weights = [params[i] for i in indices]
        decayed = torch._foreach_add(
            [updates[i] for i in indices], weights, alpha=group["weight_decay"]
        )
        norms = torch.stack(torch._foreach_norm(weights))
        update_norms = torch.stack(torch._foreach_norm(decayed))
        is_scaled = (norms > 0) & (update_norms > 0)
        ratios = torch.where(is_scaled, group["trust_coefficient"] * norms / update_norms, 1)
        torch._foreach_mul_(decayed, ratios.unbind())
        for i, update in zip(indices, decayed, strict=True):
            updates[i] = update
    if params:
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])
