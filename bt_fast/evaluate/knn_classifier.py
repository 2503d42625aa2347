"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018).

Each of a query's k most similar bank images votes for its class with weight
exp(cosine similarity / temperature); the class with most votes is the answer.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.features import extract_features
from bt_fast.evaluate.views import Images, Views
from bt_fast.runtime import Runtime
from pipelines.order import epoch_order

# k and temperature: the setting of the short list, and InstDisc's own.
SETTINGS = ((20, 0.07), (200, 0.1))
_SPLIT_EPOCH = -1  # of `epoch_order`: an order that no training epoch has


@torch.no_grad()
def knn_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int = 1024,
) -> float:
    """Share of queries whose class is found, in [0, 1].

    Args:
        bank, queries: float [n, width], L2-normalised.
        bank_labels, query_labels: int64 [n].
        k: neighbours; at most the size of the bank is used.
    """
    k = min(k, len(bank))
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    for start in range(0, len(queries), chunk):
        similarity, neighbours = (queries[start : start + chunk] @ bank.T).topk(k, dim=1)
        # Relative to the best neighbour, so that exp cannot overflow at a small temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(weights), num_classes)
        votes.scatter_add_(1, bank_labels[neighbours], weights)
        correct += (votes.argmax(1) == query_labels[start : start + chunk]).sum()
    return correct.item() / len(queries)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnData:
    """Which images are the bank and which ask. Images without a class are left out."""

    bank: Images
    bank_samples: np.ndarray  # int64 [n]
    queries: Images
    query_samples: np.ndarray  # int64 [m]

    @property
    def num_classes(self) -> int:
        return max(self.bank.num_classes, self.queries.num_classes)

    @property
    def description(self) -> str:
        held_out = "held out" if self.queries is not self.bank else "a tenth of the same file"
        return f"{len(self.query_samples)} images ({held_out}) among {len(self.bank_samples)}"


def choose_data(
    train: Images, val: Images | None, seed: int, limit: int | None = None
) -> KnnData | None:
    """Bank and queries: train and val, or nine tenths and one tenth of train.

    A split is drawn from the seed and disjoint, but pretraining has seen the pixels (never the
    classes) of both parts. `limit` caps the bank, and half of it the queries. Returns None where
    there are no two classes to tell apart.
    """
    if val is not None and train.class_names and val.class_names not in (None, train.class_names):
        raise ValueError(f"{val.path} has other classes than {train.path}")
    labelled = _labelled(train, seed)
    if val is None:
        val, first = train, len(labelled) // 10
        query_samples, bank_samples = labelled[:first], labelled[first:]
    else:
        query_samples, bank_samples = _labelled(val, seed), labelled
    if limit is not None:
        bank_samples, query_samples = bank_samples[:limit], query_samples[: limit // 2]
    classes = np.unique(train.labels[bank_samples])
    if len(classes) < 2 or len(query_samples) == 0:
        return None
    return KnnData(bank=train, bank_samples=bank_samples, queries=val, query_samples=query_samples)


def _labelled(reader: Images, seed: int) -> np.ndarray:
    order = epoch_order(len(reader), seed, _SPLIT_EPOCH)
    return order[reader.labels[order] >= 0]


def evaluate_knn(
    encoder: torch.nn.Module,
    data: KnnData,
    runtime: Runtime,
    *,
    size: int,
    crop: float,
    num_threads: int,
    world: World = ALONE,
) -> dict[str, float]:
    """`knn_scores` of an encoder's features, on every rank; each reads its share of the images."""
    bank, queries = (
        extract_features(
            encoder,
            Views(reader, runtime, size=size, num_threads=num_threads),
            samples,
            crop,
            world,
        )
        for reader, samples in ((data.bank, data.bank_samples), (data.queries, data.query_samples))
    )
    return knn_scores(bank, queries, data)


def knn_scores(bank: torch.Tensor, queries: torch.Tensor, data: KnnData) -> dict[str, float]:
    """`knn_accuracy` for each of SETTINGS: {"knn_20": ..., "knn_200": ...}, in [0, 1].

    bank, queries: features [n, width] of the images that `data` names.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, query_labels = (
        torch.from_numpy(images.labels[samples]).to(bank.device)
        for images, samples in ((data.bank, data.bank_samples), (data.queries, data.query_samples))
    )
    return {
        f"knn_{k}": knn_accuracy(
            bank,
            bank_labels,
            queries,
            query_labels,
            k=k,
            temperature=temperature,
            num_classes=data.num_classes,
        )
        for k, temperature in SETTINGS
    }
