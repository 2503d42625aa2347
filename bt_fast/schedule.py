"""The learning-rate schedule of the reference: linear warm-up per step, then half a cosine."""

import math

FLOOR = 1e-3  # the cosine ends at this share of the peak


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    batch_size: int,
    base_lr: float,
    warmup_epochs: float = 10,
) -> float:
    """The learning rate of one step, as `adjust_learning_rate` of the released code computes it.

    Args:
        step: 0 for the first step, whose rate is 0 if there is a warm-up.
        steps_per_epoch: full global batches in an epoch.
        batch_size: the global batch; the peak is base_lr * batch_size / 256.
        base_lr: the rate at batch 256 (the paper: 0.2 for weights, 0.0048 for biases and norms).
        warmup_epochs: length of the linear rise from 0.
    """
    peak = base_lr * batch_size / 256
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return peak * step / warmup_steps
    cosine_steps = max(epochs * steps_per_epoch - warmup_steps, 1)
    progress = min((step - warmup_steps) / cosine_steps, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (share + FLOOR * (1 - share))
