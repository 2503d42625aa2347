"""Two views of every image, from a `.beton` to uint8 tensors: the loader contract and `native`.

A loader yields a `Batch` for every global step. Step s is batch s mod S of epoch s // S, S being
the number of full batches in the epoch's order; rank r of W takes the r-th of W equal slices. So
resuming is a start at another step, and nothing is read for the steps left out. Samples, keys and
boxes (`steps.py`) are the same in every loader; what differs is the filter that makes the pixels.

The native loader needs no compiled extension of its own: the file is memory-mapped, threads
decode each JPEG once (libjpeg-turbo) and cut both crops from it (torch's antialiased bicubic on
uint8); both let go of the interpreter lock. Results go straight into the batch's memory, which
is page-locked when a GPU is to read it. `prefetch` batches are in the making while one is used,
also across the end of an epoch.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop, cut
from pipelines.loading.sampler import Request, Steps

IMAGES_PER_TASK = 4  # few enough to share a batch evenly, enough to hide the cost of a task


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's share of one global batch, n images."""

    step: int
    samples: np.ndarray  # int64 [n]: their numbers in the file
    keys: tuple[np.ndarray, np.ndarray]  # uint64 [n] each: what the views' augmentation draws from
    # uint8 [2, n, size, size, 3], view A first; the consumer's own, on the CPU or the GPU it is for
    views: torch.Tensor

    @classmethod
    def of(cls, request: Request, views: torch.Tensor) -> "Batch":
        return cls(step=request.step, samples=request.samples, keys=request.keys, views=views)


class NativeLoader:
    """Random resized crops of a `.beton`, two per image.

    Args:
        reader: the data.
        crop: size and shape of the crops.
        batch_size: the global batch, shared equally by the ranks.
        seed: of the order and the views.
        num_threads: decoding threads of this rank.
        prefetch: batches prepared ahead.
        size_of: the crops' side in an epoch, for runs whose views grow; default crop.size.
        pin_memory: put batches in page-locked memory, for copies that overlap GPU work.
        cache_bytes: memory for decoded images. With room for all, only the first epoch decodes.
    Raises:
        ValueError: fewer images than a batch, or a batch the ranks cannot share equally. While
            iterating: an image that does not decode or differs from its checksum, by name.
    """

    def __init__(
        self,
        reader: BetonReader,
        crop: RandomResizedCrop,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 2,
        prefetch: int = 3,
        pin_memory: bool = False,
        cache_bytes: int = 0,
        size_of: Callable[[int], int] | None = None,
    ) -> None:
        require_full_batches(batch_size, world_size, len(reader), reader.path)
        self.reader = reader
        self.steps = Steps(
            reader,
            crop,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            size_of=size_of,
        )
        self.steps_per_epoch = self.steps.per_epoch
        self.cutter = CropCutter(reader, num_threads, prefetch, pin_memory, cache_bytes)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the global steps first_step .. last_step - 1."""
        waiting: deque[Request] = deque()  # of the batches being cut

        def requests():
            for request in self.steps.requests(first_step, last_step):
                waiting.append(request)
                yield request.samples, request.boxes, request.size

        for crops in self.cutter.cut(requests()):
            yield Batch.of(waiting.popleft(), crops)


def require_full_batches(
    batch_size: int, world_size: int, num_images: int, path: str | Path
) -> None:
    """Raise ValueError unless the ranks can share a batch and there are images for one."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"--batch-size {batch_size} does not divide by {world_size} ranks")
    if batch_size > num_images:
        raise ValueError(
            f"--batch-size {batch_size} is more than the {num_images} images of {path};"
            " a batch is always full, so choose a smaller one"
        )


