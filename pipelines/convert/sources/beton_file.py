"""A `.beton` of bt-convert or FFCV; the bytes of its images are copied unchanged."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.beton import BetonError, BetonReader
from pipelines.convert.manifest import FoundImage, Location, SourceError, Split, numbered_names
from pipelines.convert.sources.splits import SourceOptions


def val_path(path: Path) -> Path:
    """Path of the validation images that belong to a `.beton`."""
    return path.with_suffix(".val.beton")


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """The file, and the `.val.beton` beside it if there is one."""
    splits = {"train": read_split(open_beton(source))}
    if (val := val_path(source)).exists():
        splits["val"] = read_split(open_beton(val))
        if splits["val"].class_names != splits["train"].class_names:
            raise SourceError(f"{val} has other classes than {source}: move it away")
    return splits


def read_split(reader: BetonReader) -> Split:
    """All images of one file."""
    class_names = reader.class_names
    if class_names is None:  # a file of FFCV, which only numbers them
        class_names = numbered_names(reader.num_classes)
    return Split(
        root=Path(reader.path), class_names=class_names, images=_images(reader), max_side=0
    )


def open_beton(path: Path) -> BetonReader:
    """Open a file. Raises SourceError."""
    try:
        return BetonReader(path)
    except BetonError as error:
        raise SourceError(str(error)) from None


def _images(reader: BetonReader) -> Iterator[FoundImage]:
    for index in range(len(reader)):
        offset, size, checksum = reader.location(index)
        prefix = b""
        if reader.is_raw(index):
            height, width = reader.size(index)
            prefix = b"P6 %d %d 255\n" % (width, height)  # header of a PPM, which pixels follow
        location = Location(reader.path, offset, size, checksum, prefix)
        yield FoundImage(reader.name(index), reader.label(index), location)
