"""Memory of bt-convert for few and many images: it should not grow with their number.

    python tools/bench_scale.py --few 30000 --many 300000

Converts folders of small JPEGs (files of about 700 bytes, in class folders or in one folder) and
prints the peak resident memory of the command, alone and with its workers, from the kernel's
statistics (VmHWM in /proc, read ten times a second). Converts the folder to each format, and one
format to the other.
"""

import _checkout  # noqa: F401  # isort: skip

import io
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

    scratch: Path | None = None
    """Folder for temporary images and results."""


def write_images(root: Path, count: int, classes: int) -> Path:
    """Write `count` small files with 50 different contents."""
    generator = np.random.default_rng(0)
    contents = []
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
    return root


def peaks(session: int) -> dict[int, int]:
    """Peak resident bytes of every process of a session, by process id."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                if int((path / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                    continue
                lines = (path / "status").read_text().splitlines()
            except OSError:  # the process has ended
                continue
            (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")] or ["0"]
            found[int(path.name)] = 1024 * int(peak)
    return found


def convert(source: Path, out: Path, workers: int, *flags: str) -> tuple[float, float, float]:
    """Returns the peak memory of the command and of all processes, MB, and the seconds."""
    command = [sys.executable, "-m", "pipelines.convert.command", str(source), str(out), *flags]
    start = time.perf_counter()
    child = subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    maxima: dict[int, int] = {}
    while child.poll() is None:
        for process, peak in peaks(child.pid).items():
            maxima[process] = max(maxima.get(process, 0), peak)  # reported as 0 while it exits
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(child.returncode)
    return maxima[child.pid] / 1e6, sum(maxima.values()) / 1e6, seconds


def main() -> None:
    config = tyro.cli(Benchmark)
    print(config)
    steps = {
        "folder to .beton": ("images", "a.beton", []),
        ".beton to web shards": ("a.beton", "shards", ["--format", "webdataset"]),
        "web shards to .beton": ("shards", "b.beton", []),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for count in (config.few, config.many):
        with tempfile.TemporaryDirectory(dir=config.scratch) as scratch:
            write_images(Path(scratch) / "images", count, config.classes)
            for name, (source, out, flags) in steps.items():
                paths = Path(scratch) / source, Path(scratch) / out
                command, everything, seconds = convert(*paths, config.workers, *flags)
                results[name].append((command, everything))
                print(
                    f"{count:>9,} images, {name:>20}: {command:4.0f} MB, with workers "
                    f"{everything:4.0f} MB; {count / seconds:,.0f} images/s"
                )
    for name, (few, many) in results.items():
        print(f"{name:>20}: {many[0] / few[0]:.2f} x, with workers {many[1] / few[1]:.2f} x")


if __name__ == "__main__":
    main()
