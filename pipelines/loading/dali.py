"""The loader whose decoding, cropping and resizing are NVIDIA DALI's; on a GPU all of it there.

Which images, keys and boxes a batch has is the native loader's business: DALI is handed encoded
images and boxes, decodes each image once, and cuts and resizes both views. Decoded pixels equal
libjpeg-turbo's on a CPU; the antialiased cubic resize differs from the native loader's by 0.2 grey
levels in the mean. On a GPU nvJPEG decodes (with chroma upsampled as libjpeg-turbo does), and the
views stay there.

Damage: DALI takes a JPEG with an error in its middle for good. So every record is checked when it
is first read: by its checksum, or by the native decoder in a file that has none.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec

import numpy as np
import torch

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading.native import CropCutter, NativeLoader

CPU = torch.device("cpu")
INSTALL = "pip install 'bt-fast[dali]'"


def is_installed() -> bool:
    """Can DALI be imported?"""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def release_memory() -> None:
    """Give back what DALI keeps on the GPU for pipelines that are gone."""
    from nvidia.dali import backend

    backend.ReleaseUnusedMemory()


class DaliLoader(NativeLoader):
    """The native loader's batches, made by DALI.

    Args:
        device: where the views are made and stay.
        Others: as NativeLoader's; there is no cache.
    """

    cutter: "DaliCutter"

    def __init__(
        self,
        reader: BetonReader,
        crop: RandomResizedCrop,
        *,
        device: torch.device = CPU,
        num_threads: int = 2,
        prefetch: int = 3,
        **settings,
    ) -> None:
        if settings.pop("cache_bytes", 0):
            raise ValueError("--cache-gb is the native loader's: leave it out, or --loader native")
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"--loader dali needs NVIDIA DALI ({error}): {INSTALL}, or --loader native"
            ) from None
        settings.pop("pin_memory", None)  # what is on the GPU already needs none
        super().__init__(reader, crop, **settings)
        num_images = self.steps.share.stop - self.steps.share.start
        self.cutter = DaliCutter(reader, num_images, num_threads, prefetch, device)


class DaliCutter(CropCutter):
    """A CropCutter whose crops are made by DALI, always `num_images` at once."""

    def __init__(
        self,
        reader: BetonReader,
        num_images: int,
        num_threads: int,
        prefetch: int = 3,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(reader, num_threads, prefetch)
        self.num_images, self.num_threads, self.device = num_images, num_threads, device
        self.has_checksums = reader.place(0)[2] is not None
        # Where a batch's bytes come from, if another reader than ours has them already.
        self.source: Callable[[], list[np.ndarray]] | None = None

    def cut(self, requests: Iterable[tuple[np.ndarray, np.ndarray, int]]) -> Iterator[torch.Tensor]:
        """For each (samples int64[n], boxes int64[n, 2, 4], size): uint8 [2, n, size, size, 3]."""
        waiting: deque[tuple] = deque()  # samples in DALI's hands, and the bytes it reads

        def inputs():
            for samples, boxes, size in requests:
                encoded = self.encoded(samples)
                waiting.append((samples, encoded))
                sides = np.full((len(samples), 2), size, np.float32)
                yield encoded, boxes.astype(np.int32), sides

        try:
            pipeline = _pipeline(
                inputs(), self.num_images, self.num_threads, self.prefetch, self.device
            )
        except RuntimeError as error:
            raise ValueError(
                f"--loader dali: DALI does not start here ({in_short(error)}); take --loader native"
            ) from None
        busy: deque[tuple] = deque()  # DALI's outputs while the GPU copies them
        while True:
            try:
                shapes, *views = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explained([s for part, _ in waiting for s in part], error) from None
            samples, _ = waiting.popleft()
            self._require_sizes(samples, np.stack([np.array(shape) for shape in shapes])[:, :2])
            crops = torch.stack([torch.from_dlpack(view.as_tensor()) for view in views])
            if crops.is_cuda:
                busy.append((views, torch.cuda.current_stream().record_event()))
                if len(busy) > 2:
                    busy.popleft()[1].synchronize()
            yield crops

    def encoded(self, samples: np.ndarray) -> list[np.ndarray]:
        """The samples as files that DALI decodes, uint8 [bytes] each, checked if read first."""
        for _ in self.pool.map(self.check, samples[~self.checked[samples]].tolist()):
            pass
        if self.source is not None:
            return self.source()
        return [self._file(int(sample)) for sample in samples]

    def check(self, sample: int) -> None:
        """As CropCutter's; without a checksum the record must decode without a warning."""
        if not self.checked[sample]:
            super().check(sample)
            if not self.has_checksums:
                self.decode(sample)

    def _file(self, sample: int) -> np.ndarray:
        data = self.reader.image(sample)
        if not self.reader.is_raw(sample):
            return data
        height, width = self.reader.size(sample)  # as a PPM: a line of text, then the pixels
        return np.concatenate([np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8), data])

    def _require_sizes(self, samples: np.ndarray, sizes: np.ndarray) -> None:
        """sizes: int [n, 2], of what was decoded."""
        recorded = [self.reader.size(int(sample)) for sample in samples]
        for sample in samples[(sizes != recorded).any(axis=1)]:
            self.decode(int(sample))  # names it

    def _explained(self, samples: list[np.int64], error: RuntimeError) -> ValueError:
        """DALI's error as one line, which names the image if the native decoder fails, too."""
        for sample in samples:
            try:
                self.decode(int(sample))
            except ValueError as known:
                return known
        return ValueError(
            f"DALI does not decode what the native loader does ({in_short(error)}); take"
            " --loader native"
        )


def in_short(error: Exception) -> str:
    """What DALI says between a traceback of its own and advice about the pipeline object."""
    lines = str(error).partition("encountered:")[2].split("\n") or [str(error)]
    return next((line.strip() for line in lines if line.strip()), str(error).split("\n")[0])


def _pipeline(
    inputs: Iterator, num_images: int, num_threads: int, prefetch: int, device: torch.device
):
    """(files, boxes int32 [n, 2, 4], sides float32 [n, 2]) -> shapes decoded, views A, views B."""
    from nvidia.dali import Pipeline, fn, types

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=num_images,
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
