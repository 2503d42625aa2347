"""Draw labelled images that show, in minutes on a CPU, whether pretraining learns anything.

    python tools/make_demo_images.py demo-images
    demo-images/train/<class>/NNNN.jpg      demo-images/val/<class>/NNNN.jpg

An image repeats one motif, which defines its class: discs, rings, stars, stripes, ... Two crops of
an image therefore have the motif in common, and by design little else: hues and light vary within
an image as much as between images, and all properties but the motif (colour, size, tilt, light,
blur, noise, random lines) have the same distribution in every class. Features of a random network
mainly encode colour and light; the common content of Barlow Twins' two views is the class.

An image is a function of (seed, split, class, index): a larger number of images does not change the
first ones. The bytes can differ between versions of Pillow, numpy and libjpeg.
"""

import _checkout  # noqa: F401  # isort: skip

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFilter

from bt_fast.cli import run_command
from pipelines.common.cpu import usable_cores

SPLITS = ("train", "val")
SUPERSAMPLING = 3  # scale at which polygons are drawn before averaging, for smooth edges
TILT = 0.2  # maximum rotation of a motif, and of the complete image, radians
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Draw labelled demo images into OUT/train/<class>/ and OUT/val/<class>/."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Output folder; must not exist."""
    train: int = 3000
    """Number of training images, distributed evenly over the classes."""
    val: int = 1000
    """Number of validation images, distributed evenly over the classes."""
    seed: int = 0
    """Seed of the images."""
    workers: int = usable_cores()
    """Number of worker processes."""


# Outlines: polygon of a motif, float [num_points, 2], with centre 0 and a radius of about 1.


