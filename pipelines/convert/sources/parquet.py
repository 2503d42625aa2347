"""Parquet files of the Hugging Face hub: columns `image` (with `bytes` and `path`) and `label`.

The schema contains the class names, and labels keep their numbers; labels that are text are
numbered in sorted order. One row group at a time is in memory.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, groupby
from pathlib import Path

from pipelines.convert.manifest import Location, SourceError, SourceImage, Split, numbered_names
from pipelines.convert.sources.files import by_split

BATCH = 4096  # rows of labels read at a time


def find_splits(source: Path) -> dict[str, Split]:
    """The training and validation files below a folder, by their names; or the given file."""
    files = by_split(list(source.rglob("*.parquet"))) if source.is_dir() else {"train": [source]}
    root = source if source.is_dir() else source.parent
    class_names = _class_names(files["train"])
    return {name: _split(root, paths, class_names) for name, paths in files.items()}


def _split(root: Path, files: list[Path], class_names: list[str]) -> Split:
    schema = _open(files[0]).schema_arrow
    image = next((name for name in ("image", "img") if name in schema.names), None)
    if image is None:
        raise SourceError(f"{files[0]} has no column image; it has {', '.join(schema.names)}")
    ignored = Counter(f"column {name}" for name in schema.names if name not in (image, "label"))
    return Split(
        root=root,
        class_names=class_names,
        images=_images(root, files, image, class_names),
        load=lambda images: _load(images, image),
        ignored=ignored,
    )


def _open(path: Path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SourceError("reading parquet files requires PyArrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _class_names(files: list[Path]) -> list[str]:
    """The names in the schema, else those of the labels; none without labels."""
    schema = _open(files[0]).schema_arrow
    if "label" not in schema.names:
        return []
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    label = metadata.get("info", {}).get("features", {}).get("label", {})
    if label.get("names"):
        return label["names"]
    values = {value for path in files for _, value, _ in _rows(path, None)}
    if names := {value for value in values if isinstance(value, str)}:
        return sorted(names)
    if not all(isinstance(value, int) for value in values):
        raise SourceError(f"{files[0]}: its labels are neither numbers nor names")
    return numbered_names(max(map(int, values), default=-1) + 1)


def _images(
    root: Path, files: list[Path], image: str, class_names: list[str]
) -> Iterator[SourceImage]:
    label_of = {name: label for label, name in enumerate(class_names)}
    for path in files:
        for row, label, name in _rows(path, image):
            label = max(label, -1) if isinstance(label, int) else label_of.get(label, -1)
            name = name or f"{path.relative_to(root).with_suffix('')}/{row}"
            # The offset is a row number, for `_load`; a size of 0 marks bytes inside an archive.
            yield SourceImage(name, label, Location(str(path), offset=row, size=0))


def _rows(path: Path, image: str | None) -> Iterator[tuple[int, int | str, str | None]]:
    """Yield (row number, label, path of the image) of every row, without reading the images."""
    file = _open(path)
    available = {column.path for column in file.schema}
    has_paths = image is not None and f"{image}.path" in available
    columns = [c for c in ("label", f"{image}.path" if has_paths else "") if c in available]
    row = 0
    for batch in file.iter_batches(BATCH, columns=columns or [next(iter(available))]):
        labels = batch["label"].to_pylist() if "label" in columns else [-1] * len(batch)
        paths = [None] * len(batch)
        if has_paths:
            paths = [value and value["path"] for value in batch[image].to_pylist()]
        for label, name in zip(labels, paths, strict=True):
            yield row, -1 if label is None else label, name
            row += 1


def _load(images: Iterator[SourceImage], column: str) -> Iterator[SourceImage]:
    """Replace locations by bytes, reading each row group once."""
    from pyarrow import ArrowException

    for path, rows in groupby(images, lambda image: image.data.path):  # type: ignore[union-attr]
        file = _open(Path(path))
        counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        starts = [0, *accumulate(counts)]
        group, values = -1, None
        for image in rows:
            assert isinstance(image.data, Location)
            row = image.data.offset
            if group < 0 or row >= starts[group + 1]:  # rows are in increasing order
                group = bisect_right(starts, row) - 1
                try:
                    values = file.read_row_group(group, columns=[column])[column]
                except (OSError, ArrowException) as error:
                    raise SourceError(f"{path} cannot be read: {error}") from None
            value = values[row - starts[group]].as_py()  # type: ignore[index]
            data = value.get("bytes") if isinstance(value, dict) else value
            yield image._replace(data=data or b"")
