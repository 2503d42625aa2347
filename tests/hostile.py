"""A folder with all sorts of valid, odd, damaged and malicious image files."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
from conftest import drawn_picture, jpeg_bytes
from PIL import Image


def saved(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.copy().save(buffer, format, **options)  # as saving as JPEG leaves options in a picture
    return buffer.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG of black pixels whose header has a large size."""
    return png(width, height, 8, 2, bytes(100_000))


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file with these rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def jpeg_bomb(width: int, height: int) -> bytes:
    """A small JPEG whose header has a large size."""
    plain = jpeg_bytes(drawn_picture(0))
    frame = plain.index(b"\xff\xc0")
    return plain[: frame + 5] + struct.pack(">HH", height, width) + plain[frame + 9 :]


def damaged_png() -> bytes:
    """Compressed data that was replaced and decodes; only the checksum detects it."""
    whole, other = (saved(Image.new("L", (8, 8), shade), "PNG") for shade in (10, 200))
    assert len(whole) == len(other)
    start, end = whole.index(b"IDAT"), whole.index(b"IEND") - 8  # up to the checksum
    return whole[:start] + other[start:end] + whole[end:]


def jpeg_441() -> bytes:
    """A 4:1:1 JPEG with the sampling of its transpose: luma blocks one below the other."""
    pixels = np.asarray(drawn_picture(0, 64, 32))
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), colorsubsampling="411")
    frame = plain.index(b"\xff\xc0") + 5
    return plain[:frame] + b"\0\x40\0\x20\x03\x01\x14" + plain[frame + 7 :]


