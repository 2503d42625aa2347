"""Reads the FFCV `.beton` format, version 2 (layout: `layout.py`).

A file is untrusted input, and C decoders trust every offset and size. All of them are checked here
before any is used; an invalid one raises a `BetonError` that names the file.
"""

import mmap
import os
import stat
import zlib
from functools import cached_property

import numpy as np

from pipelines.beton import layout
from pipelines.common.atomic import READ


class BetonError(ValueError):
    """The file is missing, unreadable or not a valid `.beton`; the message gives the reason."""


class BetonReader:
    """A memory-mapped `.beton`; all tables are validated when it is opened.

    Attributes: `path`; `labels`, int64 [N], -1 = no class; `num_classes`; `class_names`, a list or
    None; `page_size`, bytes; `fields`, the field names; `image_field`, index of the image field.

    Also reads files of FFCV's DatasetWriter with any order and names of fields. The image field is
    named "image", else the first of its type; the label field is named "label", else the first
    integer, else all labels are -1. Other fields are ignored; negative labels become -1.
    Opening reads the tables (48 B per image, and bt-convert's extras), not the images. Tables stay
    in the mapping; `labels` and the offsets of the names take 8 B per image each, opening a few MB,
    `sizes` 16 B per image on use.
    Pickling passes the path, and a worker process maps the file again.
    Raises BetonError. The file must not be truncated while it is mapped.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._bytes = np.frombuffer(_map(self.path), np.uint8)  # [file size], read-only
        self._read_tables()
        self._locate_images()
        self._read_extras()
        self._read_labels()

    def __len__(self) -> int:
        return len(self._ptrs)

    def __reduce__(self):
        return type(self), (self.path,)

    def image(self, index: int) -> np.ndarray:
        """uint8 [bytes], a read-only view of the file: a JPEG, or RGB rows if `is_raw(index)`."""
        ptr = int(self._ptrs[index])
        return self._bytes[ptr : ptr + int(self._sizes[index])]

    def label(self, index: int) -> int:
        """Label of the image, -1 for no class."""
        return int(self.labels[index])

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [N, 2]: height and width of every image in pixels; computed once."""
        return np.stack([self._images["height"], self._images["width"]], axis=1).astype(np.int64)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels from the metadata; the header of a JPEG may differ."""
        return int(self._images["height"][index]), int(self._images["width"][index])

    def is_raw(self, index: int) -> bool:
        """Whether the record is height x width x 3 bytes of RGB instead of a JPEG."""
        return int(self._images[index]["mode"]) == layout.RAW

    def name(self, index: int) -> str:
        """Path of the source file relative to the converted folder, or "record 17"."""
        index = range(len(self))[index]
        if self._checksums is None:
            return f"record {index}"
        return layout.name_at(self._names, self._name_ends, index)

    def location(self, index: int) -> tuple[int, int, int | None]:
        """(offset in the file, bytes, CRC-32 or None if the file has no checksums)."""
        crc = None if self._checksums is None else int(self._checksums[index])
        return int(self._ptrs[index]), int(self._sizes[index]), crc

    def checksum_ok(self, index: int) -> bool:
        """Whether the image matches its checksum; True if the file has no checksums."""
        if self._checksums is None:
            return True
        return zlib.crc32(self.image(index).data) == int(self._checksums[index])

    def sha256(self) -> str:
        """`content_sha256` of the file (reads no image); sizes stand for missing checksums."""
        checksums = self._sizes if self._checksums is None else self._checksums
        return layout.content_sha256([self._metadata], [np.ascontiguousarray(checksums)])

    def _read_tables(self) -> None:
        """Map header, field descriptors, metadata and allocations as views, without copies."""
        self._header = self._view(0, layout.HEADER, 1)
        version, num_fields, self.page_size, num_samples, self._tables_start = self._header.item()
        self._require(version == layout.VERSION, "not a .beton file of version 2")
        self._require(self._tables_start > 0, "its conversion did not finish; convert again")
        self._require(num_samples > 0, "it contains no images")
        self._require(self.page_size in layout.PAGE_SIZES, f"impossible page size {self.page_size}")

        self._fields = self._view(layout.HEADER.itemsize, layout.FIELD, num_fields)
        type_ids = self._fields["type_id"].tolist()
        self.fields = [name.split(b"\0")[0] for name in self._fields["name"].tolist()]  # bytes
        unknown = set(type_ids) - layout.FIELD_RECORDS.keys()
        self._require(not unknown, f"unknown field types {unknown}: FFCV defines 0 to 6")
        self.image_field = _choose(b"image", layout.RGB_IMAGE, self.fields, type_ids)
        self._label_field = _choose(b"label", layout.INT, self.fields, type_ids)
        self._require(self.image_field >= 0, "it has no RGB image field")

        metadata_start = layout.HEADER.itemsize + self._fields.nbytes
        record = layout.metadata_dtype(type_ids)
        self._metadata = self._view(metadata_start, record, num_samples)
        self._images = self._metadata[f"f{self.image_field}"]
        self._data_start = metadata_start + self._metadata.nbytes
        count, rest = divmod(len(self._bytes) - self._tables_start, layout.ALLOCATION.itemsize)
        self._require(rest == 0, "truncated, or its allocation table is damaged")
        plausible = 0 < count <= len(self._metadata) * len(type_ids)  # at most one per field
        self._require(plausible, f"{count} allocations for {len(self._metadata)} images")
        self._allocations = self._view(self._tables_start, layout.ALLOCATION, count)

    def _locate_images(self) -> None:
        """Find the bytes of every image; FFCV stores their size only in the allocation table."""
        image_ptrs, allocations = self._images["data_ptr"], self._allocations
        if self._allocated_in_order():
            self._ptrs, self._sizes = allocations["ptr"], allocations["size"]  # views of the file
            self._check_allocations(self._ptrs, self._sizes)
        else:
            allocations = allocations[allocations["size"] > 0]
            allocations = allocations[np.argsort(allocations["ptr"], kind="stable")]
            self._require(len(allocations), "it contains no image data")
            ptrs, sizes = allocations["ptr"].copy(), allocations["size"].copy()
            self._check_allocations(ptrs, sizes)
            found = np.minimum(np.searchsorted(ptrs, image_ptrs), len(ptrs) - 1)
            allocated = ptrs[found] == image_ptrs
            self._require_all(allocated, "an image's bytes are not in the allocation table")
            matches = allocations["sample_id"][found] == np.arange(len(image_ptrs))
            self._require_all(matches, "an image points to the bytes of another")
            self._ptrs, self._sizes = ptrs[found], sizes[found]

        for rows in layout.chunks(len(image_ptrs)):
            images = self._images[rows]
            pixels = images["height"].astype(np.uint64) * images["width"]
            possible = (pixels > 0) & (pixels <= layout.MAX_PIXELS)
            self._require_all(possible, "an image has an impossible size", rows)
            self._require_all(
                images["mode"] <= layout.RAW, "an image is neither JPEG nor raw", rows
            )
            complete = (images["mode"] == layout.JPEG) | (self._sizes[rows] == 3 * pixels)
            self._require_all(complete, "a raw image's length is not height x width x 3", rows)

    def _allocated_in_order(self) -> bool:
        """Whether allocation i is that of image i, at increasing offsets, as in our files."""
        allocations, image_ptrs = self._allocations, self._images["data_ptr"]
        return len(allocations) == len(image_ptrs) and all(
            (allocations["sample_id"][rows] == np.arange(rows.start, rows.stop)).all()
            and (allocations["size"][rows] > 0).all()
            and (allocations["ptr"][rows] == image_ptrs[rows]).all()
            and (np.diff(image_ptrs[rows.start : rows.stop + 1].astype(np.int64)) > 0).all()
            for rows in layout.chunks(len(image_ptrs))
        )

    def _check_allocations(self, ptrs: np.ndarray, sizes: np.ndarray) -> None:
        """Check uint64 [n] each, sorted by ptr: inside the data, in one page, not overlapping."""
        for rows in layout.chunks(len(ptrs)):
            start, size = ptrs[rows], sizes[rows]
            # Differences, not sums: a uint64 sum can wrap around.
            inside = (start >= self._data_start) & (start <= self._tables_start)
            self._require_all(inside, "an allocation lies outside the data", rows)
            fits = size <= self._tables_start - start
            self._require_all(fits, "an allocation ends outside the data", rows)
            end = start + size
            one_page = start // self.page_size == (end - 1) // self.page_size
            self._require_all(one_page, "an allocation crosses a page boundary", rows)
            following = ptrs[rows.start + 1 : rows.stop + 1]
            self._require_all(end[: len(following)] <= following, "two allocations overlap", rows)
        self._data_end = int(ptrs[-1]) + int(sizes[-1])

    def _read_extras(self) -> None:
        """Read what bt-convert adds: checksums, names, classes. Files of FFCV have no extras."""
        self.class_names: list[str] | None = None
        self._checksums: np.ndarray | None = None
        arguments = self._fields["arguments"][self.image_field].tobytes()
        if not any(arguments):
            return
        extras = np.frombuffer(arguments, layout.EXTRAS, count=1)
        known = extras["magic"][0].tobytes() == layout.MAGIC
        self._require(known, "its image field has arguments that neither FFCV nor bt-fast writes")
        num_classes, start, names_size, class_names_size = (
            int(extras[key][0]) for key in ("num_classes", "ptr", "names_size", "class_names_size")
        )
        names_start, classes_start = 4 * len(self), 4 * len(self) + names_size
        num_bytes = classes_start + class_names_size
        inside = self._data_end <= start <= self._tables_start - num_bytes
        self._require(inside, "its extras are not between the images and the allocation table")
        blob = self._view(start, np.dtype(np.uint8), num_bytes)
        tables = (self._metadata, blob, self._allocations)
        crc = layout.tables_crc(self._header, self._fields, self.image_field, tables)
        self._require(crc == extras["crc"][0], "its tables are damaged (checksum mismatch)")
        self._checksums = blob[:names_start].view("<u4")
        self._names = blob[names_start:classes_start]
        self._name_ends = layout.name_ends(self._names)
        self._require(len(self._name_ends) == len(self), "its list of names is damaged")
        classes = blob[classes_start:]
        ends = layout.name_ends(classes)
        self._require(len(ends) == num_classes, "its list of classes is damaged")
        self.class_names = [layout.name_at(classes, ends, label) for label in range(num_classes)]

    def _read_labels(self) -> None:
        self.labels = np.full(len(self), -1, np.int64)
        if self._label_field >= 0:
            stored = self._metadata[f"f{self._label_field}"]
            for rows in layout.chunks(len(self)):
                np.maximum(stored[rows], -1, out=self.labels[rows])
        highest = int(self.labels.max())
        limit = layout.MAX_CLASSES if self.class_names is None else len(self.class_names)
        self._require(highest < limit, f"label {highest} is out of range: at most {limit} classes")
        self.num_classes = highest + 1 if self.class_names is None else limit

    def _view(self, start: int, dtype: np.dtype, count: int) -> np.ndarray:
        """View of `count` records at byte `start` of the file (Python integers cannot overflow)."""
        end = start + count * dtype.itemsize
        self._require(end <= len(self._bytes), f"truncated: at least {end} bytes expected")
        return self._bytes[start:end].view(dtype)

    def _require(self, condition: object, reason: str) -> None:
        if not condition:
            raise BetonError(f"{self.path}: {reason}")

    def _require_all(self, conditions: np.ndarray, reason: str, rows: slice = slice(0)) -> None:
        if not conditions.all():
            first = (rows.start or 0) + int(np.argmin(conditions))
            raise BetonError(f"{self.path}: {reason} (first: number {first})")


def _map(path: str) -> mmap.mmap:
    """Map the file read-only (a private writable mapping counts as memory)."""
    try:
        descriptor = os.open(path, READ)
    except FileNotFoundError:
        raise BetonError(f"{path}: no such file; create it with bt-convert FOLDER {path}") from None
    except (OSError, ValueError) as error:
        raise BetonError(f"{path!r}: cannot be opened: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BetonError(f"{path}: not a regular file")
        if status.st_size < layout.HEADER.itemsize:
            raise BetonError(f"{path}: too short ({status.st_size} bytes) to be a .beton file")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BetonError(f"{path}: cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)


def _choose(name: bytes, type_id: int, names: list[bytes], type_ids: list[int]) -> int:
    """Index of the field of this type with this name, else of the first of the type, else -1."""
    candidates = [index for index, other in enumerate(type_ids) if other == type_id]
    named = [index for index in candidates if names[index] == name]
    return next(iter(named + candidates), -1)
