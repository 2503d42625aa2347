"""Two-view loading speed: bt-fast's loaders, stock FFCV, and the reference, in one run.

    python tools/bench_loader.py imagenet-sample/train --workers 2

    reference       the released code's loader: ImageFolder, Pillow, its two full branches (its
                    colours and blur run in these workers too; there is no other place for them)
    stock ffcv      FFCV with two image pipelines, random resized crops only: decodes twice
    two-view ffcv   bt-fast's --loader ffcv: FFCV decodes once, crops twice
    dali            bt-fast's --loader dali: the same, on the GPU if there is one
    native          bt-fast: decodes once, crops twice
    cached          the same with --cache-gb, once all images are decoded: what is left is cropping

All give two views of 224 px per image, from the same images and with as many workers or threads.
All but the reference read the same `.beton`, made first. The first batches (start-up, Numba's
compilation) are not timed; the contenders alternate. What counts is the ratio within one run.
"""

import _checkout  # noqa: F401  # isort: skip

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import simplejpeg
import torch
import tyro
from PIL import Image

from pipelines.beton import BetonReader
from pipelines.common.cpu import usable_cores
from pipelines.convert.command import Convert, convert
from pipelines.crop import RandomResizedCrop, random_boxes
from pipelines.loading.dali import DaliLoader
from pipelines.loading.ffcv import FfcvLoader
from pipelines.loading.native import NativeLoader
from tools import reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Compare two-view loaders."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder with one folder of images per class."""
    workers: int = usable_cores()
    """Worker processes of the reference, threads of the others."""
    batch_size: int = 64
    """Images per batch."""
    size: int = 224
    """Side of the views, pixels."""
    seconds: float = 8.0
    """Time each contender runs per repeat, after warming up."""
    repeats: int = 3
    """Turns of each contender; the median counts."""


def released(config: Benchmark, beton: Path) -> Iterator:
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


def two_view_ffcv(config: Benchmark, beton: Path) -> Iterator:
    return ours(FfcvLoader, config, beton)


def native(config: Benchmark, beton: Path) -> Iterator:
    return ours(NativeLoader, config, beton)


def cached(config: Benchmark, beton: Path) -> Iterator:
    batches = ours(NativeLoader, config, beton, cache_bytes=16 << 30)
    for _ in islice(batches, 4 * len(BetonReader(beton)) // config.batch_size):
        pass  # four epochs, because each leaves its tail out
    return batches


def dali(config: Benchmark, beton: Path) -> Iterator:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return ours(DaliLoader, config, beton, device=device)


def ours(kind: Callable, config: Benchmark, beton: Path, **settings) -> Iterator:
    crop = RandomResizedCrop(size=config.size)
    settings |= {"batch_size": config.batch_size, "num_threads": config.workers}
    return kind(BetonReader(beton), crop, **settings).batches(0, 1 << 40)


CONTENDERS: dict[str, Callable[[Benchmark, Path], Iterator]] = {
    "reference": released,
    "stock ffcv": stock_ffcv,
    "two-view ffcv": two_view_ffcv,
    "dali": dali,
    "native": native,
    "cached": cached,
}
NEEDS = {"stock ffcv": "ffcv", "two-view ffcv": "ffcv", "dali": "nvidia.dali"}  # optional packages
# Whose boxes are known, so that their pixels are compared.
LOADERS = ("two-view ffcv", "dali", "native")


def measure(batches: Iterator, config: Benchmark) -> float:
    """Images/s of an endless iterator of batches, after the first four."""
    for _ in islice(batches, 4):
        pass
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < config.seconds or count == 0:
        next(batches)
        count += 1
    return count * config.batch_size / elapsed


def difference_from_pillow(name: str, config: Benchmark, beton: Path) -> tuple[float, float]:
    """Mean and 99.9 % quantile of |crop - Pillow's bicubic of the same box|, grey levels."""
    reader, crop = BetonReader(beton), RandomResizedCrop(size=config.size)
    batches = CONTENDERS[name](config, beton)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    boxes = random_boxes(crop, batch.keys[0], *reader.sizes[batch.samples].T)
    differences = []
    for sample, (top, left, height, width), view in zip(
        batch.samples, boxes.tolist(), batch.views[0].cpu().numpy(), strict=True
    ):
        pixels = simplejpeg.decode_jpeg(reader.image(sample), fastdct=False, fastupsample=False)
        cut = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        theirs = np.array(cut.resize((config.size, config.size), Image.Resampling.BICUBIC))
        differences.append(np.abs(view.astype(int) - theirs.astype(int)))
    return float(np.mean(differences)), float(np.quantile(differences, 0.999))


def installed(name: str) -> bool:
    try:
        importlib.import_module(NEEDS.get(name, "torch"))
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def main() -> None:
    config = tyro.cli(Benchmark, description=__doc__)
    names = [name for name in CONTENDERS if installed(name)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        beton = Path(scratch) / "out.beton"
        convert(Convert(source=config.source, out=beton, workers=config.workers))
        for repeat in range(config.repeats):
            for name in names:
                batches = CONTENDERS[name](config, beton)
                rates[name].append(measure(batches, config))
                batches.close()  # type: ignore[attr-defined]
                print(f"turn {repeat + 1}: {name:>13} {rates[name][-1]:7.0f} images/s", flush=True)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in medians.items():
            ratios = ", ".join(f"{rate / other:.2f} x {than}" for than, other in medians.items())
            print(f"{name:>13} {rate:7.0f} images/s: {ratios}")
        for name in [name for name in LOADERS if name in names]:
            mean, high = difference_from_pillow(name, config, beton)
            print(f"{name}: {mean:.3f} grey levels from Pillow's bicubic (99.9 %: {high:.0f})")


if __name__ == "__main__":
    main()
