"""Two-view loading speed of bt-fast's loaders, stock FFCV and the reference, in one run.

    python tools/bench_loader.py imagenet-sample/train --workers 2

    reference       the released code's loader: ImageFolder, Pillow, both complete branches (colour
                    operations and blur also run in its workers)
    stock ffcv      FFCV with two image pipelines of random resized crops; decodes twice
    two-view ffcv   --loader ffcv: FFCV decodes once, crops twice
    dali            --loader dali: the same, on the GPU if there is one
    native          --loader native: decodes once, crops twice
    cached          native with --cache-gb after all images are decoded: only crops

All return two views of 224 px per image, from the same images and with the same number of workers
or threads. All but the reference read the same `.beton`, which is written first. The first batches
(start-up, Numba's compilation) are not timed; the loaders alternate. Compare ratios within one run.
"""

import _checkout  # noqa: F401  # isort: skip

import importlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pipelines.beton import BetonReader
from pipelines.common.cpu import usable_cores
from pipelines.convert.command import Convert, convert
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.loading.dali import CPU
from tools import reference
from tools.timing import images_per_second

# Loaders and the optional packages that they need.
LOADERS = {"reference": "torch", "stock ffcv": "ffcv", "two-view ffcv": "ffcv"}
LOADERS |= {"dali": "nvidia.dali", "native": "torch", "cached": "torch"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Compare two-view loaders."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder with one folder of images per class."""
    workers: int = usable_cores()
    """Number of worker processes of the reference, of threads of the other loaders."""
    batch_size: int = 64
    """Images per batch."""
    size: int = 224
    """Side of the views, pixels."""
    seconds: float = 8.0
    """Time of each measurement after the warm-up, seconds."""
    repeats: int = 3
    """Number of measurements of each loader; the median is reported."""


def released(config: Benchmark) -> Iterator:
    from torchvision.datasets import ImageFolder

    images = ImageFolder(config.source, reference.Views(config.size))
    return reference.endless(reference.loader(images, config.batch_size, config.workers))


def stock_ffcv(config: Benchmark, beton: Path) -> Iterator:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import ToTensor

    def view():
        decoder = RandomResizedCropRGBImageDecoder((config.size, config.size))
        return PipelineSpec("image", decoder=decoder, transforms=[ToTensor()])

    loader = Loader(
        str(beton),
        batch_size=config.batch_size,
        num_workers=config.workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": view(), "image_again": view(), "label": None},
    )
    return reference.endless(loader)


def batches_of(name: str, config: Benchmark, beton: Path) -> Iterator:
    """An infinite iterator of batches."""
    if name == "reference":
        return released(config)
    if name == "stock ffcv":
        return stock_ffcv(config, beton)
    reader = BetonReader(beton)
    on_gpu = name == "dali" and torch.cuda.is_available()
    loader = open_loader(
        {"two-view ffcv": "ffcv", "cached": "native"}.get(name, name),  # type: ignore[arg-type]
        reader,
        RandomResizedCrop(size=config.size),
        batch_size=config.batch_size,
        num_threads=config.workers,
        device=torch.device("cuda", 0) if on_gpu else CPU,
        cache_bytes=16 << 30 if name == "cached" else 0,
    )
    batches = loader.batches(0, 1 << 40)
    for _ in range(4 * len(reader) // config.batch_size if name == "cached" else 0):
        next(batches)  # four epochs, because each drops its tail
    return batches


def main() -> None:
    config = tyro.cli(Benchmark, description=__doc__)
    rates: dict[str, list[float]] = {}
    for name, package in LOADERS.items():
        try:
            importlib.import_module(package)
            rates[name] = []
        except ImportError as error:
            print(f"{name} is skipped: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        beton = Path(scratch) / "out.beton"
        convert(Convert(source=config.source, out=beton, workers=config.workers))
        for _ in range(config.repeats):
            for name in rates:
                batches = batches_of(name, config, beton)
                rate = images_per_second(batches, config.batch_size, CPU, config.seconds)
                rates[name].append(rate)
                batches.close()  # type: ignore[attr-defined]
                print(f"{name:>13} {rates[name][-1]:7.0f} images/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        ratios = ", ".join(f"{rate / other:.2f} x {than}" for than, other in medians.items())
        print(f"{name:>13} {rate:7.0f} images/s: {ratios}")


if __name__ == "__main__":
    main()
