"""Converts an image file of any format into a plain JPEG, which all decoders read identically.

A plain JPEG has three components or one, 8 bits, Huffman coding and no damage: torchvision,
libjpeg-turbo and nvJPEG agree on such files. Most images are plain JPEGs and keep their bytes.
"""

import errno
import io
import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.common.atomic import READ
from pipelines.convert.pixels import PixelFlags, check_size, read_rgb, why_unidentified
from pipelines.convert.tiff import UnreadableImage

JPEG_EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif"}
IMAGE_EXTENSIONS = JPEG_EXTENSIONS | {
    *(".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"),
    *(".avif", ".jp2", ".j2k", ".heic", ".heif"),
}
NO_FLAGS = PixelFlags()
PROGRESSIVE = 0xC2
Check = Literal["full", "quick", "none"]
PLAIN_FRAMES = {(0xC0, 8), (0xC1, 8), (PROGRESSIVE, 8)}  # baseline, extended; all with 8 bits
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
MAX_FILE_BYTES = 1 << 29  # more than MAX_PIXELS of uncompressed RGB
MAX_JPEG_SIDE = 65500  # libjpeg's limit
MAX_SCANS = 500  # a progressive JPEG of thousands of empty scans takes minutes to decode
JPEG_QUALITY = 95
BLANK_DEVIATION = 2.0  # grey levels of 255; a blank image deviates less in every channel
SUBSAMPLING = {"420": 2, "422": 1}  # Pillow's codes of those it can write; 0 is none

# Warnings of libjpeg that mean grey or shifted blocks. Others, such as extra bytes before the end
# marker, also occur in complete photographs, which are decoded and encoded again.
LOST_DATA = re.compile(
    r"premature end|bad Huffman|arithmetic code|instead of RST|before marker 0xd[0-7]", re.I
)
_SEGMENT = struct.Struct(">BHBHHB")  # marker, length; in a frame: bits, height, width, channels


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plain JPEG: its bytes, its size in pixels, and what was done to the source file."""

    jpeg: bytes
    height: int
    width: int
    action: str  # "kept", "resized" or "reencoded (why)"
    is_blank: bool | None = None  # pixels deviate by less than BLANK_DEVIATION; None: not decoded
    is_grey: bool | None = None  # all channels are equal; None: not decoded


def read_image(path: str | os.PathLike) -> bytes:
    """Read a regular file of at most MAX_FILE_BYTES.

    Raises UnreadableImage, and OSError when too many files are open.
    """
    try:
        descriptor = os.open(path, READ)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnreadableImage(f"{status.st_size} bytes, more than {MAX_FILE_BYTES}")
            return os.read(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        raise UnreadableImage(error.strerror or str(error)) from None


def prepare(
    data: bytes, max_side: int, check: Check = "full", flags: PixelFlags = NO_FLAGS
) -> Prepared:
    """Convert an image file to a plain JPEG, its longer side at most `max_side` pixels (0: any).

    A plain JPEG within `max_side` is decoded once and returned unchanged. A larger one is
    resized (bicubic, antialiased) and encoded at quality 95 with its chroma subsampling. Any other
    image is converted to RGB, as `pixels.read_rgb` describes, and encoded at quality 95 without
    subsampling.

    `check="quick"` does not decode plain JPEGs within `max_side`: they are accepted if segments,
    markers and end are valid. That finds truncated, empty and overwritten files, but not all damage
    inside the image data. `check="none"` accepts a plain JPEG whose bytes are known to be intact.
    Raises UnreadableImage.
    """
    if not data:
        raise UnreadableImage("empty file")
    if not data.startswith(b"\xff\xd8\xff"):
        return _reencode(data, max_side, flags)
    try:
        return _prepare_jpeg(data, max_side, check, flags)
    except UnreadableImage:
        raise
    except ValueError as error:  # an error or a warning of libjpeg-turbo
        if LOST_DATA.search(str(error)):
            raise UnreadableImage(str(error)) from None
        if not _has_end_marker(data):  # libjpeg reports its first warning only, Pillow none
            raise UnreadableImage(f"{error}; and premature end of JPEG file") from None
        return _reencode(data, max_side, flags, str(error))
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}".rstrip(": ")) from None


def _prepare_jpeg(data: bytes, max_side: int, check: Check, flags: PixelFlags) -> Prepared:
    """`prepare` for data that starts like a JPEG. Raises ValueError where Pillow may decode it."""
    frame, height, width, num_channels = _jpeg_frame(data)
    check_size(height, width)
    if frame[0] == PROGRESSIVE and data.count(b"\xff\xda") > MAX_SCANS:
        raise UnreadableImage(f"a JPEG of more than {MAX_SCANS} scans")
    try:
        _, _, colours, subsampling = simplejpeg.decode_jpeg_header(data)
    except KeyError:  # a subsampling without a name in simplejpeg, such as 4:4:1
        colours, subsampling = "unusual", ""
    plain = frame in PLAIN_FRAMES and colours in ("YCbCr", "Gray")
    space = "RGB" if num_channels == 3 else "GRAY"
    if plain and max_side and max(height, width) > max_side:
        # Same pixels as Pillow's (both use libjpeg-turbo), but damage raises.
        pixels = simplejpeg.decode_jpeg(data, space, strict=True)
        return _encode(pixels, max_side, "resized", subsampling)
    if plain and (check == "none" or (check == "quick" and _has_valid_structure(data))):
        return Prepared(data, height, width, "kept")
    # The cheapest decoding that reads every coefficient: at an eighth of the size.
    eighth = {"min_height": 1, "min_width": 1, "min_factor": 8, "fastdct": True}
    if plain:
        pixels = simplejpeg.decode_jpeg(data, space, strict=True, **eighth)
        # What looks blank so small may have a fine texture, which the full size shows.
        is_blank = _is_blank(pixels) and _is_blank(simplejpeg.decode_jpeg(data, space))
        return Prepared(data, height, width, "kept", is_blank, _is_grey(pixels))
    simplejpeg.decode_jpeg(data, "CMYK" if num_channels == 4 else "GRAY", strict=True, **eighth)
    why = f"{colours} JPEG" if frame in PLAIN_FRAMES else "unusual JPEG"
    return _reencode(data, max_side, flags, why)


def _jpeg_frame(data: bytes) -> tuple[tuple[int, int], int, int, int]:
    """((frame marker, bits), height, width, channels) of a JPEG. Raises ValueError."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length, bits, height, width, num_channels = _SEGMENT.unpack_from(data, position + 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, not frames
            return (marker, bits), height, width, num_channels
        position += 1 if marker == 0xFF else 2 + length  # 0xFF: a fill byte
    raise ValueError("JPEG without a frame header")


