"""What `examine` finds in the features of a data set."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bt_fast.evaluate.curate.clusters import Clusters
from bt_fast.evaluate.curate.neighbours import Whitening

KINDS = {
    "across": "held-out and training images",
    "train": "training images",
    "val": "held-out images",
}
Images = TypeVar("Images")


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Near duplicates, neighbours and clusters, by image number."""

    pairs: dict[str, np.ndarray]  # of KINDS: first, second, similarity; the most similar first
    similarity_to_neighbours: np.ndarray  # float32 [n], of training images, mean over neighbours
    clusters: Clusters  # of the training images
    whitening: Whitening  # of the training images

    @staticmethod
    def sides(train: Images, val: Images | None) -> dict[str, tuple[Images, Images]]:
        """What the first and the second of each kind of pair belong to."""
        if val is None:
            return {"train": (train, train)}
        return {"across": (val, train), "train": (train, train), "val": (val, val)}

    def overlap(self) -> np.ndarray:
        """Training images with a near duplicate among the held-out ones: int64, sorted."""
        pairs = self.pairs.get("across")
        return np.unique(pairs["second"]) if pairs is not None else np.empty(0, np.int64)

    def rows(self) -> dict[str, str]:
        """Rows of the console's table."""
        sizes = np.sort(self.clusters.sizes)
        rows = {
            f"near duplicates, {KINDS[kind]}": f"{len(pairs):,} pairs"
            for kind, pairs in self.pairs.items()
        }
        return rows | {
            "clusters": f"{len(sizes):,} of {sizes[0]:,} to {sizes[-1]:,} images,"
            f" median {np.median(sizes):,.0f}"
        }
