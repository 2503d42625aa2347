"""Layout of the FFCV `.beton` format, version 2.

Little-endian (source: ffcv 1.0.2, `types.py`, `writer.py`, `memory_allocator.py`):

    0                24 B    header: version, num_fields, page_size, num_samples, alloc_table_ptr
    24             1041 B    per field: type, name, 1024 B of arguments
    24 + 1041 F              metadata: one record per sample; 24 B for the fields (image, label)
    page-aligned             data: JPEG files or raw RGB pixels; none crosses a page boundary
    bt-convert only          extras: a CRC-32 per image, source names, class names
    alloc_table_ptr  24 B    per allocation, to the end of the file: sample_id, ptr, size

The extras make a `.beton` self-contained. FFCV never reads them: their offset is stored in the
arguments of the image field, which its RGBImageField writes as zeros and does not read. There, a
checksum covers all bytes of the file but image data, so damage to tables is found when the file is
opened, and damage to an image by `checksum_ok`.
"""

import hashlib
import itertools
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

VERSION = 2
PAGE_SIZES = tuple(1 << bits for bits in range(21, 32))  # FFCV: 2 MiB to below 4 GiB
MAX_PIXELS = 1 << 27  # per image: 402 MB as RGB; more is damage or a decompression bomb
MAX_CLASSES = 1 << 24  # bounds memory that is allocated per class

INT, RGB_IMAGE = 1, 2  # field types
JPEG, RAW = 0, 1  # modes of an image
CHUNK = 1 << 16  # rows of a table, or bytes of the names, processed at a time
MAGIC = b"BTFAST\x00\x01"

HEADER = np.dtype("<u2, <u2, <u4, <u8, <u8")  # the five numbers of the header
ARGUMENTS = 17  # offset of the arguments in a field descriptor
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
EXTRAS = np.dtype(  # at the start of the image field's arguments
    [
        ("magic", "V8"),
        ("crc", "<u4"),  # `tables_crc`
        ("num_classes", "<u4"),
        ("ptr", "<u8"),  # uint32 [num_samples] checksums, then names, then class names
        ("names_size", "<u8"),  # bytes; every name ends with a NUL, which no path contains
        ("class_names_size", "<u8"),
    ]
)
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# Types in a metadata record: float, integer, image, bytes, array, JSON and tensor field.
FIELD_RECORDS = dict(enumerate(["<f8", "<i8", IMAGE, BYTES, "<u8", BYTES, "<u8"]))


def metadata_dtype(type_ids: list[int]) -> np.dtype:
    """The metadata record of a sample: a C struct with fields f0, f1, ... and C's alignment."""
    records = [(f"f{index}", FIELD_RECORDS[type_id]) for index, type_id in enumerate(type_ids)]
    return np.dtype(records, align=True)


def tables_crc(
    header: np.ndarray, fields: np.ndarray, image_field: int, tables: Iterable[np.ndarray]
) -> int:
    """CRC-32 over header, fields (this checksum as 0), then metadata, extras and allocations."""
    head = bytearray(header.tobytes() + fields.tobytes())
    position = HEADER.itemsize + image_field * FIELD.itemsize + ARGUMENTS + len(MAGIC)
    head[position : position + 4] = bytes(4)
    crc = zlib.crc32(head)
    for table in tables:
        crc = zlib.crc32(table.view(np.uint8).data, crc)
    return crc


def content_sha256(metadata: Iterable[np.ndarray], checksums: Iterable[np.ndarray]) -> str:
    """SHA-256 (hex) of the metadata table and the images' CRC-32, each in any pieces."""
    digest = hashlib.sha256()
    for piece in itertools.chain(metadata, checksums):
        digest.update(piece.view(np.uint8).data)
    return digest.hexdigest()


def name_ends(stored: np.ndarray) -> np.ndarray:
    """Offsets of the NULs in the names of the extras, uint8 [bytes]: int64 [names].

    Empty if the last name has no NUL.
    """
    if not len(stored) or stored[-1] != 0:
        return np.empty(0, np.int64)
    found = (rows.start + np.flatnonzero(stored[rows] == 0) for rows in chunks(len(stored)))
    return np.concatenate([*found])


def name_at(stored: np.ndarray, ends: np.ndarray, index: int) -> str:
    """Name `index` of those that `name_ends` has found."""
    start = int(ends[index - 1]) + 1 if index else 0
    # Paths need not be UTF-8, but names are printed and compared as text.
    return stored[start : ends[index]].tobytes().decode("utf-8", "backslashreplace")


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK that cover range(count)."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
