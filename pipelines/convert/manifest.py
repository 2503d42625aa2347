"""The manifest: the images of a split, recorded in a file so that memory does not grow with them.

A source (`pipelines.convert.sources`) describes a `Split` and yields its images once; a `Manifest`
records them and yields them in the same order, all or a selection, any number of times.
"""

import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipelines.beton.layout import MAX_CLASSES

ENTIRE_FILE = -1  # size of a location that is a complete file


class SourceError(ValueError):
    """The source cannot be converted as it is; the message states the way out."""


class Location(NamedTuple):
    """The bytes of an image file: all of the file `path`, or `size` bytes of it from `offset`."""

    path: str
    offset: int = 0
    size: int = ENTIRE_FILE
    checksum: int | None = None  # expected CRC-32 of the bytes, if known
    prefix: bytes = b""  # prepended to the bytes: the header that raw pixels lack
    problem: str = ""  # why there are no bytes


Label = int | str | None  # number or name of a class; None or -1: no class
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)


class FoundImage(NamedTuple):
    """One image as a source lists it."""

    name: str
    label: Label
    location: Location


class SourceImage(NamedTuple):
    """One image of a manifest: name, index of its class (-1: none), its bytes or their location."""

    name: str
    label: int
    data: Location | bytes


@dataclass(kw_only=True, slots=True)
class Split:
    """The source of one output. `images` is iterated once, and fills all below `max_side`."""

    root: Path  # names of images are relative to it
    images: Iterable[FoundImage] = ()
    # Names of the classes in the order of their numbers; None: those of the labels that are found.
    class_names: list[str] | None = None
    # Replaces locations by bytes where only the source can read them.
    load: Callable[[Iterator[SourceImage]], Iterator[SourceImage]] = iter
    max_side: int = 512  # default of --max-side; 0 where images have been converted already
    ignored: Counter[str] = field(default_factory=Counter)  # reason -> number of entries
    problems: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of unread ones
    unused: dict[str, None] = field(default_factory=dict)  # possible labels, and how to use them
    warnings: dict[str, None] = field(default_factory=dict)  # what may not be meant, one line each
    other_labels: set[Label] = field(default_factory=set)  # of images left out, whose classes stay


class Manifest:
    """The images of a split, recorded as lines in an unnamed temporary file in `scratch`.

    Attributes: `class_names`; of the complete split `num_listed`, its images, `samples_per_class`,
    a Counter (-1: no class), and `sha256`, hex, of all entries, independent of the source's path.

    class_names: those of the training images, to which the labels of other images refer: by name
    if they have names; numbered ones are extended. Otherwise the split's own classes, or those of
    the labels that are found: numbers are kept, names are numbered in sorted order.

    Supports one iteration at a time. Raises SourceError for a split without images, and for labels
    that are not among the classes, or partly numbers and partly names.
    """

    def __init__(
        self, split: Split, scratch: Path | None = None, class_names: list[str] | None = None
    ):
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  open as long as self
        found: dict[Label, int] = {None: -1}  # label -> its number in the file, by appearance
        counts: Counter[int] = Counter()
        digest = hashlib.sha256()
        for image in split.images:
            number = found.setdefault(_or_none(image.label), len(found) - 1)
            path, *place, prefix, _ = image.location
            record = [image.name, number, *place, prefix.decode("latin-1")]
            digest.update(json.dumps(record).encode())
            self._file.write(json.dumps([*record, path]).encode() + b"\n")
            counts[number] += 1
        for label in split.other_labels:
            found.setdefault(_or_none(label), len(found) - 1)
        if not counts:
            reason = f" ({split.problems[0][1]})" if split.problems else ""
            raise SourceError(f"{split.root} has no images that can be read{reason}")
        class_names = split.class_names if class_names is None else class_names
        self.class_names = _class_names(split, found) if class_names is None else class_names
        if split.class_names is None and self.class_names and _are_numbers(self.class_names):
            # Higher numbers, which only the validation images have, are classes of both splits.
            highest = max((label for label in found if isinstance(label, int)), default=-1)
            self.class_names += numbered_names(highest + 1)[len(self.class_names) :]
        label_of = _label_indices(split, found, self.class_names)
        self._labels = {number: label_of[label] for label, number in found.items()}
        self.samples_per_class: Counter[int] = Counter()
        for number, count in counts.items():
            self.samples_per_class[self._labels[number]] += count
        digest.update(json.dumps([self.class_names, list(self._labels.values())]).encode())
        self.sha256 = digest.hexdigest()
        # Selection: `_range` of `_per_class` images of every class and one more of `_num_extra`.
        self._per_class, self._num_extra = max(self.samples_per_class.values()), 0
        self.num_listed = self.samples_per_class.total()
        self._range = range(self.num_listed)

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

    def pick(self, positions: Collection[int]) -> dict[int, SourceImage]:
        """The images at these positions of the iteration."""
        wanted, first = set(positions), self._range.start
        if self._per_class < max(self.samples_per_class.values()):  # a subset
            return {position: image for position, image in enumerate(self) if position in wanted}
        self._file.seek(0)
        return {
            number - first: self._parse(line)
            for number, line in enumerate(self._file)
            if number - first in wanted
        }

    def _subset(self) -> Iterator[SourceImage]:
        num_seen: Counter[int] = Counter()
        num_extra = self._num_extra
        self._file.seek(0)
        for image in map(self._parse, self._file):
            index = num_seen[image.label]
            num_seen[image.label] += 1
            if index < self._per_class:
                yield image
            elif index == self._per_class and num_extra:
                num_extra -= 1
                yield image

    def _parse(self, line: bytes) -> SourceImage:
        name, number, offset, size, checksum, prefix, path = json.loads(line)
        location = Location(path, offset, size, checksum, prefix.encode("latin-1"))
        return SourceImage(name, self._labels[number], location)


