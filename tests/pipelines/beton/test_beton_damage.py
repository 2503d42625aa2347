"""Damaged and malicious `.beton` files are detected and never crash the reader."""

import os
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sample_beton import NUM_IMAGES, PAGE_SIZE, write_sample

from pipelines.beton import BetonError, BetonReader
from pipelines.beton.layout import EXTRAS, FIELD, HEADER, tables_crc


@pytest.fixture
def sample(tmp_path) -> Path:
    write_sample(tmp_path / "sample.beton", page_size=PAGE_SIZE)
    return tmp_path / "sample.beton"


@contextmanager
def edited(path: Path, edits: dict[int, bytes], size: int | None = None):
    """Change bytes and the length of a file; restores it after the block."""
    original = path.read_bytes()
    changed = bytearray(original)
    for offset, content in edits.items():
        changed[offset : offset + len(content)] = content
    path.write_bytes(changed[:size])
    try:
        yield
    finally:
        path.write_bytes(original)


def contents(reader: BetonReader) -> list[tuple]:
    """All records of the reader, which reads every byte that they consist of."""
    methods = (reader.image, reader.label, reader.size, reader.name, reader.is_raw)
    records = [[method(index) for method in methods] for index in range(len(reader))]
    return [(image.tobytes(), *others) for image, *others in records]


def regions(path: Path) -> list[tuple[int, int]]:
    """(start, end) of the header, the fields, the metadata, the data, the extras, the rest."""
    raw = path.read_bytes()
    tables = np.frombuffer(raw, HEADER, 1).item()[4]
    fields_end = HEADER.itemsize + 2 * FIELD.itemsize
    extras = int(np.frombuffer(raw, EXTRAS, 1, HEADER.itemsize + 17)["ptr"][0]) or tables
    metadata_end = fields_end + 24 * NUM_IMAGES
    data = PAGE_SIZE, PAGE_SIZE + sum(BetonReader(path)._sizes.tolist())
    return [
        (0, HEADER.itemsize),
        (HEADER.itemsize, HEADER.itemsize + 17 + EXTRAS.itemsize + 8),
        (HEADER.itemsize + FIELD.itemsize, HEADER.itemsize + FIELD.itemsize + 17),
        (fields_end, metadata_end),
        data,
        (extras, tables),
        (tables, len(raw)),
    ]


def random_edit(generator: np.random.Generator, raw: bytes, ranges) -> dict[int, bytes]:
    """One to three changes: a flipped bit, or an integer of 1 to 8 bytes set to an edge case."""
    edits = {}
    for _ in range(generator.integers(1, 4)):
        start, end = ranges[generator.integers(len(ranges))]
        offset = int(generator.integers(start, max(end, start + 1)))
        width = int(generator.choice([1, 1, 2, 4, 8]))
        edge_cases = [0, 1, 2**7, 2**16 - 1, 2**31, 2**32 - 1, 2**63 - 1, len(raw), PAGE_SIZE]
        value = int(generator.choice(edge_cases))
        if generator.random() < 0.5:
            content = bytes([raw[offset % len(raw)] ^ 1 << int(generator.integers(8))])
        else:
            content = value.to_bytes(8, "little")[:width]
        edits[min(offset, len(raw) - len(content))] = content
    return edits


def test_invalid_tables_with_a_valid_checksum(sample):
    """1,000 files with invalid tables: refused, or every record is within the file.

    `tests/tools/test_fuzz.py` has damage that checksums detect, and files of FFCV without them.
    """
    raw, ranges = sample.read_bytes(), regions(sample)
    generator, refused, opened = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        edits = random_edit(generator, raw, ranges)
        with edited(sample, edits | forged(raw, edits)):
            try:
                reader = BetonReader(sample)
            except BetonError as error:
                assert "checksum" not in str(error)
                refused += 1
                continue
            opened += 1
            assert len(contents(reader)) == len(reader) <= NUM_IMAGES
            assert all(image.size for image in map(reader.image, range(len(reader))))
            assert reader.labels.min() >= -1 and reader.labels.max() < reader.num_classes
    assert refused > 100 and opened > 50