class CropCutter:
    """Threads that decode each image once and cut any number of boxes from it."""

    def __init__(
        self,
        reader: BetonReader,
        num_threads: int,
        prefetch: int = 3,
        pin_memory: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.reader = reader
        self.prefetch = max(prefetch, 1)
        self.pin_memory = pin_memory
        self.cache: dict[int, torch.Tensor] = {}
        self.cache_room = cache_bytes
        self.cache_lock = threading.Lock()
        self.checked = np.zeros(len(reader), bool)  # records whose checksum was right once
        # One core per thread. The first call settles how many the *main* thread uses: torch
        # would otherwise take the worker's 1 for every thread that has not asked yet.
        torch.get_num_threads()
        self.pool = ThreadPoolExecutor(
            num_threads, "bt-fast-decode", initializer=torch.set_num_threads, initargs=(1,)
        )

    def cut(self, requests: Iterable[tuple[np.ndarray, np.ndarray, int]]) -> Iterator[torch.Tensor]:
        """For each (samples int64[n], boxes int64[n, k, 4], size): uint8 [k, n, size, size, 3]."""
        pending: deque[tuple[torch.Tensor, list[Future]]] = deque()
        requests = iter(requests)
        try:
            while True:
                while len(pending) <= self.prefetch and (request := next(requests, None)):
                    pending.append(self._submit(*request))
                if not pending:
                    return
                crops, tasks = pending.popleft()
                for task in tasks:
                    task.result()
                yield crops
        finally:
            for _, tasks in pending:
                for task in tasks:
                    task.cancel()

    def _submit(self, samples: np.ndarray, boxes: np.ndarray, size: int):
        n, views, _ = boxes.shape
        crops = torch.empty(
            (views, n, size, size, 3), dtype=torch.uint8, pin_memory=self.pin_memory
        )
        tasks = [
            self.pool.submit(self._cut_some, samples, boxes, crops, first)
            for first in range(0, n, IMAGES_PER_TASK)
        ]
        return crops, tasks

    def _cut_some(
        self, samples: np.ndarray, boxes: np.ndarray, crops: torch.Tensor, first: int
    ) -> None:
        for row in range(first, min(first + IMAGES_PER_TASK, len(samples))):
            image = self._image(int(samples[row]))
            for view in range(boxes.shape[1]):
                cut(image, boxes[row, view], out=crops[view, row])

    def _image(self, sample: int) -> torch.Tensor:
        """A decoded image, uint8 [3, H, W], from the cache or into it while there is room."""
        image = self.cache.get(sample)
        if image is None:
            image = self.decode(sample)
            with self.cache_lock:
                if image.nbytes <= self.cache_room and sample not in self.cache:
                    self.cache_room -= image.nbytes
                    self.cache[sample] = image
        return image

    def decode(self, sample: int) -> torch.Tensor:
        """One record -> uint8 [3, H, W], channels-last in memory."""
        self.check(sample)
        height, width = self.reader.size(sample)
        data = self.reader.image(sample)
        if self.reader.is_raw(sample):
            pixels = np.array(data).reshape(height, width, 3)
        else:
            try:  # the header first: it may claim more than there is memory
                found = simplejpeg.decode_jpeg_header(data)[:2]
                if found == (height, width):
                    pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
            except ValueError as error:
                raise ValueError(
                    f"{self.title(sample)} does not decode ({error}); convert the data again"
                ) from None
            if found != (height, width):
                raise ValueError(
                    f"{self.title(sample)} is {found[1]}x{found[0]} but was"
                    f" recorded as {width}x{height}; convert the data again"
                )
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def check(self, sample: int) -> None:
        """Compare a record with its checksum, the first time it is asked for."""
        if not self.checked[sample]:
            if not self.reader.checksum_ok(sample):
                raise ValueError(
                    f"{self.title(sample)} is not what was converted (its checksum differs);"
                    " convert the data again"
                )
            self.checked[sample] = True

    def title(self, sample: int) -> str:
        """An image's number, name and file, for messages."""
        return f"image {sample} ({self.reader.name(sample)}) of {self.reader.path}"
