"""k-means on the unit sphere: clusters of features by cosine similarity."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.evaluate.curate.neighbours import BANK_BLOCK, Whitening

ITERATIONS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """A partition of the images."""

    assignment: np.ndarray  # int64 [n], cluster of every image
    similarity: np.ndarray  # float32 [n], to the centre of the image's cluster
    num_clusters: int

    @property
    def sizes(self) -> np.ndarray:
        """Number of images of every cluster: int64 [num_clusters]."""
        return np.bincount(self.assignment, minlength=self.num_clusters)


def cluster(
    features: np.ndarray,
    num_clusters: int,
    whitening: Whitening,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Clusters:
    """Spherical k-means (Dhillon and Modha, 2001), a function of the seed.

    Centres start at different random images; those of empty clusters move to the images that are
    the least similar to their centre. Ends when no image changes its cluster, at the latest after
    ITERATIONS. features: float32 [n, d]; advance: called with the images of every block.
    """
    num_clusters = min(num_clusters, len(features))
    chosen = np.sort(np.random.default_rng(seed).choice(len(features), num_clusters, replace=False))
    centres = whitening.rows(features[chosen])
    assignment = np.full(len(features), -1, np.int64)
    similarity = np.empty(len(features), np.float32)
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centres)
        before = assignment.copy()
        for start, rows in whitening.blocks(features, BANK_BLOCK):
            values, nearest = (rows @ centres.T).max(dim=1)
            sums += _sum_by_cluster(rows, nearest, num_clusters)
            assignment[start : start + len(rows)] = nearest.cpu().numpy()
            similarity[start : start + len(rows)] = values.cpu().numpy()
            advance(len(rows))
        if np.array_equal(assignment, before):
            break
        empty = np.flatnonzero(np.bincount(assignment, minlength=num_clusters) == 0)
        centres = F.normalize(sums, dim=1)
        if len(empty):
            far = np.sort(np.argsort(similarity, kind="stable")[: len(empty)])
            centres[torch.from_numpy(empty).to(centres.device)] = whitening.rows(features[far])
    return Clusters(assignment=assignment, similarity=similarity, num_clusters=num_clusters)


def _sum_by_cluster(rows: torch.Tensor, nearest: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Sums of the rows [n, d] of each cluster: [num_clusters, d].

    In the order of the rows: `index_add_` would add them in any order on a GPU.
    """
    order = nearest.argsort(stable=True)
    sizes = nearest.bincount(minlength=num_clusters)
    return torch.segment_reduce(rows[order], "sum", lengths=sizes, axis=0)
