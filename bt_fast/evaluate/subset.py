"""Some of the images of a data set."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.loading.datasets import ImageDataset


@dataclass(frozen=True, slots=True)
class Subset:
    """Samples of a data set: to train on, to test on, or to compare with."""

    images: ImageDataset
    samples: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> torch.Tensor:
        """int64 [n], on the CPU."""
        return torch.from_numpy(self.images.labels[self.samples])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the data set's checksum and the sample indices."""
        return hashlib.sha256(self.images.sha256().encode() + self.samples.tobytes()).hexdigest()


def count_classes(train: Subset, val: Subset) -> int:
    """Number of classes that a classifier of both distinguishes."""
    return max(train.images.num_classes, val.images.num_classes)


def complete_subset(images: ImageDataset) -> Subset:
    """All samples, in the file's order."""
    return Subset(images, np.arange(len(images)))


def labelled_subset(images: ImageDataset) -> Subset:
    """The samples that have a class, in the file's order."""
    return Subset(images, np.flatnonzero(images.labels >= 0))
