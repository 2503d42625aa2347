"""Choosing a run's loader, the requested one or the fastest for the data, and building it."""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading import BackendName, LoaderName, dali
from pipelines.loading.dali import DaliBackend
from pipelines.loading.dali_shards import ShardSampler
from pipelines.loading.ffcv import FfcvBackend
from pipelines.loading.loader import CropBackend, Loader, Sampler
from pipelines.loading.native import NativeBackend
from pipelines.loading.process import DecodeProcess
from pipelines.webdataset.reader import ShardReader

MIN_IMAGES_TO_MEASURE = 1_000_000  # auto measures only runs of at least this many
MIN_SPEEDUP = 1.1  # native's pixels are nearest to the reference's: keep it for less than this
MEASURE_SECONDS = 2.0  # per measured loader
MAX_MEASURED_BATCH = 256  # largest batch used in the measurement


def open_loader(
    name: BackendName,
    dataset: BetonReader | ShardReader,
    crop: RandomResizedCrop,
    *,
    batch_size: int,
    device: torch.device = dali.CPU,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sizes: Sequence[int] = (),
    num_threads: int = 2,
    prefetch: int = 3,
    cache_bytes: int = 0,
) -> Loader:
    """The loader of that name. Arguments are `Sampler`'s and `NativeBackend`'s.

    Raises ValueError if the loader is not installed or cannot read the data, with the way out.
    """
    if isinstance(dataset, ShardReader) and (name != "dali" or not dali.is_installed()):
        raise ValueError(
            f"--data {dataset.path}: web shards are read by --loader dali"
            f" ({dali.INSTALL}); or convert them: bt-convert {dataset.path} out.beton"
        )
    sampling: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "sizes": sizes,
    }
    threads: dict[str, Any] = {"num_threads": num_threads, "prefetch": prefetch}
    if cache_bytes and name != "native":
        raise ValueError(f"--cache-gb needs --loader native: {name} keeps no decoded images")
    if isinstance(dataset, ShardReader):
        sampler: Sampler = ShardSampler(dataset, crop, **sampling)
    else:
        sampler = Sampler(dataset, crop, **sampling)
    backend: CropBackend
    if name == "dali":
        backend = DaliBackend(
            dataset, batch_size=sampler.local_batch_size, device=device, **threads
        )
    elif name == "ffcv":
        assert isinstance(dataset, BetonReader)
        backend = FfcvBackend(dataset, pin_memory=device.type == "cuda", **threads)
    elif device.type == "cuda":
        batch_bytes = 2 * sampler.local_batch_size * max(sampler.sizes) ** 2 * 3
        backend = DecodeProcess(
            dataset, batch_bytes=batch_bytes, device=device, cache_bytes=cache_bytes, **threads
        )
    else:
        backend = NativeBackend(dataset, cache_bytes=cache_bytes, **threads)
    return Loader(sampler, backend)


def choose_loader(
    requested: LoaderName,
    dataset: BetonReader | ShardReader,
    num_images: int,
    build: Callable[[BackendName], Loader],
    *,
    cache: bool,
    device: torch.device,
) -> tuple[BackendName, str]:
    """The name of a run's loader, and a line with the reason.

    auto chooses among those with the same order, boxes and filter: DALI for web shards, native for
    short runs and wherever there is no choice, else the faster of native and DALI. (FFCV's pixels
    differ, which speed alone must not decide.)

    num_images: that the run will load. build: builds the loader of a name for the measurement.
    cache: whether there is memory for decoded images, which only native uses.
    """
    if requested != "auto":
        return requested, requested
    if isinstance(dataset, ShardReader):
        return "dali", "dali, which reads web shards"
    if cache or device.type == "cpu" or not dali.is_installed():
        return "native", "native"
    if num_images < MIN_IMAGES_TO_MEASURE:
        return "native", "native (a short run)"
    native_rate = rate(build("native"))
    try:
        dali_rate = rate(build("dali"))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return "native", f"native (dali fails: {dali.short_message(error)})"
    dali.release_memory()
    chosen: BackendName = "dali" if dali_rate > MIN_SPEEDUP * native_rate else "native"
    rates = f"native {native_rate:,.0f}, dali {dali_rate:,.0f}"
    return chosen, f"{chosen} (measured on one rank, images/s: {rates})"


def rate(loader: Loader) -> float:
    """Images/s of a loader whose consumer never waits, after its first two batches."""
    batches = loader.batches(0, 1 << 40)
    for _ in islice(batches, 2):
        pass
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < MEASURE_SECONDS:
        count += len(next(batches).request.samples)
    elapsed = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return count / elapsed
