"""Decodes an image file to 8-bit RGB if it is known what its samples mean.

| samples | read |
|---|---|
| grey, RGB, CMYK, YCbCr or a palette of at most 8 bits, alpha if the format defines it | always |
| several frames of an animation | always: the first, or that of `--page` |
| several pages of a TIFF | with `--page` |
| other bands: a fourth, or alpha, in a TIFF; bands without a defined meaning | with `--bands` |
| more than 8 bits, or a sign (PNG, TIFF, PPM) | with `--bits` or `--range`, or if white is given |
| floating-point numbers | with `--range` |

A flag has no effect on files that do not leave open what it decides. As in torchvision's default
loader, alpha is dropped and EXIF orientation ignored.
"""

import functools
import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from PIL import Image, ImageFile, features

from pipelines.convert import tiff
from pipelines.convert.tiff import UnreadableImage

MAX_PIXELS = 1 << 27  # 402 MB as RGB; compared with the header before decoding
# The only formats that Pillow may decode, with what it must be built with.
FORMATS = {"JPEG": "", "PNG": "", "BMP": "", "GIF": "", "TIFF": "", "WEBP": "webp", "PPM": ""}
FORMATS |= {"AVIF": "avif", "JPEG2000": "jpg_2000", "HEIF": ""}
FIRST_FRAME = "first frame"
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "HEIF")
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")  # two are common errors
_DEEP_AVIF = re.compile(rb"av1C\x81.[\x40-\x7f\xc0-\xff]", re.DOTALL)  # decoder configuration
_TIFF_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3, 9: 3}  # of each photometric tag


@dataclass(frozen=True, slots=True)
class PixelFlags:
    """What flags of bt-convert decide where files leave it open."""

    bits: int | None = None  # white is 2**bits - 1
    range: tuple[float, float] | None = None  # black and white
    bands: tuple[int, ...] | None = None  # red, green and blue, or grey; counted from 1
    page: int | None = None  # counted from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """A page or frame of a file, and what the file states about its samples."""

    name: str  # of the format
    image: Callable[[], Image.Image]  # decoded by Pillow
    samples: Callable[[], np.ndarray]  # [height, width, bands]
    num_pages: int = 1
    bits: int = 8
    kind: str = "u"  # u, i or f: unsigned, signed or floating-point
    num_bands: int
    num_colours: int  # 1: the first band is grey; 3: RGB; 0: undefined
    white: int = 0  # 0: not stated for more than 8 bits
    is_inverted: bool = False  # 0 is white

    @property
    def is_deep(self) -> bool:
        """Whether Pillow's 8 bits are not the samples."""
        return self.bits > 8 or self.kind != "u"


def read_rgb(data: bytes, flags: PixelFlags) -> tuple[Image.Image, str]:
    """Returns the RGB image, and the name of its format with what decided, for the report.

    Raises UnreadableImage, and what Pillow raises for damaged files.
    """
    page = _tiff_page(data, flags) if data[:4] in _TIFF else _page(data, flags)
    what = ", ".join([page.name, *_decide(page, flags)])
    if page.num_colours and not page.is_deep:
        return page.image().convert("RGB"), what
    bands = range(1, page.num_colours + 1) if page.num_colours else flags.bands or ()
    if max(bands) > page.num_bands:
        raise UnreadableImage(f"{_describe(page)}: it has no band {max(bands)}, as of --bands")
    samples = page.samples()[..., [band - 1 for band in bands]]
    if page.is_deep and flags.range:
        low, high = flags.range
    else:
        bits = flags.bits if page.is_deep else None
        low, high = 0.0, float((1 << bits) - 1 if bits else page.white or (1 << page.bits) - 1)
        if not (samples.min() >= 0 and samples.max() <= high):
            raise UnreadableImage(f"{_describe(page)}: values outside 0 to {high:g}")
    pixels = np.stack([_scale(samples[..., i], low, high) for i in range(len(bands))], axis=2)
    pixels = 255 - pixels if page.is_inverted else pixels
    return Image.fromarray(pixels if len(bands) == 3 else pixels[..., 0]).convert("RGB"), what