def rotation(angle: float) -> np.ndarray:
    """Matrix [2, 2] that rotates row vectors by an angle in radians."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def arc(radius: float, start: float = 0, stop: float = 2 * np.pi, num: int = 40) -> np.ndarray:
    """Points [num, 2] on a circle, from one angle in radians to another."""
    angle = np.linspace(start, stop, num)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def cross() -> np.ndarray:
    """A plus sign."""
    arm = np.array([[0.95, -0.3], [0.95, 0.3], [0.3, 0.3]])
    return np.concatenate([arm @ rotation(quarter * np.pi / 2) for quarter in range(4)])


def crescent() -> np.ndarray:
    """The unit disc without a disc of radius 0.8 about (0.5, 0)."""
    tip = np.arccos((1 + 0.5**2 - 0.8**2) / (2 * 0.5))  # angle of the intersection seen from 0
    inner_tip = np.arctan2(np.sin(tip), np.cos(tip) - 0.5)  # seen from (0.5, 0)
    bite = arc(0.8, 2 * np.pi - inner_tip, inner_tip) + [0.5, 0]
    return np.concatenate([arc(1, tip, 2 * np.pi - tip), bite])


# Layouts: (random generator, reach) -> the polygons of an image, covering [-reach, reach]², where
# 1 is the distance between neighbouring motifs.


def lattice(reach: float) -> np.ndarray:
    """Integer points [num, 2] of the square."""
    ticks = np.arange(-np.ceil(reach), reach + 1)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


def scatter(outline: np.ndarray, rng: np.random.Generator, reach: float) -> list[np.ndarray]:
    """Copies of an outline near the points of the lattice, with random sizes and tilts."""
    polygons = []
    for centre in lattice(reach):
        motif = outline @ rotation(rng.uniform(-TILT, TILT)) * rng.uniform(0.36, 0.48)
        polygons.append(motif + centre + rng.uniform(-0.1, 0.1, 2))
    return polygons


def checks(rng: np.random.Generator, reach: float) -> list[np.ndarray]:
    """Every other cell of a chessboard."""
    upright = rotation(np.pi / 4)
    return [(arc(0.5, num=5) + centre) @ upright for centre in lattice(1.5 * reach)]


def bands(
    profile: Callable[[np.ndarray], np.ndarray],
    angle: float,
    rng: np.random.Generator,
    reach: float,
) -> list[np.ndarray]:
    """Parallel bands along y = profile(x), rotated by the angle."""
    x = np.arange(-np.ceil(reach), reach + 1.25, 0.25)
    middle = np.stack([x, profile(x)], axis=1)
    band = np.concatenate([middle - [0, 0.22], (middle + [0, 0.22])[::-1]])
    return [(band + [0, y]) @ rotation(angle) for y in np.arange(-np.ceil(reach), reach + 1)]


ring = np.concatenate([arc(1), arc(0.55)[::-1]])  # the inner circle in the opposite direction
triangle = arc(1.2, num=4) @ rotation(-np.pi / 2)
star = arc(1, num=11) * np.resize([1.1, 0.3], (11, 1)) @ rotation(-np.pi / 2)

CLASSES: dict[str, Callable[[np.random.Generator, float], list[np.ndarray]]] = {
    "checks": checks,
    "crescents": partial(scatter, crescent()),
    "crosses": partial(scatter, cross()),
    "diagonals": partial(bands, np.zeros_like, np.pi / 4),
    "discs": partial(scatter, arc(0.9)),
    "rings": partial(scatter, ring),
    "stars": partial(scatter, star),
    "stripes": partial(bands, np.zeros_like, 0),
    "triangles": partial(scatter, triangle),
    "zigzags": partial(bands, lambda x: 0.5 * np.abs(2 * x % 2 - 1), np.pi / 2),
}


def random_colours(rng: np.random.Generator, luma: np.ndarray, spread: float) -> np.ndarray:
    """Random hues uint8 [..., 3] of the given luma (0 to 1) [...]; a larger spread is less grey."""
    hue = rng.random((*luma.shape, 3))
    colour = luma[..., None] + spread * (hue - (hue @ LUMA)[..., None])
    return (255 * colour.clip(0, 1)).astype(np.uint8)


def draw(name: str, rng: np.random.Generator) -> Image.Image:
    """An image of a class: RGB, sides of 88 to 160 px."""
    width, height = rng.integers(88, 161, 2).tolist()
    size = np.array([width, height]) * SUPERSAMPLING
    background = random_colours(rng, rng.uniform(0.77, 0.87, (4, 4)), spread=0.6)
    canvas = Image.fromarray(background).resize(size.tolist(), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)

    pitch = min(size) * rng.uniform(0.32, 0.44)
    tilt = rotation(rng.uniform(-TILT, TILT))
    middle = size / 2 + rng.uniform(-0.5, 0.5, 2) * pitch
    polygons = CLASSES[name](rng, np.hypot(*size) / pitch / 2 + 1)
    colours = random_colours(rng, rng.uniform(0.2, 0.4, len(polygons)), spread=0.9)
    for polygon, colour in zip(polygons, colours.tolist(), strict=True):
        points = polygon @ tilt * pitch + middle
        pen.polygon(points.ravel().tolist(), fill=tuple(colour))
    for colour in random_colours(rng, rng.random(rng.integers(0, 4)), spread=0.9).tolist():
        ends = rng.random((2, 2)) * size
        pen.line(ends.ravel().tolist(), fill=tuple(colour), width=SUPERSAMPLING)

    canvas = canvas.reduce(SUPERSAMPLING).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    corner_light = Image.fromarray(rng.uniform(0.7, 1, (2, 2)).astype(np.float32))
    light = np.asarray(corner_light.resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.normal(0, rng.uniform(0, 4), (height, width, 1))
    pixels = np.asarray(canvas) * light[..., None] * rng.uniform(0.7, 1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(root: Path, seed: int, task: tuple[str, int, int]) -> None:
    """Write the image (split, class number, index) into its folder."""
    split, class_number, index = task
    name = list(CLASSES)[class_number]
    rng = np.random.default_rng([seed, SPLITS.index(split), class_number, index])
    quality = int(rng.integers(80, 96))
    draw(name, rng).save(root / split / name / f"{index:04d}.jpg", quality=quality)


def main(config: Config) -> int:
    """Draw all images into a temporary folder, then rename it, so that OUT is always complete."""
    if min(config.train, config.val, config.seed, config.workers - 1) < 0:
        raise ValueError("--train, --val and --seed must be at least 0, --workers at least 1")
    if config.out.exists():
        raise ValueError(f"{config.out} exists; remove it or choose another folder")
    start = time.perf_counter()
    unfinished = config.out.with_name(f".{config.out.name}.unfinished-{os.getpid()}")
    tasks = [
        (split, number % len(CLASSES), number // len(CLASSES))
        for split, count in zip(SPLITS, (config.train, config.val), strict=True)
        for number in range(count)
    ]
    try:
        for split in SPLITS:
            for name in CLASSES:
                (unfinished / split / name).mkdir(parents=True)
        with ProcessPoolExecutor(config.workers) as pool:
            list(pool.map(partial(write, unfinished, config.seed), tasks, chunksize=50))
        unfinished.rename(config.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.perf_counter() - start
    print(f"{len(tasks)} images of {len(CLASSES)} classes in {config.out}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("make_demo_images.py", lambda: main(tyro.cli(Config))))
