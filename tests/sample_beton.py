"""A small `.beton` for the tests."""

from pathlib import Path

from conftest import drawn_picture, jpeg_bytes

from pipelines.beton.writer import BetonWriter

CLASSES = ["cat", "dog", "é ☕"]
NUM_IMAGES = 23
PAGE_SIZE = 2 << 20


def write_sample(path: Path, **options) -> list[bytes]:
    """Write NUM_IMAGES images, number i of (50 + 2i) x (60 + i) pixels; returns the JPEGs."""
    sizes = [(60 + index, 50 + 2 * index) for index in range(NUM_IMAGES)]
    encoded = [jpeg_bytes(drawn_picture(index, *size)) for index, size in enumerate(sizes)]
    with BetonWriter(path, num_samples=NUM_IMAGES, class_names=CLASSES, **options) as writer:
        for index, jpeg in enumerate(encoded):
            writer.add(jpeg, *sizes[index][::-1], index % 3, f"{CLASSES[index % 3]}/{index}")
    return encoded
