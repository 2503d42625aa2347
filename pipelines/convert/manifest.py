"""The manifest: the images of a split, recorded in a file so that memory does not grow with them.

A source (`pipelines.convert.sources`) describes a `Split` and yields its images once; a `Manifest`
records them and yields them in the same order, all or a selection, any number of times.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipelines.beton.layout import MAX_CLASSES

ENTIRE_FILE = -1  # size of a location that is a complete file
# Label, archive or -1, offset, size, CRC-32 or -1, lengths of prefix and name.
_RECORD = struct.Struct("<iiqqqHI")


class SourceError(ValueError):
    """The source cannot be converted as it is; the message states the way out."""


class Location(NamedTuple):
    """The bytes of an image file: all of the file `path`, or `size` bytes of it from `offset`."""

    path: str
    offset: int = 0
    size: int = ENTIRE_FILE
    checksum: int | None = None  # expected CRC-32 of the bytes, if known
    prefix: bytes = b""  # prepended to the bytes: the header that raw pixels lack


class SourceImage(NamedTuple):
    """One image of a source: name, label (-1: no class), and its bytes or their location."""

    name: str
    label: int
    data: Location | bytes


@dataclass(kw_only=True, slots=True)
class Split:
    """The source of one output. `images` is iterated once, and fills `ignored` and `problems`."""

    root: Path  # names of images are relative to it
    class_names: list[str]
    images: Iterable[SourceImage]
    # Replaces locations by bytes where only the source can read them.
    load: Callable[[Iterator[SourceImage]], Iterator[SourceImage]] = iter
    max_side: int = 512  # default of --max-side; 0 where images have been converted already
    ignored: Counter[str] = field(default_factory=Counter)  # reason -> number of entries
    problems: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of unread ones


class Manifest:
    """The images of a split, recorded in an unnamed temporary file in the folder `scratch`.

    Attributes: `samples_per_class`, a Counter over the complete split (-1: no class); `sha256`,
    hex, of all entries and the class names, independent of the source's path.

    Supports one iteration at a time. Raises SourceError for a split without images, and for a label
    outside the classes.
    """

    def __init__(self, split: Split, scratch: Path | None = None):
        self._root = split.root
        self._archives: list[str] = []  # files that contain many images
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  open as long as self
        self.samples_per_class: Counter[int] = Counter()
        digest = hashlib.sha256()
        for image in split.images:
            _check_label(image.name, image.label, len(split.class_names))
            record = self._pack(image)
            digest.update(record)
            self._file.write(record)
            self.samples_per_class[image.label] += 1
        if not self.samples_per_class:
            reason = f" ({split.problems[0][1]})" if split.problems else ""
            raise SourceError(f"{split.root} has no images that can be read{reason}")
        digest.update(json.dumps(split.class_names).encode())
        self.sha256 = digest.hexdigest()
        # Selection: `_range` of `_per_class` images of every class and one more of `_num_extra`.
        self._per_class, self._num_extra = max(self.samples_per_class.values()), 0
        self._range = range(self.samples_per_class.total())

    def __len__(self) -> int:
        return len(self._range)

    def select_subset(self, count: int) -> None:
        """Keep `count` images, the first ones of every class, evenly over the classes."""
        if count >= self.samples_per_class.total():
            return
        self._range, self._per_class, self._num_extra = range(count), 0, count
        sizes = self.samples_per_class.values()
        # Take one image of every class that has any left, as long as `count` permits.
        while (num_left := sum(size > self._per_class for size in sizes)) <= self._num_extra:
            self._per_class += 1
            self._num_extra -= num_left

    def select_part(self, number: int, num_parts: int) -> None:
        """Keep part `number` (from 1) of consecutive parts whose sizes differ by at most one."""
        count = len(self._range)
        self._range = self._range[count * (number - 1) // num_parts : count * number // num_parts]

    def __iter__(self) -> Iterator[SourceImage]:
        return islice(self._subset(), self._range.start, self._range.stop)

    def _subset(self) -> Iterator[SourceImage]:
        num_seen: Counter[int] = Counter()
        num_extra = self._num_extra
        for image in self._entries():
            index = num_seen[image.label]
            num_seen[image.label] += 1
            if index < self._per_class:
                yield image
            elif index == self._per_class and num_extra:
                num_extra -= 1
                yield image

    def _entries(self) -> Iterator[SourceImage]:
        self._file.seek(0)
        while record := self._file.read(_RECORD.size):
            label, archive, offset, size, crc, prefix_size, name_size = _RECORD.unpack(record)
            prefix = self._file.read(prefix_size)
            name = os.fsdecode(self._file.read(name_size))
            if archive < 0:
                location = Location(os.path.join(self._root, name))
            else:
                checksum = None if crc < 0 else crc
                location = Location(self._archives[archive], offset, size, checksum, prefix)
            yield SourceImage(name, label, location)

    def _pack(self, image: SourceImage) -> bytes:
        location, name = image.data, os.fsencode(image.name)
        assert isinstance(location, Location)
        path, offset, size, checksum, prefix = location
        archive = -1 if size == ENTIRE_FILE else self._archive_index(path)
        crc = -1 if checksum is None else checksum
        numbers = image.label, archive, offset, size, crc, len(prefix), len(name)
        return _RECORD.pack(*numbers) + prefix + name

    def _archive_index(self, path: str) -> int:
        """Index of an archive in `_archives`. The images of one archive follow each other."""
        if not self._archives or self._archives[-1] != path:
            self._archives.append(path)
        return len(self._archives) - 1


def numbered_names(count: int) -> list[str]:
    """Class names "0", "1", ... of a source without names. Raises SourceError for too many."""
    if count > MAX_CLASSES:
        raise SourceError(f"label {count - 1} is out of range: at most {MAX_CLASSES} classes")
    return [str(number) for number in range(count)]


def _check_label(name: str, label: int, num_classes: int) -> None:
    if num_classes and label < 0:
        raise SourceError(f"{name} has no class, unlike other images of its source")
    if label >= num_classes:
        raise SourceError(f"{name}: label {label} is out of range: {num_classes} classes")
