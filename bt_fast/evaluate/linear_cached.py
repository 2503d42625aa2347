"""The quick linear protocol: features are read once, then many linear classifiers train at once.

Not the paper's protocol: the images are seen as their central crop and a few fixed random views
instead of a new one per epoch. It answers in minutes what the full one answers in hours, and tries
the learning rates and weight decays that the full one fixes. Which of them counts is decided on a
tenth of the training images; then the classifier with these values trains on all of them, and the
held-out images are asked once.

With H classifiers, weights W [H, C, F + 1] (the last column is the bias, of a feature that is 1):
one product gives all logits, the sum of the H losses has independent gradients, and SGD with
momentum 0.9 takes a rate and a decay per classifier.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.distributed import collectives
from bt_fast.evaluate.eval_directory import EvalFolder, shared_folder
from bt_fast.evaluate.features import outputs
from bt_fast.evaluate.options import Part, Subject
from pipelines.common.atomic import atomic_file
from pipelines.common.console import progress
from pipelines.order import epoch_order

_MOMENTUM = 0.9
_SPLIT_EPOCH = -2  # of `epoch_order`: an order that no training epoch has


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is tried, and how each classifier trains; cosine to 0, per epoch."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    decays: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4)
    epochs: int = 100
    batch_size: int = 256
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rates) * len(self.decays)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(rate, decay) of every classifier."""
        return list(itertools.product(self.rates, self.decays))


def fit_grid(
    subject: Subject, train: Part, val: Part, grid: Grid, *, min_scale: float, num_views: int
) -> dict[str, Any]:
    """The quick protocol: {"top1", "top5", "lr", "decay", "grid"}.

    grid: (lr, decay, top-1 on the tenth of the training images that chose) of every classifier.
    """
    if num_views < 1:
        raise ValueError(f"--views must be at least 1, got {num_views}")
    facts = {
        **subject.facts(train, val),
        "min_scale": min_scale,
        "views": num_views,
        "grid": dataclasses.asdict(grid),
    }
    with shared_folder(subject.folder, "linear-cached", facts, subject.world) as (folder, found):
        if found is None:
            train_files = cached_views(
                subject, train, num_views, min_scale=min_scale, seed=grid.seed
            )
            val_files = cached_views(subject, val, 1, min_scale=min_scale, seed=grid.seed)
            if folder:  # on the first rank
                load = partial(load_features, device=subject.runtime.device)
                bank, (queries,) = torch.stack([*map(load, train_files)]), map(load, val_files)
                labels, val_labels = (part.labels.to(bank.device) for part in (train, val))
                found = choose_and_fit(folder, bank, labels, queries, val_labels, grid)
            found = collectives.from_first(found, subject.world.group)
        return found


def cached_views(
    subject: Subject, part: Part, count: int, *, min_scale: float, seed: int
) -> list[Path]:
    """Files with features [n, F], float16, of the central crops and of `count` - 1 random views.

    Each is read from the images once, by all ranks, and kept in the subject's folder.
    """
    facts = repr((subject.facts(part), min_scale, seed))
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    views, world = subject.views(part.images), subject.world
    files = [subject.folder / "features" / f"{digest}-{number}.npy" for number in range(count)]
    for number, file in enumerate(files):
        if collectives.from_first(file.exists(), world.group):
            continue
        batches: Callable[[np.ndarray], Iterator[torch.Tensor]]
        if number == 0:
            batches = partial(views.central, share=subject.crop)
        else:
            batches = partial(views.random, min_scale=min_scale, seed=seed, epoch=number - 1)
        title = f"features of {Path(part.images.path).name}, view {number + 1} of {count}"
        with progress(title, len(part)) as advance:
            features = outputs(
                subject.encoder,
                part.samples,
                partial(_counted, batches, lambda n: advance(n * world.size)),
                subject.runtime,
                world,
            ).half()
        if world.is_first:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file, overwrite=True) as opened:
                np.save(opened, features.cpu().numpy())
    return files


def load_features(file: Path, device: torch.device) -> torch.Tensor:
    """A file of `cached_views`: float16 [n, F]."""
    return torch.from_numpy(np.load(file)).to(device)


def _counted(batches, advance, samples: np.ndarray) -> Iterator[torch.Tensor]:
    for batch in batches(samples):
        yield batch
        advance(len(batch))


