"""Synthetic images for measurements without a data set."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.beton.writer import BetonWriter


def images(folder: Path, count: int) -> Path:
    """Write a `.beton` of images with ImageNet's cost to read and decode: 500x375, 110 kB."""
    path, generator = folder / "synthetic.beton", np.random.default_rng(0)
    jpegs = []
    for _ in range(16):
        layers = [
            Image.fromarray(generator.integers(0, 256, (3 * 2**k, 4 * 2**k, 3), dtype=np.uint8))
            for k in range(7)
        ]
        sized = [layer.resize((500, 375), Image.Resampling.BICUBIC) for layer in layers]
        mixed = np.sum([np.asarray(layer) * 0.5 ** (k + 1) for k, layer in enumerate(sized)], 0)
        grain = generator.normal(0, 20, (375, 500, 1))
        buffer = io.BytesIO()
        pixels = np.clip(mixed + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue())
    with BetonWriter(path, num_samples=count, class_names=["synthetic"]) as writer:
        for index in range(count):
            writer.add(jpegs[index % 16], 375, 500, 0, f"{index}.jpg")
        writer.finalize()
    return path
