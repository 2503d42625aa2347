"""One image file, whatever it is, made into a JPEG that every decoder downstream reads alike.

Three components or grey, 8 bits, Huffman-coded, undamaged to the last block: torchvision,
libjpeg-turbo and nvJPEG agree on such files. Most already are, and keep their bytes.
"""

import io
import os
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

JPEG_EXTENSIONS = {".jpg", ".jpeg"}
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # Pillow may try no other
PROGRESSIVE = 0xC2
Check = Literal["full", "quick"]
PLAIN_FRAMES = {(0xC0, 8), (0xC1, 8), (PROGRESSIVE, 8)}  # baseline, extended; all of 8 bits
MAX_FILE_BYTES = 1 << 29  # more than MAX_PIXELS of uncompressed RGB
MAX_PIXELS = 1 << 27  # 402 MB as RGB; checked in the header, before anything is decoded
MAX_JPEG_SIDE = 65500  # libjpeg's limit
MAX_SCANS = 500  # a progressive JPEG of thousands of empty scans takes minutes to decode
JPEG_QUALITY = 95
SUBSAMPLING = {"420": 2, "422": 1}  # Pillow's names of what it can write; 0 is none

# The warnings of libjpeg that mean grey or shifted blocks. Others, such as bytes too many before
# the end marker, come with real photographs that are whole: those are decoded and encoded anew.
LOST_DATA = re.compile(
    r"premature end|bad Huffman|arithmetic code|instead of RST|before marker 0xd[0-7]", re.I
)
_SEGMENT = struct.Struct(">BHBHHB")  # marker, length; in a frame: bits, height, width, channels


class UnreadableImage(ValueError):
    """The file is not an image that can be decoded whole; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plain JPEG: its bytes, its size in pixels, and what was done to the source file."""

    jpeg: bytes
    height: int
    width: int
    action: str  # "kept", "resized" or "reencoded (why)"


def read_image(path: str | os.PathLike) -> bytes:
    """The bytes of a file that may be anything. Raises UnreadableImage."""
    try:
        # O_NONBLOCK: a named pipe would make us wait for a writer.
        with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnreadableImage(f"{status.st_size} bytes, more than {MAX_FILE_BYTES}")
            return file.read(status.st_size)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None


def prepare(data: bytes, max_side: int, check: Check = "full") -> Prepared:
    """Make a plain JPEG of an image file, its longer side at most `max_side` pixels (0: any).

    A plain JPEG that fits is returned byte for byte, after all of it was decoded once. A larger
    one is resized (bicubic, antialiased) and encoded at quality 95 with its own chroma subsampling.
    Anything else is decoded by Pillow, made RGB and encoded at quality 95 without subsampling.

    As in torchvision's default loader, alpha is dropped and EXIF orientation ignored. 16-bit
    greys are scaled to 8 bits, where Pillow's own conversion clips them.
    `check="quick"` spares the plain JPEGs that fit the decoding: they are taken if their segments,
    markers and end are as they should be. That finds cut, empty and overwritten files, but not
    every damage inside the image data.
    Raises UnreadableImage.
    """
    if not data:
        raise UnreadableImage("empty file")
    if not data.startswith(b"\xff\xd8\xff"):
        return _reencode(data, max_side)
    try:
        return _prepare_jpeg(data, max_side, check)
    except UnreadableImage:
        raise
    except ValueError as error:  # what libjpeg-turbo refuses or warns of
        if LOST_DATA.search(str(error)):
            raise UnreadableImage(str(error)) from None
        if not _has_end(data):  # libjpeg tells its first warning only, and Pillow none
            raise UnreadableImage(f"{error}; and premature end of JPEG file") from None
        return _reencode(data, max_side, str(error))


def _prepare_jpeg(data: bytes, max_side: int, check: Check) -> Prepared:
    """`prepare` for what starts like a JPEG. Raises ValueError where Pillow may know better."""
    kind, height, width, num_channels = _jpeg_frame(data)
    _check_size(height, width)
    if kind[0] == PROGRESSIVE and data.count(b"\xff\xda") > MAX_SCANS:
        raise UnreadableImage(f"a JPEG of more than {MAX_SCANS} scans")
    _, _, colours, subsampling = simplejpeg.decode_jpeg_header(data)
    plain = kind in PLAIN_FRAMES and colours in ("YCbCr", "Gray")
    if plain and max_side and max(height, width) > max_side:
        # The pixels are Pillow's (both are libjpeg-turbo), but damage raises.
        pixels = simplejpeg.decode_jpeg(data, "RGB" if num_channels == 3 else "GRAY", strict=True)
        return _encode(pixels, max_side, "resized", subsampling)
    if plain and check == "quick" and _looks_whole(data):
        return Prepared(data, height, width, "kept")
    # The cheapest decode that reads every coefficient: an eighth of the size, without colour.
    eighth = {"min_height": 1, "min_width": 1, "min_factor": 8, "fastdct": True}
    simplejpeg.decode_jpeg(data, "CMYK" if num_channels == 4 else "GRAY", strict=True, **eighth)
    if plain:
        return Prepared(data, height, width, "kept")
    return _reencode(data, max_side, f"{colours} JPEG" if kind in PLAIN_FRAMES else "unusual JPEG")


