"""Exact nearest neighbours of whitened features, in blocks of bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

QUERY_BLOCK, BANK_BLOCK = 2048, 16_384  # rows; their product of float32 takes 134 MB
_MIN_SHRINKAGE = 0.01  # of the mean eigenvalue of the covariance


@dataclass(frozen=True, kw_only=True, slots=True)
class Whitening:
    """Makes the features of a data set uncorrelated with equal variances, then their norm 1.

    An encoder's features are positive and vary in few directions, so that the cosine similarity of
    any two images may be 0.9; after whitening, only those of near duplicates are similar.
    """

    mean: torch.Tensor  # float32 [d], on the device of all computations
    matrix: torch.Tensor  # float32 [d, d]

    @classmethod
    def of(cls, features: np.ndarray, device: torch.device) -> "Whitening":
        """Of the rows' mean and covariance, float32 [n, d], such as a memory-mapped file.

        All eigenvalues are increased by the mean one times d / n, at least by a hundredth of it:
        the small ones are noise, the more so the fewer images there are.
        """
        size, width = features.shape
        total, products = np.zeros(width), np.zeros((width, width))
        for start in range(0, size, BANK_BLOCK):
            rows = np.asarray(features[start : start + BANK_BLOCK], np.float64)
            total += rows.sum(axis=0)
            products += rows.T @ rows
        mean = total / size
        values, vectors = np.linalg.eigh(products / size - np.outer(mean, mean))
        values = np.maximum(values, 0)
        scale = np.sqrt(values + max(_MIN_SHRINKAGE, width / size) * values.mean())
        matrix = vectors / np.where(scale > 0, scale, 1)
        return cls(
            mean=torch.from_numpy(mean.astype(np.float32)).to(device),
            matrix=torch.from_numpy(matrix.astype(np.float32)).to(device),
        )

    def blocks(self, features: np.ndarray, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, whitened rows of norm 1 on the device) of every `size` rows."""
        for start in range(0, len(features), size):
            rows = torch.from_numpy(np.array(features[start : start + size])).to(self.mean.device)
            yield start, F.normalize((rows - self.mean) @ self.matrix, dim=1)

    def rows(self, features: np.ndarray) -> torch.Tensor:
        """All rows as one block."""
        return torch.cat([block for _, block in self.blocks(features, BANK_BLOCK)])


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    whitening: Whitening,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of the bank for every query, the most similar first.

    Args:
        queries, bank: features float32 [m, d] and [n, d]. If they are the same array, an image is
            not its own neighbour.
        k: number of neighbours; fewer if the bank has fewer.
        advance: called with the number of queries of every finished block.
    Returns:
        cosine similarities of whitened features, float32 [m, k]; rows of the bank, int64 [m, k].
    """
    alone = queries is bank
    k = min(k, len(bank) - alone)
    similarities = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    for query_start, block in whitening.blocks(queries, QUERY_BLOCK):
        best = block.new_empty((len(block), 0))
        best_rows = torch.empty((len(block), 0), dtype=torch.int64, device=block.device)
        for bank_start, part in whitening.blocks(bank, BANK_BLOCK):
            products = block @ part.T
            if alone:
                own = torch.arange(len(block), device=block.device) + query_start - bank_start
                inside = (own >= 0) & (own < len(part))
                products[inside.nonzero()[:, 0], own[inside]] = -2.0
            values, rows = products.topk(min(k, len(part)), dim=1)
            best = torch.cat([best, values], dim=1)
            best_rows = torch.cat([best_rows, rows + bank_start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            best_rows = best_rows.gather(1, order)
        rows_of_block = slice(query_start, query_start + len(block))
        similarities[rows_of_block] = best.cpu().numpy()
        indices[rows_of_block] = best_rows.cpu().numpy()
        advance(len(block))
    return similarities, indices
