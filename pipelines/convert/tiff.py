"""What a TIFF states about its pages, and the samples of those that Pillow reads wrongly or not."""

import io
from dataclasses import dataclass

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

MAX_BYTES = 1 << 30  # of a page's samples
SUBFILE, WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION = 254, 256, 257, 258, 262, 274
BANDS, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT = 277, 284, 338, 339
KINDS = {1: "u", 2: "i", 3: "f"}  # NumPy's letters of sample formats


class UnreadableImage(ValueError):
    """The file is not an image that decodes completely; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Page:
    """One directory of a TIFF."""

    data: bytes  # of the file
    index: int
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
        """[height, width, bands], upright. Raises UnreadableImage, and what tifffile raises."""
        try:
            from tifffile import TiffFile
        except ImportError:
            raise UnreadableImage(
                "such a TIFF is read by tifffile: pip install 'bt-fast[sources]'"
            ) from None
        size = self.number(WIDTH) * self.number(HEIGHT) * self.number(BANDS, 1)
        if size * self.bits > 8 * MAX_BYTES:
            raise UnreadableImage(f"a TIFF of {size} samples, more than are read")
        with TiffFile(io.BytesIO(self.data)) as file:
            page = file.pages[self.index]
            end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)))
            if end > len(self.data) or 0 in page.dataoffsets:  # which tifffile reads as zeros
                raise UnreadableImage("truncated TIFF")
            samples = page.asarray()
        if self.number(PLANAR, 1) == 2 and samples.ndim == 3:
            samples = np.moveaxis(samples, 0, 2)
        samples = np.atleast_3d(samples)
        orientation = self.number(ORIENTATION, 1)  # which Pillow applies, too
        if orientation > 4:
            samples, orientation = samples.swapaxes(0, 1), orientation - 4
        vertical, horizontal = (-1 if orientation in pair else 1 for pair in ((3, 4), (2, 3)))
        return samples[::vertical, ::horizontal]


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
        pages.append(Page(data, len(pages), directory))
    return pages
