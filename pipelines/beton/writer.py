"""Writes a `.beton` (layout: `layout.py`) in one pass, atomically and deterministically.

Records are in call order, so the same calls give the same bytes. Memory does not grow with the
number of images: the tables are collected in unnamed temporary files beside the output.
"""

import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.beton import layout
from pipelines.common.atomic import atomic_file, open_for_recovery, read_at

TYPE_IDS = [layout.RGB_IMAGE, layout.INT]  # fields "image" and "label"
IMAGE_FIELD = 0
ROW = np.dtype([("metadata", layout.metadata_dtype(TYPE_IDS)), ("size", "<u8"), ("crc", "<u4")])
CHUNK = 4096  # rows in memory at a time


class BetonWriter:
    """A context manager that writes `path`, which appears if the block ends without an exception.

        with BetonWriter("out.beton", num_samples=2, class_names=["cat", "dog"]) as writer:
            writer.add(jpeg, height, width, label=0, name="cat/1.jpg")

    `num_samples` reserves space for the metadata, which precedes the data. With fewer images, the
    header has their number and the remaining space stays empty, as FFCV finds images by absolute
    offsets. `class_names` may be empty; a label of -1 is no class.

    `page_size` (bytes) is the smallest unit that FFCV's cache reads. It is doubled when an image is
    larger: data within one aligned page also is within the aligned page of twice the size.

    `in_place` writes into `path` itself and keeps what a killed writer has stored there, so that
    `recover` can read it: for callers that move the file when it is complete.

    Raises FileExistsError unless `in_place`; OSError when the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        num_samples: int,
        class_names: Sequence[str] = (),
        page_size: int = 8 << 20,
        in_place: bool = False,
    ):
        if page_size not in layout.PAGE_SIZES:
            raise ValueError(f"page_size {page_size}: must be a power of two from 2 MiB to 2 GiB")
        self.path = Path(path)
        self.page_size = page_size
        self._in_place = in_place
        self._capacity = num_samples
        self._num_classes = len(class_names)
        self._class_names = b"".join(_terminated(name) for name in class_names)
        self._num_images = self._names_size = 0
        self._metadata_start = layout.HEADER.itemsize + len(TYPE_IDS) * layout.FIELD.itemsize
        metadata_end = self._metadata_start + num_samples * ROW["metadata"].itemsize
        self._data_start = self._position = _round_up(metadata_end, page_size)
        self._row = np.zeros(1, ROW)  # the padding between its fields stays 0
        self._finalized = False

    def __enter__(self) -> "BetonWriter":
        with ExitStack() as exit_:
            opened = open_for_recovery if self._in_place else atomic_file
            self._file: BinaryIO = exit_.enter_context(opened(self.path))
            self._file.seek(self._position)
            self._rows = exit_.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
            self._names = exit_.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
            self._exit = exit_.pop_all()
        return self

    def __exit__(self, error_type, error, traceback):
        if error_type is not None:
            return self._exit.__exit__(error_type, error, traceback)
        with self._exit:  # renames the file; removes it if finalize() fails
            self.finalize()

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
        """Append one image: a JPEG file of `height` x `width` pixels, its label and source name.

        `checksum` is its CRC-32, if already computed by a worker process.
        """
        size = len(jpeg)
        if len(self) == self._capacity:
            raise ValueError(f"{self.path}: more than num_samples={len(self)} images")
        if not -1 <= label < self._num_classes:
            raise ValueError(f"{name}: label {label} is out of range: {self._num_classes} classes")
        page_size, position = self._next_position(size)
        if size == 0 or page_size not in layout.PAGE_SIZES:
            raise ValueError(f"{name}: {size} bytes cannot be stored")
        terminated = _terminated(name)
        checksum = zlib.crc32(jpeg) if checksum is None else checksum
        self._skip(self._position, position)
        self._file.write(jpeg)
        self._row[0] = ((layout.JPEG, width, height, position), label), size, checksum
        self._rows.write(self._row.view(np.uint8).data)
        self._names.write(terminated)
        self._names_size += len(terminated)
        self.page_size, self._position = page_size, position + size
        self._num_images += 1

    def recover(self, size: int) -> bytes:
        """The bytes where `add` would store the next image, of `size` bytes (`in_place`)."""
        return read_at(self._file, self._next_position(size)[1], size)

    def stored(self, index: int) -> bytes:
        """The JPEG of image `index`, of those added so far."""
        self._rows.flush()
        self._file.flush()
        row = np.frombuffer(read_at(self._rows, index * ROW.itemsize, ROW.itemsize), ROW)[0]
        ptr = int(row["metadata"][f"f{IMAGE_FIELD}"]["data_ptr"])
        return read_at(self._file, ptr, int(row["size"]))

    def discard_rest(self) -> None:
        """Truncate the file after the images added so far (`in_place`)."""
        self._file.flush()
        self._file.truncate(self._position)

    def finalize(self) -> None:
        """Write everything but image data; called at the end of the block, or earlier."""
        if self._finalized:
            return
        if not len(self):
            raise ValueError(f"{self.path}: no images were added")
        # The extras begin on a new page: FFCV's page cache reads complete pages of images.
        extras_ptr = _round_up(self._position, self.page_size)
        extras_size = 4 * len(self) + self._names_size + len(self._class_names)
        alloc_table_ptr = _round_up(extras_ptr + extras_size, 8)
        header = np.array(
            [(layout.VERSION, len(TYPE_IDS), self.page_size, len(self), alloc_table_ptr)],
            layout.HEADER,
        )
        sizes = self._names_size, len(self._class_names)
        locator = np.array(
            [(np.void(layout.MAGIC), 0, self._num_classes, extras_ptr, *sizes)], layout.EXTRAS
        )
        tables = self._write_tables(extras_ptr, alloc_table_ptr)
        locator["crc"] = layout.tables_crc(header, _fields(locator), IMAGE_FIELD, tables)
        for position, table in (layout.HEADER.itemsize, _fields(locator)), (0, header):
            self._file.seek(position)
            self._file.write(table.view(np.uint8).data)
        metadata_end = self._metadata_start + len(self) * ROW["metadata"].itemsize
        self._skip(metadata_end, self._data_start)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._finalized = True

    def sha256(self) -> str:
        """`content_sha256` of the images added, equal to that of the reader."""
        return layout.content_sha256(self._metadata_chunks(), self._checksum_chunks())

    def _next_position(self, size: int) -> tuple[int, int]:
        """Page size and position of the next image if it has `size` bytes."""
        page_size, position = self.page_size, self._position
        while size > page_size:
            page_size *= 2
        if position % page_size + size > page_size:  # would cross a page boundary
            position = _round_up(position, page_size)
        return page_size, position

    def _skip(self, start: int, end: int) -> None:
        """Seek to `end`; overwrite with zeros what a killed writer left between."""
        if start == end:
            return
        self._file.seek(start if self._in_place else end)
        while (missing := end - self._file.tell()) > 0:
            self._file.write(bytes(min(missing, 1 << 20)))

    def _write_tables(self, extras_ptr: int, alloc_table_ptr: int) -> Iterator[np.ndarray]:
        """Write metadata, extras and allocations; yield each piece after writing it."""
        for position, pieces in (
            (self._metadata_start, self._metadata_chunks()),
            (extras_ptr, self._checksum_chunks()),
            (extras_ptr + 4 * len(self), self._name_chunks()),
            (alloc_table_ptr, self._allocation_chunks()),
        ):
            self._file.seek(position)
            for piece in pieces:
                self._file.write(piece.view(np.uint8).data)
                yield piece

    def _row_chunks(self) -> Iterator[np.ndarray]:
        """All rows so far, CHUNK at a time. Do not add images while iterating."""
        self._rows.seek(0)
        while piece := self._rows.read(CHUNK * ROW.itemsize):
            yield np.frombuffer(piece, ROW)

    def _metadata_chunks(self) -> Iterator[np.ndarray]:
        # Copied as bytes: a NumPy copy of records leaves the padding between fields undefined.
        size = ROW["metadata"].itemsize
        for rows in self._row_chunks():
            yield np.ascontiguousarray(rows.view(np.uint8).reshape(-1, ROW.itemsize)[:, :size])

    def _checksum_chunks(self) -> Iterator[np.ndarray]:
        return (np.ascontiguousarray(rows["crc"]) for rows in self._row_chunks())

    def _name_chunks(self) -> Iterator[np.ndarray]:
        self._names.seek(0)
        while piece := self._names.read(1 << 16):
            yield np.frombuffer(piece, np.uint8)
        yield np.frombuffer(self._class_names, np.uint8)

    def _allocation_chunks(self) -> Iterator[np.ndarray]:
        first = 0
        for rows in self._row_chunks():
            allocations = np.empty(len(rows), layout.ALLOCATION)
            allocations["sample_id"] = np.arange(first, first + len(rows))
            allocations["ptr"] = rows["metadata"]["f0"]["data_ptr"]
            allocations["size"] = rows["size"]
            first += len(rows)
            yield allocations


def _fields(locator: np.ndarray) -> np.ndarray:
    fields = np.zeros(len(TYPE_IDS), layout.FIELD)
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
