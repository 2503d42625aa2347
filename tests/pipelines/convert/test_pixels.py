"""What image files state about their samples: read, or refused until a flag decides."""

import struct
import zlib

import numpy as np
import pytest
from conftest import jpeg_bytes
from hostile import png, saved
from PIL import Image

from pipelines.convert import pixels
from pipelines.convert.jpeg import IMAGE_EXTENSIONS, UnreadableImage, prepare
from pipelines.convert.pixels import PixelFlags, read_rgb

pytest.importorskip("tifffile", reason="tifffile is not installed")

HEIGHT, WIDTH = 37, 53
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
RGB[0, :2] = [[0, 255, 0], [255, 0, 255]]
GREY = RGB[..., :1]
PICTURE = Image.fromarray(RGB)
OTHER = Image.fromarray(RGB[::-1])


def frames(format: str, first: Image.Image, second: Image.Image) -> bytes:
    return saved(first, format, save_all=True, append_images=[second])


def grey_picture(samples: np.ndarray) -> Image.Image:
    return Image.fromarray(samples[..., 0])


def grown(samples: np.ndarray, white: int, dtype: str = "u2") -> np.ndarray:
    """Samples of which `white` is white and which are nearest to the given ones of 8 bits."""
    return np.rint(samples * (white / 255)).astype(dtype)


