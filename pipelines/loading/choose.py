"""From --data and --loader to a loader: the one asked for, or the fastest of those that can."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from pipelines.beton import BetonReader
from pipelines.convert.sources.shards import read_dataset
from pipelines.crop import RandomResizedCrop
from pipelines.loading import dali
from pipelines.loading.dali import DaliLoader
from pipelines.loading.dali_shards import ShardLoader
from pipelines.loading.ffcv import FfcvLoader
from pipelines.loading.native import NativeLoader
from pipelines.webdataset.reader import ShardReader

Name = Literal["native", "ffcv", "dali"]
Wish = Literal["auto", "native", "ffcv", "dali"]
Loader = NativeLoader  # the others are kinds of it
Data = BetonReader | ShardReader

WORTH_MEASURING = 1_000_000  # images of a run, below which auto takes native unseen
WORTH_CHANGING = 1.1  # native's pixels are nearest to the reference's: keep it for less than this
SECONDS = 2.0  # for which each is measured
BATCH = 256  # images at most in the measurement's batches


def open_data(path: Path, flag: str) -> Data:
    """A `.beton`, or the training images of a folder of web shards. Raises ValueError."""
    if not path.exists():
        raise ValueError(
            f"{flag} {path} does not exist; say where it is, or: bt-convert IMAGE_FOLDER {path}"
        )
    return ShardReader(path) if path.is_dir() else BetonReader(path)


def open_val(data: Path, val_data: Path | None) -> Data | None:
    """The held-out images: the ones named, else what bt-convert left beside the training images."""
    if val_data is not None:
        return open_data(val_data, "--val-data")
    if data.is_dir():
        return ShardReader(data, "val") if "val" in read_dataset(data)["splits"] else None
    beside = data.with_suffix(f".val{data.suffix}")
    return BetonReader(beside) if beside.exists() else None


def open_loader(
    name: Name,
    data: Data,
    crop: RandomResizedCrop,
    *,
    device: torch.device,
    **settings,
) -> Loader:
    """The loader of that name; device is the one trained on, settings are NativeLoader's.

    Raises ValueError where it is not installed or cannot read the data, with the way out.
    """
    if isinstance(data, ShardReader):
        if name != "dali" or not dali.is_installed():
            raise ValueError(
                f"--data {data.path}: web shards are read by --loader dali"
                f" ({dali.INSTALL}); or convert them: bt-convert {data.path} out.beton"
            )
        return ShardLoader(data, crop, device=device, **settings)
    if name == "dali":
        return DaliLoader(data, crop, device=device, **settings)
    kind = FfcvLoader if name == "ffcv" else NativeLoader
    return kind(data, crop, pin_memory=device.type == "cuda", **settings)


def choose_backend(
    wish: Wish,
    data: Data,
    num_images: int,
    measure: Callable[[Name], Loader],
    *,
    cache: bool,
    device: torch.device,
) -> tuple[Name, str]:
    """The loader of a run, and a line that says why.

    auto chooses among those with the same order, boxes and filter: DALI for web shards, native for
    short runs and wherever there is nothing to choose, else the faster of native and DALI. (FFCV's
    pixels are others, which speed alone must not decide.)

    Args:
        num_images: that the run will load.
        measure: makes a loader of that name with a batch for the measurement.
        cache: is there memory for decoded images? Only native uses it.
        device: trained on; DALI is slower than native where that is a CPU.
    """
    if wish != "auto":
        return wish, wish
    if isinstance(data, ShardReader):
        return "dali", "dali, which reads web shards"
    if cache or device.type == "cpu" or not dali.is_installed():
        return "native", "native"
    if num_images < WORTH_MEASURING:
        return "native", "native (a short run)"
    native_rate = rate(measure("native"))
    try:
        dali_rate = rate(measure("dali"))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return "native", f"native (dali cannot: {dali.in_short(error)})"
    dali.release_memory()
    chosen: Name = "dali" if dali_rate > WORTH_CHANGING * native_rate else "native"
    rates = f"native {native_rate:,.0f}, dali {dali_rate:,.0f}"
    return chosen, f"{chosen} (one rank alone, images/s: {rates})"


def rate(loader: Loader) -> float:
    """Images/s of a loader that nothing waits for, after its first two batches."""
    batches = loader.batches(0, 1 << 40)
    for _ in islice(batches, 2):
        pass
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < SECONDS:
        count += len(next(batches).samples)
    elapsed = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return count / elapsed