_picture = drawn_picture(0)
_grey, _large = _picture.convert("L"), _picture.resize((900, 300))
_plain, _progressive = jpeg_bytes(_picture), saved(_picture, "JPEG", progressive=True)
_scan = _plain.index(b"\xff\xda")
_middle = (_scan + len(_plain)) // 2
_pages = saved(_large, "TIFF", save_all=True, append_images=[_grey.copy()])
_ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
_animated = saved(_picture, "GIF", save_all=True, append_images=[_grey])
_sixteen = saved(Image.fromarray(_ramp.astype(np.uint16)), "PNG")
_scan_of_one = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
_broken_exif = saved(_picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
_palette = saved(_picture.convert("P"), "PNG", transparency=bytes(range(256)))

# For each file the expected result, which is the start of the action or a part of the reason, and
# its content, if it is a regular file.
_STORED = {
    "a/plain.jpg": ("kept", _plain),
    "a/grey.jpg": ("kept", jpeg_bytes(_grey)),
    "a/progressive.JPEG": ("kept", _progressive),
    "a/trailing.jpg": ("kept", _plain + b"a film that the camera appended" * 9),
    "a/broken exif.jpg": ("kept", _broken_exif),
    "a/large.jpg": ("resized", jpeg_bytes(_large)),
    "a/large grey.jpg": ("resized", jpeg_bytes(_large.convert("L"))),
    "a/really a png.JPEG": ("reencoded (PNG)", saved(_picture, "PNG")),
    "a/cmyk.jpg": ("reencoded (CMYK JPEG)", saved(_picture.convert("CMYK"), "JPEG")),
    "a/rgb.jpg": ("reencoded (RGB JPEG)", saved(_picture, "JPEG", keep_rgb=True)),
    "a/441.jpg": ("reencoded (unusual JPEG)", jpeg_441()),
    "a/extraneous.jpg": ("reencoded (Corrupt JPEG data:", _plain[:-2] + b"\x12" * 40 + _plain[-2:]),
    "b/palette.png": ("reencoded (PNG)", _palette),
    "b/alpha.png": ("reencoded (PNG)", saved(_picture.convert("RGBA"), "PNG")),
    "b/animated.gif": ("reencoded (GIF, first frame)", _animated),
    "b/scan.tiff": ("reencoded (TIFF)", saved(_picture, "TIFF")),
    "b/web.webp": ("reencoded (WEBP)", saved(_picture, "WEBP")),
    "b/really avif.jpg": ("reencoded (AVIF)", saved(_picture, "AVIF")),
    "b/really jpeg 2000.jpg": ("reencoded (JPEG2000)", saved(_picture.convert("RGBA"), "JPEG2000")),
    "b/thin.bmp": ("reencoded (BMP)", saved(_picture.resize((3000, 1)), "BMP")),
    "b/café ☕.jpg": ("kept", _plain),
    "b/folder.jpg/inside.jpg": ("kept", _plain),
    "b/line\nbreak.jpg": ("kept", _plain),
}
_BROKEN = {
    "b/truncated.jpg": ("Premature end", _plain[: len(_plain) * 2 // 3]),
    "b/overwritten.jpg": ("premature end", _plain[:_middle] + bytes(500) + _plain[_middle + 500 :]),
    "b/no end.jpg": ("Premature end", _plain[:-2]),
    "b/no end, odd bytes.jpg": ("premature end", _plain[:_scan] + b"odd" + _plain[_scan:_middle]),
    "b/empty.jpg": ("empty file", b""),
    "b/text.jpg": ("not an image", b"<html>404 Not Found</html>"),
    "b/truncated.png": ("truncated", saved(_picture, "PNG")[:-3000]),
    "b/damaged.png": ("checksum", damaged_png()),
    "b/bomb.png": ("13000 x 13000 pixels", png_bomb(13000, 13000)),
    "b/bomb.jpg": ("65000 x 65000 pixels", jpeg_bomb(65000, 65000)),
    "b/truncated 441.jpg": ("Premature end", jpeg_441()[:-200]),
    "b/scans.jpg": ("more than 500 scans", _progressive[:-2] + 600 * _scan_of_one + _plain[-2:]),
    "b/sixteen.png": ("values 0 to 65535: which value is white is unknown", _sixteen),
    "b/fourth band.tiff": ("which bands are", saved(_picture.convert("RGBA"), "TIFF")),
    "b/pages.tiff": ("which page", _pages),
    "b/heic.jpg": ("HEIC, which this Pillow does not read", b"\0\0\0\x18ftypheic" + bytes(99)),
    "b/float.tiff": ("white is unknown", saved(Image.fromarray(_ramp.astype(np.float32)), "TIFF")),
    "b/dangling.jpg": ("No such file", None),
    "b/pipe.jpg": ("not a regular file", None),
    "b/loop.jpg": ("Too many levels of symbolic links", None),
}
STORED = {name: action for name, (action, _) in _STORED.items()}
BROKEN = {name: reason for name, (reason, _) in _BROKEN.items()}
_IGNORED = {
    "b/notes.txt": b"ignored: not named like an image",
    "a/._plain.jpg": b"ignored: what macOS leaves behind",
    ".hidden/plain.jpg": _plain,
}


def make_hostile_folder(root: Path) -> None:
    """Classes `a` and `b`, with all files of STORED and BROKEN and ignored ones, and `empty`."""
    for folder in ("a", "b/folder.jpg", "empty", ".hidden"):
        (root / folder).mkdir(parents=True)
    expected = {name: content for name, (_, content) in (_STORED | _BROKEN).items()}
    for name, content in (expected | _IGNORED).items():
        if content is not None:
            (root / name).write_bytes(content)
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "a" / "again").symlink_to(root / "a", target_is_directory=True)
    (root / "b" / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "b" / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "b" / "pipe.jpg")


def write_tar(path: Path, files: dict | list, mode: str = "w") -> None:
    """Write an archive of {name: content, or kind and target of a link}, or of such pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def make_folder(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder of small JPEGs; `classes` has the number of images of each class."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture = drawn_picture(seed + 100 * label + index, 80 + index, 60)
            (root / name / f"{index:03}.jpg").write_bytes(jpeg_bytes(picture))
    return root