def numbered_names(count: int) -> list[str]:
    """Class names "0", "1", ... of a source without names. Raises SourceError for too many."""
    if count > MAX_CLASSES:
        raise SourceError(f"label {count - 1} is out of range: at most {MAX_CLASSES} classes")
    return [str(number) for number in range(count)]


def parse_label(value: object) -> Label:
    """The label that a cell, a file or a word of text means: a number if it can be one.

    Raises ValueError for a value that is no class, such as 0.5 or a list of several.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        value = value.strip()
        if not all(map(_NUMBER.fullmatch, re.split(r"[\s,;]+", value))):
            return value or None  # a name, such as 707-320
        if _INTEGER.fullmatch(value):
            value = int(value.partition(".")[0])
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value >= -1:
        return int(value)
    raise ValueError(f"{str(value)[:40]} is not the number or name of one class (-1: none)")


def _or_none(label: Label) -> Label:
    return None if isinstance(label, int) and label < 0 else label


def _class_names(split: Split, labels: Iterable[Label]) -> list[str]:
    """The classes of labels: "0" to the highest number, or the sorted names."""
    numbers = [label for label in labels if isinstance(label, int)]
    names = sorted(label for label in labels if isinstance(label, str))
    if numbers and names:
        raise SourceError(
            f"{split.root} has labels that are numbers, such as {numbers[0]}, and others, such as"
            f" {names[0]}: use one kind (-1: no class)"
        )
    return numbered_names(max(numbers, default=-1) + 1) if numbers else names


def _are_numbers(class_names: list[str]) -> bool:
    return class_names == [str(number) for number in range(len(class_names))]


def _label_indices(
    split: Split, labels: Iterable[Label], class_names: list[str]
) -> dict[Label, int]:
    """{label: index of its class, -1 for None}. Raises SourceError for an unknown class.

    A number is that of a class only in a source that numbers its classes itself.
    """
    indices: dict[Label, int] = {name: index for index, name in enumerate(class_names)} | {None: -1}
    if split.class_names is not None or _are_numbers(class_names):
        indices |= {index: index for index in range(len(class_names))}
    unknown = sorted(str(label) for label in labels if label not in indices)
    if unknown:
        raise SourceError(
            f"{split.root} has classes that are not among the {len(class_names)} of the training"
            f" images: {', '.join(unknown[:5])} ({len(unknown)} in all); add them there, or convert"
            " the two sets one by one"
        )
    return indices