def _jpeg_frame(data: bytes) -> tuple[tuple[int, int], int, int, int]:
    """((frame marker, bits), height, width, channels) of a JPEG. Raises ValueError."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length, bits, height, width, num_channels = _SEGMENT.unpack_from(data, position + 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, not frames
            return (marker, bits), height, width, num_channels
        position += 1 if marker == 0xFF else 2 + length  # 0xFF: a fill byte
    raise ValueError("JPEG without a frame header")


def _has_end(data: bytes) -> bool:
    """Is there an end marker behind the first scan? Skips odd bytes between segments as libjpeg."""
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 3:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker in (0, 0xFF) else 2 + length
    return False


def _looks_whole(data: bytes) -> bool:
    """One scan, nothing but stuffed bytes and restarts in it, the end marker behind it."""
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
    runs = b"\0" * 32 in data[position:]  # a lost disk block reads as zeros
    return len(escapes) > 0 and followers[-1] == 0xD9 and inner.all() and not runs


def _reencode(data: bytes, max_side: int, why: str | None = None) -> Prepared:
    """What Pillow makes of the file; `why` defaults to its format's name."""
    try:
        with warnings.catch_warnings():  # of large images, odd EXIF, palettes: all dealt with here
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.height, image.width)
            if image.format == "PNG":
                _check_png(data)
            pixels = np.asarray(_to_rgb(image))
            return _encode(pixels, max_side, f"reencoded ({why or image.format})")
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(why or "not an image") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from None


def _check_png(data: bytes) -> None:
    """Compare the checksums of the chunks that make the picture, which Pillow does not do for all.

    Damaged compressed data may decode to as many bytes as are needed, and nobody notices.
    """
    position = len(b"\x89PNG\r\n\x1a\n")
    while position < len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        end = position + 12 + length
        if end > len(data):
            raise UnreadableImage("truncated PNG")
        stored = int.from_bytes(data[end - 4 : end])
        if kind[:1].isupper() and zlib.crc32(memoryview(data)[position + 4 : end - 4]) != stored:
            raise UnreadableImage("a damaged PNG (checksum mismatch)")
        if kind == b"IEND":
            return
        position = end


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, as Pillow converts it, except that 16-bit greys are scaled and not clipped."""
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels: which value is white is unknown")
    if image.mode.startswith(
        "I"
    ):  # "I;16" and its byte orders; "I" holds 16-bit PGM or 32-bit TIFF
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("32-bit pixels: which value is white is unknown")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def _encode(pixels: np.ndarray, max_side: int, action: str, subsampling: str = "444") -> Prepared:
    """Shrink to `max_side` and encode uint8 [H, W, 1 or 3]."""
    height, width, num_channels = pixels.shape
    longest = max(height, width)
    if max_side and longest > max_side:
        pixels = _shrink(pixels, *(max(1, round(s * max_side / longest)) for s in (height, width)))
    elif longest > MAX_JPEG_SIDE:
        raise UnreadableImage(f"{longest} pixels long: a JPEG has at most {MAX_JPEG_SIDE}")
    image = Image.fromarray(pixels if num_channels == 3 else pixels[:, :, 0])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=SUBSAMPLING.get(subsampling, 0))
    return Prepared(buffer.getvalue(), image.height, image.width, action)


def _shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic, the one the loader cuts crops with; seven times as fast as Pillow's."""
    import torch  # here, because it takes a second to load and few data sets need it

    from pipelines.crop import resize

    pixels = np.require(pixels, requirements="W")  # what Pillow hands out is read-only
    shrunk = torch.empty((height, width, pixels.shape[2]), dtype=torch.uint8)
    resize(torch.from_numpy(pixels).permute(2, 0, 1), shrunk.permute(2, 0, 1))
    return shrunk.numpy()


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")
