"""A folder with all sorts of valid, odd, damaged and malicious image files."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from conftest import drawn_picture, jpeg_bytes
from PIL import Image

# Expected result for each file: the start of the action, or a part of the reason.
STORED = {
    "a/plain.jpg": "kept",
    "a/grey.jpg": "kept",
    "a/progressive.JPEG": "kept",
    "a/trailing.jpg": "kept",
    "a/broken exif.jpg": "kept",
    "a/large.jpg": "resized",
    "a/large grey.jpg": "resized",
    "a/really a png.JPEG": "reencoded (PNG)",
    "a/cmyk.jpg": "reencoded (CMYK JPEG)",
    "a/rgb.jpg": "reencoded (RGB JPEG)",
    "a/extraneous.jpg": "reencoded (Corrupt JPEG data:",
    "b/sixteen.png": "reencoded (PNG)",
    "b/palette.png": "reencoded (PNG)",
    "b/alpha.png": "reencoded (PNG)",
    "b/animated.gif": "reencoded (GIF)",
    "b/scan.tiff": "reencoded (TIFF)",
    "b/web.webp": "reencoded (WEBP)",
    "b/thin.bmp": "reencoded (BMP)",
    "b/café ☕.jpg": "kept",
    "b/folder.jpg/inside.jpg": "kept",
    "b/line\nbreak.jpg": "kept",
}
BROKEN = {
    "b/truncated.jpg": "Premature end",
    "b/overwritten.jpg": "premature end of data segment",
    "b/no end.jpg": "Premature end",
    "b/no end, odd bytes.jpg": "premature end",
    "b/empty.jpg": "empty file",
    "b/text.jpg": "not an image",
    "b/truncated.png": "truncated",
    "b/damaged.png": "checksum",
    "b/bomb.png": "13000 x 13000 pixels",
    "b/bomb.jpg": "65000 x 65000 pixels",
    "b/scans.jpg": "more than 500 scans",
    "b/float.tiff": "white is unknown",
    "b/dangling.jpg": "No such file",
    "b/pipe.jpg": "not a regular file",
    "b/loop.jpg": "Too many levels of symbolic links",
}


def saved(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG of black pixels whose header has a large size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def damaged_png() -> bytes:
    """Compressed data that was replaced and decodes; only the checksum detects it."""
    whole, other = (saved(Image.new("L", (8, 8), shade), "PNG") for shade in (10, 200))
    assert len(whole) == len(other)
    start, end = whole.index(b"IDAT"), whole.index(b"IEND") - 8  # up to the checksum
    return whole[:start] + other[start:end] + whole[end:]


def make_hostile_folder(root: Path) -> None:
    """Classes `a` and `b`, with all files of STORED and BROKEN and ignored ones, and `empty`."""
    for folder in ("a", "b/folder.jpg", "empty", ".hidden"):
        (root / folder).mkdir(parents=True)
    picture = drawn_picture(0)
    grey, plain = picture.convert("L"), jpeg_bytes(picture)
    progressive = saved(picture, "JPEG", progressive=True)
    large = picture.resize((900, 300))
    frame = plain.index(b"\xff\xc0")
    scan = plain.index(b"\xff\xda")
    middle = (scan + len(plain)) // 2
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    files = {
        "a/plain.jpg": plain,
        "a/grey.jpg": jpeg_bytes(grey),
        "a/progressive.JPEG": progressive,
        "a/trailing.jpg": plain + b"a film that the camera appended" * 9,
        "a/broken exif.jpg": saved(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken"),
        "a/large.jpg": jpeg_bytes(large),
        "a/large grey.jpg": jpeg_bytes(large.convert("L")),
        "a/really a png.JPEG": saved(picture, "PNG"),
        "a/cmyk.jpg": saved(picture.convert("CMYK"), "JPEG"),
        "a/rgb.jpg": saved(picture, "JPEG", keep_rgb=True),
        "a/extraneous.jpg": plain[:-2] + b"\x12" * 40 + plain[-2:],
        "b/sixteen.png": saved(Image.fromarray(ramp.astype(np.uint16)), "PNG"),
        "b/palette.png": saved(picture.convert("P"), "PNG", transparency=bytes(range(256))),
        "b/alpha.png": saved(picture.convert("RGBA"), "PNG"),
        "b/animated.gif": saved(picture, "GIF", save_all=True, append_images=[grey]),
        "b/scan.tiff": saved(picture, "TIFF"),
        "b/web.webp": saved(picture, "WEBP"),
        "b/thin.bmp": saved(picture.resize((3000, 1)), "BMP"),
        "b/café ☕.jpg": plain,
        "b/folder.jpg/inside.jpg": plain,
        "b/line\nbreak.jpg": plain,
        "b/truncated.jpg": plain[: len(plain) * 2 // 3],
        "b/overwritten.jpg": plain[:middle] + bytes(500) + plain[middle + 500 :],
        "b/no end.jpg": plain[:-2],
        "b/no end, odd bytes.jpg": plain[:scan] + b"odd" + plain[scan:middle],
        "b/empty.jpg": b"",
        "b/text.jpg": b"<html>404 Not Found</html>",
        "b/truncated.png": saved(picture, "PNG")[:-3000],
        "b/damaged.png": damaged_png(),
        "b/bomb.png": png_bomb(13000, 13000),
        "b/bomb.jpg": plain[: frame + 5] + struct.pack(">HH", 65000, 65000) + plain[frame + 9 :],
        "b/scans.jpg": progressive[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 600 + plain[-2:],
        "b/float.tiff": saved(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        "b/notes.txt": b"ignored: not named like an image",
        "a/._plain.jpg": b"ignored: what macOS leaves behind",
        ".hidden/plain.jpg": plain,
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "a" / "again").symlink_to(root / "a", target_is_directory=True)
    (root / "b" / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "b" / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "b" / "pipe.jpg")


def make_folder(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder of small JPEGs; `classes` has the number of images of each class."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture = drawn_picture(seed + 100 * label + index, 80 + index, 60)
            (root / name / f"{index:03}.jpg").write_bytes(jpeg_bytes(picture))
    return root
