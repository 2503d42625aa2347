"""The backend in which NVIDIA DALI decodes, crops and resizes; on a GPU all of it there.

DALI gets encoded images and boxes, decodes each image once, and cuts and resizes both views.
Decoded pixels equal libjpeg-turbo's on a CPU; the antialiased cubic resize differs from the native
backend's by 0.2 grey levels on average. On a GPU nvJPEG decodes (with libjpeg-turbo's chroma
upsampling), and the views stay there.

DALI accepts a JPEG with an error in its middle. So every image is checked when it is first read: by
its checksum, or by decoding it natively if the file has none.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pipelines.beton import BetonReader
from pipelines.loading.loader import Request
from pipelines.loading.native import RecordDecoder, decoding_threads
from pipelines.webdataset.reader import ShardReader

CPU = torch.device("cpu")


class DaliBackend:
    """Crops by DALI, always of `batch_size` images at once, on `device`.

    Raises ValueError if DALI is missing or does not start.
    """

    def __init__(
        self,
        dataset: BetonReader | ShardReader,
        *,
        batch_size: int,
        num_threads: int = 2,
        prefetch: int = 3,
        device: torch.device = CPU,
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"--loader dali needs NVIDIA DALI ({error}): pip install 'bt-fast[dali]', or"
                " --loader native"
            ) from None
        self.dataset = dataset
        self.decoder = RecordDecoder(dataset)  # for checks and messages
        self.has_checksums = dataset.location(0)[2] is not None
        self.batch_size, self.num_threads = batch_size, num_threads
        self.prefetch, self.device = max(prefetch, 1), device
        self.pool = decoding_threads(num_threads)

    def crops(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 [2, n, size, size, 3] for each request, in order, on the device."""
        pending: deque[tuple[np.ndarray, list[np.ndarray]]] = deque()  # samples and their bytes
        check = self.decoder.check if self.has_checksums else self.decoder.decode

        def inputs():
            for request in requests:
                self.decoder.check_new(request.samples, self.pool, check)
                encoded = [self._file(int(sample)) for sample in request.samples]
                pending.append((request.samples, encoded))
                sides = np.full((len(request.samples), 2), request.size, np.float32)
                yield encoded, request.boxes.astype(np.int32), sides

        try:
            pipeline = _pipeline(
                inputs(), self.batch_size, self.num_threads, self.prefetch, self.device
            )
        except RuntimeError as error:
            raise ValueError(
                f"--loader dali: DALI does not start here ({_cause(error)}); choose --loader native"
            ) from None
        copying: deque[tuple] = deque()  # DALI's outputs while the GPU copies them
        while True:
            try:
                shapes, *views = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                for samples, _ in pending:
                    self._decode(samples)
                raise ValueError(
                    "DALI cannot decode an image that the native loader decodes"
                    f" ({_cause(error)}); choose --loader native"
                ) from None
            samples, _ = pending.popleft()
            sizes = np.stack([np.array(shape) for shape in shapes])[:, :2]
            recorded = [self.dataset.size(int(sample)) for sample in samples]
            self._decode(samples[(sizes != recorded).any(axis=1)])
            crops = torch.stack([torch.from_dlpack(view.as_tensor()) for view in views])
            if crops.is_cuda:
                copying.append((views, torch.cuda.current_stream().record_event()))
                if len(copying) > 2:
                    copying.popleft()[1].synchronize()
            yield crops

    def _file(self, sample: int) -> np.ndarray:
        """An image as a file that DALI decodes: uint8 [bytes]."""
        data = self.dataset.image(sample)
        if not self.dataset.is_raw(sample):
            return data
        height, width = self.dataset.size(sample)  # as a PPM: a line of text, then the pixels
        return np.concatenate([np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8), data])

    def _decode(self, samples: np.ndarray) -> None:
        """Raise ValueError, with its name, for an image that the native loader refuses, too."""
        for sample in samples.tolist():
            self.decoder.decode(sample)


def _cause(error: Exception) -> str:
    """The cause in DALI's message, which stands between a traceback and general advice."""
    lines = str(error).partition("encountered:")[2].split("\n") or [str(error)]
    return next((line.strip() for line in lines if line.strip()), str(error).split("\n")[0])


def _pipeline(
    inputs: Iterator, batch_size: int, num_threads: int, prefetch: int, device: torch.device
):
    """(files, boxes int32 [n, 2, 4], sides float32 [n, 2]) -> shapes decoded, views A, views B."""
    from nvidia.dali import Pipeline, fn, types

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=prefetch,
    )
    with pipeline:
        files, boxes, sides = fn.external_source(
            source=inputs,
            num_outputs=3,
            dtype=[types.UINT8, types.INT32, types.FLOAT],
            ndim=[1, 2, 1],
            no_copy=True,
        )
        images = fn.decoders.image(
            files,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as everywhere here
            jpeg_fancy_upsampling=True,
        )
        views = [
            fn.resize(
                fn.slice(images, start=boxes[view, :2], shape=boxes[view, 2:], axes=(0, 1)),
                size=sides,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            for view in (0, 1)
        ]
        pipeline.set_outputs(images.shape(), *views)
    pipeline.build()
    return pipeline