def _decide(page: _Page, flags: PixelFlags) -> list[str]:
    """What flags decide for this page. Raises UnreadableImage if any of it remains unknown."""
    decided, unknown = [], []
    if page.num_pages > 1 and flags.page:
        decided.append(f"page {flags.page}")
    elif page.num_pages > 1 and page.name in ANIMATED:
        decided.append(FIRST_FRAME)
    elif page.num_pages > 1:
        unknown.append(("which page is meant", "--page N"))
    if not page.num_colours and flags.bands:
        decided.append(f"bands {','.join(map(str, flags.bands))}")
    elif not page.num_colours:
        answer = "--bands R,G,B by number, such as 1,2,3, or one for grey"
        unknown.append(("which bands are red, green and blue", answer))
    if page.is_deep and flags.range:
        decided.append("range {:g} to {:g}".format(*flags.range))
    elif page.is_deep and flags.bits and page.kind != "f":
        decided.append(f"bits {flags.bits}")
    elif page.is_deep and not page.white:
        by_bits = "--bits N (12: 4095 is white) or " if page.kind != "f" else ""
        unknown.append(("which value is white", f"{by_bits}--range MIN:MAX"))
    if unknown:
        questions, answers = (" and ".join(texts) for texts in zip(*unknown, strict=True))
        raise UnreadableImage(
            f"{_describe(page)}: {questions} is unknown; give bt-convert {answers}"
        )
    return decided


def _describe(page: _Page) -> str:
    """What the file states; and, of more than 8 bits, the values that are seen."""
    depth = f"{page.bits}-bit " + {"i": "signed ", "f": "floating-point "}.get(page.kind, "")
    pages = f"{page.num_pages} pages of " if page.num_pages > 1 else ""
    bands = {1: "grey", 3: "RGB"}.get(page.num_colours, f"{page.num_bands} bands")
    seen = f"{page.name}, {pages}{depth}{bands}"
    if not page.is_deep:
        return seen
    samples = page.samples()
    return f"{seen}, values {samples.min():g} to {samples.max():g}"


