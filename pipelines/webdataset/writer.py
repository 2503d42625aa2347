"""Writes web shards: tar archives that the webdataset library, DALI and plain `tar` read.

    shards/train-000000.tar     000000000.jpg 000000000.cls 000000001.jpg ... .names .crc32
    shards/train-000000.idx     DALI's index, so that its reader need not search for samples
    shards/dataset.json         number of images, classes, shards with their counts and SHA-256

A key is the index of the image in its split; `.cls` is its label as a decimal number, -1 without a
class, and is missing in splits without classes. `.names` contains the source names of the images,
each terminated by NUL, and `.crc32` the CRC-32 of each image, 4 bytes each, little-endian; readers
ignore both, as all names that begin with a dot.

An index is text (source: DALI 2.4.0, `wds2idx`): "v1.2" and the number of samples, then for each
sample its components: extension, offset of the bytes in the archive, their number, file name.

Archives are written in order and contain no times or users: equal images give equal bytes.
"""

import hashlib
import os
import struct
import tarfile
import tempfile
import zlib
from array import array
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.common.atomic import open_for_recovery, read_at

DATASET = "dataset.json"
NAMES = ".names"
CHECKSUMS = ".crc32"
BLOCK = 512  # of a tar archive: a header is one block, contents are padded to full blocks
END = bytes(2 * BLOCK)
PLACE = struct.Struct("<QQQ")  # number of the shard, offset and bytes of an image
MAX_IMAGES = 10_000  # per shard: bounds the memory of its index and names


class ShardWriter:
    """A context manager that writes the shards of one split into `folder`.

    Images are added to a shard until the next would make it larger than `max_bytes`; an image that
    is larger gets a separate shard. Files of a killed writer stay in the folder for `recover`.
    `shards` are the entries of complete shards in `dataset.json`.
    Raises OSError when the disk is full.
    """

    def __init__(self, folder: Path, split: str, *, max_bytes: int, has_classes: bool):
        self.shards: list[dict] = []
        self._folder, self._split = folder, split
        self._max_bytes, self._has_classes = max_bytes, has_classes
        self._num_images = 0

    def __enter__(self) -> "ShardWriter":
        self._places = tempfile.TemporaryFile(dir=self._folder)
        self._begin_shard()
        return self

    def __exit__(self, error_type, error, traceback):
        with suppress(OSError):  # of a full disk; its contents are not needed any more
            self._places.close()
        if error_type is None:
            self.finalize()
        with suppress(OSError):  # the disk is full, so the buffer cannot be flushed
            self._file.close()

    def __len__(self) -> int:
        return self._num_images

    def add(
        self,
        jpeg: bytes,
        height: int,
        width: int,
        label: int,
        name: str,
        checksum: int | None = None,
    ) -> None:
        """Append one image; arguments as of `BetonWriter.add`."""
        assert label < 0 or self._has_classes
        if self._next_position(len(jpeg))[0] != len(self.shards):
            self._finish_shard()
            self._begin_shard()
        self._places.write(PLACE.pack(len(self.shards), self._position + BLOCK, len(jpeg)))
        key = f"{self._num_images:09}"
        entries = [self._write_member(f"{key}.jpg", jpeg)]
        if self._has_classes:
            entries.append(self._write_member(f"{key}.cls", b"%d" % label))
        self._index.append(" ".join(entries) + "\n")
        self._names += os.fsencode(name) + b"\0"
        self._checksums.append(zlib.crc32(jpeg) if checksum is None else checksum)
        self._num_images += 1

    def recover(self, size: int) -> bytes:
        """The bytes where `add` would store the next image, of `size` bytes."""
        shard, position = self._next_position(size)
        if shard == len(self.shards):
            return read_at(self._file, position, size)
        try:
            with open(self._path(shard, "tar"), "rb") as file:
                return read_at(file, position, size)
        except FileNotFoundError:
            return b""

    def stored(self, index: int) -> bytes:
        """The JPEG of image `index`, of those added so far."""
        self._places.flush()
        shard, offset, size = PLACE.unpack(read_at(self._places, index * PLACE.size, PLACE.size))
        if not self._file.closed:
            self._file.flush()
        with open(self._path(shard, "tar"), "rb") as file:
            return read_at(file, offset, size)

    def discard_rest(self) -> None:
        """Remove what a killed writer left after the images added so far."""
        self._file.flush()
        self._file.truncate(self._position)
        later = len(self.shards) + 1
        while self._path(later, "tar").exists():
            self._path(later, "tar").unlink()
            self._path(later, "idx").unlink(missing_ok=True)
            later += 1

    def finalize(self) -> None:
        """Complete the last shard. Called at the end of the block."""
        if self._file.closed:
            return
        if not len(self):
            raise ValueError(f"{self._folder}: no images were added")
        self._finish_shard()

    def sha256(self) -> str:
        """SHA-256 (hex) of the concatenated SHA-256 (hex) of the shards."""
        return hashlib.sha256(
            "".join(shard["sha256"] for shard in self.shards).encode()
        ).hexdigest()

    def _next_position(self, size: int) -> tuple[int, int]:
        """Index of the shard, and position in it, of the next image if it has `size` bytes."""
        sample = _member_size(size) + (_member_size(1) if self._has_classes else 0)
        names = _member_size(len(self._names) + 1000)  # with space for one more
        checksums = _member_size(4 * len(self._index) + 4)
        end = self._position + sample + names + checksums + len(END)
        if self._index and (end > self._max_bytes or len(self._index) == MAX_IMAGES):
            return len(self.shards) + 1, BLOCK
        return len(self.shards), self._position + BLOCK

    def _begin_shard(self) -> None:
        self._file: BinaryIO = open_for_recovery(self._path(len(self.shards), "tar"))
        self._digest = hashlib.sha256()
        self._position = 0
        self._index: list[str] = []  # a line for each image
        self._names, self._checksums = bytearray(), array("I")

    def _finish_shard(self) -> None:
        self._write_member(NAMES, self._names)
        self._write_member(CHECKSUMS, np.asarray(self._checksums, "<u4").tobytes())
        self._write(END)
        self._file.truncate(self._position)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        number = len(self.shards)
        with open(self._path(number, "idx"), "w") as file:
            file.write(f"v1.2 {len(self._index)}\n")
            file.writelines(self._index)
            file.flush()
            os.fsync(file.fileno())
        self.shards.append(
            {
                "name": self._path(number, "tar").name,
                "num_images": len(self._index),
                "num_bytes": self._position,
                "sha256": self._digest.hexdigest(),
            }
        )

    def _write_member(self, name: str, content: bytes | bytearray) -> str:
        """Write a file into the archive; returns its entry in the index."""
        entry = f"{name.rpartition('.')[2]} {self._position + BLOCK} {len(content)} {name}"
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        self._write(content)
        self._write(bytes(-len(content) % BLOCK))
        return entry

    def _write(self, data: bytes | bytearray) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)

    def _path(self, number: int, extension: str) -> Path:
        return self._folder / f"{self._split}-{number:06}.{extension}"


def _member_size(size: int) -> int:
    """Bytes that a file of `size` bytes takes in an archive: header and full blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK
