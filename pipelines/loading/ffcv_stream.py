"""What FFCV 1.0.2 runs for the ffcv loader: an operation of ours in its pipeline, and its iterator.

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

# Numba's last choice among its thread pools ends the process when two threads call it at once.
_ONE_AT_A_TIME = threading.Lock()


class Work(NamedTuple):
    """One batch to be made; stands where FFCV has the indices of a batch."""

    samples: np.ndarray  # int64 [n]
    boxes: np.ndarray  # int64 [n, k, 4]: top, left, height, width
    views: np.ndarray  # uint8 [k, n, size, size, 3]: receives the crops


class DecodeOnce(Operation):
    """Decodes each image once with libffcv and cuts all its boxes from it, in Numba's threads.

    Its result is int32 [n]: libturbojpeg's return codes, which FFCV's own decoders throw away.
    0 is an image decoded without as much as a warning; also that of a raw image.
    """

    def declare_state_and_memory(self, previous_state):
        return previous_state, None  # the memory that is written to comes with the work

    def generate_code(self):
        read, rows = self.memory_read, Compiler.get_iterator()
        decode, crop = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        jpeg = JPEG

        def cut(work, _, images, storage):
            samples, boxes, views = work
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

        cut.is_parallel = True  # type: ignore[attr-defined]
        return cut


class Stream(EpochIterator):
    """FFCV's iterator and thread, for any work; yields the operation's result in a tuple of one.

    FFCV lists all batches of an epoch when it starts; this takes them one by one, across epochs.
    It waits for ever for a thread that died; this one ends, and `error` tells why. And it leaves
    its thread running when a loop is left early; `stop` ends it.
    """

    def __init__(self, loader: Loader, work: Iterable[Work]) -> None:
        self.work = self._in_thread(work, torch.get_num_threads())
        self.error: Exception | None = None
        super().__init__(loader, ())

    def start(self) -> None:
        self.iter_ixes: Iterator[Work] = self.work
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.error = error
            self.output_queue.put(None)  # the end

    def run_pipeline(self, *arguments):
        with _ONE_AT_A_TIME:
            return super().run_pipeline(*arguments)

    def stop(self) -> None:
        """Return when the thread has ended: after the batch it is working on at the latest."""
        self.iter_ixes = iter(())
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()  # it may be waiting for room
            self.join(0.01)

    @staticmethod
    def _in_thread(work: Iterable[Work], torch_threads: int) -> Iterator[Work]:
        torch.set_num_threads(torch_threads)  # FFCV gives torch its own number, in all threads
        yield from work


def open_loader(reader: BetonReader, num_threads: int, batches_ahead: int) -> Loader:
    """FFCV's loader of a file's images, for `Stream`. Raises ValueError for too many threads."""
    most = numba_config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if num_threads > most:
        raise ValueError(
            f"--workers {num_threads} is more than the {most} threads Numba starts here;"
            f" choose at most {most}, or set NUMBA_NUM_THREADS={num_threads}"
        )
    fields = [name.decode() for name in reader.fields]
    images = fields[reader.image_field]
    pipeline = PipelineSpec(images, decoder=DecodeOnce())
    torch_threads = torch.get_num_threads()
    loader = Loader(
        reader.path,
        batch_size=1,  # work comes in batches of any size
        num_workers=num_threads,
        os_cache=True,
        batches_ahead=batches_ahead,
        pipelines={**dict.fromkeys(fields), images: pipeline},  # None: not read
    )
    torch.set_num_threads(torch_threads)
    # Which sample is on which page, for orders we do not use: half a gigabyte for ImageNet.
    manager = loader.memory_manager
    for table in (manager.sample_to_pages, manager.page_to_samples, manager.ptr_to_size):
        table.clear()
    return loader
