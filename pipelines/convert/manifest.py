"""Which images there are: noted once, in a file, so that memory does not grow with their number.

A source (`pipelines.convert.sources`) describes a `Split` and yields its images; a `Listing` writes
them down and gives them again in the same order, all or a selection, as often as asked.
"""

import hashlib
import json
import os
import struct
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipelines.beton.layout import MAX_CLASSES

WHOLE = -1  # the size of a place that is a file of its own
UNKNOWN = -1  # the CRC-32 of bytes that nobody has summed up
_RECORD = struct.Struct("<iiqqqHI")  # label, container, start, size, crc, head and name lengths


class SourceError(ValueError):
    """The source cannot be converted as it is; the message says what to do."""


class Place(NamedTuple):
    """Where the bytes of an image file are: all of `path`, or `size` bytes of it from `start`."""

    path: str
    start: int = 0
    size: int = WHOLE
    crc: int = UNKNOWN  # CRC-32 that the bytes must have
    head: bytes = b""  # to be put before them: a header that makes an image file of raw pixels


class Image(NamedTuple):
    """One image of a source: its name there, its class (-1: none), and its bytes or their place."""

    name: str
    label: int
    data: Place | bytes


@dataclass(kw_only=True, slots=True)
class Split:
    """What becomes one file. `images` can be gone through once, and fills the notes meanwhile."""

    root: Path  # what the images' names are relative to
    class_names: list[str]
    images: Iterable[Image]
    load: Callable[[Iterator[Image]], Iterator[Image]] = iter  # put bytes for places only it knows
    max_side: int = 512  # default of --max-side; 0 where images were shrunk already
    ignored: Counter[str] = field(default_factory=Counter)  # reason -> number of entries
    problems: list[tuple[str, str]] = field(default_factory=list)  # (name, why it was not read)


class Listing:
    """The images of a split, listed to a file without a name in `scratch` (a folder).

    Attributes: `samples_per_class`, a Counter over the whole split (-1: no class); `sha256`, hex,
    which names the whole list and the classes, wherever the source lies.

    Iterate over one at a time. Raises SourceError for a split without images, or where a label
    is not that of a class.
    """

    def __init__(self, split: Split, scratch: Path | None = None):
        self._root = split.root
        self._containers: list[str] = []  # files that hold many images, such as archives
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  it lives as long as we
        self.samples_per_class: Counter[int] = Counter()
        digest = hashlib.sha256()
        for image in split.images:
            _check_label(image, split.class_names)
            record = self._pack(image)
            digest.update(record)
            self._file.write(record)
            self.samples_per_class[image.label] += 1
        if not self.samples_per_class:
            reason = f" ({split.problems[0][1]})" if split.problems else ""
            raise SourceError(f"{split.root} has no images that can be read{reason}")
        digest.update(json.dumps(split.class_names).encode())
        self.sha256 = digest.hexdigest()
        self._turns, self._extra = max(self.samples_per_class.values()), 0
        self._range = range(self.samples_per_class.total())

    def __len__(self) -> int:
        return len(self._range)

    def keep(self, count: int) -> None:
        """Keep `count` images, the first ones of every class, evenly over the classes."""
        sizes = self.samples_per_class.values()
        if count < sum(sizes):
            # Whole turns, each taking an image of every class that has one left; then some more.
            taken = lambda turns: sum(min(size, turns) for size in sizes)  # noqa: E731
            self._turns = bisect_right(range(count + 1), count, key=taken) - 1
            self._extra = count - taken(self._turns)
            self._range = range(count)

    def take_part(self, number: int, of: int) -> None:
        """Keep part `number` (from 1) of `of` consecutive parts, equal to within one image."""
        count = len(self._range)
        self._range = self._range[count * (number - 1) // of : count * number // of]

    def __iter__(self) -> Iterator[Image]:
        return islice(self._chosen(), self._range.start, self._range.stop)

    def _chosen(self) -> Iterator[Image]:
        seen: Counter[int] = Counter()
        extra = self._extra
        for image in self._all():
            turn = seen[image.label]
            seen[image.label] += 1
            if turn < self._turns:
                yield image
            elif turn == self._turns and extra:
                extra -= 1
                yield image

    def _all(self) -> Iterator[Image]:
        self._file.seek(0)
        while header := self._file.read(_RECORD.size):
            label, container, start, size, crc, head_size, name_size = _RECORD.unpack(header)
            head = self._file.read(head_size)
            name = os.fsdecode(self._file.read(name_size))
            if container < 0:
                place = Place(os.path.join(self._root, name))
            else:
                place = Place(self._containers[container], start, size, crc, head)
            yield Image(name, label, place)

    def _pack(self, image: Image) -> bytes:
        place, name = image.data, os.fsencode(image.name)
        assert isinstance(place, Place)
        container = -1 if place.size == WHOLE else self._container(place.path)
        lengths = len(place.head), len(name)
        numbers = image.label, container, place.start, place.size, place.crc
        return _RECORD.pack(*numbers, *lengths) + place.head + name

    def _container(self, path: str) -> int:
        """Its number; images of one container come in a row."""
        if not self._containers or self._containers[-1] != path:
            self._containers.append(path)
        return len(self._containers) - 1


def number_names(count: int) -> list[str]:
    """Names of classes that a source only numbers. Raises SourceError for absurdly many."""
    if count > MAX_CLASSES:
        raise SourceError(f"label {count - 1} is no class: there may be {MAX_CLASSES} at most")
    return [str(number) for number in range(count)]


def _check_label(image: Image, class_names: list[str]) -> None:
    if class_names and image.label < 0:
        raise SourceError(f"{image.name} has no class, unlike others of its source")
    if image.label >= len(class_names):
        raise SourceError(f"{image.name}: label {image.label} with {len(class_names)} classes")
