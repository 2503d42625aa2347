"""What an encoder makes of the images of a data set; ranks share the images."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from bt_fast.distributed.collectives import ALONE, World, gather_shares
from bt_fast.evaluate.views import Views
from bt_fast.runtime import Runtime


def extract_features(
    encoder: torch.nn.Module, views: Views, samples: np.ndarray, crop: float, world: World = ALONE
) -> torch.Tensor:
    """Features of the samples' central crops: float32 [n, width] on the device of `views`, on every
    rank; each reads its share. The encoder is left in the mode it was in."""
    return outputs(encoder, samples, lambda own: views.central(own, crop), views.runtime, world)


def outputs(
    model: torch.nn.Module,
    samples: np.ndarray,
    batches: Callable[[np.ndarray], Iterator[torch.Tensor]],
    runtime: Runtime,
    world: World = ALONE,
) -> torch.Tensor:
    """The model's outputs for the samples in evaluation mode: float32 [n, width], on every rank.

    Args:
        samples: int64 [n], at least one.
        batches: makes images of some of them, in their order.
    """
    own = world.share(samples)
    # A rank that has none of them must know the width, too.
    ours = _encode(model, batches(own if len(own) else samples[:1]), runtime)[: len(own)]
    return gather_shares(ours, len(samples), world.group)


@torch.no_grad()
def _encode(
    model: torch.nn.Module, batches: Iterator[torch.Tensor], runtime: Runtime
) -> torch.Tensor:
    was_training = model.training
    model.eval()
    parts = []
    for images in batches:
        with runtime.autocast():
            parts.append(model(images).float())
    model.train(was_training)
    return torch.cat(parts)
