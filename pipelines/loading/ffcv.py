"""The ffcv loader: FFCV's own `Loader` with an operation of ours that decodes once and crops twice.

Samples, keys, boxes, ranks and resuming are those of the native loader; the pixels are not. FFCV
decodes with libjpeg-turbo's fast DCT and resizes with OpenCV's INTER_AREA, where the reference and
native have the accurate DCT and Pillow's antialiased bicubic: on ImageNet's crops 1.9 grey levels
in the mean, of which 1.4 would stay with the accurate DCT. Stock FFCV has the same pixels.

What FFCV does here: it maps the file (its cache for the operating system: with a random order its
own page cache would load the whole file), looks up records, compiles the operation with Numba, and
runs it in Numba's threads from a thread of its own, `prefetch` batches ahead. What it does not:

- order and boxes: its traversal orders list an epoch from its start, and its augmentations cannot
  be seeded; so the work goes to its iterator step by step, as `Steps` has it.
- damage: its decoders ignore libturbojpeg's return code, which ours collects. A record is compared
  with its checksum, and its JPEG's size with the recorded one, when it is first read.
- memory: it reuses its batches. Here crops go into new memory, so a batch is the consumer's to
  keep; `prefetch` + 1 exist beside those. Nor is there scratch for a whole batch of images.

A start costs a few seconds more than native's: importing FFCV, listing the file's records in Python
(5 s for ImageNet), and the first batch's compilation. Numba cannot keep that for the next start: it
caches no function that calls into a library ("uses dynamic globals (such as ctypes pointers...)").
"""

from collections import deque
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import simplejpeg
import torch

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading.native import Batch, NativeLoader
from pipelines.loading.sampler import Request


class FfcvLoader(NativeLoader):
    """The native loader's batches with FFCV's pixels.

    Args:
        reader: the data, JPEGs and raw images in any mixture.
        num_threads: decoding threads of this rank; at most Numba's, which are the usable cores.
        others: as `NativeLoader`; there is no cache.
    Raises:
        ValueError: ffcv is missing; what it cannot do is asked for; else as `NativeLoader`.
    """

    def __init__(
        self,
        reader: BetonReader,
        crop: RandomResizedCrop,
        *,
        num_threads: int = 2,
        prefetch: int = 3,
        pin_memory: bool = False,
        **settings,
    ) -> None:
        if settings.pop("cache_bytes", 0):
            raise ValueError("--cache-gb needs --loader native: FFCV keeps no decoded images")
        # Its cutter has the last word on damaged records.
        super().__init__(reader, crop, num_threads=num_threads, **settings)
        self.ffcv = _import()
        self.loader = self.ffcv.open_loader(reader, num_threads, max(prefetch, 1))
        self.num_threads = num_threads
        self.pin_memory = pin_memory

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the global steps first_step .. last_step - 1."""
        waiting: deque[tuple[Request, torch.Tensor]] = deque()  # of the batches being made

        def work():
            for request in self.steps.requests(first_step, last_step):
                self._check_new(request.samples)
                shape = (2, len(request.samples), request.size, request.size, 3)
                views = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                waiting.append((request, views))
                yield self.ffcv.Work(request.samples, request.boxes, views.numpy())

        stream = self.ffcv.Stream(self.loader, work())
        try:
            for (codes,) in stream:
                request, views = waiting.popleft()
                for sample in request.samples[codes != 0]:
                    self._refuse(int(sample))
                yield Batch.of(request, views)
            if stream.error is not None:
                raise stream.error
        finally:
            stream.stop()

    def _check_new(self, samples: np.ndarray) -> None:
        """Check the records that have not been read yet, in native's threads."""
        new = samples[~self.cutter.checked[samples]]
        for _ in self.cutter.pool.map(self._check, np.array_split(new, self.num_threads)):
            pass

    def _check(self, samples: np.ndarray) -> None:
        for sample in samples.tolist():
            self.cutter.check(sample)
            if not self.reader.is_raw(sample) and not self._has_recorded_size(sample):
                self._refuse(sample)

    def _has_recorded_size(self, sample: int) -> bool:
        """libffcv would scale a JPEG of another size, or leave part of the image unwritten."""
        try:
            header = simplejpeg.decode_jpeg_header(self.reader.image(sample))
        except ValueError:
            return False
        return header[:2] == self.reader.size(sample)

    def _refuse(self, sample: int) -> None:
        self.cutter.decode(sample)  # says by name what is wrong with it
        raise ValueError(
            f"{self.cutter.title(sample)} does not decode with FFCV's libjpeg-turbo;"
            " choose --loader native"
        )


def _import() -> ModuleType:
    """`ffcv_stream`; FFCV is optional, and importing it sets torch's threads to one."""
    torch_threads = torch.get_num_threads()
    try:
        from pipelines.loading import ffcv_stream
    except ImportError as error:
        raise ValueError(
            f"--loader ffcv needs FFCV ({error}): install Debian's libopencv-dev,"
            " libturbojpeg0-dev and pkg-config, then pip install 'bt-fast[ffcv]';"
            " or choose --loader native"
        ) from None
    finally:
        torch.set_num_threads(torch_threads)
    return ffcv_stream
