"""An image for each reason of a broken image in docs/errors.md."""

import numpy as np
from error_convert_cases import CONVERT, damaged
from error_list import Case, Place
from error_source_cases import shards
from hostile import make_hostile_folder, saved
from PIL import Image


def damaged_shard(place: Place) -> None:
    path = shards(place)
    content = bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(bytes(content))


def broken_images(place: Place) -> None:
    """The folder of tests/hostile.py and further broken images."""
    make_hostile_folder(place.path / "images")
    huge = np.full((4, 4), 1 << 30, np.int32)
    place.write("images/a/32 bit.tiff", saved(Image.fromarray(huge), "TIFF"))
    place.write("images/a/long.png", saved(Image.new("L", (70_000, 2)), "PNG"))
    with open(place.path / "images" / "a" / "large.bmp", "wb") as file:
        file.truncate(1 << 30)


REASONS = [
    *("empty file", "not a regular file", "No such file or directory"),
    *("Too many levels of symbolic links", "not an image", "Premature end of JPEG file"),
    *("Corrupt JPEG data", "truncated PNG", "a damaged PNG", "… x … pixels", "… bytes, more than"),
    *("… pixels long", "a JPEG of more than", "floating-point pixels", "32-bit pixels"),
]
CASES = [
    *(Case(f"Broken: …: {r}", CONVERT + " --max-side 0", broken_images, 1) for r in REASONS),
    Case("Broken: …; and premature end", CONVERT, broken_images, 1),
    Case("Broken: …: its bytes are not", "bt-convert x.beton out.beton", damaged, 1),
    Case("Damaged: …: image", "bt-convert --verify x.beton", damaged, 1),
    Case("Damaged: …: its SHA-256", "bt-convert --verify shards", damaged_shard, 1),
]
