"""Subsets of images: without near duplicates, balanced over clusters, or random."""

from collections.abc import Callable

import numpy as np
import torch

from bt_fast.evaluate.curate.clusters import Clusters
from bt_fast.evaluate.curate.neighbours import QUERY_BLOCK, Whitening


def redundancy(
    features: np.ndarray,
    clusters: Clusters,
    whitening: Whitening,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """SemDeDup's measure of every image: its largest cosine similarity to an image of its cluster
    that precedes it, where those far from the cluster's centre come first (Abbas et al.,
    arXiv 2303.09540). float32 [n]; -1 for the first image of a cluster.

    An image is dropped if the value is above a threshold, so of near duplicates the one that is
    the least typical of its cluster stays.
    """
    result = np.full(len(features), -1.0, np.float32)
    # Sorted by cluster, then by similarity to the centre, then by number.
    order = np.lexsort((np.arange(len(features)), clusters.similarity, clusters.assignment))
    for members in np.split(order, np.cumsum(clusters.sizes)[:-1]):
        for start in range(0, len(members), QUERY_BLOCK):
            queries = whitening.rows(features[members[start : start + QUERY_BLOCK]])
            position = torch.arange(start, start + len(queries), device=queries.device)[:, None]
            largest = queries.new_full((len(queries),), -1.0)
            for other in range(0, start + len(queries), QUERY_BLOCK):
                earlier = whitening.rows(features[members[other : other + QUERY_BLOCK]])
                products = queries @ earlier.T
                number = torch.arange(other, other + len(earlier), device=queries.device)
                products[number >= position] = -1.0
                largest = torch.maximum(largest, products.max(dim=1).values)
            result[members[start : start + len(queries)]] = largest.cpu().numpy()
        advance(len(members))
    return result


def least_redundant(values: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of the `count` images of the smallest redundancy, ties by number."""
    return np.sort(np.argsort(values, kind="stable")[:count])


def balanced(clusters: Clusters, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` images, as equal a number of every cluster as their sizes allow,
    random within a cluster."""
    sizes = clusters.sizes
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(clusters.assignment))
    order = order[np.argsort(clusters.assignment[order], kind="stable")]  # random within a cluster
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Images of rank 0 of all clusters, then those of rank 1, and so on; the last round is random.
    return np.sort(order[np.lexsort((rng.random(len(order)), rank))][:count])


def random_subset(num_images: int, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` random images."""
    return np.sort(np.random.default_rng(seed).permutation(num_images)[:count])
