"""Batches of two crops per image: a sampler selects images and boxes, a backend makes the pixels.

Step s of a run is batch s mod S of epoch s // S, where S is the number of full batches in an epoch;
rank r of W has the r-th of W equal slices of it. So resuming is a start at another step, and
nothing is read for the steps before. Indices, keys and boxes do not depend on the backend; pixels
may.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from pipelines.crop import RandomResizedCrop, random_boxes
from pipelines.loading.datasets import ImageDataset, require_full_batches
from pipelines.order import epoch_order, view_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Which boxes of which images a backend crops: one rank's slice of a batch, n images."""

    samples: np.ndarray  # int64 [n]: indices in the data set
    boxes: np.ndarray  # int64 [n, k, 4]: top, left, height, width of each of k views, pixels
    size: int  # side of the crops, pixels
    step: int = 0
    keys: tuple[np.ndarray, ...] = ()  # uint64 [n] per view: random keys of its augmentation

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the crops: [k, n, size, size, 3]."""
        n, num_views, _ = self.boxes.shape
        return num_views, n, self.size, self.size, 3


@dataclass(frozen=True, slots=True)
class Batch:
    """A request and its crops.

    request: its `samples`, int64 [n], are indices in the data set (`dataset.labels[samples]` are
        the classes), its `keys`, uint64 [n] per view, those of the augmentation.
    views: uint8 [2, n, size, size, 3], view A first, on the CPU or the training device. The
        consumer may keep it: no backend reuses the memory.
    """

    request: Request
    views: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch with its crops on a device; Lightning calls it."""
        return replace(self, views=self.views.to(device, non_blocking=non_blocking))


class CropBackend(Protocol):
    """Decodes each image once and cuts all its boxes."""

    def crops(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 [k, n, size, size, c] for each request, in order (c is 3).

        Requests are taken ahead, possibly from another thread. Raises ValueError, by name, for an
        image that does not decode or differs from its checksum.
        """
        ...


class Sampler:
    """The requests of this rank for every step: pure functions of the seed, computed on demand.

    Args:
        batch_size: the global batch size, divided equally among the ranks.
        sizes: side of the crops in each epoch, for progressive view sizes; the last one holds for
            all later epochs. Default: crop.size.

    Raises:
        ValueError: fewer images than a batch, a batch that the ranks cannot divide equally, or a
            rank that is none of them.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        crop: RandomResizedCrop,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sizes: Sequence[int] = (),
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks, counted from 0")
        require_full_batches(batch_size, world_size, len(dataset), dataset.path)
        self.dataset = dataset
        self.crop = crop
        self.batch_size, self.local_batch_size = batch_size, batch_size // world_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.sizes = sizes or (crop.size,)
        self.steps_per_epoch = len(dataset) // batch_size

    def requests(self, first_step: int, last_step: int) -> Iterator[Request]:
        """This rank's requests for the steps first_step .. last_step - 1."""
        image_sizes = self.dataset.sizes
        order, order_epoch = np.empty(0, np.int64), -1
        first_row = self.rank * self.local_batch_size
        for step in range(first_step, last_step):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(len(self.dataset), self.seed, epoch), epoch
            start = batch * self.batch_size + first_row
            samples = order[start : start + self.local_batch_size]
            heights, widths = image_sizes[samples].T
            key_a, key_b = (
                view_keys(samples, seed=self.seed, epoch=epoch, view=view) for view in (0, 1)
            )
            boxes = [random_boxes(self.crop, key, heights, widths) for key in (key_a, key_b)]
            yield Request(
                step=step,
                samples=samples,
                keys=(key_a, key_b),
                boxes=np.stack(boxes, axis=1),
                size=self.sizes[min(epoch, len(self.sizes) - 1)],
            )


class Loader:
    """This rank's batches: iterating gives the `Batch`es of one epoch, `len` is their number.
    The sampler chooses their images and boxes, the backend makes their pixels (`open_loader`).

    `epoch` is the number of the next one; set it to continue elsewhere. On a GPU one iterator is
    used at a time: its decoding processes serve it alone, and an earlier one that goes on raises
    RuntimeError.
    """

    def __init__(self, sampler: Sampler, backend: CropBackend) -> None:
        self.sampler, self.backend = sampler, backend
        self.steps_per_epoch = sampler.steps_per_epoch
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        first_step = self.epoch * len(self)
        self.epoch += 1
        return self.batches(first_step, first_step + len(self))

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches for the steps first_step .. last_step - 1."""
        pending: deque[Request] = deque()  # taken by the backend

        def requests() -> Iterator[Request]:
            for request in self.sampler.requests(first_step, last_step):
                pending.append(request)
                yield request

        for crops in self.backend.crops(requests()):
            yield Batch(pending.popleft(), crops)