def _has_end_marker(data: bytes) -> bool:
    """Whether an end marker follows the first scan; skips stray bytes between segments."""
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 3:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker in (0, 0xFF) else 2 + length
    return False


def _has_valid_structure(data: bytes) -> bool:
    """Whether one scan, with no markers but restarts in it, is followed by the end marker."""
    position, marker = 2, 0
    while marker != 0xDA:  # start of scan
        if position + 4 > len(data) or data[position] != 0xFF:
            return False
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        position += 2 + length
    coded = np.frombuffer(data, np.uint8)[position:]
    escapes = np.flatnonzero(coded[:-1] == 0xFF)
    followers = coded[escapes + 1]
    inner = (followers[:-1] == 0) | ((followers[:-1] & 0xF8) == 0xD0)
    runs = b"\0" * 32 in data[position:]  # a lost disk block is read as zeros
    return len(escapes) > 0 and followers[-1] == 0xD9 and inner.all() and not runs


def _reencode(data: bytes, max_side: int, flags: PixelFlags, why: str = "") -> Prepared:
    """Decode with Pillow and encode again; `why` defaults to what was read and decided."""
    try:
        with warnings.catch_warnings():  # of large images, EXIF, palettes: all handled here
            warnings.simplefilter("ignore")
            image, what = read_rgb(data, flags)
            return _encode(np.asarray(image), max_side, f"reencoded ({why or what})")
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(why or why_unidentified(data) or "not an image") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(f"{type(error).__name__}: {error}".rstrip(": ")) from None


def _encode(pixels: np.ndarray, max_side: int, action: str, subsampling: str = "444") -> Prepared:
    """Shrink to `max_side` and encode uint8 [H, W, 1 or 3]."""
    height, width, num_channels = pixels.shape
    longest = max(height, width)
    is_blank, is_grey = _is_blank(pixels), _is_grey(pixels)
    if max_side and longest > max_side:
        pixels = _shrink(pixels, *(max(1, round(s * max_side / longest)) for s in (height, width)))
    elif longest > MAX_JPEG_SIDE:
        raise UnreadableImage(f"{longest} pixels long: a JPEG has at most {MAX_JPEG_SIDE}")
    image = Image.fromarray(pixels if num_channels == 3 else pixels[:, :, 0])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=SUBSAMPLING.get(subsampling, 0))
    return Prepared(buffer.getvalue(), image.height, image.width, action, is_blank, is_grey)


def _is_blank(pixels: np.ndarray) -> bool:
    """Whether no channel of uint8 [H, W, 1 or 3] deviates by BLANK_DEVIATION or more."""
    height, width, num_channels = pixels.shape
    limit = height * width * BLANK_DEVIATION**2  # of the squared deviations' sum
    # One channel of every 128th row, with the middle one, nearly always exceeds it.
    rows = pixels[height // 2 % 128 :: 128, :, num_channels // 2].ravel().astype(np.float64)
    if (rows * rows).sum() - rows.sum() ** 2 / len(rows) >= limit:  # a dot product starts threads
        return False
    return all(_squared_deviations(pixels[::step]) < limit for step in (16, 4, 1))


def _squared_deviations(pixels: np.ndarray) -> float:
    """The sum of squared deviations from the mean of uint8 [H, W, C]; the channels' maximum."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    counts = np.reshape(image.histogram(), (-1, 256))
    values = np.arange(256.0)  # the square of a large image's sum exceeds an int64
    return float((counts @ values**2 - (counts @ values) ** 2 / counts.sum(axis=1)).max())


def _is_grey(pixels: np.ndarray) -> bool:
    """Whether all channels of uint8 [H, W, 1 or 3] are equal; a few rows usually tell."""
    if pixels.shape[2] == 1:
        return True
    parts = (rows.tobytes() for rows in (pixels[:1], pixels[::32], pixels))
    return all(values[::3] == values[1::3] == values[2::3] for values in parts)


def _shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic resize of the loaders' crops; seven times as fast as Pillow's."""
    from pipelines.crop import resize  # here because it imports torch and few data sets need it

    shrunk = np.empty((height, width, pixels.shape[2]), np.uint8)
    resize(np.require(pixels, requirements="W"), shrunk)  # Pillow's arrays are read-only
    return shrunk
