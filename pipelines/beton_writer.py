"""Writes a `.beton` (layout: `pipelines/beton.py`) in one pass, atomically and deterministically.

Records lie in call order, so the same calls give the same bytes. The memory used is that of the
tables, about 60 B an image, whatever the images weigh.
"""

import os
import zlib
from array import array
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from pipelines.atomic import atomic_file
from pipelines.beton import (
    ALLOCATION,
    EXTRAS,
    FIELD,
    HEADER,
    INT,
    JPEG,
    MAGIC,
    PAGE_SIZES,
    RGB_IMAGE,
    VERSION,
    content_sha256,
    metadata_dtype,
    tables_crc,
)

TYPE_IDS = [RGB_IMAGE, INT]  # fields "image" and "label"
IMAGE_FIELD = 0


class BetonWriter:
    """A context manager that writes `path`; it appears when the block ends without an exception.

        with BetonWriter("out.beton", num_samples=2, class_names=["cat", "dog"]) as writer:
            writer.add(jpeg, height, width, label=0, name="cat/1.jpg")

    `num_samples` reserves the place of the metadata, which lies before the data. Fewer may come:
    the header counts those that did, and the rest of the place stays empty, as FFCV finds images
    by absolute offsets. `class_names` may be empty; then labels are -1.

    `page_size` (bytes) is the smallest unit FFCV's own cache reads. It doubles by itself when an
    image is larger: what lies within one aligned page also lies within the page of twice the size.

    Raises FileExistsError unless `overwrite`; OSError when the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        num_samples: int,
        class_names: Sequence[str] = (),
        page_size: int = 8 << 20,
        overwrite: bool = False,
    ):
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={page_size}: must be a power of two, 2 MiB to 2 GiB")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: a .beton holds at least one image")
        self.path = os.fspath(path)
        self.page_size = page_size
        self._overwrite = overwrite
        self._num_classes = len(class_names)
        self._class_names = b"".join(map(_terminated, class_names))
        self._names = bytearray()
        self._checksums = array("I")
        self._sizes = array("Q")
        self._metadata = np.zeros(num_samples, metadata_dtype(TYPE_IDS))
        self._metadata_start = HEADER.itemsize + len(TYPE_IDS) * FIELD.itemsize
        self._position = _round_up(self._metadata_start + self._metadata.nbytes, page_size)
        self._finalized = False

    def __enter__(self) -> "BetonWriter":
        self._exit = ExitStack()
        self._file = self._exit.enter_context(atomic_file(self.path, overwrite=self._overwrite))
        self._file.seek(self._position)
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            return self._exit.__exit__(kind, error, traceback)
        with self._exit:  # renames the file; removes it if finalize() fails
            self.finalize()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(
        self,
        jpeg: bytes,
        height: int,
        width: int,
        label: int,
        name: str,
        checksum: int | None = None,
    ) -> None:
        """Append one image: a JPEG file of `height` x `width` pixels, its class and its source.

        `checksum` is its CRC-32, where a worker process has computed it already.
        """
        index, size = len(self), len(jpeg)
        if index == len(self._metadata):
            raise ValueError(f"{self.path}: more than the {index} announced images")
        if not -1 <= label < max(self._num_classes, 1) or (label >= 0) != (self._num_classes > 0):
            raise ValueError(f"{name}: label {label} with {self._num_classes} classes")
        while size > self.page_size:
            self.page_size *= 2
        if size == 0 or self.page_size not in PAGE_SIZES:
            raise ValueError(f"{name}: {size} bytes cannot be stored")
        if self._position % self.page_size + size > self.page_size:  # would cross a page boundary
            self._position = _round_up(self._position, self.page_size)
            self._file.seek(self._position)
        terminated = _terminated(name)
        self._file.write(jpeg)
        self._metadata[index] = (JPEG, width, height, self._position), label
        self._sizes.append(size)
        self._checksums.append(zlib.crc32(jpeg) if checksum is None else checksum)
        self._names += terminated
        self._position += size

    def finalize(self) -> None:
        """Write all that is not image data. Called by the end of the block.

        Calling it earlier lets several files fail or appear together: the renames that then remain
        need no space and no computation.
        """
        if self._finalized:
            return
        if not len(self):
            raise ValueError(f"{self.path}: no images were added")
        self._metadata = self._metadata[: len(self)]
        extras = np.frombuffer(
            self._checksum_table().tobytes() + self._names + self._class_names, np.uint8
        )
        # Whole pages before the extras: FFCV's page cache reads the last one whole.
        extras_ptr = _round_up(self._position, self.page_size)
        alloc_table_ptr = _round_up(extras_ptr + len(extras), 8)
        allocations = np.empty(len(self), ALLOCATION)
        allocations["sample_id"] = np.arange(len(self))
        allocations["ptr"] = self._metadata["f0"]["data_ptr"]
        allocations["size"] = self._sizes

        header = np.array(
            [(VERSION, len(TYPE_IDS), self.page_size, len(self), alloc_table_ptr)], HEADER
        )
        locator = np.zeros(1, EXTRAS)
        locator["magic"] = np.void(MAGIC)
        locator["num_classes"] = self._num_classes
        locator["ptr"] = extras_ptr
        locator["names_size"] = len(self._names)
        locator["class_names_size"] = len(self._class_names)
        fields = _fields(locator)
        locator["crc"] = tables_crc(
            header, fields, IMAGE_FIELD, self._metadata, extras, allocations
        )
        fields = _fields(locator)

        for position, table in (
            (alloc_table_ptr, allocations),
            (extras_ptr, extras),
            (HEADER.itemsize, fields),
            (self._metadata_start, self._metadata),
            (0, header),
        ):
            self._file.seek(position)
            self._file.write(table.view(np.uint8).data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._finalized = True

    def sha256(self) -> str:
        """`content_sha256` of what was added; the reader gives the same."""
        return content_sha256(self._metadata[: len(self)], self._checksum_table())

    def _checksum_table(self) -> np.ndarray:
        return np.array(self._checksums, "<u4")


def _fields(locator: np.ndarray) -> np.ndarray:
    fields = np.zeros(len(TYPE_IDS), FIELD)
    fields["type_id"] = TYPE_IDS
    fields["name"] = b"image", b"label"
    fields["arguments"][IMAGE_FIELD] = locator.tobytes().ljust(1024, b"\0")
    return fields


def _round_up(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple


def _terminated(name: str) -> bytes:
    encoded = os.fsencode(name)
    if b"\0" in encoded:
        raise ValueError(f"{name!r}: a name cannot contain NUL")
    return encoded + b"\0"
