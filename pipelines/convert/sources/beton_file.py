"""A `.beton`, ours or FFCV's, whose images go elsewhere as they are: their bytes do not change."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.beton import BetonError, BetonReader
from pipelines.beton.layout import CHUNK
from pipelines.convert.manifest import UNKNOWN, Image, Place, SourceError, Split, number_names


def val_beside(path: Path) -> Path:
    """Where bt-fast keeps the validation images that belong to a `.beton`."""
    return path.with_suffix(".val.beton")


def find_splits(source: Path) -> dict[str, Split]:
    """The file, and the `.val.beton` beside it if there is one."""
    splits = {"train": split_of(open_beton(source))}
    if val_beside(source).exists():
        splits["val"] = split_of(open_beton(val_beside(source)))
        if splits["val"].class_names != splits["train"].class_names:
            raise SourceError(f"{val_beside(source)} has other classes than {source}: move it away")
    return splits


def split_of(reader: BetonReader) -> Split:
    """All images of one file."""
    class_names = reader.class_names
    if class_names is None:  # FFCV's own files number them
        class_names = number_names(reader.num_classes)
    return Split(
        root=Path(reader.path), class_names=class_names, images=_images(reader), max_side=0
    )


def open_beton(path: Path) -> BetonReader:
    """A reader. Raises SourceError."""
    try:
        return BetonReader(path)
    except BetonError as error:
        raise SourceError(str(error)) from None


def _images(reader: BetonReader) -> Iterator[Image]:
    for index in range(len(reader)):
        if index % CHUNK == 0:
            reader.release()
        start, size, crc = reader.place(index)
        head = b""
        if reader.is_raw(index):
            height, width = reader.size(index)
            head = b"P6 %d %d 255\n" % (width, height)  # the header of a PPM: pixels follow
        place = Place(reader.path, start, size, UNKNOWN if crc is None else crc, head)
        yield Image(reader.name(index), reader.label(index), place)
