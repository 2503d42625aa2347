"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018).

Each of a query's k most similar bank images adds exp(cosine similarity / temperature) to the score
of its class; the class with the highest score is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.evaluate.subset import Subset, count_classes
from pipelines.loading.datasets import ImageDataset
from pipelines.order import epoch_order

SETTINGS = ((20, 0.07), (200, 0.1))  # (k, temperature)
_MAX_SIMILARITIES = 1 << 28  # computed at once: 1 GiB of float32
_SPLIT_EPOCH = -1  # `epoch_order`'s epoch for the split: no training epoch has this order


@torch.no_grad()
def knn_accuracies(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    settings: Sequence[tuple[int, float]],
    num_classes: int,
) -> list[float]:
    """Top-1 accuracy on the queries, in [0, 1], for each (k, temperature) of the settings.

    bank, queries: float [n, width], of any norm. bank_labels, query_labels: int64 [n].
    """
    max_k = min(max(k for k, _ in settings), len(bank))
    queries = F.normalize(queries, dim=1)
    # Instead of a normalised copy of the bank, which may fill half of a GPU's memory.
    scale = 1 / bank.norm(dim=1).clamp_min(1e-12)
    chunk = min(max(_MAX_SIMILARITIES // len(bank), 1), 1024)
    correct = torch.zeros(len(settings), dtype=torch.int64, device=bank.device)
    for start in range(0, len(queries), chunk):
        similarity, neighbours = (
            (queries[start : start + chunk] @ bank.T).mul_(scale).topk(max_k, dim=1)
        )
        labels = bank_labels[neighbours]
        for i, (k, temperature) in enumerate(settings):
            # Relative to the best neighbour, so that exp cannot overflow at a small temperature.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            scores = weights.new_zeros(len(weights), num_classes)
            scores.scatter_add_(1, labels[:, :k], weights)
            correct[i] += (scores.argmax(1) == query_labels[start : start + chunk]).sum()
    return [hits / len(queries) for hits in correct.tolist()]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnData:
    """Bank and query images; images without a class are in neither."""

    bank: Subset
    queries: Subset

    @property
    def num_classes(self) -> int:
        return count_classes(self.bank, self.queries)

    @property
    def description(self) -> str:
        of_train = self.queries.images is self.bank.images
        split = "a tenth of the training images" if of_train else "held out"
        few = f", so that k = {len(self.bank)}" if len(self.bank) < SETTINGS[0][0] else ""
        return f"{len(self.queries)} queries ({split}), {len(self.bank)} bank images{few}"


def choose_data(
    train: ImageDataset, val: ImageDataset | None, seed: int, limit: int | None = None
) -> KnnData | None:
    """Bank and queries: train and val, or nine tenths and one tenth of train.

    The split of `train` is disjoint and a function of the seed, but pretraining has seen the pixels
    (never the classes) of both parts. `limit` caps the bank, half of it the queries. Returns None
    if the bank has fewer than two classes or there are no queries.
    """
    if val is not None:
        require_same_classes(train, val)
    bank_samples = _shuffled_labelled(train, seed)
    if val is None:
        num_queries = len(bank_samples) // 10
        val, query_samples = train, bank_samples[:num_queries]
        bank_samples = bank_samples[num_queries:]
    else:
        query_samples = _shuffled_labelled(val, seed)
    if limit is not None:
        bank_samples, query_samples = bank_samples[:limit], query_samples[: limit // 2]
    classes = np.unique(train.labels[bank_samples])
    if len(classes) < 2 or len(query_samples) == 0:
        return None
    return KnnData(bank=Subset(train, bank_samples), queries=Subset(val, query_samples))


def missing_classes(train: ImageDataset, val: ImageDataset | None) -> str:
    """Why `choose_data` returns None."""
    for images, least in (train, 2), (val, 1):
        if images is not None:
            found = len(np.unique(images.labels[images.labels >= 0]))
            if found < least:
                return f"{images.path} has {'only one class' if found else 'no classes'}"
    return f"{train.path} has too few images"


def require_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise ValueError if both data sets name their classes, and differ."""
    if train.class_names and val.class_names and val.class_names != train.class_names:
        raise ValueError(f"{val.path} has other classes than {train.path}")


def _shuffled_labelled(images: ImageDataset, seed: int) -> np.ndarray:
    """Samples that have a class, in a random order: int64 [n]."""
    order = epoch_order(len(images), seed, _SPLIT_EPOCH)
    return order[images.labels[order] >= 0]


def knn_scores(bank: torch.Tensor, queries: torch.Tensor, data: KnnData) -> dict[str, float]:
    """`knn_accuracies` of SETTINGS, "knn_20" and "knn_200", from features [n, width].

    One for more neighbours than bank images is left out, except the first, whose k is then smaller.
    """
    settings = [SETTINGS[0], *(setting for setting in SETTINGS[1:] if setting[0] <= len(bank))]
    labels = data.bank.labels.to(bank.device)
    query_labels = data.queries.labels.to(bank.device)
    accuracies = knn_accuracies(
        bank, labels, queries, query_labels, settings=settings, num_classes=data.num_classes
    )
    return {f"knn_{k}": value for (k, _), value in zip(settings, accuracies, strict=True)}
