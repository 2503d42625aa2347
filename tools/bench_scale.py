"""Memory of bt-convert for few and many images: it should not grow with their number.

    python tools/bench_scale.py --few 30000 --many 300000

Converts folders of small JPEGs (about 700 bytes) to each format, and one format to the other, and
prints the peak resident memory of the command without its workers (VmHWM in /proc, read ten times
a second).
"""

import _checkout  # noqa: F401  # isort: skip

import io
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Compare the peak memory of converting few and many images."""

    few: int = 30_000
    """Number of images in the small folder."""
    many: int = 300_000
    """Number of images in the large folder."""
    classes: int = 100
    """Number of class folders; 1 puts all images into one folder without classes."""
    workers: int = 2
    """Number of worker processes."""


def write_images(root: Path, count: int, classes: int) -> None:
    """Write `count` small files with 50 different contents."""
    generator, contents = np.random.default_rng(0), []
    for index in range(50):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (24, 24 + index % 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=30)
        contents.append(buffer.getvalue())
    for index in range(count):
        folder = root / f"class{index % classes:04}" if classes > 1 else root
        if index < classes:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"n{index:08}.JPEG").write_bytes(contents[index % 50])


def convert(source: Path, out: Path, workers: int, *flags: str) -> float:
    """Peak MB of a conversion."""
    command = [sys.executable, "-m", "pipelines.convert.command", str(source), str(out), *flags]
    command += ["--workers", str(workers)]
    child, peak = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), 0
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):  # not while the process exits
            peak = int(found[1])
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(child.returncode)
    return peak * 1024 / 1e6


def main() -> None:
    config = tyro.cli(Benchmark)
    for count in (config.few, config.many):
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            write_images(scratch / "images", count, config.classes)
            for source, out, *flags in (
                ("images", "a.beton"),
                ("a.beton", "shards", "--format=webdataset"),
                ("shards", "b.beton"),
            ):
                peak = convert(scratch / source, scratch / out, config.workers, *flags)
                print(f"{count:>9,} images, {source} to {out}: {peak:4.0f} MB", flush=True)


if __name__ == "__main__":
    main()
