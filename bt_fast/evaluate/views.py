"""Images of a labelled data set as an encoder takes them: central crops, or one random view.

Random views are random resized crops and flips, cut and resized as in pretraining (bicubic; the
released evaluation code is bilinear there). They are a function of (seed, epoch, sample): an
evaluation that is continued sees what it would have seen.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from bt_fast.runtime import Runtime
from pipelines import augment
from pipelines.augment import Branch
from pipelines.crop import RandomResizedCrop, center_boxes, random_boxes
from pipelines.loading.native import CropCutter
from pipelines.order import view_keys

FLIP_ONLY = Branch(blur=0.0, solarize=0.0, jitter=0.0, grayscale=0.0)
SUPERVISED_VIEW = 2  # pretraining's views are 0 and 1


class Images(Protocol):
    """What BetonReader, ImageFiles and ShardReader have in common."""

    path: str
    num_classes: int
    class_names: list[str] | None

    @property
    def labels(self) -> np.ndarray: ...
    @property
    def sizes(self) -> Any: ...  # indexed by samples int64 [n] -> int64 [n, 2]: heights, widths
    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def sha256(self) -> str | None: ...


class Views:
    """Batches of one data set on the device, normalised: [n, 3, size, size], channels-last.

    Args:
        reader: a BetonReader or ImageFiles.
        size: side of the views, pixels.
        cache_bytes: memory for decoded images.
    """

    def __init__(
        self,
        reader: Images,
        runtime: Runtime,
        *,
        size: int,
        num_threads: int,
        cache_bytes: int = 0,
    ) -> None:
        self.reader = reader
        self.runtime = runtime
        self.size = size
        self._cutter = CropCutter(
            reader,  # type: ignore[arg-type]
            num_threads,
            pin_memory=runtime.device.type == "cuda",
            cache_bytes=cache_bytes,
        )

    def central(
        self, samples: np.ndarray, share: float, *, batch_size: int = 256
    ) -> Iterator[torch.Tensor]:
        """Central crops of `share` of the short side, in the order of `samples`."""
        for images in self._cut(
            (chosen, center_boxes(share, *self.reader.sizes[chosen].T))
            for chosen in _batches(samples, batch_size)
        ):
            yield augment.plain(images, dtype=self.runtime.view_dtype)

    def random(
        self,
        samples: np.ndarray,
        *,
        min_scale: float,
        seed: int,
        epoch: int,
        branch: Branch = FLIP_ONLY,
        view: int = SUPERVISED_VIEW,
        batch_size: int = 256,
    ) -> Iterator[torch.Tensor]:
        """Random resized crops through `branch`, in the order of `samples`."""
        crop = RandomResizedCrop(size=self.size, scale=(min_scale, 1.0))

        def keys(chosen: np.ndarray) -> np.ndarray:
            return view_keys(chosen, seed=seed, epoch=epoch, view=view)

        cut = self._cut(
            (chosen, random_boxes(crop, keys(chosen), *self.reader.sizes[chosen].T))
            for chosen in _batches(samples, batch_size)
        )
        for chosen, images in zip(_batches(samples, batch_size), cut, strict=True):
            yield self.runtime.augment(images, augment.draw(branch, keys(chosen)))

    def _cut(self, requests) -> Iterator[torch.Tensor]:
        """(samples [n], boxes [n, 4]) -> uint8 [n, size, size, 3] on the device."""
        boxes = ((samples, boxes[:, None], self.size) for samples, boxes in requests)
        for crops in self._cutter.cut(boxes):
            yield crops[0].to(self.runtime.device, non_blocking=True)


def _batches(samples: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Consecutive batches; the last one may be smaller."""
    for start in range(0, len(samples), batch_size):
        yield samples[start : start + batch_size]
