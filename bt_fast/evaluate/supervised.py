"""A linear classifier on an encoder, frozen or fine-tuned: the loop of every supervised protocol.

One random view of every image per epoch, SGD with momentum 0.9, cross-entropy; the classifier
starts from N(0, 0.01) and 0, as in the released code. A frozen encoder stays in evaluation mode, a
fine-tuned one trains with its batch norms. The last batch of an epoch may be smaller. Held-out
images count once each.

Over ranks, each takes its slice of every batch and of the held-out images, gradients are summed,
and a fine-tuned encoder's batch norms see the whole batch: the result is that of one process up to
rounding.

State is saved at the end of every epoch. Order, views and rates are functions of the epoch, so a
run that was interrupted ends with the weights of one that was not, bit for bit.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.distributed import collectives
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.eval_directory import EvalFolder, shared_folder
from bt_fast.evaluate.options import Part, Subject
from bt_fast.evaluate.views import Views
from bt_fast.models import batch_norm
from bt_fast.runtime import prepare
from pipelines.common.console import progress, say
from pipelines.order import epoch_order

_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Everything that decides how a classifier is trained."""

    epochs: int
    batch_size: int
    lr_head: float
    lr_encoder: float = 0.0  # 0: frozen
    weight_decay: float = 0.0
    drops: tuple[int, ...] = ()  # epochs from which the rates are multiplied by `factor` once more
    factor: float = 1.0  # without drops the rates follow a cosine to 0, per epoch
    min_scale: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}")
        rates = (self.lr_head, self.lr_encoder, self.weight_decay)
        if not all(0 <= rate < 1e30 for rate in rates):  # as float32
            raise ValueError(f"learning rates and weight decay must lie in [0, 1e30), got {rates}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"--min-scale must be in (0, 1], got {self.min_scale}")

    def share(self, epoch: int) -> float:
        """Learning rates of an epoch, as a share of the first one's."""
        if self.drops:
            return self.factor ** sum(epoch >= drop for drop in self.drops)
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


class Classifier(nn.Module):
    """images [n, 3, H, W] -> logits [n, num_classes]."""

    def __init__(self, encoder: nn.Module, width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # drawn on the CPU, alike everywhere
            self.head.weight.copy_(0.01 * torch.randn(num_classes, width, generator=generator))
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(images))


def train_classifier(
    subject: Subject, name: str, train: Part, val: Part, protocol: Protocol
) -> dict[str, Any]:
    """Train on one part, measure on the other, in the folder of `name`.

    Returns {"top1", "top5", "history"}: shares of the held-out images after the last epoch, and
    at each tenth of the epochs. The subject's encoder changes if the protocol fine-tunes it.
    Raises ValueError if the loss is not finite.
    """
    world = subject.world
    if protocol.batch_size < world.size:
        raise ValueError(f"--batch-size {protocol.batch_size} is less than one for each rank")
    facts = {**subject.facts(train, val), "protocol": dataclasses.asdict(protocol)}
    with shared_folder(subject.folder, name, facts, world) as (folder, found):
        return found or _train(subject, folder, name, train, val, protocol)


def accuracy_rows(result: dict[str, Any], held_out: Part) -> dict[str, str]:
    """What a table says of a result of `train_classifier`."""
    return {
        f"top-1 of {len(held_out)}": f"{100 * result['top1']:.2f} %",
        "top-5": f"{100 * result['top5']:.2f} %",
    }


def _train(
    subject: Subject,
    folder: EvalFolder | None,
    name: str,
    train: Part,
    val: Part,
    protocol: Protocol,
) -> dict[str, Any]:
    num_classes = max(train.images.num_classes, val.images.num_classes)
    model = Classifier(subject.encoder, subject.width, num_classes, protocol.seed)
    prepare(model, subject.runtime)
    trained = model if protocol.lr_encoder else model.head
    if protocol.lr_encoder:
        batch_norm.over_uneven_ranks(model, subject.world.group)
    model.requires_grad_(False)
    trained.requires_grad_(True)
    groups = [{"params": list(model.head.parameters()), "base": protocol.lr_head}]
    if protocol.lr_encoder:
        groups.append({"params": list(model.encoder.parameters()), "base": protocol.lr_encoder})
    optimizer = torch.optim.SGD(groups, 0.0, _MOMENTUM, weight_decay=protocol.weight_decay)

    first, history = 0, []
    saved = collectives.from_first(folder and folder.load(), subject.world.group)
    if saved is not None:
        tensors, state = saved
        first, history = state["epoch"], state["history"]
        _restore(trained, optimizer, tensors)
        say(f"{name}: continuing after epoch {first} of {protocol.epochs}")
    train_views, val_views = subject.views(train.images), subject.views(val.images)
    report_every = max(1, protocol.epochs // 10)
    with progress(name, (protocol.epochs - first) * len(train)) as advance:
        for epoch in range(first, protocol.epochs):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * protocol.share(epoch)
            trained.train()
            _train_epoch(
                model,
                optimizer,
                train_views,
                train.samples,
                protocol,
                epoch,
                advance,
                subject.world,
            )
            trained.eval()
            if (epoch + 1) % report_every == 0 or epoch + 1 == protocol.epochs:
                top1, top5 = accuracy(model, val_views, val.samples, subject.crop, subject.world)
                history.append({"epoch": epoch + 1, "top1": top1, "top5": top5})
                say(f"{name}: epoch {epoch + 1} of {protocol.epochs}, top-1 {100 * top1:.2f} %")
            if folder:
                folder.save(_state(trained, optimizer), {"epoch": epoch + 1, "history": history})
    result = {key: history[-1][key] for key in ("top1", "top5")} | {"history": history}
    learned = {
        key: value
        for key, value in model.state_dict().items()
        if protocol.lr_encoder or key.startswith("head.")
    }
    return folder.finish(result, learned) if folder else result


def _train_epoch(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    views: Views,
    samples: np.ndarray,
    protocol: Protocol,
    epoch: int,
    advance,
    world: World,
) -> None:
    """Every sample once, in the epoch's order; each rank takes its slice of every batch.

    Where batch norm would see the last image alone, the epoch does without it; it is another one in
    every epoch.
    """
    order = samples[epoch_order(len(samples), protocol.seed, epoch)]
    if protocol.lr_encoder and len(order) % protocol.batch_size == 1 and len(order) > 1:
        order = order[:-1]
    starts = range(0, len(order), protocol.batch_size)
    whole = [order[start : start + protocol.batch_size] for start in starts]
    ours = [world.share(batch) for batch in whole]  # only the last ones are smaller, or empty
    device, order = views.runtime.device, np.concatenate(ours)
    labels = torch.from_numpy(views.reader.labels[order]).to(device)
    total = torch.zeros((), device=device)
    batches = views.random(
        order,
        min_scale=protocol.min_scale,
        seed=protocol.seed,
        epoch=epoch,
        batch_size=max(len(ours[0]), 1),
    )
    targets = iter(labels.split(max(len(ours[0]), 1)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    none = torch.empty(0, 3, views.size, views.size, device=device)
    for batch, own in zip(whole, ours, strict=True):
        for p in parameters:
            p.grad = None
        # Without images of its own, a rank still has a part in the batch norms of the others.
        images, wanted = (next(batches), next(targets)) if len(own) else (none, labels[:0])
        with views.runtime.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum") / len(batch)
        loss.backward()
        total += loss.detach()
        _sum_gradients(parameters, world)
        optimizer.step()
        advance(len(batch))
    if not torch.isfinite(collectives.all_sum(total, world.group)):
        raise ValueError(f"the loss of epoch {epoch + 1} was not finite; lower the learning rates")


def _sum_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Over ranks, each of which has had its part of the batch, or none of it."""
    if world.group is None:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = collectives.all_sum(torch.cat([gradient.flatten() for gradient in own]), world.group)
    for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


@torch.no_grad()
def accuracy(
    model: nn.Module, views: Views, samples: np.ndarray, crop: float, world: World = ALONE
) -> tuple[float, float]:
    """(top-1, top-5) on central crops, every sample counted once. The model is in eval mode."""
    num_samples, samples = len(samples), world.share(samples)
    labels = torch.from_numpy(views.reader.labels[samples]).to(views.runtime.device)
    correct = torch.zeros(2, dtype=torch.int64, device=labels.device)
    done = 0
    for images in views.central(samples, crop):
        with views.runtime.autocast():
            logits = model(images).float()
        targets = labels[done : done + len(logits), None]
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets
        correct += torch.stack([hits[:, :1].sum(), hits.sum()])
        done += len(logits)
    top1, top5 = (collectives.all_sum(correct, world.group) / num_samples).tolist()
    return top1, top5


def _state(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the next epoch depends on: weights, batch statistics, momentum."""
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
