"""Reads the images of bt-convert's web shards by sample index, with a BetonReader's interface.

It has what DALI's reader lacks: sample indices, sizes, checksums and labels. Opening reads the
`.idx` files, which locate every file in its archive (`pipelines.webdataset.writer`).
"""

import hashlib
import os
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import simplejpeg

from pipelines.convert.sources.files import members
from pipelines.convert.sources.shards import has_dataset, read_dataset, shard_paths
from pipelines.loading.image_files import Sizes
from pipelines.order import epoch_order
from pipelines.webdataset.writer import BLOCK, CHECKSUMS, DATASET

MAX_LABELS = 30_000  # images whose label is read: enough for the kNN probe


class ShardReader:
    """A split of a folder that `bt-convert --format webdataset` wrote.

    Attributes: `path`; `class_names`; `num_classes`.
    Raises ValueError for a folder that is damaged, has no `dataset.json` or not this split.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.path, self._split = os.fspath(folder), split
        if not has_dataset(folder):
            raise ValueError(
                f"{folder} is a folder that bt-convert has not written; convert it: bt-convert"
                f" {folder} out.beton"
            )
        dataset = read_dataset(folder)
        if split not in dataset["splits"]:
            raise ValueError(f"{folder} has no {split} images; convert a source that has them")
        self._archives = shard_paths(folder, dataset, split)
        self.class_names: list[str] | None = list(dataset["classes"])
        self.num_classes = len(dataset["classes"])
        counts = [int(shard["num_images"]) for shard in dataset["splits"][split]["shards"]]
        self._first = np.cumsum([0, *counts])  # index of the first image in each archive
        tables = [_read_index(*pair) for pair in zip(self._archives, counts, strict=True)]
        self._locations = np.concatenate([table[:, :2] for table in tables])  # offset, bytes [N, 2]
        self._label_locations = np.concatenate([table[:, 2:] for table in tables])  # [N, 2 or 0]
        self._bytes = [np.memmap(path, np.uint8, "r") for path in self._archives]
        self._checksums = self._read_checksums()
        self.sizes = Sizes(self._read_size, len(self))

    def __reduce__(self):
        return type(self), (Path(self.path), self._split)

    def __len__(self) -> int:
        return len(self._locations)

    def image(self, index: int) -> np.ndarray:
        """uint8 [bytes], a read-only view of the archive: a JPEG."""
        return self._file(index, *self._locations[index].tolist())

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: the labels of MAX_LABELS random images, one small file each; else -1."""
        labels = np.full(len(self), -1, np.int64)
        if self._label_locations.size:
            for index in epoch_order(len(self), seed=0, epoch=0)[:MAX_LABELS].tolist():
                label = bytes(self._file(index, *self._label_locations[index].tolist()))
                if label == b"-1":
                    continue
                if not label.isdigit() or int(label) >= self.num_classes:
                    raise ValueError(
                        f"{self.name(index)} of {self.path} has the invalid class {label!r};"
                        " convert the data again"
                    )
                labels[index] = int(label)
        return labels

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels. Raises ValueError for a damaged header."""
        height, width = self.sizes[index].tolist()
        return height, width

    def is_raw(self, index: int) -> bool:
        """False: every image is a JPEG."""
        return False

    def name(self, index: int) -> str:
        """File name of the image and its archive."""
        return f"{index:09}.jpg in {self._archives[self._shard(index)].name}"

    def location(self, index: int) -> tuple[int, int, int]:
        """(offset in its archive, bytes, CRC-32)."""
        offset, size = self._locations[index].tolist()
        return offset, size, int(self._checksums[index])

    def checksum_ok(self, index: int) -> bool:
        """Whether the image matches its checksum."""
        return zlib.crc32(self.image(index).data) == int(self._checksums[index])

    def sha256(self) -> str:
        """SHA-256 of `dataset.json`, which contains that of every shard."""
        return hashlib.sha256((Path(self.path) / DATASET).read_bytes()).hexdigest()

    def _read_size(self, index: int) -> tuple[int, int]:
        try:
            return simplejpeg.decode_jpeg_header(self.image(index))[:2]
        except ValueError as error:
            raise ValueError(
                f"image {index} ({self.name(index)}) of {self.path} does not decode ({error});"
                " convert the data again"
            ) from None

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, "right")) - 1

    def _file(self, index: int, offset: int, size: int) -> np.ndarray:
        return self._bytes[self._shard(index)][offset : offset + size]

    def _read_checksums(self) -> np.ndarray:
        """uint32 [N], stored after the images of each archive."""
        tables = []
        for path, content, end in zip(self._archives, self._bytes, self._first[1:], strict=True):
            offset, size = self._locations[end - 1].tolist()
            start = offset + -(-size // BLOCK) * BLOCK
            for member in members(path, start=start):
                if member.name == CHECKSUMS:
                    stored = content[member.offset : member.offset + member.size]
                    tables.append(np.frombuffer(stored.tobytes(), "<u4"))
        checksums = np.concatenate([np.empty(0, np.uint32), *tables])
        if len(checksums) != len(self):
            raise ValueError(f"{self.path}/*.tar: a list of checksums is missing; convert again")
        return checksums


def _read_index(archive: Path, num_images: int) -> np.ndarray:
    """int64 [n, 4 or 2]: offset and bytes of each image, and of its label if there are any."""
    path = archive.with_suffix(".idx")
    try:
        version, count, *tokens = path.read_text().split()
        num_columns = len(tokens) // max(num_images, 1)
        table = np.array(tokens).reshape(num_images, num_columns)
        numeric = [column for column in range(num_columns) if column % 4 in (1, 2)]
        numbers = table[:, numeric].astype(np.int64)
        if (
            (version, int(count)) == ("v1.2", num_images)
            and num_columns in (4, 8)
            and (table[:, ::4] == ["jpg", "cls"][: num_columns // 4]).all()
            and (numbers > 0).all()
            and (numbers[:, ::2] <= archive.stat().st_size - numbers[:, 1::2]).all()  # no overflow
        ):
            return numbers
    except (OSError, ValueError, OverflowError):
        pass
    raise ValueError(f"{path} is missing or damaged; convert the data again")
