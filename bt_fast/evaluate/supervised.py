"""Training of a linear classifier on a frozen or fine-tuned encoder, for all supervised protocols.

One random view of every image per epoch, SGD with momentum 0.9, cross-entropy; the classifier
starts from N(0, 0.01) and 0, as in the released code. A frozen encoder stays in evaluation mode, a
fine-tuned one trains with its batch norms. The last batch of an epoch may be smaller. Held-out
images count once each.

Each rank takes its slice of every batch and of the held-out images, gradients are summed over
ranks, and the batch norms of a fine-tuned encoder use the statistics of the global batch: the
result is that of one process up to rounding.

State is saved at the end of every epoch. Order, views and rates are functions of the epoch, so an
interrupted evaluation ends with the weights of an uninterrupted one, bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.distributed import collectives
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.eval_directory import EvalDirectory, open_eval_directory
from bt_fast.evaluate.eval_setup import EvalSetup
from bt_fast.evaluate.features import count_correct
from bt_fast.evaluate.subset import Subset, count_classes
from bt_fast.evaluate.views import Views
from bt_fast.finite import NotFinite
from bt_fast.models import batch_norm
from bt_fast.models.networks import feature_width
from bt_fast.runtime import prepare
from pipelines.common.console import print_line, progress
from pipelines.order import epoch_order

_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Hyperparameters of the training."""

    epochs: int
    batch_size: int
    lr_head: float
    lr_encoder: float = 0.0  # 0: frozen encoder
    weight_decay: float = 0.0
    drops: tuple[int, ...] = ()  # first epochs with rates multiplied by `factor` once more
    factor: float = 1.0  # without drops the rates follow a cosine to 0, per epoch
    min_scale: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.lr_head, self.lr_encoder, self.weight_decay)
        if not all(0 <= rate < 1e30 for rate in rates):  # as float32
            raise ValueError(f"learning rates and weight decay must lie in [0, 1e30), got {rates}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"--min-scale must be in (0, 1], got {self.min_scale}")

    def lr_factor(self, epoch: int) -> float:
        """Learning rates of an epoch relative to those of the first epoch."""
        if self.drops:
            return self.factor ** sum(epoch >= drop for drop in self.drops)
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


class Classifier(nn.Module):
    """images [n, 3, H, W] -> logits [n, num_classes]."""

    def __init__(self, encoder: nn.Module, num_features: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features, num_classes)
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(num_classes, num_features, generator=generator)  # on the CPU
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(images))


def train_classifier(
    setup: EvalSetup, name: str, train: Subset, val: Subset, protocol: Protocol
) -> dict[str, Any]:
    """Train on one subset and test on the other; states and the result are kept in a folder.

    Returns {"top1", "top5", "history"}: accuracies in [0, 1] on the held-out images after the last
    epoch, and after each tenth of the epochs. Changes the encoder if the protocol fine-tunes it.
    Raises ValueError if the loss is not finite.
    """
    world = setup.world
    if protocol.batch_size < world.size:
        raise ValueError(f"--batch-size {protocol.batch_size} is less than the number of ranks")
    identity = {**setup.identity(train, val), "protocol": dataclasses.asdict(protocol)}
    with open_eval_directory(setup.folder, name, identity, world) as (folder, finished):
        return finished or _train(setup, folder, name, train, val, protocol)


def accuracy_rows(result: dict[str, Any], train: Subset, val: Subset) -> dict[str, str]:
    """Rows of the table for a result of `train_classifier`; top-5 of more than five classes."""
    rows = {f"top-1 of {len(val)}": f"{100 * result['top1']:.2f} %"}
    if count_classes(train, val) > 5:
        rows["top-5"] = f"{100 * result['top5']:.2f} %"
    return rows


