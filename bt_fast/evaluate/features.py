"""Outputs of an encoder for the images of a data set, which are divided among the ranks."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, World, gather_slices
from bt_fast.evaluate.views import Views
from bt_fast.finite import require_finite
from bt_fast.runtime import Runtime


def extract_features(
    encoder: torch.nn.Module, views: Views, samples: np.ndarray, crop: float, world: World = ALONE
) -> torch.Tensor:
    """Features of the samples' central crops: float32 [n, width], on every rank."""
    return model_outputs(encoder, samples, partial(views.central, crop=crop), views.runtime, world)


@torch.no_grad()
def model_outputs(
    model: torch.nn.Module,
    samples: np.ndarray,
    batches: Callable[[np.ndarray], Iterator[torch.Tensor]],
    runtime: Runtime,
    world: World = ALONE,
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The model's outputs for the samples in evaluation mode: float32 [n, width], on every rank.

    Each rank reads its slice of the images. The model is left in its previous mode. Raises
    NotFinite if a row is not finite, or so long that its norm is not.

    Args:
        samples: int64 [n], at least one.
        batches: sample indices -> batches of their images, in the same order.
        advance: called with the approximate number of images that all ranks have finished.
    """
    local = world.local_slice(samples)
    was_training = model.training
    model.eval()
    # A rank without samples still needs the width of the outputs: it computes one and drops it.
    read = local if len(local) else samples[:1]
    outputs, done = torch.empty(0), 0
    for images in batches(read):
        with runtime.autocast():
            batch = model(images).float()
        if done == 0:  # one tensor, because those of a million images fill half of a GPU
            outputs = batch.new_empty(len(read), batch.shape[1])
        outputs[done : done + len(batch)] = batch
        done += len(batch)
        if advance is not None:
            advance(len(images) * world.size)
    model.train(was_training)
    rows = gather_slices(outputs[: len(local)], len(samples), world.group)
    way_out = "evaluate an earlier checkpoint or another encoder"
    require_finite({"its features": rows.norm(dim=1)}, "the encoder", way_out)
    return rows


def two_view_outputs(
    model: torch.nn.Module, views: Views, samples: np.ndarray, config: Config, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """`model_outputs` for pretraining's two views of held-out images, in evaluation mode."""
    z_a, z_b = (
        model_outputs(
            model,
            samples,
            partial(
                views.random,
                min_scale=config.min_scale,
                seed=config.seed,
                epoch=-1,  # which training never reaches
                branch=branch,
                view=view,
            ),
            views.runtime,
            world,
        )
        for view, branch in enumerate((config.view_a, config.view_b))
    )
    return z_a, z_b


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Number of top-1 and top-5 hits: logits [n, classes], labels int64 [n] -> int64 [2]."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([hits[:, :1].sum(), hits.sum()])
