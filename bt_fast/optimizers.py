"""Optimizers of a run. LARS is the paper's; AdamW is usual for transformers.

All of them can be guarded: a step whose guard or gradients are not finite changes nothing, which is
decided on the device, without waiting for it. Biases and norm parameters have no weight decay.
"""

from typing import Any

import torch
from torch import nn

from bt_fast.choices import OptimizerName
from bt_fast.lars import LARS, parameter_groups

SGD_MOMENTUM = 0.9
NUM_STATES: dict[OptimizerName, int] = {"lars": 1, "sgd": 1, "adamw": 2}  # values per parameter


class _Guarded(torch.optim.Optimizer):
    """torch's fused optimizers skip a step where `found_inf` is 1, as for a loss scaler."""

    def step(self, *, guard: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Update -> whether it was applied, a bool scalar on the device; see `LARS.step`."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        applied = torch.isfinite(guard) & torch.isfinite(nn.utils.get_total_norm(gradients))
        self.grad_scale, self.found_inf = None, (~applied).float()
        super().step()
        return applied


class AdamW(_Guarded, torch.optim.AdamW):  # type: ignore[misc]
    """torch's fused AdamW with a guard."""


class SGD(_Guarded, torch.optim.SGD):  # type: ignore[misc]
    """torch's fused SGD with a guard."""


GuardedOptimizer = LARS | AdamW | SGD


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    """What timm's models except from weight decay, such as embeddings of positions."""
    return [
        parameter
        for module in model.modules()
        if callable(exempt := getattr(module, "no_weight_decay", None))
        for name, parameter in module.named_parameters()
        if name in exempt()
    ]


def build_optimizer(name: OptimizerName, model: nn.Module, weight_decay: float) -> GuardedOptimizer:
    """The optimizer of that name, with its state, for all parameters; rates are set every step."""
    parameters = list(model.parameters())
    # LARS itself excepts vectors only; embeddings would get the biases' small rate.
    groups = parameter_groups(parameters, [] if name == "lars" else _embeddings(model))
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": weight_decay}
    if name == "lars":
        lars = LARS(groups, **options)
        for p in parameters:
            lars.momentum_buffer(p)
        return lars
    groups[1]["weight_decay"] = 0.0
    # torch would create the state in the first step, and a skipped one leaves it uninitialised.
    if name == "sgd":
        sgd = SGD(groups, momentum=SGD_MOMENTUM, fused=True, **options)
        sgd.state.update((p, {"momentum_buffer": torch.zeros_like(p)}) for p in parameters)
        return sgd
    adamw = AdamW(groups, fused=True, **options)
    for p in parameters:
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return adamw