def _train(
    setup: EvalSetup,
    folder: EvalDirectory | None,
    name: str,
    train: Subset,
    val: Subset,
    protocol: Protocol,
) -> dict[str, Any]:
    num_classes = count_classes(train, val)
    model = Classifier(setup.encoder, feature_width(setup.encoder), num_classes, protocol.seed)
    prepare(model, setup.runtime)
    trained = model if protocol.lr_encoder else model.head
    if protocol.lr_encoder:
        batch_norm.convert_sync_batch_norm(model, setup.world.group)
    model.requires_grad_(False)
    trained.requires_grad_(True)
    groups = [{"params": list(model.head.parameters()), "base": protocol.lr_head}]
    if protocol.lr_encoder:
        groups.append({"params": list(model.encoder.parameters()), "base": protocol.lr_encoder})
    optimizer = torch.optim.SGD(groups, 0.0, _MOMENTUM, weight_decay=protocol.weight_decay)

    first, history = 0, []
    saved = collectives.broadcast_object(folder and folder.load(), setup.world.group)
    if saved is not None:
        tensors, state = saved
        first, history = state["epoch"], state["history"]
        _restore(trained, optimizer, tensors)
        print_line(f"{name}: continuing after epoch {first} of {protocol.epochs}")
    train_views, val_views = setup.views(train.images), setup.views(val.images)
    # A first batch: without it, features that are not finite look like a learning rate too high.
    setup.features(train_views, train.samples[: protocol.batch_size])
    report_every = max(1, protocol.epochs // 10)
    with progress(name, (protocol.epochs - first) * len(train)) as advance:
        for epoch in range(first, protocol.epochs):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * protocol.lr_factor(epoch)
            trained.train()
            _train_epoch(
                model, optimizer, train_views, train.samples, protocol, epoch, advance, setup.world
            )
            trained.eval()
            if (epoch + 1) % report_every == 0 or epoch + 1 == protocol.epochs:
                top1, top5 = accuracy(model, val_views, val.samples, setup.crop, setup.world)
                history.append({"epoch": epoch + 1, "top1": top1, "top5": top5})
                print_line(
                    f"{name}: epoch {epoch + 1} of {protocol.epochs}, top-1 {100 * top1:.2f} %"
                )
            if folder:
                folder.save(_state(trained, optimizer), {"epoch": epoch + 1, "history": history})
    result = {"top1": history[-1]["top1"], "top5": history[-1]["top5"], "history": history}
    weights = model.state_dict()
    if not protocol.lr_encoder:
        weights = {name: value for name, value in weights.items() if name.startswith("head.")}
    return folder.finish(result, weights) if folder else result


def _train_epoch(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    views: Views,
    samples: np.ndarray,
    protocol: Protocol,
    epoch: int,
    advance: Callable[[int], None],
    world: World,
) -> None:
    """Every sample once. Fine-tuning skips a last batch of one image, which has no variance."""
    order = samples[epoch_order(len(samples), protocol.seed, epoch)]
    if protocol.lr_encoder and len(order) % protocol.batch_size == 1 and len(order) > 1:
        order = order[:-1]
    starts = range(0, len(order), protocol.batch_size)
    global_batches = [order[start : start + protocol.batch_size] for start in starts]
    local_batches = [world.local_slice(batch) for batch in global_batches]
    local_size = max(len(local_batches[0]), 1)  # only the last one is smaller, or empty
    local_samples, device = np.concatenate(local_batches), views.runtime.device
    image_batches = views.random(
        local_samples,
        min_scale=protocol.min_scale,
        seed=protocol.seed,
        epoch=epoch,
        batch_size=local_size,
    )
    labels = torch.from_numpy(views.images.labels[local_samples]).to(device)
    label_batches = iter(labels.split(local_size))
    total_loss = torch.zeros((), device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch, local_batch in zip(global_batches, local_batches, strict=True):
        for p in parameters:
            p.grad = None
        if len(local_batch):
            images, targets = next(image_batches), next(label_batches)
        else:  # a rank without images still takes part in the collectives of batch norm
            images = torch.empty(0, 3, views.size, views.size, device=device)
            targets = labels[:0]
        with views.runtime.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / len(batch)
        loss.backward()
        total_loss += loss.detach()
        _sum_gradients(parameters, world)
        optimizer.step()
        advance(len(batch))
    if not torch.isfinite(collectives.all_reduce(total_loss, world.group)):
        raise ValueError(f"the loss of epoch {epoch + 1} was not finite; lower the learning rates")


def _sum_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """All-reduce the gradients; those of a rank without images count as 0."""
    if world.group is None:
        return
    local = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = collectives.all_reduce(
        torch.cat([gradient.flatten() for gradient in local]), world.group
    )
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = gradient.view_as(p)


@torch.no_grad()
def accuracy(
    model: nn.Module, views: Views, samples: np.ndarray, crop: float, world: World = ALONE
) -> tuple[float, float]:
    """(top-1, top-5) on central crops, every sample counted once. The model is in eval mode.

    Raises NotFinite if a logit is not finite: it would count as the largest.
    """
    local_samples = world.local_slice(samples)
    labels = torch.from_numpy(views.images.labels[local_samples]).to(views.runtime.device)
    counts = torch.zeros(3, dtype=torch.int64, device=labels.device)  # top-1, top-5, not finite
    start = 0
    for images in views.central(local_samples, crop):
        with views.runtime.autocast():
            logits = model(images).float()
        counts[:2] += count_correct(logits, labels[start : start + len(logits)])
        counts[2] += (~logits.isfinite()).any(1).sum()
        start += len(logits)
    top1, top5, num_not_finite = collectives.all_reduce(counts, world.group).tolist()
    if num_not_finite:
        raise NotFinite(
            f"the logits of {num_not_finite} of {len(samples)} held-out images are not finite;"
            " evaluate another encoder, or lower the learning rates"
        )
    return top1 / len(samples), top5 / len(samples)


def _state(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that the next epoch depends on: weights, running statistics, momentum."""
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    for name, parameter in trained.named_parameters():
        state[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return state


def _restore(trained: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    trained.load_state_dict(
        {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    )
    for name, parameter in trained.named_parameters():
        buffer = torch.empty_like(parameter).copy_(state[f"momentum.{name}"])
        optimizer.state[parameter]["momentum_buffer"] = buffer