def choose_and_fit(
    folder: EvalFolder,
    views: torch.Tensor,
    labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    grid: Grid,
) -> dict[str, Any]:
    """Choose rate and decay on a tenth of the images, train with them on all, measure.

    Args:
        views: [V, n, F], of which [0] are the central crops. labels: int64 [n].
        val_features: [m, F]. val_labels: int64 [m].
    """
    order = torch.from_numpy(epoch_order(len(labels), grid.seed, _SPLIT_EPOCH)).to(labels.device)
    tenth, rest = order[: len(order) // 10], order[len(order) // 10 :]
    num_classes = int(torch.cat([labels, val_labels]).max()) + 1
    saved = folder.load()
    if saved is None or "best" not in saved[1]:
        stage, pairs = "choosing a classifier", grid.pairs
        heads = train_heads(
            folder, stage, views[:, rest], labels[rest], pairs, num_classes, grid, {}
        )
        scores = [score for score, _ in top_1_and_5(heads, views[0, tenth], labels[tenth])]
        best = scores.index(max(scores))
        tried = [[*pair, score] for pair, score in zip(grid.pairs, scores, strict=True)]
        chosen: dict[str, Any] = {"best": best, "grid": tried}
        folder.save({}, {**chosen, "epoch": 0})
    else:
        chosen = {key: saved[1][key] for key in ("best", "grid")}
    pair = grid.pairs[chosen["best"]]
    heads = train_heads(folder, "training it", views, labels, [pair], num_classes, grid, chosen)
    top1, top5 = top_1_and_5(heads, val_features, val_labels)[0]
    result = {"top1": top1, "top5": top5, "lr": pair[0], "decay": pair[1], "grid": chosen["grid"]}
    weights = {"head.weight": heads[0, :, :-1], "head.bias": heads[0, :, -1]}
    return folder.finish(result, weights)


def train_heads(
    folder: EvalFolder,
    stage: str,
    views: torch.Tensor,
    labels: torch.Tensor,
    pairs: list[tuple[float, float]],
    num_classes: int,
    grid: Grid,
    chosen: dict[str, Any],
) -> torch.Tensor:
    """One classifier per (rate, decay), float32 [H, C, F + 1]; epoch e sees views[e mod V].

    State is saved at each tenth of the epochs, with `chosen`, which names the stage on resume.
    """
    device, (num_heads, width) = labels.device, (len(pairs), views.shape[2])
    generator = torch.Generator().manual_seed(grid.seed)
    start = 0.01 * torch.randn(num_classes, width + 1, generator=generator)
    start[:, -1] = 0
    heads = start.repeat(num_heads, 1, 1).to(device)
    momentum = torch.zeros_like(heads)
    first, saved = 0, folder.load()
    if saved is not None and saved[0]:
        heads.copy_(saved[0]["heads"])
        momentum.copy_(saved[0]["momentum"])
        first = saved[1]["epoch"]
    rates, decays = (
        torch.tensor(part, device=device).view(-1, 1, 1) for part in zip(*pairs, strict=True)
    )
    save_every = max(1, grid.epochs // 10)
    title = f"{stage} ({num_heads} at once)"
    with progress(title, (grid.epochs - first) * len(labels)) as done:
        for epoch in range(first, grid.epochs):
            share = 0.5 * (1 + math.cos(math.pi * epoch / grid.epochs))
            order = torch.from_numpy(epoch_order(len(labels), grid.seed, epoch)).to(device)
            view = views[epoch % len(views)]
            for batch in order.split(grid.batch_size):
                gradient = cross_entropy_gradient(heads, view[batch], labels[batch])
                momentum.mul_(_MOMENTUM).add_(gradient + decays * heads)
                heads -= share * rates * momentum
                done(len(batch))
            if (epoch + 1) % save_every == 0:
                state = {"heads": heads, "momentum": momentum}
                folder.save(state, {**chosen, "epoch": epoch + 1})
    return heads


def cross_entropy_gradient(
    heads: torch.Tensor, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Of each head's mean loss over the batch: [H, C, F + 1], from features [n, F].

    d loss / d logits is softmax minus one-hot, over n.
    """
    num_heads, num_classes, _ = heads.shape
    inputs = F.pad(features.float(), (0, 1), value=1.0)  # [n, F + 1]
    logits = (inputs @ heads.flatten(0, 1).T).view(-1, num_heads, num_classes)
    errors = logits.softmax(2)
    errors -= F.one_hot(labels, num_classes)[:, None]
    return (errors.flatten(1).T @ inputs).view_as(heads) / len(inputs)


def top_1_and_5(
    heads: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, *, chunk: int = 4096
) -> list[tuple[float, float]]:
    """(top-1, top-5) of each head, every image counted once."""
    correct = torch.zeros(len(heads), 2, dtype=torch.int64, device=labels.device)
    for inputs, targets in zip(features.split(chunk), labels.split(chunk), strict=True):
        inputs = F.pad(inputs.float(), (0, 1), value=1.0)
        for number, head in enumerate(heads):
            logits = inputs @ head.T
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            correct[number] += torch.stack([hits[:, :1].sum(), hits.sum()])
    return [(top1 / len(labels), top5 / len(labels)) for top1, top5 in correct.tolist()]
