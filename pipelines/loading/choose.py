"""Building the loader of a name: its sampler and its backend."""

from collections.abc import Sequence
from typing import Any, get_args

import torch

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading import LoaderName
from pipelines.loading.dali import CPU, DaliBackend
from pipelines.loading.ffcv import FfcvBackend
from pipelines.loading.loader import CropBackend, Loader, Sampler
from pipelines.loading.processes import native_backend
from pipelines.webdataset.reader import ShardReader

LOADERS = get_args(LoaderName)


def open_loader(
    name: LoaderName,
    dataset: BetonReader | ShardReader,
    crop: RandomResizedCrop,
    *,
    batch_size: int,
    device: torch.device | str = CPU,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sizes: Sequence[int] = (),
    num_threads: int = 2,
    prefetch: int = 3,
    cache_bytes: int = 0,
) -> Loader:
    """Open a loader of two random crops per image.

    Args:
        name: "native" or "auto" (the same), "dali" or "ffcv".
        dataset: of `open_data`.
        crop: the size of the crops, and their range of areas.
        batch_size: images in the global batch, divided equally among the ranks.
        device: where the crops are wanted.
        seed: order, boxes and keys are functions of it, the epoch and the image.
        rank: this process's part of every batch, of `world_size`.
        sizes: sides of the crops by epoch, pixels; default: crop.size in all.
        num_threads: that decode; the native backend decodes for a GPU in as many processes.
        prefetch: batches that are made ahead.
        cache_bytes: of memory for decoded images; native only.

    Raises:
        ValueError: another name, data set or crop, a count below 1, no GPU, a loader that is not
            installed or cannot read the data, fewer images than a batch, or a batch that the ranks
            cannot divide.
    """
    if name not in LOADERS:
        raise ValueError(f"loader {name!r} is not one of {', '.join(LOADERS)}")
    if not isinstance(dataset, BetonReader | ShardReader):
        raise ValueError(f"dataset must be opened by open_data, got {dataset!r}")
    if not isinstance(crop, RandomResizedCrop):
        raise ValueError(f"crop must be a RandomResizedCrop, got {crop!r}")
    threads: dict[str, Any] = {"num_threads": num_threads, "prefetch": prefetch}
    if cache_bytes and name in ("dali", "ffcv"):
        raise ValueError(f"--cache-gb needs --loader native: {name} keeps no decoded images")
    counts = {"batch_size": batch_size, "num_threads": num_threads, "prefetch": prefetch}
    for argument, value in counts.items():
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if abs(seed) >= 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but there is no usable GPU here")
    sampler = Sampler(
        dataset,
        crop,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        sizes=sizes,
    )
    backend: CropBackend
    if name == "dali":
        backend = DaliBackend(
            dataset, batch_size=sampler.local_batch_size, device=device, **threads
        )
    elif name == "ffcv":
        if not isinstance(dataset, BetonReader):
            raise ValueError(f"--loader ffcv reads a .beton: bt-convert {dataset.path} out.beton")
        backend = FfcvBackend(dataset, pin_memory=device.type == "cuda", **threads)
    else:
        batch_bytes = 2 * sampler.local_batch_size * max(sampler.sizes) ** 2 * 3
        backend = native_backend(
            dataset, device, batch_bytes=batch_bytes, cache_bytes=cache_bytes, **threads
        )
    return Loader(sampler, backend)
