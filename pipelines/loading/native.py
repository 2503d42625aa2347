"""The native backend: threads decode each JPEG once (libjpeg-turbo) and cut all crops from it
(torch's antialiased bicubic on uint8).

The data set is memory-mapped. Decoding and resizing release the interpreter lock, once each; in
between, threads handle arrays rather than tensors, whose operations would release it as well.
Crops are written into the memory of the batch. `prefetch` batches are in preparation while one is
used, also across the end of an epoch.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch

from pipelines.crop import crop_and_resize
from pipelines.loading.datasets import ImageDataset
from pipelines.loading.loader import Request

IMAGES_PER_TASK = 4  # few enough to balance the threads, enough to hide the cost of a task


class NativeBackend:
    """Crops of any number of boxes per image.

    Args:
        num_threads: decoding threads of this rank.
        prefetch: batches prepared ahead.
        cache_bytes: memory for decoded images. If all fit, only the first epoch decodes.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        num_threads: int = 2,
        prefetch: int = 3,
        cache_bytes: int = 0,
    ) -> None:
        self.decoder = RecordDecoder(dataset)
        self.prefetch = max(prefetch, 1)
        self.cache: dict[int, np.ndarray] = {}
        self._free_cache_bytes = cache_bytes
        self._cache_lock = threading.Lock()
        self.pool = decoding_threads(num_threads)

    def crops(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 [k, n, size, size, 3] for each request, in order."""
        pending: deque[tuple[torch.Tensor, list[Future]]] = deque()
        requests = iter(requests)
        try:
            while True:
                while len(pending) <= self.prefetch and (request := next(requests, None)):
                    pending.append(self._submit(request))
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

    def _submit(self, request: Request) -> tuple[torch.Tensor, list[Future]]:
        crops = torch.empty(request.shape, dtype=torch.uint8, device="cpu")
        tasks = [
            self.pool.submit(self._crop_rows, request, crops.numpy(), first)
            for first in range(0, len(request.samples), IMAGES_PER_TASK)
        ]
        return crops, tasks

    def _crop_rows(self, request: Request, crops: np.ndarray, first: int) -> None:
        for row in range(first, min(first + IMAGES_PER_TASK, len(request.samples))):
            self.crop(int(request.samples[row]), request.boxes[row], crops[:, row])

    def crop(self, sample: int, boxes: np.ndarray, out: np.ndarray) -> None:
        """Write the boxes of an image, int [k, 4], to `out`, uint8 [k, size, size, 3]."""
        image = self._image(sample)
        for box, pixels in zip(boxes, out, strict=True):
            crop_and_resize(image, box, pixels)

    def _image(self, sample: int) -> np.ndarray:
        """A decoded image, uint8 [H, W, 3], from the cache or stored in it while there is space."""
        image = self.cache.get(sample)
        if image is None:
            image = self.decoder.decode(sample)
            with self._cache_lock:
                if image.nbytes <= self._free_cache_bytes and sample not in self.cache:
                    self._free_cache_bytes -= image.nbytes
                    self.cache[sample] = image
        return image


class RecordDecoder:
    """Decodes images of a data set, and checks each against its checksum when it is first read."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.checked = np.zeros(len(dataset), bool)  # images whose checksum was correct once

    def decode(self, sample: int) -> np.ndarray:
        """One image -> uint8 [H, W, 3].

        Raises ValueError if it does not decode, or differs in size or checksum.
        """
        is_known = self.checked[sample]
        self.check(sample)
        recorded = self.dataset.size(sample)
        data = self.dataset.image(sample)
        if self.dataset.is_raw(sample):
            return np.array(data).reshape(*recorded, 3)
        try:  # the header first: it may claim an image larger than the memory
            size = recorded if is_known else simplejpeg.decode_jpeg_header(data)[:2]
            if size == recorded:
                pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
                size = pixels.shape[:2]
        except ValueError as error:
            raise ValueError(
                f"{self.title(sample)} does not decode ({error}); convert the data again"
            ) from None
        if size != recorded:
            raise ValueError(
                f"{self.title(sample)} is {size[1]}x{size[0]} but was"
                f" recorded as {recorded[1]}x{recorded[0]}; convert the data again"
            )
        return pixels

    def check(self, sample: int) -> None:
        """Raise ValueError if an image that is read for the first time differs from its
        checksum."""
        if not self.checked[sample]:
            if not self.dataset.checksum_ok(sample):
                raise ValueError(
                    f"{self.title(sample)} is not what was converted (its checksum differs);"
                    " convert the data again"
                )
            self.checked[sample] = True

    def check_new(
        self, samples: np.ndarray, pool: ThreadPoolExecutor, check: Callable[[int], object]
    ) -> None:
        """Check the images that are read for the first time, in threads."""
        for _ in pool.map(check, samples[~self.checked[samples]].tolist()):
            pass

    def title(self, sample: int) -> str:
        """An image's index, name and file, for messages."""
        return f"image {sample} ({self.dataset.name(sample)}) of {self.dataset.path}"


def decoding_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes with one core."""
    # The first call fixes the number of threads of the *main* thread: torch would otherwise take
    # the workers' 1 for every thread that has not called it yet.
    torch.get_num_threads()
    return ThreadPoolExecutor(
        num_threads, "bt-fast-decode", initializer=torch.set_num_threads, initargs=(1,)
    )
