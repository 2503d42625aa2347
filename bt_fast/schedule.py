"""The learning-rate schedule of the reference: linear warm-up per step, then cosine decay."""

import math

FINAL_FRACTION = 1e-3  # of the peak, at the end of the cosine


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    batch_size: int,
    base_lr: float,
    warmup_epochs: float = 10,
) -> float:
    """The learning rate of one step, as in `adjust_learning_rate` of the released code.

    Args:
        step: 0-based; with a warm-up, step 0 has rate 0.
        steps_per_epoch: full global batches in an epoch.
        batch_size: the global batch size; the peak is base_lr * batch_size / 256.
        base_lr: the rate at batch size 256 (the paper: 0.2 for weights, 0.0048 for biases, norms).
        warmup_epochs: length of the linear warm-up from 0.
    """
    peak = base_lr * batch_size / 256
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return peak * step / warmup_steps
    cosine_steps = max(epochs * steps_per_epoch - warmup_steps, 1)
    progress = min((step - warmup_steps) / cosine_steps, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (cosine + FINAL_FRACTION * (1 - cosine))