def forged(raw: bytes, edits: dict[int, bytes]) -> dict[int, bytes]:
    """The edit that makes the checksum of an edited file valid, if its tables can be located."""
    changed = bytearray(raw)
    for offset, content in edits.items():
        changed[offset : offset + len(content)] = content
    header = np.frombuffer(changed, HEADER, 1)
    extras = np.frombuffer(changed, EXTRAS, 1, HEADER.itemsize + 17)
    _, _, _, count, tables = header.item()
    start = int(extras["ptr"][0])
    length = 4 * count + int(extras["names_size"][0]) + int(extras["class_names_size"][0])
    metadata_start = HEADER.itemsize + 2 * FIELD.itemsize
    parts = (metadata_start, 24 * count), (start, length), (tables, max(len(raw) - tables, 0))
    if any(begin + size > len(raw) for begin, size in parts):
        return {}
    fields = np.frombuffer(changed, FIELD, 2, HEADER.itemsize)
    views = [np.frombuffer(changed, np.uint8, size, begin) for begin, size in parts]
    crc = tables_crc(header, fields, 0, views)
    return {HEADER.itemsize + 17 + 8: struct.pack("<I", crc)}


def test_truncated_files_are_refused(sample):
    size = sample.stat().st_size
    cuts = np.random.default_rng(2).integers(0, size, 300).tolist()
    for cut in [*range(0, 64), *cuts, *range(size - 64, size)]:
        with edited(sample, {}, size=cut), pytest.raises(BetonError, match=r"sample\.beton"):
            BetonReader(sample)
    assert len(BetonReader(sample)) == NUM_IMAGES


HUGE = (1 << 64) - 1
METADATA = HEADER.itemsize + 2 * FIELD.itemsize
IMAGE_TYPE, LABEL_TYPE = HEADER.itemsize, HEADER.itemsize + FIELD.itemsize


@pytest.mark.parametrize(
    "offset,layout,value,message",
    [
        (0, "<H", 3, "version 2"),
        (2, "<H", 0, "no RGB image field"),
        (4, "<I", 0, "page size"),
        (4, "<I", 4 << 20, None),  # valid, too: data in one page is in one page of twice the size
        (8, "<Q", 0, "no images"),
        (8, "<Q", NUM_IMAGES + 1, "allocation"),
        (8, "<Q", 1 << 40, "truncated"),
        (16, "<Q", 0, "did not finish"),
        (IMAGE_TYPE, "<B", 255, "field types"),
        (METADATA, "<B", 2, "neither JPEG nor raw"),
        (METADATA, "<B", 1, "height x width x 3"),
        (METADATA + 1, "<H", 0, "impossible size"),
        (METADATA + 5, "<Q", HUGE, "not in the allocation table"),
        (METADATA + 16, "<q", 1 << 40, "label"),
        (METADATA + 16, "<q", -7, None),  # no class, as written by other tools
        ("tables+0", "<Q", 1, "bytes of another"),
        ("tables+8", "<Q", HUGE, "outside the data"),
        ("tables+16", "<Q", HUGE - PAGE_SIZE + 2, "ends outside"),  # the sum wraps around
        ("tables+16", "<Q", 1 << 20, "overlap"),
        ("tables+16", "<Q", PAGE_SIZE + 1, "page boundary"),
    ],
)
def test_each_invalid_number_is_named(sample, offset, layout, value, message):
    with open(sample, "r+b") as file:  # without the checksum, which would detect all of these
        file.seek(HEADER.itemsize + 17)
        file.write(bytes(1024))
    if isinstance(offset, str):
        offset = regions(sample)[-1][0] + int(offset.removeprefix("tables"))
    with edited(sample, {offset: struct.pack(layout, value)}):
        if message is None:
            assert len(BetonReader(sample)) == NUM_IMAGES
        else:
            with pytest.raises(BetonError, match=message):
                BetonReader(sample)


def test_other_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello " * 100)
    (tmp_path / "loop").symlink_to("loop")
    for name in (".", "pipe", "empty", "text", "loop", "missing", "text/under", "nul\0"):
        with pytest.raises(BetonError) as caught:
            BetonReader(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path) in message and "\n" not in message
