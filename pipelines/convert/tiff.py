"""Samples of a TIFF of any depth and number of bands; Pillow reads only some, others wrongly.

Pillow (libtiff) does decompress all of them: it is given the strips or tiles of a page as those of
a grey image of 8 bits whose pixels are the bytes of the samples.
"""

import io
import struct
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

MAX_BYTES = 1 << 30  # of a page's samples
BLOCK_BYTES = 1 << 25  # decoded at a time
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, BANDS, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 317, 322, 323, 324, 325
SUBFILE, ORIENTATION, EXTRA_SAMPLES, SAMPLE_FORMAT = 254, 274, 338, 339
# Byte streams: none, LZW, Deflate (twice), PackBits, LZMA, Zstandard. JPEG is none.
COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
KINDS = {1: "u", 2: "i", 3: "f"}  # NumPy's letters of sample formats


class UnreadableImage(ValueError):
    """The file is not an image that decodes completely; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Page:
    """One directory of a TIFF."""

    data: bytes
    tags: ImageFileDirectory_v2

    def numbers(self, tag: int, *default: int) -> tuple:
        """The values of a tag."""
        value = self.tags.get(tag, default)
        return value if isinstance(value, tuple) else (value,)

    def number(self, tag: int, default: int = 0) -> int:
        """The only value of a tag, or its first."""
        return self.numbers(tag, default)[0]

    @property
    def is_complete(self) -> bool:
        """False for the smaller copy or the mask of another page."""
        return not self.number(SUBFILE) & 0b101

    @property
    def bits(self) -> int:
        """Bits of a sample. Raises UnreadableImage if they differ between the bands."""
        bits = set(self.numbers(BITS, 1))
        if len(bits) > 1:
            raise UnreadableImage(
                f"bands of different depths {sorted(bits)}, which is not converted"
            )
        return bits.pop()

    @property
    def kind(self) -> str:
        """u, i or f: the samples are unsigned, signed or floating-point. Raises UnreadableImage."""
        formats = set(self.numbers(SAMPLE_FORMAT, 1))
        if len(formats) > 1 or not formats <= KINDS.keys():
            raise UnreadableImage(f"samples of format {sorted(formats)}, which is not converted")
        return KINDS[formats.pop()]

    def samples(self) -> np.ndarray:
        """[height, width, bands], upright. Raises UnreadableImage, and what Pillow raises."""
        width, height, num_bands = self.number(WIDTH), self.number(HEIGHT), self.number(BANDS, 1)
        if self.number(COMPRESSION, 1) not in COMPRESSIONS:
            raise UnreadableImage(
                f"compression {self.number(COMPRESSION)} of such samples is not read"
            )
        if width * height * num_bands * self.bits > 8 * MAX_BYTES:
            raise UnreadableImage(f"{width} x {height} x {num_bands} samples, more than are read")
        num_planes = num_bands if self.number(PLANAR, 1) == 2 else 1
        planes = [self._plane(plane, num_bands // num_planes) for plane in range(num_planes)]
        samples = planes[0] if num_planes == 1 else np.concatenate(planes, axis=2)
        orientation = self.number(ORIENTATION, 1)  # which Pillow applies, too
        if orientation > 4:
            samples, orientation = samples.swapaxes(0, 1), orientation - 4
        vertical, horizontal = (-1 if orientation in pair else 1 for pair in ((3, 4), (2, 3)))
        return samples[::vertical, ::horizontal]

    def _plane(self, plane: int, num_bands: int) -> np.ndarray:
        """[height, width, bands] that are stored together. A strip is a tile of the full width."""
        width, height, tiled = self.number(WIDTH), self.number(HEIGHT), TILE_OFFSETS in self.tags
        tile_width = self.number(TILE_WIDTH) if tiled else width
        strip_height = min(self.number(ROWS_PER_STRIP, height), height)
        tile_height = self.number(TILE_HEIGHT) if tiled else strip_height
        across, down = -(-width // tile_width), -(-height // tile_height)
        row_bytes = across * -(-tile_width * num_bands * self.bits // 8)
        first, blocks = plane * across * down, []
        step = max(1, BLOCK_BYTES // (row_bytes * tile_height))  # rows of tiles at a time
        for row in range(0, down, step):
            num_rows = min(step, down - row)
            num_lines = num_rows * tile_height
            if not tiled:  # the last strip is shorter
                num_lines = min(num_lines, height - row * tile_height)
            tiles = slice(first + row * across, first + (row + num_rows) * across)
            coded = self._decompressed(tiles, row_bytes, num_lines, across, tile_height)
            values = self._values(coded.reshape(num_lines, across, -1), tile_width, num_bands)
            blocks.append(values.reshape(num_lines, -1, num_bands)[:, :width])
        return np.concatenate(blocks)[:height]

    def _decompressed(
        self, tiles: slice, width: int, height: int, across: int, tile_height: int
    ) -> np.ndarray:
        """uint8 [height, width]: the bytes of some tiles or strips, read as a grey image."""
        tiled = TILE_OFFSETS in self.tags
        starts = self.numbers(TILE_OFFSETS if tiled else STRIP_OFFSETS)[tiles]
        sizes = self.numbers(TILE_BYTES if tiled else STRIP_BYTES)[tiles]
        parts = [self.data[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        num_bytes = sum(map(len, parts))
        is_short = self.number(COMPRESSION, 1) == 1 and num_bytes < width * height
        if len(parts) < tiles.stop - tiles.start or num_bytes < sum(sizes) or is_short:
            raise UnreadableImage("truncated TIFF")
        offsets = [8 + offset for offset in accumulate(map(len, parts), initial=0)]
        tags = {WIDTH: [width], HEIGHT: [height], BITS: [8], PHOTOMETRIC: [1], BANDS: [1]}
        tags |= {tag: [self.number(tag, 1)] for tag in (COMPRESSION, FILL_ORDER)}
        if tiled:
            tags |= {TILE_WIDTH: [width // across], TILE_HEIGHT: [tile_height]}
            tags |= {TILE_OFFSETS: offsets[:-1], TILE_BYTES: [*sizes]}
        else:
            tags |= {ROWS_PER_STRIP: [tile_height]}
            tags |= {STRIP_OFFSETS: offsets[:-1], STRIP_BYTES: [*sizes]}
        header = b"II*\0" + struct.pack("<I", offsets[-1])
        file = io.BytesIO(b"".join([header, *parts, _directory(tags, offsets[-1])]))
        return np.asarray(Image.open(file, formats=["TIFF"]))

    def _values(self, coded: np.ndarray, tile_width: int, num_bands: int) -> np.ndarray:
        """[lines, tiles, width, bands] of uint8 [lines, tiles, bytes]; undoes the predictor."""
        lines, tiles, _ = coded.shape
        bits, kind, predictor = self.bits, self.kind, self.number(PREDICTOR, 1)
        shape = lines, tiles, tile_width, num_bands
        if bits not in (8, 16, 32, 64):  # packed, the first bit first
            if kind != "u" or bits > 31 or bits % 8 == 0 or predictor != 1:
                raise UnreadableImage(f"samples of {bits} bits of format {kind} are not read")
            ones = np.unpackbits(coded, axis=2, count=tile_width * num_bands * bits)
            ones = ones.reshape(*shape, bits)
            values = np.zeros(shape, np.uint32)
            for bit in range(bits):
                values |= ones[..., bit].astype(np.uint32) << (bits - 1 - bit)
            return values
        size = bits // 8
        order = ">" if self.tags.prefix == b"MM" else "<"
        if predictor == 3:  # differences of bytes, of which the highest of all samples come first
            coded = np.cumsum(coded.reshape(lines, tiles, -1, num_bands), axis=2, dtype=np.uint8)
            coded = coded.reshape(lines, tiles, size, -1).swapaxes(2, 3)
            order = ">"
        unsigned = np.ascontiguousarray(coded).view(f"{order}u{size}").reshape(shape)
        if predictor == 2:  # differences from the pixel to the left
            unsigned = np.cumsum(unsigned, axis=2, dtype=f"u{size}")
            order = "="
        return unsigned.view(f"{order}{kind}{size}")


def read_pages(data: bytes) -> list[Page]:
    """All directories of a TIFF, in order."""
    file = io.BytesIO(data)
    directory = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
    pages: list[Page] = []
    seen = {0}
    if data[:4] == b"MM\0+":
        raise UnreadableImage("a big-endian BigTIFF, which Pillow does not read")
    while (position := directory.next) not in seen:
        seen.add(position)
        directory = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
        file.seek(position)
        directory.load(file)
        pages.append(Page(data, directory))
    return pages


def _directory(tags: dict[int, list[int]], position: int) -> bytes:
    """A directory at `position` of a little-endian file; all values are of 32 bits."""
    entries = values = b""
    end = position + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        field = packed if len(numbers) == 1 else struct.pack("<I", end + len(values))
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + field
        values += packed if len(numbers) > 1 else b""
    return struct.pack("<H", len(tags)) + entries + bytes(4) + values
