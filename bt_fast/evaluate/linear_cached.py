"""The quick linear protocol: features are read once, then many linear classifiers train at once.

Not the paper's protocol: each image has its central crop and a few fixed random views instead of a
new view per epoch. It takes minutes where the full one takes hours, and tries several learning
rates and weight decays where the full one fixes them. The pair is chosen by accuracy on a tenth of
the training images; a classifier with this pair then trains on all of them and is tested once on
the held-out images.

With H classifiers, weights W [H, C, F + 1] (the last column is the bias, for a feature of 1): one
product gives all logits, the sum of the H losses has independent gradients, and SGD with momentum
0.9 has a learning rate and a weight decay per classifier.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.distributed import collectives
from bt_fast.evaluate.eval_directory import EvalDirectory, open_eval_directory
from bt_fast.evaluate.eval_setup import EvalSetup
from bt_fast.evaluate.features import count_correct, model_outputs
from bt_fast.evaluate.subset import Subset
from bt_fast.finite import require_finite
from pipelines.common.atomic import atomic_file
from pipelines.common.console import progress
from pipelines.order import epoch_order

_MOMENTUM = 0.9
_SPLIT_EPOCH = -2  # `epoch_order`'s epoch for the split: no training epoch has this order


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Grid of hyperparameters; learning rates follow a cosine to 0, per epoch."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    decays: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4)
    epochs: int = 100
    batch_size: int = 256
    seed: int = 0

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(rate, decay) of every classifier."""
        return list(itertools.product(self.rates, self.decays))


def fit_grid(
    setup: EvalSetup, train: Subset, val: Subset, grid: Grid, *, min_scale: float, num_views: int
) -> dict[str, Any]:
    """The quick protocol: {"top1", "top5", "lr", "decay", "grid"}.

    grid: (lr, decay, top-1 on the held-back tenth of the training images) of every classifier.
    """
    if num_views < 1:
        raise ValueError(f"--views must be at least 1, got {num_views}")
    identity = {
        **setup.identity(train, val),
        "min_scale": min_scale,
        "views": num_views,
        "grid": dataclasses.asdict(grid),
    }
    device, world = setup.runtime.device, setup.world
    with open_eval_directory(setup.folder, "linear-cached", identity, world) as (folder, result):
        if result is None:
            files = cached_views(setup, train, num_views, min_scale=min_scale, seed=grid.seed)
            (val_file,) = cached_views(setup, val, 1, min_scale=min_scale, seed=grid.seed)
            if folder:  # on the first rank
                views = [load_features(file, device) for file in files]
                val_features = load_features(val_file, device)
                labels, val_labels = train.labels.to(device), val.labels.to(device)
                result = choose_and_fit(folder, views, labels, val_features, val_labels, grid)
            result = collectives.broadcast_object(result, world.group)
        return result


def cached_views(
    setup: EvalSetup, subset: Subset, num_views: int, *, min_scale: float, seed: int
) -> list[Path]:
    """Files of features, float16 [n, F]: central crops first, then `num_views` - 1 random views.

    Missing files are computed by all ranks and kept in the setup's folder.
    """
    identity = repr((setup.identity(subset), min_scale, seed))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    files = [setup.folder / "features" / f"{digest}-{number}.npy" for number in range(num_views)]
    views, world = setup.views(subset.images), setup.world
    for number, file in enumerate(files):
        if collectives.broadcast_object(file.exists(), world.group):
            continue
        batches: Callable[..., Iterator[torch.Tensor]] = partial(views.central, crop=setup.crop)
        if number > 0:
            batches = partial(views.random, min_scale=min_scale, seed=seed, epoch=number - 1)
        title = f"features of {Path(subset.images.path).name}, view {number + 1} of {num_views}"
        with progress(title, len(subset)) as advance:
            features = model_outputs(
                setup.encoder, subset.samples, batches, setup.runtime, world, advance
            )
        if world.is_first:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file, overwrite=True) as opened:
                np.save(opened, features.half().cpu().numpy())
    return files


def load_features(file: Path, device: torch.device) -> torch.Tensor:
    """A file of `cached_views`: float16 [n, F]. Raises NotFinite, as for features above 65504."""
    features = torch.from_numpy(np.load(file)).to(device)
    require_finite({"its features": features}, str(file), "evaluate another encoder")
    return features


