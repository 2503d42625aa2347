"""FFCV 1.0.2's parts of the ffcv loader: an operation for its pipeline, and its iterator.

Importing this module imports ffcv, and with it Numba and OpenCV.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import Empty
from typing import NamedTuple

import numpy as np
import torch
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.operation import Operation
from numba import config as numba_config

from pipelines.beton import BetonReader
from pipelines.beton.layout import JPEG

# Numba's fallback thread pool, workqueue, aborts the process if two threads use it at once.
_NUMBA_LOCK = threading.Lock()


class CropRequest(NamedTuple):
    """A batch to crop; passed in place of FFCV's sample indices."""

    samples: np.ndarray  # int64 [n]
    boxes: np.ndarray  # int64 [n, k, 4]: top, left, height, width
    views: np.ndarray  # uint8 [k, n, size, size, 3]: the crops are written to it


class DecodeOnce(Operation):
    """Decodes each image once with libffcv and crops all its boxes, in Numba's threads.

    Its result is int32 [n]: libturbojpeg's return codes, which FFCV's own decoders ignore. The code
    is 0 for an image decoded without a warning, and for a raw image.
    """

    def declare_state_and_memory(self, previous_state):
        return previous_state, None  # the request contains the output memory

    def generate_code(self):
        read, rows = self.memory_read, Compiler.get_iterator()
        decode, crop = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        jpeg = JPEG

        def decode_and_crop(request, _, images, storage):
            samples, boxes, views = request
            codes = np.zeros(len(samples), np.int32)
            for row in rows(len(samples)):
                image = images[samples[row]]
                data = read(image["data_ptr"], storage)
                height, width = np.int64(image["height"]), np.int64(image["width"])
                if image["mode"] == jpeg:
                    pixels = np.empty((height, width, 3), np.uint8)
                    codes[row] = decode(
                        data, pixels, height, width, height, width, 0, 0, 1, 1, False, False
                    )
                else:
                    pixels = data.reshape((height, width, 3))
                for view in range(len(views)):
                    top, left, box_height, box_width = boxes[row, view]
                    crop(pixels, top, top + box_height, left, left + box_width, views[view, row])
            return codes

        decode_and_crop.is_parallel = True  # type: ignore[attr-defined]
        return decode_and_crop


class RequestIterator(EpochIterator):
    """FFCV's iterator and thread over requests; yields (result of the operation,).

    Unlike FFCV, it reads requests one by one, across epochs, instead of listing an epoch's batches
    at its start; it ends if the thread fails, with the exception in `error`, instead of blocking;
    and `stop` ends the thread when a loop is left early.
    """

    def __init__(self, loader: Loader, requests: Iterable[CropRequest]) -> None:
        self.requests = self._in_thread(requests, torch.get_num_threads())
        self.error: Exception | None = None
        super().__init__(loader, ())

    def start(self) -> None:
        self.iter_ixes: Iterator[CropRequest] = self.requests
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.error = error
            self.output_queue.put(None)  # ends the iteration

    def run_pipeline(self, *arguments):
        with _NUMBA_LOCK:
            return super().run_pipeline(*arguments)

    def stop(self) -> None:
        """End the thread after its current batch, and wait for it."""
        self.iter_ixes = iter(())
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()  # the thread may be blocked by a full queue
            self.join(0.01)

    @staticmethod
    def _in_thread(requests: Iterable[CropRequest], torch_threads: int) -> Iterator[CropRequest]:
        torch.set_num_threads(torch_threads)  # FFCV changes it in all threads
        yield from requests


def create_loader(reader: BetonReader, num_threads: int, batches_ahead: int) -> Loader:
    """FFCV's loader for `RequestIterator`. Raises ValueError for more threads than Numba starts."""
    limit = numba_config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if num_threads > limit:
        raise ValueError(
            f"--workers {num_threads} is more than the {limit} threads Numba starts here;"
            f" choose at most {limit}, or set NUMBA_NUM_THREADS={num_threads}"
        )
    fields = [name.decode() for name in reader.fields]
    images = fields[reader.image_field]
    pipeline = PipelineSpec(images, decoder=DecodeOnce())
    torch_threads = torch.get_num_threads()
    loader = Loader(
        reader.path,
        batch_size=1,  # requests have any size
        num_workers=num_threads,
        os_cache=True,
        batches_ahead=batches_ahead,
        pipelines={**dict.fromkeys(fields), images: pipeline},  # None: not read
    )
    torch.set_num_threads(torch_threads)
    # The maps of samples to pages, for orders that are not used: half a gigabyte for ImageNet.
    manager = loader.memory_manager
    for table in (manager.sample_to_pages, manager.page_to_samples, manager.ptr_to_size):
        table.clear()
    return loader
