"""Held-out images that are training images: found without decoding, and said in a warning.

Images are compared by CRC-32 and length, the first hundred shared ones also byte by byte. Sets
without bt-convert's checksums, image files and files of FFCV, are read if they have at most a
gigabyte. Larger ones are only compared by name with sets of the same folder or file. 1.28 million
images take seconds and less than 100 MB.
"""

import os
import zlib
from typing import Any

import numpy as np

from pipelines.common.console import print_line
from pipelines.convert.jpeg import UnreadableImage, read_image
from pipelines.loading.datasets import ImageDataset
from pipelines.loading.image_files import ImageFiles

_MAX_BYTES = 1e9  # of a set that is read
_NUM_COMPARED = 100
_NUM_NAMED = 3


def warn_of_overlap(train: ImageDataset, val: ImageDataset) -> None:
    """Print a warning if held-out images are training images."""
    found = shared_images(train, val)
    if len(found):
        names = ", ".join(val.name(index) for index in found[:_NUM_NAMED].tolist())
        print_line(
            f"warning: {len(found)} of the {len(val)} held-out images of {val.path} are training"
            f" images of {train.path} ({names}{', ...' * (len(found) > _NUM_NAMED)}): the scores"
            " are not those of unseen images; choose others with --val-data"
        )


def shared_images(train: ImageDataset, val: ImageDataset) -> np.ndarray:
    """Indices of the held-out images that are also training images: int64 [n], sorted."""
    train_keys, val_keys = _contents(train), _contents(val)
    if train_keys is None or val_keys is None:
        if os.path.realpath(train.path) != os.path.realpath(val.path):
            return np.arange(0)
        names = {train.name(index) for index in range(len(train))}
        return np.flatnonzero([val.name(index) in names for index in range(len(val))])
    found = np.flatnonzero(np.isin(val_keys, train_keys))
    differing = [
        index
        for index in found[:_NUM_COMPARED].tolist()
        if not any(
            np.array_equal(val.image(index), train.image(other))
            for other in np.flatnonzero(train_keys == val_keys[index])[:_NUM_COMPARED].tolist()
        )
    ]
    return np.setdiff1d(found, differing)


def _contents(images: Any) -> np.ndarray | None:
    """CRC-32 and length of every image: uint64 [n]; None for too many without checksums."""
    indices, keys = range(len(images)), None
    if isinstance(images, ImageFiles):
        paths = [os.path.join(images.path, images.name(index)) for index in indices]
        if sum(os.path.getsize(path) for path in paths if os.path.exists(path)) <= _MAX_BYTES:
            keys = (_content(_read(path)) for path in paths)
    else:
        locations = map(images.location, indices)
        if images.location(0)[2] is not None:
            keys = (size | crc << 32 for _, size, crc in locations)
        elif sum(size for _, size, _ in locations) <= _MAX_BYTES:
            keys = (_content(images.image(index)) for index in indices)
    return None if keys is None else np.fromiter(keys, np.uint64, len(images))


def _content(data: Any) -> int:
    return len(data) | zlib.crc32(data) << 32


def _read(path: str) -> bytes:
    """Content of an image file; of an unreadable one, which the evaluation will name, its path."""
    try:
        return read_image(path)
    except UnreadableImage:
        return os.fsencode(path)
