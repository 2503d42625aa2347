"""Images of a labelled data set as an encoder takes them: central crops, or one random view.

Random views are random resized crops and flips, cut and resized as in pretraining (bicubic; the
released evaluation code is bilinear there). They are a function of (seed, epoch, sample), so a
continued evaluation has the same views as an uninterrupted one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from bt_fast.runtime import Runtime
from pipelines import augment
from pipelines.augment import Branch
from pipelines.crop import RandomResizedCrop, center_boxes, random_boxes
from pipelines.loading.datasets import ImageDataset
from pipelines.loading.loader import CropBackend, Request
from pipelines.loading.processes import native_backend
from pipelines.order import view_keys

FLIP_ONLY = Branch(blur=0.0, solarize=0.0, jitter=0.0, grayscale=0.0)
SUPERVISED_VIEW = 2  # pretraining's views are 0 and 1
_BATCH_SIZE = 256


class Views:
    """Batches of one data set on the device, normalised: [n, 3, size, size], channels-last.

    size: side of the views, pixels. cache_bytes: memory for decoded images.
    """

    def __init__(
        self,
        images: ImageDataset,
        runtime: Runtime,
        *,
        size: int,
        num_threads: int,
        cache_bytes: int = 0,
    ) -> None:
        self.images = images
        self.runtime = runtime
        self.size = size
        self._options = {"num_threads": num_threads, "cache_bytes": cache_bytes}
        self._backend: CropBackend | None = None
        self._largest_batch = 0  # that the backend can make

    def central(self, samples: np.ndarray, crop: float) -> Iterator[torch.Tensor]:
        """Central crops, `crop` times the short side, in the order of `samples`."""

        def boxes_of(batch: np.ndarray) -> np.ndarray:
            return center_boxes(crop, *self.images.sizes[batch].T)

        for _, crops in self._cut(samples, boxes_of, _BATCH_SIZE):
            yield augment.normalise_only(crops, dtype=self.runtime.view_dtype)

    def random(
        self,
        samples: np.ndarray,
        *,
        min_scale: float,
        seed: int,
        epoch: int,
        branch: Branch = FLIP_ONLY,
        view: int = SUPERVISED_VIEW,
        batch_size: int = _BATCH_SIZE,
    ) -> Iterator[torch.Tensor]:
        """Random resized crops, augmented by `branch`, in the order of `samples`."""
        crop = RandomResizedCrop(size=self.size, scale=(min_scale, 1.0))

        def keys_of(batch: np.ndarray) -> np.ndarray:
            return view_keys(batch, seed=seed, epoch=epoch, view=view)

        def boxes_of(batch: np.ndarray) -> np.ndarray:
            return random_boxes(crop, keys_of(batch), *self.images.sizes[batch].T)

        for batch, crops in self._cut(samples, boxes_of, batch_size):
            yield self.runtime.augmentation()(crops, augment.draw(branch, keys_of(batch)))

    def _cut(
        self,
        samples: np.ndarray,
        boxes_of: Callable[[np.ndarray], np.ndarray],
        batch_size: int,
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(samples [n], uint8 [n, size, size, 3] on the device) of every batch."""
        starts = range(0, len(samples), batch_size)
        batches = [samples[start : start + batch_size] for start in starts]
        requests = (
            Request(samples=batch, boxes=boxes_of(batch)[:, None], size=self.size)
            for batch in batches
        )
        for batch, crops in zip(batches, self._open(batch_size).crops(requests), strict=True):
            yield batch, crops[0].to(self.runtime.device)

    def _open(self, batch_size: int) -> CropBackend:
        """The backend, for batches of this size; it is started when it is first needed."""
        if self._backend is None or batch_size > self._largest_batch:
            self._largest_batch = batch_size
            self._backend = native_backend(
                self.images,
                self.runtime.device,
                batch_bytes=batch_size * self.size**2 * 3,
                **self._options,
            )
        return self._backend