def deep_png(samples: np.ndarray, colour_type: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(WIDTH, HEIGHT, 16, colour_type, rows)


def pnm(magic: str, samples: np.ndarray, white: int) -> bytes:
    header = f"{magic} # a comment\n{WIDTH} {HEIGHT}\n{white}\n".encode()
    if magic in ("P2", "P3"):
        return header + b" ".join(b"%d" % value for value in samples.ravel())
    return header + samples.astype(">u2").tobytes()


def tiff(samples: np.ndarray, *, order="<", planar=1, tile=0, packed=0, tags=None) -> bytes:
    """A TIFF of samples [height, width, bands], compressed if tiled; `packed`: bits of a sample."""
    height, width, num_bands = samples.shape
    planes = [samples] if planar == 1 else [samples[..., i : i + 1] for i in range(num_bands)]
    rows, columns, parts = tile or 8, tile or width, []
    for plane in planes:
        for top, left in np.ndindex(-(-height // rows), -(-width // columns)):
            part = plane[top * rows :, left * columns :][:rows, :columns]
            if tile:
                part = np.pad(part, [(0, tile - n) for n in part.shape[:2]] + [(0, 0)])
            content = part.astype(samples.dtype.newbyteorder(order)).tobytes()
            if packed:
                pairs = part.astype(">u2").reshape(len(part), -1, 1).view("u1")
                bits = np.unpackbits(pairs, axis=2)
                content = np.packbits(bits[..., -packed:].reshape(len(part), -1), axis=1).tobytes()
            parts.append(zlib.compress(content) if tile else content)
    offsets = 8 + np.cumsum([0, *map(len, parts)])
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = {256: [width], 257: [height], 258: [packed or samples.itemsize * 8] * num_bands}
    entries |= {259: [8 if tile else 1], 262: [1], 277: [num_bands], 284: [planar], 339: [kind]}
    sizes = [*map(len, parts)]
    entries |= {322: [tile], 323: [tile], 324: offsets[:-1], 325: sizes} if tile else {}
    entries |= {} if tile else {273: offsets[:-1], 278: [rows], 279: sizes}
    entries |= tags or {}
    end = offsets[-1] + 2 + 12 * len(entries) + 4
    directory, values = struct.pack(order + "H", len(entries)), b""
    for tag, numbers in sorted(entries.items()):
        packed_numbers = struct.pack(f"{order}{len(numbers)}I", *numbers)
        field = packed_numbers
        if len(numbers) > 1:
            field, values = struct.pack(order + "I", end + len(values)), values + packed_numbers
        directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + field
    magic = b"II*\0" if order == "<" else b"MM\0*"
    header = magic + struct.pack(order + "I", offsets[-1])
    return header + b"".join(parts) + directory + bytes(4) + values


def decoded(data: bytes, **flags) -> np.ndarray:
    image, _ = read_rgb(data, PixelFlags(**flags))
    return np.asarray(image)


def thirteen(dtype: str) -> np.ndarray:
    """[height, width, 13] whose bands 4, 3 and 2 are RGB from 0 to 2550."""
    bands = np.random.default_rng(1).integers(0, 2550, (HEIGHT, WIDTH, 13)).astype(dtype)
    bands[..., [3, 2, 1]] = RGB.astype(dtype) * 10
    return bands


BANDS_AND_RANGE = {"bands": (4, 3, 2), "range": (0, 2550)}
NIR = np.dstack([RGB, GREY])
NIR_JPEG_2000 = saved(Image.fromarray(NIR), "JPEG2000", no_jp2=True)
TURNED = grown(np.rot90(RGB), 65535)
DEEP_GREY, FLOAT_GREY = grey_picture(grown(GREY, 65535)), grey_picture(GREY.astype("f4"))
LZW = {"compression": "tiff_lzw", "tiffinfo": {317: 2}}
DEFLATE = {"compression": "tiff_adobe_deflate", "tiffinfo": {317: 3}}
DECIDED = {
    "12 bits in 16, PNG": (deep_png(grown(GREY, 4095), 0), {"bits": 12}, GREY),
    "16 bits, PNG": (deep_png(grown(RGB, 65535), 2), {"bits": 16}, RGB),
    "14 bits and alpha, PNG": (deep_png(grown(NIR, 16383), 6), {"bits": 14}, RGB),
    "grey and alpha, PNG": (deep_png(grown(NIR[..., :2], 65535), 4), {"bits": 16}, GREY),
    "a range, clipped": (deep_png(grown(GREY, 1000) * 2 + 500, 0), {"range": (500, 2500)}, GREY),
    "PGM that states white": (pnm("P5", grown(GREY, 4095), 4095), {}, GREY),
    "PPM that states white": (pnm("P6", grown(RGB, 1023), 1023), {}, RGB),
    "PGM of 65535": (pnm("P5", grown(GREY, 4095), 65535), {"bits": 12}, GREY),
    "32 bits, signed, TIFF": (saved(grey_picture(GREY.astype("i4")), "TIFF"), {"bits": 8}, GREY),
    "32 bits, unsigned": (tiff(grown(GREY, 2**32 - 1, "u4")), {"bits": 32}, GREY),
    "negative values": (tiff(GREY.astype("i2") - 128), {"range": (-128, 127)}, GREY),
    "8 bits, signed": (tiff((GREY.astype("i2") - 128).astype("i1")), {"range": (-128, 127)}, GREY),
    "floating-point": (tiff(GREY.astype("f8") / 255), {"range": (0, 1)}, GREY),
    "12 bits, packed": (tiff(grown(RGB, 4095), packed=12, tags={262: [2]}), {"bits": 12}, RGB),
    "differences, LZW": (saved(DEEP_GREY, "TIFF", **LZW), {"bits": 16}, GREY),
    "differences of floats": (saved(FLOAT_GREY, "TIFF", **DEFLATE), {"range": (0, 255)}, GREY),
    "white is zero": (tiff(grown(255 - GREY, 65535), tags={262: [0]}), {"bits": 16}, GREY),
    "16-bit RGB, turned": (tiff(TURNED, tags={262: [2], 274: [6]}), {"bits": 16}, RGB),
    "13 bands": (tiff(thirteen("u2")), BANDS_AND_RANGE, RGB),
    "13 bands, big-endian": (tiff(thirteen("i4"), order=">"), BANDS_AND_RANGE, RGB),
    "13 bands, one by one": (tiff(thirteen("u2"), planar=2), BANDS_AND_RANGE, RGB),
    "13 bands, tiles": (tiff(thirteen("f4"), tile=16), BANDS_AND_RANGE, RGB),
    "13 bands, tiles, one by one": (tiff(thirteen("u2"), tile=16, planar=2), BANDS_AND_RANGE, RGB),
    "near infrared": (tiff(NIR, tags={262: [2], 338: [0]}), {"bands": (1, 2, 3)}, RGB),
    "one band of four": (tiff(NIR, tags={262: [2], 338: [2]}), {"bands": (4,)}, GREY),
    "three bands": (tiff(RGB, tags={338: [0, 0]}), {"bands": (3, 2, 1)}, RGB[..., ::-1]),
    "a page": (frames("TIFF", OTHER, PICTURE), {"page": 2}, RGB),
    "a frame": (frames("PNG", OTHER, PICTURE), {"page": 2}, RGB),
    "first frame": (frames("PNG", PICTURE, OTHER), {}, RGB),
    "JPEG 2000": (saved(PICTURE, "JPEG2000"), {}, RGB),
    "four bands, JPEG 2000": (NIR_JPEG_2000, {"bands": (1, 2, 3)}, RGB),
}


@pytest.mark.parametrize("data,flags,expected", DECIDED.values(), ids=DECIDED)
def test_what_is_decided_is_read_exactly(data, flags, expected):
    image, what = read_rgb(data, PixelFlags(**flags))
    assert np.array_equal(image, np.broadcast_to(expected, (*expected.shape[:2], 3)))
    assert all(key in what for key in flags)


def deep_avif() -> bytes:
    """An AVIF of which the decoder configuration states more than 8 bits, which Pillow writes."""
    data = bytearray(saved(PICTURE, "AVIF"))
    data[data.index(b"av1C\x81") + 6] |= 0x40
    return bytes(data)


DEEP = "of more than 8 bits"
TWELVE_BITS = jpeg_bytes(PICTURE).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")
WHITE, BAND, PAGE = "which value is white", "which bands are red, green and blue", "which page"
REFUSED = {
    "16 bits, PNG": (deep_png(grown(RGB, 4095), 2), {}, f"16-bit RGB, values 0 to 4095: {WHITE}"),
    "too few bits": (deep_png(grown(GREY, 4095), 0), {"bits": 11}, "values outside 0 to 2047"),
    "PGM of 65535": (pnm("P5", grown(GREY, 4095), 65535), {}, f"values 0 to 4095: {WHITE}"),
    "32 bits": (tiff(GREY.astype("i4")), {}, f"32-bit signed grey, values 0 to 255: {WHITE}"),
    "8 bits, signed": (tiff(GREY.astype("i1")), {"bits": 7}, "values outside 0 to 127"),
    "floats": (tiff(GREY.astype("f4")), {"bits": 8}, f"floating-point grey.*{WHITE}.*--range"),
    "NaN": (tiff(np.full((HEIGHT, WIDTH, 1), np.nan)), {"range": (0, 1)}, "not numbers"),
    "13 bands": (tiff(thirteen("u2")), {}, f"16-bit 13 bands, .*{BAND}.*{WHITE}.*--bands.*--bits"),
    "no such band": (tiff(NIR), {"bands": (1, 2, 5)}, "it has no band 5"),
    "alpha of a TIFF": (saved(PICTURE.convert("RGBA"), "TIFF"), {}, f"4 bands: {BAND}.*--bands"),
    "four bands, JPEG 2000": (NIR_JPEG_2000, {}, BAND),
    "signed JPEG 2000": (saved(PICTURE, "JPEG2000", signed=True), {}, f"JPEG 2000 {DEEP}"),
    "12 bits, JPEG 2000": (saved(grey_picture(grown(GREY, 4095)), "JPEG2000"), {}, DEEP),
    "10 bits, AVIF": (deep_avif(), {}, f"AVIF {DEEP}"),
    "PPM as text": (pnm("P3", grown(RGB, 1023), 1023), {}, f"PPM as text {DEEP}"),
    "pages": (frames("TIFF", PICTURE, OTHER), {}, f"2 pages.*{PAGE}.*--page"),
    "no such page": (frames("TIFF", PICTURE, OTHER), {"page": 3}, "no page 3"),
    "no such frame": (frames("GIF", PICTURE, OTHER), {"page": 3}, "no page 3"),
    "other depths": (tiff(RGB, tags={258: [8, 8, 4]}), {}, "bands of different depths"),
    "complex": (tiff(GREY, tags={339: [5]}), {}, "samples of format"),
    "16-bit CMYK": (
        tiff(grown(NIR, 65535), tags={262: [5]}),
        {"bits": 16},
        "convert it to RGB first",
    ),
    "JPEG in TIFF": (tiff(NIR, tags={259: [7]}), {"bands": (1, 2, 3)}, "Jpeg"),
    "cut": (tiff(thirteen("u2"), tags={279: [1 << 20] * 5}), BANDS_AND_RANGE, "truncated TIFF"),
    "big": (tiff(NIR, tags={256: [30_000], 257: [4000], 277: [200]}), BANDS_AND_RANGE, "more than"),
    "BigTIFF, big-endian": (b"MM\0+" + bytes(99), {}, "BigTIFF"),
    "12-bit JPEG": (TWELVE_BITS, {}, "precision 12"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), {}, "HEIC, which this Pillow does not read"),
    "JPEG XL": (b"\xff\x0a" + bytes(99), {}, "JPEG XL, which this Pillow does not read"),
    "damaged AVIF": (saved(PICTURE, "AVIF")[:99], {}, "a damaged AVIF"),
}


@pytest.mark.parametrize("data,flags,message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_decided_is_refused_with_what_is_seen(data, flags, message):
    with pytest.raises(UnreadableImage, match=message):
        prepare(data, 0, flags=PixelFlags(**flags))


def test_smaller_copies_and_masks_are_no_pages():
    first = Image.fromarray(RGB[::2, ::2])
    first.encoderinfo = {"tiffinfo": {254: 1}}
    data = frames("TIFF", PICTURE, first)
    assert np.array_equal(decoded(data), RGB)
    others = [first, Image.fromarray(RGB[::-1].copy())]
    data = saved(PICTURE, "TIFF", save_all=True, append_images=others)
    assert np.array_equal(decoded(data, page=2), RGB[::-1])
    with pytest.raises(UnreadableImage, match="2 pages"):
        decoded(data, page=3)


def test_flags_have_no_effect_where_nothing_is_open():
    flags = {"bits": 12, "bands": (3, 2, 1), "page": 2}
    for format in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(decoded(saved(PICTURE, format), **flags), RGB)
    plain = jpeg_bytes(PICTURE)
    assert prepare(plain, 0, flags=PixelFlags(**flags)).jpeg == plain


def test_a_format_that_this_pillow_lacks_is_named(monkeypatch):
    monkeypatch.setattr(pixels, "formats", lambda: ("PNG",))
    for format, name in (("AVIF", "AVIF"), ("JPEG2000", "JPEG2000")):
        with pytest.raises(UnreadableImage, match=f"{name}, which this Pillow does not read"):
            prepare(saved(PICTURE, format), 0)
    assert {".avif", ".jp2", ".j2k", ".heic", ".heif", ".jpg", ".tif"} <= IMAGE_EXTENSIONS
