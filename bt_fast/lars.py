"""LARS (You et al. 2017) as the Barlow Twins reference uses it.

For a parameter p with gradient g, momentum buffer m and learning rate lr:

    ndim > 1:    u = g + weight_decay * p
                 u = u * trust_coefficient * |p| / |u|      (as it is if either norm is 0)
    ndim <= 1:   u = g                                      (biases and norm parameters)
    m = momentum * m + u
    p = p - lr * m

Weight decay is inside the trust ratio's norm; there is no epsilon and no clipping.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; parameter groups may differ in every hyper-parameter.

    Args:
        params: parameters, or groups of them, as for any torch optimizer.
        lr: learning rate.
        momentum: of the buffer, without dampening or Nesterov.
        weight_decay: applied to parameters with ndim > 1 only.
        trust_coefficient: eta of the paper.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], torch.Tensor] | None = None,
        *,
        apply: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """One update.

        Args:
            closure: re-evaluates the model, as for any torch optimizer.
            apply: bool scalar on the parameters' device. False leaves parameters and momentum
                as they are, whatever the gradients hold: how a non-finite step is skipped
                without asking the device first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group, apply)
        return loss

    def _update(self, params: list[torch.Tensor], group: dict, apply: torch.Tensor | None) -> None:
        updates: list[Any] = [p.grad for p in params]
        if apply is not None:  # a select, because 0 * nan is nan
            updates = [torch.where(apply, update, 0) for update in updates]
        updates = _adapt(params, updates, group["weight_decay"], group["trust_coefficient"])

        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        if apply is None:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        else:
            on = apply.to(params[0].dtype)
            torch._foreach_mul_(
                buffers, torch.lerp(torch.ones_like(on), on * group["momentum"], on)
            )
            torch._foreach_add_(buffers, torch._foreach_mul(updates, on))
            torch._foreach_add_(params, torch._foreach_mul(buffers, -group["lr"] * on))


def _adapt(params, gradients, weight_decay: float, trust_coefficient: float):
    """Weight decay and trust ratio for the parameters with ndim > 1; the rest pass through."""
    updates = list(gradients)
    rows = [i for i, p in enumerate(params) if p.ndim > 1]
    if not rows:
        return updates
    matrices = [params[i] for i in rows]
    decayed = torch._foreach_add([gradients[i] for i in rows], matrices, alpha=weight_decay)
    norms = torch.stack(torch._foreach_norm(matrices))
    update_norms = torch.stack(torch._foreach_norm(decayed))
    both = (norms > 0) & (update_norms > 0)
    ratios = torch.where(both, trust_coefficient * norms / update_norms, 1)
    torch._foreach_mul_(decayed, ratios.unbind())
    for i, update in zip(rows, decayed, strict=True):
        updates[i] = update
    return updates