def _scale(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the same shape: `low` is 0, `high` 255, linear between and clipped beyond."""
    scaled = np.subtract(samples, low, dtype=np.float64)
    scaled *= 255 / (high - low)
    if np.isnan(scaled).any():
        raise UnreadableImage("pixels that are not numbers (NaN)")
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def check_size(height: int, width: int) -> None:
    """Raise UnreadableImage for more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")


def why_unidentified(data: bytes) -> str:
    """Why Pillow does not identify a file: its name, if not every Pillow reads the format."""
    name = ""
    if data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        name = "JPEG2000"
    elif data.startswith((b"\0\0\0\x0cJXL ", b"\xff\x0a")):
        name = "JPEG XL"
    elif brand := re.match(rb"....ftyp(?:(avi[fs])|hei[cxms]|hev[cx]|mif1|msf1)", data, re.DOTALL):
        name = "AVIF" if brand[1] else "HEIC"
    if {"HEIC": "HEIF"}.get(name, name) in formats():
        return f"a damaged {name}"
    return name and f"{name}, which this Pillow does not read; convert it to JPEG first"


@functools.cache
def formats() -> tuple[str, ...]:
    """Names of the FORMATS that this Pillow reads, by itself or with a plug-in."""
    Image.init()
    return tuple(n for n, f in FORMATS.items() if n in Image.OPEN and (not f or features.check(f)))


def _page(data: bytes, flags: PixelFlags) -> _Page:
    """The page of any file but a TIFF."""
    if data[4:8] == b"ftyp" and _DEEP_AVIF.search(data):
        _refuse_depth("AVIF")
    image = Image.open(io.BytesIO(data), formats=formats())
    check_size(image.height, image.width)
    name, num_bands = image.format or "", len(image.getbands())
    facts: dict = {"num_bands": num_bands, "num_colours": 1 if num_bands < 3 else 3}
    facts["samples"] = lambda: np.atleast_3d(np.asarray(image))
    if name == "PNG":
        _check_png(data)
        if data[24] == 16:
            num_bands, num_colours = {0: (1, 1), 2: (3, 3), 4: (2, 1), 6: (4, 3)}[data[25]]
            facts |= {"bits": 16, "num_bands": num_bands, "num_colours": num_colours}
            if num_bands > 1:  # of which Pillow keeps 8 bits
                facts["samples"] = lambda: _png_samples(data)
    elif name == "PPM":
        facts |= _state_ppm(data, image)
    elif name == "JPEG2000":
        facts |= _state_jpeg2000(data, image)
    if name in ANIMATED:
        facts["num_pages"] = num_pages = getattr(image, "n_frames", 1)
        if num_pages > 1 and facts.get("bits") == 16:
            raise UnreadableImage("an animated PNG of 16 bits, which is not converted")
        image.seek(_page_index(name, num_pages, flags))
    return _Page(name=name, image=lambda: image, **facts)


def _tiff_page(data: bytes, flags: PixelFlags) -> _Page:
    """The page of a TIFF; smaller copies and masks are no pages."""
    pages = tiff.read_pages(data)
    complete = [index for index, page in enumerate(pages) if page.is_complete] or [0]
    index = complete[_page_index("TIFF", len(complete), flags)]
    page = pages[index]
    check_size(page.number(tiff.HEIGHT), page.number(tiff.WIDTH))
    photometric, num_bands = page.number(tiff.PHOTOMETRIC), page.number(tiff.BANDS, 1)
    is_known = num_bands == _TIFF_BANDS.get(photometric) and not page.numbers(tiff.EXTRA_SAMPLES)
    is_deep = page.bits > 8 or page.kind != "u"
    if photometric > 2 and not (is_known and not is_deep):
        raise UnreadableImage(
            f"TIFF of {num_bands} bands of {page.bits} bits in colour space {photometric}, which is"
            f" not converted; convert it to RGB first"
        )

    def image() -> Image.Image:
        opened = Image.open(io.BytesIO(data), formats=["TIFF"])
        opened.seek(index)
        return opened

    return _Page(
        name="TIFF",
        image=image,
        samples=page.samples,
        num_pages=len(complete),
        bits=page.bits,
        kind=page.kind,
        num_bands=num_bands,
        num_colours=(1 if num_bands == 1 else 3) if is_known else 0,
        is_inverted=photometric == 0,
    )


def _page_index(name: str, num_pages: int, flags: PixelFlags) -> int:
    """Index of the page that --page states, if a file has several; else of the first."""
    number = (flags.page or 1) if num_pages > 1 else 1
    if number > num_pages:
        raise UnreadableImage(f"{name}, {num_pages} pages: it has no page {number}, as of --page")
    return number - 1


def _check_png(data: bytes) -> None:
    """Compare the checksums of all critical chunks; Pillow compares only some."""
    position = len(b"\x89PNG\r\n\x1a\n")
    while position < len(data):
        length = int.from_bytes(data[position : position + 4])
        name = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise UnreadableImage("truncated PNG")
        stored = int.from_bytes(data[end - 4 : end])
        if name[:1].isupper() and zlib.crc32(memoryview(data)[position + 4 : end - 4]) != stored:
            raise UnreadableImage("a damaged PNG (checksum mismatch)")
        if name == b"IEND":
            return
        position = end


def _png_samples(data: bytes) -> np.ndarray:
    """uint16 [height, width, bands] of a PNG of 16 bits."""
    import torch  # here because few data sets need it
    from torchvision.io import ImageReadMode, decode_image

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_image(encoded, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()


def _state_ppm(data: bytes, image: ImageFile.ImageFile) -> dict:
    """The white of a PGM or PPM of more than 8 bits. 65535 may only mean the two bytes."""
    if image.mode == "F":
        return {"bits": 32, "kind": "f"}
    start = image.tile[0].offset
    header = re.sub(rb"#[^\r\n]*", b"", data[:start]).split()
    white = int(header[3]) if header[0] in (b"P2", b"P3", b"P5", b"P6") else 255
    if white < 256:
        return {}
    if header[0] in (b"P2", b"P3"):
        _refuse_depth("PPM as text")
    shape = image.height, image.width, 1 if header[0] == b"P5" else 3
    return {
        "bits": white.bit_length(),
        "white": white % 65535,
        "samples": lambda: np.frombuffer(data, ">u2", math.prod(shape), start).reshape(shape),
    }


def _state_jpeg2000(data: bytes, image: ImageFile.ImageFile) -> dict:
    """Bands, by the codestream's first segment (SIZ) and the channel definition."""
    start = data.index(b"\xff\x4f\xff\x51") + 40
    num_bands = int.from_bytes(data[start : start + 2])
    if max(data[start + 2 : start + 2 + 3 * num_bands : 3]) > 7:  # bits less one; 128: signed
        _refuse_depth("JPEG 2000")
    # Two or four bands: the last is alpha if the file says so (type 1, of the whole image).
    last = struct.pack(">HHH", num_bands - 1, 1, 0)
    defined = data.find(b"cdef", 0, start)
    is_known = (
        num_bands in (1, 3)
        or image.mode in ("CMYK", "PA")
        or (defined > 0 and last in data[defined : defined + 6 + 6 * num_bands])
    )
    return {} if is_known else {"num_colours": 0}


def _refuse_depth(name: str) -> NoReturn:
    raise UnreadableImage(
        f"{name} of more than 8 bits, which is not converted; convert it to PNG or TIFF first"
    )
