"""Held-out images that are training images: found without decoding, and said in a warning.

Images are compared by CRC-32 and length, the first hundred shared ones also byte by byte. Sets
without bt-convert's checksums, image files and files of FFCV, are read if they have at most a
gigabyte. Larger ones are only compared with themselves: image files by file, under any path. 1.28
million images take seconds and less than 100 MB.
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
        if isinstance(train, ImageFiles) and isinstance(val, ImageFiles):
            return np.flatnonzero(np.isin(_files(val), _files(train)))
        same = os.path.realpath(train.path) == os.path.realpath(val.path)
        return np.arange(len(val) if same else 0)
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
        if sum(_status(path)[1] for path in paths) <= _MAX_BYTES:
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


def _files(images: ImageFiles) -> np.ndarray:
    """Device and inode of every file in uint64 [n]."""
    paths = (os.path.join(images.path, images.name(index)) for index in range(len(images)))
    return np.fromiter((_status(path)[0] for path in paths), np.uint64, len(images))


def _status(path: str) -> tuple[int, int]:
    """(device and inode in 64 bits, bytes) of a file; (hash of its path, 0) of a missing one."""
    try:
        status = os.stat(path)
    except OSError:
        return hash(path) % 2**64, 0
    return (status.st_ino ^ status.st_dev << 48) % 2**64, status.st_size
