"""A bt-convert command line for each message of docs/errors.md, except those about sources."""

import errno
import fcntl
import os
import signal
from pathlib import Path

from error_list import Case, Place

from pipelines.convert.command import main

CONVERT = "bt-convert images out.beton"


def images(place: Place) -> None:
    place.images()


def raises(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


def unfinished(place: Place, journal: bytes = b""):
    """The work folder of a killed or a running conversion."""
    images(place)
    place.write("out.beton.partial/.unfinished", b"")
    place.write("out.beton.partial/train.journal", journal)


def locked(place: Place) -> "Lock":
    unfinished(place)
    return Lock(place.path / "out.beton.partial")


class Lock:
    """A lock on a folder, held until the object is deleted."""

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def __del__(self) -> None:
        os.close(self.descriptor)


def failing(name: str, error: BaseException):
    def prepare(place: Place) -> None:
        images(place)
        place.patch(name, raises(error))

    return prepare


def killed(place: Place) -> None:
    images(place)
    place.patch(
        "pipelines.convert.command.find_splits", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )


def broken(place: Place, *, all_images: bool = False) -> None:
    images(place)
    for path in sorted((place.path / "images").rglob("*.jpg"))[: None if all_images else 1]:
        path.write_bytes(b"")


def converted(place: Place, *flags: str, out: str = "x.beton", source: str = "images") -> Path:
    if not (place.path / source).exists():
        images(place)
    (place.path / out).parent.mkdir(exist_ok=True)
    assert main([source, out, "--workers=1", *flags]) == 0
    return place.path / out


def damaged(place: Place) -> None:
    content = bytearray(converted(place).read_bytes())
    content[(8 << 20) + 700] ^= 255
    place.write("x.beton", bytes(content))


CASES = [
    Case("…; see … --help", CONVERT + " --worker 3"),
    Case("--… …: must be … or more", CONVERT + " --workers 0"),
    Case("--shard …: must be like", CONVERT + " --shard 3/2", images),
    Case("--shard …: … has fewer", CONVERT + " --shard 9/100", images),
    Case("OUT is missing", "bt-convert images"),
    Case("OUT …: the folder", "bt-convert images nowhere/out.beton"),
    Case(
        "OUT …: no permission",
        CONVERT,
        lambda place: place.patch("os.access", lambda path, mode: False),
    ),
    Case("OUT … must end in .beton", "bt-convert images out.txt", images),
    Case("OUT … is a folder", "bt-convert images images", images),
    Case("OUT … exists", "bt-convert images x.beton", converted),
    Case(
        "OUT …: name a new folder",
        "bt-convert images x --format webdataset",
        lambda place: (images(place), place.write("x", "")),
    ),
    Case(
        "OUT … has no …",
        "bt-convert images x --format webdataset --overwrite",
        lambda place: (images(place), place.write("x/mine.txt", "")),
    ),
    Case("OUT … is being written", CONVERT, locked),
    Case(
        "… is left from another conversion",
        CONVERT,
        lambda place: (images(place), place.write("out.val.beton", "")),
    ),
    Case(
        "--continue: … was written with",
        CONVERT + " --continue",
        lambda place: unfinished(place, b'{"max_side": 3}\n'),
    ),
    Case(
        "--continue: … was written with",
        CONVERT + " --continue",
        lambda place: unfinished(place, b"\xff\xfe damaged\n"),
    ),
    Case(
        "cannot write …: …; nothing was written",
        CONVERT,
        lambda place: (images(place), place.write("out.beton.partial/mine.txt", "")),
        status=1,
    ),
    Case(
        "cannot write …: …; free some space",
        CONVERT,
        failing("pipelines.beton.writer.BetonWriter.add", OSError(errno.ENOSPC, "No space left")),
        status=1,
    ),
    Case("stopped by …", CONVERT, killed, status=143),
    Case(
        "the reader of standard output",
        CONVERT,
        failing("pipelines.convert.command.find_splits", BrokenPipeError()),
        status=1,
    ),
    Case(
        "a worker process died",
        CONVERT + " --workers 2",
        lambda place: (images(place), place.patch("pipelines.convert.workers._serve", os.abort)),
        status=1,
    ),
    Case("… broken (listed above)", CONVERT, broken, status=1),
    Case(
        "…: no image is readable",
        CONVERT + " --skip-broken",
        lambda place: broken(place, all_images=True),
        status=1,
    ),
    Case("…: … damaged (listed above)", "bt-convert --verify x.beton", damaged, status=1),
    Case("--verify …: neither", "bt-convert --verify images", images),
]
