"""Reads the images of our web shards by number, with a BetonReader's interface.

What DALI's own reader does not tell stands here: numbers, sizes, checksums and classes. Opening
reads the indices, which say where in its archive every file lies (`pipelines.webdataset.writer`).
"""

import hashlib
import os
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import simplejpeg

from pipelines.convert.sources.shards import is_ours, our_archives, read_dataset
from pipelines.convert.sources.tars import members
from pipelines.loading.image_files import Sizes
from pipelines.order import epoch_order
from pipelines.webdataset.writer import BLOCK, CHECKSUMS, DATASET

MAX_LABELS = 30_000  # images whose class is read: enough for the kNN probe


class ShardReader:
    """A split of a folder that `bt-convert --format webdataset` wrote.

    Attributes: `path`; `archives`, paths of the tar files; `first`, int64 [shards + 1], the number
    of the first image in each; `places`, int64 [N, 2]: position in the archive and bytes;
    `class_names`; `num_classes`.
    Raises ValueError for a folder that is not ours, has not this split, or is damaged.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.path = os.fspath(folder)
        if not is_ours(folder):
            raise ValueError(
                f"{folder} is a folder without {DATASET}; convert it: bt-convert {folder} out.beton"
            )
        dataset = read_dataset(folder)
        if split not in dataset["splits"]:
            raise ValueError(f"{folder} has no {split} images; convert a source that has them")
        self.archives = our_archives(folder, dataset, split)
        self.class_names: list[str] | None = list(dataset["classes"])
        self.num_classes = len(dataset["classes"])
        counts = [int(shard["num_images"]) for shard in dataset["splits"][split]["shards"]]
        self.first = np.cumsum([0, *counts])
        tables = [_read_index(*pair) for pair in zip(self.archives, counts, strict=True)]
        self.places = np.concatenate([table[:, :2] for table in tables])
        self._classes = np.concatenate([table[:, 2:] for table in tables])  # [N, 2 or 0]
        self._bytes = [np.memmap(path, np.uint8, "r") for path in self.archives]
        self._checksums = self._read_checksums()
        self._sizes = np.zeros((len(self), 2), np.int64)  # 0: not known yet

    def __len__(self) -> int:
        return len(self.places)

    def image(self, index: int) -> np.ndarray:
        """uint8 [bytes], a read-only view into the archive: a JPEG."""
        return self._file(index, *self.places[index].tolist())

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: the classes of MAX_LABELS images from everywhere, -1 for the others.

        Every class is a file of a byte or three, and all of them a read for each image.
        """
        labels = np.full(len(self), -1, np.int64)
        if self._classes.size:
            for index in epoch_order(len(self), seed=0, epoch=0)[:MAX_LABELS].tolist():
                label = bytes(self._file(index, *self._classes[index].tolist()))
                if not label.isdigit() or int(label) >= self.num_classes:
                    raise ValueError(
                        f"{self.name(index)} of {self.path} has the class {label!r}, which is none;"
                        " convert the data again"
                    )
                labels[index] = int(label)
        return labels

    @property
    def sizes(self) -> Sizes:
        """sizes[samples] -> int64 [n, 2]: heights and widths, from the JPEGs' headers."""
        return Sizes(self)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels. Raises ValueError for a header that is damaged."""
        if not self._sizes[index, 0]:
            try:
                self._sizes[index] = simplejpeg.decode_jpeg_header(self.image(index))[:2]
            except ValueError as error:
                raise ValueError(
                    f"image {index} ({self.name(index)}) of {self.path} does not decode ({error});"
                    " convert the data again"
                ) from None
        height, width = self._sizes[index].tolist()
        return height, width

    def is_raw(self, index: int) -> bool:
        """Never: every image is a JPEG."""
        return False

    def name(self, index: int) -> str:
        """The image's file and archive."""
        return f"{index:09}.jpg in {self.archives[self._shard(index)].name}"

    def place(self, index: int) -> tuple[int, int, int | None]:
        """(position in its archive, bytes, CRC-32 or None where the shards have no checksums)."""
        position, size = self.places[index].tolist()
        return position, size, None if self._checksums is None else int(self._checksums[index])

    def checksum_ok(self, index: int) -> bool:
        """Are the image's bytes those that were written? True where there are no checksums."""
        if self._checksums is None:
            return True
        return zlib.crc32(self.image(index).data) == int(self._checksums[index])

    def sha256(self) -> str:
        """Of `dataset.json`, which has the SHA-256 of every shard."""
        return hashlib.sha256((Path(self.path) / DATASET).read_bytes()).hexdigest()

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.first, index, "right")) - 1

    def _file(self, index: int, position: int, size: int) -> np.ndarray:
        return self._bytes[self._shard(index)][position : position + size]

    def _read_checksums(self) -> np.ndarray | None:
        """uint32 [N], from behind the images of each archive; None for shards without."""
        parts = []
        for path, content, end in zip(self.archives, self._bytes, self.first[1:], strict=True):
            position, size = self.places[end - 1].tolist()
            start = position + -(-size // BLOCK) * BLOCK
            for member in members(path, start=start):
                if member.name == CHECKSUMS:
                    at = member.offset_data
                    parts.append(np.frombuffer(content[at : at + member.size].tobytes(), "<u4"))
        found = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        return found if len(found) == len(self) else None


def _read_index(archive: Path, num_images: int) -> np.ndarray:
    """int64 [n, 4 or 2]: position and bytes of each image, and of its class if there are any."""
    try:
        version, count, *tokens = archive.with_suffix(".idx").read_text().split()
        width = len(tokens) // max(num_images, 1)
        table = np.array(tokens).reshape(num_images, width)
        assert (version, int(count)) == ("v1.2", num_images) and width in (4, 8)
        assert (table[:, ::4] == ["jpg", "cls"][: width // 4]).all()
        places = table[:, [column for column in range(width) if column % 4 in (1, 2)]]
        numbers = places.astype(np.int64)
        assert (numbers > 0).all()
        assert (numbers[:, ::2] + numbers[:, 1::2] <= archive.stat().st_size).all()
        return numbers
    except (OSError, ValueError, AssertionError):
        raise ValueError(
            f"{archive.with_suffix('.idx')} is missing or damaged; convert the data again"
        ) from None
