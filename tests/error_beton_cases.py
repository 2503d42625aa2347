"""An invalid `.beton` for each message about them in docs/errors.md."""

import os
import struct
from collections.abc import Callable

import numpy as np
from error_list import Case, Place
from sample_beton import NUM_IMAGES, PAGE_SIZE, write_sample
from test_beton_damage import HUGE, IMAGE_TYPE, METADATA, regions

from pipelines.beton import BetonReader
from pipelines.beton.layout import EXTRAS, HEADER
from tools.fuzz_targets import forged

READ = "pretrain --recipe demo --device cpu --batch-size 8 --workers 1 --run-dir new --data x.beton"
ARGUMENTS = HEADER.itemsize + 17  # of the image field: the extras


def changed(offset: int, layout: str, value: int, *, keep_checksum: bool = False):
    """Change one number; negative offsets are relative to the allocation table (see `table`)."""

    def prepare(place: Place) -> None:
        write_sample(place.path / "x.beton", page_size=PAGE_SIZE)
        tables = regions(place.path / "x.beton")[-1][0]
        content = bytearray((place.path / "x.beton").read_bytes())
        if not keep_checksum:
            content[ARGUMENTS : ARGUMENTS + 1024] = bytes(1024)
        struct.pack_into(layout, content, offset if offset >= 0 else tables - 1 - offset, value)
        place.write("x.beton", bytes(content))

    return prepare


def table(offset: int) -> int:
    """An offset in the allocation table, for `changed`."""
    return -1 - offset


def edited(edit: Callable[[bytearray, BetonReader], object]):
    """Change all bytes of a file with `edit`."""

    def prepare(place: Place) -> None:
        write_sample(place.path / "x.beton", page_size=PAGE_SIZE)
        content = bytearray((place.path / "x.beton").read_bytes())
        edit(content, BetonReader(place.path / "x.beton"))
        place.write("x.beton", bytes(content))

    return prepare


def no_sizes(content: bytearray, reader: BetonReader) -> None:
    content[ARGUMENTS : ARGUMENTS + 1024] = bytes(1024)
    start = np.frombuffer(content, HEADER, 1).item()[4]
    for index in range(NUM_IMAGES):
        struct.pack_into("<Q", content, start + 24 * index + 16, 0)


def without_last_nul(field: str):
    """Overwrite the last NUL of a list and recompute the checksums."""

    def edit(content: bytearray, reader: BetonReader) -> None:
        extras = np.frombuffer(content, EXTRAS, 1, ARGUMENTS)
        end = int(extras["ptr"][0]) + 4 * NUM_IMAGES + int(extras["names_size"][0])
        end += int(extras["class_names_size"][0]) if field == "classes" else 0
        content[end - 1] = ord("x")
        content[:] = forged(bytes(content))

    return edit


def without_end(place: Place) -> None:
    write_sample(place.path / "x.beton", page_size=PAGE_SIZE)
    os.truncate(place.path / "x.beton", (place.path / "x.beton").stat().st_size - 1)


def unmappable(place: Place) -> None:
    def fail(*_, **__):
        raise OSError(19, "No such device")

    place.beton("x.beton")
    place.patch("pipelines.beton.mmap.mmap", fail)


EXTRAS_PTR = ARGUMENTS + EXTRAS.fields["ptr"][1]
CASES = [
    Case("…: no such file", "bt-convert --verify x.beton"),
    Case("…: not a regular file", READ, lambda place: os.mkfifo("x.beton")),
    Case("…: too short", READ, lambda place: place.write("x.beton", b"")),
    Case(
        "… cannot be opened",
        "bt-convert --verify x.beton",
        lambda place: os.symlink("x.beton", "x.beton"),
    ),
    Case("…: cannot be mapped", READ, unmappable),
    Case("…: not a .beton file", READ, lambda place: place.write("x.beton", b"text " * 99)),
    Case("…: its conversion did not finish", READ, changed(16, "<Q", 0)),
    Case("…: it contains no images", READ, changed(8, "<Q", 0)),
    Case("…: it has no RGB image field", READ, changed(IMAGE_TYPE, "<B", 1)),
    Case("…: unknown field types", READ, changed(IMAGE_TYPE, "<B", 255)),
    Case("…: its image field has arguments", READ, changed(ARGUMENTS, "<Q", 1)),
    Case("…: impossible page size", READ, changed(4, "<I", 0)),
    Case("…: truncated: at least", READ, changed(8, "<Q", 1 << 40)),
    Case("…: truncated, or its allocation table", READ, without_end),
    Case(
        "…: … allocations for … images",
        READ,
        edited(lambda content, reader: struct.pack_into("<Q", content, 16, len(content))),
    ),
    Case("…: it contains no image data", READ, edited(lambda c, reader: no_sizes(c, reader))),
    Case("…: an image's bytes are not in", READ, changed(METADATA + 5, "<Q", HUGE)),
    Case("…: an image points to", READ, changed(table(0), "<Q", 1)),
    Case("…: an image has an impossible size", READ, changed(METADATA + 1, "<H", 0)),
    Case("…: an image is neither", READ, changed(METADATA, "<B", 2)),
    Case("…: a raw image's length", READ, changed(METADATA, "<B", 1)),
    Case("…: an allocation lies outside", READ, changed(table(8), "<Q", HUGE)),
    Case("…: an allocation ends outside", READ, changed(table(16), "<Q", HUGE)),
    Case("…: an allocation crosses", READ, changed(table(16), "<Q", PAGE_SIZE + 1)),
    Case("…: two allocations overlap", READ, changed(table(16), "<Q", 1 << 20)),
    Case("…: its extras are not", READ, changed(EXTRAS_PTR, "<Q", 0, keep_checksum=True)),
    Case("…: its tables are damaged", READ, changed(METADATA + 16, "<q", 1, keep_checksum=True)),
    Case("…: its list of names", READ, edited(without_last_nul("names"))),
    Case("…: its list of classes", READ, edited(without_last_nul("classes"))),
    Case("…: label … is out of range: at most", READ, changed(METADATA + 16, "<q", 1 << 40)),
]
