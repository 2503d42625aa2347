"""Conversion speed: bt-convert against FFCV's DatasetWriter, side by side in one run.

    python tools/bench_convert.py imagenet-sample/train --workers 2 --repeats 3

Both read the same folder (class folders of images, linked `--copies` times so that start-up does
not dominate), resize to the same longest side and write a `.beton`. The time includes listing,
decoding, writing and flushing, with new worker processes. FFCV uses the usual recipe: torchvision's
ImageFolder with its Pillow loader, RGBImageField(write_mode="jpg"), quality 90; it decodes and
re-encodes every image. bt-convert keeps the bytes of images within the limit; by default it decodes
them once to find damage, with `--check quick` it only checks their structure. The runs alternate;
compare ratios within one run.
"""

import _checkout  # noqa: F401  # isort: skip

import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.common.cpu import usable_cores
from pipelines.convert.command import Convert, convert


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Compare the speed of bt-convert with that of FFCV's DatasetWriter."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder with one folder of images per class."""
    workers: int = usable_cores()
    """Number of worker processes of each converter."""
    max_side: int = 512
    """Maximum longest side, pixels."""
    copies: int = 40
    """Number of copies of every image."""
    repeats: int = 3
    """Number of alternating runs of each converter; the median is reported."""


def link_copies(source: Path, target: Path, copies: int) -> int:
    """Fill `target` with `copies` links to every image of `source`; returns the number of links."""
    source = source.resolve()
    paths = [path for path in source.rglob("*") if path.is_file()]
    for path in paths:
        for copy in range(copies):
            link = target / f"copy{copy}" / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return len(paths) * copies


def run(name: str, folder: Path, out: Path, config: Benchmark) -> None:
    if name == "ffcv":
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        from torchvision.datasets import ImageFolder

        image = RGBImageField(write_mode="jpg", max_resolution=config.max_side)
        fields = {"image": image, "label": IntField()}
        writer = DatasetWriter(str(out), fields, num_workers=config.workers)
        writer.from_indexed_dataset(ImageFolder(folder), chunksize=20)
        os.sync()  # bt-convert flushes its file, too
        return
    limits = {"workers": config.workers, "max_side": config.max_side}
    check = "quick" if "quick" in name else "full"
    convert(Convert(source=folder, out=out, check=check, **limits))


def main() -> None:
    config = tyro.cli(Benchmark)
    import ffcv.writer  # noqa: F401  imports are not timed
    import torchvision.datasets  # noqa: F401

    print(f"{usable_cores()} usable cores, {config}")
    rates: dict[str, list[float]] = {
        "ffcv": [], "bt-convert": [], "bt-convert --check quick": []
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "images", Path(scratch) / "out.beton"
        count = link_copies(config.source, folder, config.copies)
        for _ in range(config.repeats):
            for name in rates:
                start = time.perf_counter()
                with (
                    open(os.devnull, "w") as void,
                    contextlib.redirect_stdout(void),
                    contextlib.redirect_stderr(void),
                ):
                    run(name, folder, out, config)
                rates[name].append(count / (time.perf_counter() - start))
                size = out.stat().st_size / 1e6
                print(f"{name:>24} {rates[name][-1]:7.0f} images/s, {size:.0f} MB", flush=True)
                out.unlink()
    for name, values in rates.items():
        ratios = [ours / ffcv for ours, ffcv in zip(values, rates["ffcv"], strict=True)]
        print(
            f"{name:>24}: median {statistics.median(values):.0f} images/s, "
            f"{statistics.median(ratios):.2f} x ffcv ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
