"""Which images a step consists of and where they are cut: the part that every loader shares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop, random_boxes
from pipelines.order import epoch_order, view_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What becomes a batch: one rank's share of one global step, n images."""

    step: int
    samples: np.ndarray  # int64 [n]: their numbers in the file
    keys: tuple[np.ndarray, np.ndarray]  # uint64 [n] each: what a view's random numbers hang on
    boxes: np.ndarray  # int64 [n, 2, 4]: for each view top, left, height, width in pixels
    size: int  # side of the views, pixels


class Steps:
    """The requests of all global steps: pure functions of the seed, computed when asked for.

    Args:
        reader: the data; at least `batch_size` images.
        crop: size and shape of the crops.
        batch_size: the global batch, shared equally by the ranks.
        seed: of the order and the views.
        size_of: the crops' side in an epoch, for runs whose views grow; default crop.size.
    """

    def __init__(
        self,
        reader: BetonReader,
        crop: RandomResizedCrop,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        size_of: Callable[[int], int] | None,
    ) -> None:
        self.num_images = len(reader)
        self.image_sizes = reader.sizes  # int64 [N, 2]
        self.crop = crop
        self.batch_size = batch_size
        self.seed = seed
        self.share = slice(batch_size // world_size * rank, batch_size // world_size * (rank + 1))
        self.size_of = size_of or (lambda epoch: crop.size)
        self.per_epoch = self.num_images // batch_size

    def requests(self, first_step: int, last_step: int) -> Iterator[Request]:
        """This rank's requests of the global steps first_step .. last_step - 1."""
        for step, samples in self.samples(first_step, last_step):
            epoch = step // self.per_epoch
            sizes = self.image_sizes[samples].T  # [2, n]: heights, widths
            keys = [view_keys(samples, seed=self.seed, epoch=epoch, view=view) for view in (0, 1)]
            boxes = [random_boxes(self.crop, key, *sizes) for key in keys]
            yield Request(
                step=step,
                samples=samples,
                keys=(keys[0], keys[1]),
                boxes=np.stack(boxes, axis=1),
                size=self.size_of(epoch),
            )

    def samples(self, first_step: int, last_step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, this rank's samples int64 [n]) of these steps."""
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(first_step, last_step):
            epoch, batch = divmod(step, self.per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_images, self.seed, epoch), epoch
            start = batch * self.batch_size
            yield step, order[start : start + self.batch_size][self.share]

    def state(self, step: int) -> str:
        """What a checkpoint after `step` steps keeps: nothing, the step says it all."""
        return ""

    def restore(self, states: list[str]) -> str:
        """Go on from `state` of every rank, if need be; returns a warning where that cannot be."""
        return ""
