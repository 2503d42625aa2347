"""The ffcv backend: FFCV's own `Loader`, with an operation that decodes once and crops twice.

Its pixels differ from the other backends'. FFCV decodes with libjpeg-turbo's fast DCT and resizes
with OpenCV's INTER_AREA, where the reference and native have the accurate DCT and Pillow's
antialiased bicubic: on ImageNet's crops 1.9 grey levels on average, of which 1.4 would stay with
the accurate DCT. Stock FFCV has the same pixels.

FFCV maps the file, looks up records, compiles the operation with Numba, and runs it in Numba's
threads from a thread of its own, `prefetch` batches ahead. It does not provide

- order and boxes: its iterator gets one request after the other.
- damage: its decoders ignore libturbojpeg's return code, which ours collects. A record is compared
  with its checksum, and its JPEG's size with the recorded one, when it is first read.
- memory: it reuses its batches. Here crops are written into new memory, so a batch is the
  consumer's to keep; `prefetch` + 1 exist beside those.

A start takes a few seconds longer than native's: importing FFCV, listing the file's records in
Python (5 s for ImageNet), and compiling, which Numba cannot cache for functions of libraries.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import ModuleType

import simplejpeg
import torch

from pipelines.beton import BetonReader
from pipelines.loading.loader import Request
from pipelines.loading.native import RecordDecoder, decoding_threads


class FfcvBackend:
    """Crops by FFCV from JPEGs and raw images in any mixture.

    num_threads: decoding threads of this rank; at most Numba's, which are the usable cores.
    Raises ValueError if ffcv is missing, or for too many threads.
    """

    def __init__(
        self,
        dataset: BetonReader,
        *,
        num_threads: int = 2,
        prefetch: int = 3,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.decoder = RecordDecoder(dataset)  # for checks and messages
        self.ffcv = _import()
        self.loader = self.ffcv.create_loader(dataset, num_threads, max(prefetch, 1))
        self.pin_memory = pin_memory
        self.pool = decoding_threads(num_threads)

    def crops(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 [k, n, size, size, 3] for each request, in order."""
        pending: deque[tuple[Request, torch.Tensor]] = deque()  # of the batches being made

        def work():
            for request in requests:
                self.decoder.check_new(request.samples, self.pool, self._check)
                views = torch.empty(request.shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                pending.append((request, views))
                yield self.ffcv.CropRequest(request.samples, request.boxes, views.numpy())

        stream = self.ffcv.RequestIterator(self.loader, work())
        try:
            for (codes,) in stream:
                request, views = pending.popleft()
                for sample in request.samples[codes != 0]:
                    self._refuse(int(sample))
                yield views
            if stream.error is not None:
                raise stream.error
        finally:
            stream.stop()

    def _check(self, sample: int) -> None:
        """Raise ValueError for other bytes or a JPEG of another size, which libffcv would scale."""
        self.decoder.check(sample)
        if not self.dataset.is_raw(sample):
            with suppress(ValueError):
                header = simplejpeg.decode_jpeg_header(self.dataset.image(sample))
                if header[:2] == self.dataset.size(sample):
                    return
            self._refuse(sample)

    def _refuse(self, sample: int) -> None:
        self.decoder.decode(sample)  # raises for what is wrong with it
        raise ValueError(
            f"{self.decoder.title(sample)} does not decode with FFCV's libjpeg-turbo;"
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