def choose_and_fit(
    folder: EvalDirectory,
    views: Sequence[torch.Tensor],
    labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    grid: Grid,
) -> dict[str, Any]:
    """Choose learning rate and weight decay on a tenth of the images, train on all of them, test.

    views: [n, F] each, the central crops first. val_features: [m, F]. Labels: int64.
    """
    order = torch.from_numpy(epoch_order(len(labels), grid.seed, _SPLIT_EPOCH)).to(labels.device)
    tenth, rest = order[: len(order) // 10], order[len(order) // 10 :]
    num_classes = int(torch.cat([labels, val_labels]).max()) + 1
    saved = folder.load()
    if saved is None or "best" not in saved[1]:
        stage, pairs = "choosing a classifier", grid.pairs
        classifiers = train_classifiers(
            folder, stage, views, labels, rest, pairs, num_classes, grid, {}
        )
        scores = [top1 for top1, _ in top_1_and_5(classifiers, views[0][tenth], labels[tenth])]
        scored_pairs = [[*pair, score] for pair, score in zip(pairs, scores, strict=True)]
        choice: dict[str, Any] = {"best": scores.index(max(scores)), "grid": scored_pairs}
        folder.save({}, {**choice, "epoch": 0})
    else:
        choice = {key: saved[1][key] for key in ("best", "grid")}
    lr, decay = grid.pairs[choice["best"]]
    stage, pairs = "training the chosen classifier", [(lr, decay)]
    everything = torch.arange(len(labels), device=labels.device)
    classifiers = train_classifiers(
        folder, stage, views, labels, everything, pairs, num_classes, grid, choice
    )
    ((top1, top5),) = top_1_and_5(classifiers, val_features, val_labels)
    result = {"top1": top1, "top5": top5, "lr": lr, "decay": decay, "grid": choice["grid"]}
    weights = {"head.weight": classifiers[0, :, :-1], "head.bias": classifiers[0, :, -1]}
    return folder.finish(result, weights)


def train_classifiers(
    folder: EvalDirectory,
    stage: str,
    views: Sequence[torch.Tensor],
    labels: torch.Tensor,
    samples: torch.Tensor,
    pairs: list[tuple[float, float]],
    num_classes: int,
    grid: Grid,
    choice: dict[str, Any],
) -> torch.Tensor:
    """One classifier per (rate, decay), float32 [H, C, F + 1]; epoch e uses views[e mod V].

    samples: int64 [m], the images to train on. Only batches of views are copied.
    State is saved after each tenth of the epochs, with `choice`, which marks the second stage.
    """
    device, num_features = labels.device, views[0].shape[1]
    generator = torch.Generator().manual_seed(grid.seed)
    initial = 0.01 * torch.randn(num_classes, num_features + 1, generator=generator)
    initial[:, -1] = 0
    classifiers = initial.repeat(len(pairs), 1, 1).to(device)
    momentum = torch.zeros_like(classifiers)
    first_epoch, saved = 0, folder.load()
    if saved is not None and saved[0]:
        classifiers.copy_(saved[0]["heads"])
        momentum.copy_(saved[0]["momentum"])
        first_epoch = saved[1]["epoch"]
    rates = torch.tensor([rate for rate, _ in pairs], device=device).view(-1, 1, 1)
    decays = torch.tensor([decay for _, decay in pairs], device=device).view(-1, 1, 1)
    save_every = max(1, grid.epochs // 10)
    title = f"{stage} ({len(pairs)} at once)"
    with progress(title, (grid.epochs - first_epoch) * len(samples)) as advance:
        for epoch in range(first_epoch, grid.epochs):
            lr_factor = 0.5 * (1 + math.cos(math.pi * epoch / grid.epochs))
            order = torch.from_numpy(epoch_order(len(samples), grid.seed, epoch)).to(device)
            view = views[epoch % len(views)]
            for batch in samples[order].split(grid.batch_size):
                gradient = cross_entropy_gradient(classifiers, view[batch], labels[batch])
                momentum.mul_(_MOMENTUM).add_(gradient + decays * classifiers)
                classifiers -= lr_factor * rates * momentum
                advance(len(batch))
            if (epoch + 1) % save_every == 0:
                state = {"heads": classifiers, "momentum": momentum}
                folder.save(state, {**choice, "epoch": epoch + 1})
    return classifiers


def cross_entropy_gradient(
    classifiers: torch.Tensor, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Gradient of each classifier's mean loss from features [n, F]: [H, C, F + 1]."""
    num_classifiers, num_classes, _ = classifiers.shape
    inputs = F.pad(features.float(), (0, 1), value=1.0)  # [n, F + 1]
    logits = (inputs @ classifiers.flatten(0, 1).T).view(-1, num_classifiers, num_classes)
    errors = logits.softmax(2)
    errors -= F.one_hot(labels, num_classes)[:, None]
    return (errors.flatten(1).T @ inputs).view_as(classifiers) / len(inputs)


def top_1_and_5(
    classifiers: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, *, chunk: int = 4096
) -> list[tuple[float, float]]:
    """(top-1, top-5) of each classifier, every image counted once."""
    num_correct = torch.zeros(len(classifiers), 2, dtype=torch.int64, device=labels.device)
    for inputs, targets in zip(features.split(chunk), labels.split(chunk), strict=True):
        inputs = F.pad(inputs.float(), (0, 1), value=1.0)
        for number, classifier in enumerate(classifiers):
            num_correct[number] += count_correct(inputs @ classifier.T, targets)
    return [(top1 / len(labels), top5 / len(labels)) for top1, top5 in num_correct.tolist()]
