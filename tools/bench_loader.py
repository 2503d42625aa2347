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
from pipelines.loading import BackendName
from pipelines.loading.choose import open_loader
from tools import reference


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
    return bt_fast_loader("ffcv", config, beton)


def native(config: Benchmark, beton: Path) -> Iterator:
    return bt_fast_loader("native", config, beton)


def cached(config: Benchmark, beton: Path) -> Iterator:
    batches = bt_fast_loader("native", config, beton, cache_bytes=16 << 30)
    for _ in islice(batches, 4 * len(BetonReader(beton)) // config.batch_size):
        pass  # four epochs, because each drops its tail
    return batches


def dali(config: Benchmark, beton: Path) -> Iterator:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return bt_fast_loader("dali", config, beton, device=device)


def bt_fast_loader(name: BackendName, config: Benchmark, beton: Path, **settings) -> Iterator:
    crop = RandomResizedCrop(size=config.size)
    settings |= {"batch_size": config.batch_size, "num_threads": config.workers}
    return open_loader(name, BetonReader(beton), crop, **settings).batches(0, 1 << 40)


LOADERS: dict[str, Callable[[Benchmark, Path], Iterator]] = {
    "reference": released,
    "stock ffcv": stock_ffcv,
    "two-view ffcv": two_view_ffcv,
    "dali": dali,
    "native": native,
    "cached": cached,
}
NEEDS = {"stock ffcv": "ffcv", "two-view ffcv": "ffcv", "dali": "nvidia.dali"}  # optional packages
# Loaders with known boxes, whose pixels are compared with Pillow's.
COMPARED = ("two-view ffcv", "dali", "native")


def measure(batches: Iterator, config: Benchmark) -> float:
    """Images/s of an infinite iterator of batches, without its first four."""
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
    batches = LOADERS[name](config, beton)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    boxes = random_boxes(crop, batch.request.keys[0], *reader.sizes[batch.request.samples].T)
    differences = []
    for sample, (top, left, height, width), view in zip(
        batch.request.samples, boxes.tolist(), batch.views[0].cpu().numpy(), strict=True
    ):
        pixels = simplejpeg.decode_jpeg(reader.image(sample), fastdct=False, fastupsample=False)
        cut = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        expected = np.array(cut.resize((config.size, config.size), Image.Resampling.BICUBIC))
        differences.append(np.abs(view.astype(int) - expected.astype(int)))
    return float(np.mean(differences)), float(np.quantile(differences, 0.999))


def installed(name: str) -> bool:
    try:
        importlib.import_module(NEEDS.get(name, "torch"))
    except ImportError as error:
        print(f"{name} is skipped: {error}")
        return False
    return True


def main() -> None:
    config = tyro.cli(Benchmark, description=__doc__)
    names = [name for name in LOADERS if installed(name)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        beton = Path(scratch) / "out.beton"
        convert(Convert(source=config.source, out=beton, workers=config.workers))
        for repeat in range(config.repeats):
            for name in names:
                batches = LOADERS[name](config, beton)
                rates[name].append(measure(batches, config))
                batches.close()  # type: ignore[attr-defined]
                print(f"run {repeat + 1}: {name:>13} {rates[name][-1]:7.0f} images/s", flush=True)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in medians.items():
            ratios = ", ".join(f"{rate / other:.2f} x {than}" for than, other in medians.items())
            print(f"{name:>13} {rate:7.0f} images/s: {ratios}")
        for name in [name for name in COMPARED if name in names]:
            mean, high = difference_from_pillow(name, config, beton)
            print(f"{name}: {mean:.3f} grey levels from Pillow's bicubic (99.9 %: {high:.0f})")


if __name__ == "__main__":
    main()
